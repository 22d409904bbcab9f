"""Completions token by token, for people: what each token adds to the text, and numbers beside it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignment_modules.rollouts.codec import Codec

_DECIMALS = 3


def token_columns(
    codec: Codec, ids: Tensor, mask: Tensor, own: Tensor | None, values: Mapping[str, Tensor | None]
) -> dict[str, list[Any]]:
    """The tokens of some completions as columns, with an entry a completion: a list with an entry a token.

    Args:
        codec: Tokens to text.
        ids: [N, T] int64.
        mask: [N, T] bool: the token exists.
        own: [N, T] bool: the policy wrote it; None: all of them.
        values: Numbers [N, T] by name; None: there are none.

    Returns:
        `tokens`, the text that each adds, special tokens and the stop included (empty where there is no tokenizer);
        `own` where others wrote some of them; and each of `values`, rounded to 3 decimals, NaN as it is.
    """
    kept = mask.bool().cpu()

    def ragged(table: Tensor) -> list[list[Any]]:
        return [row[real].tolist() for row, real in zip(table.detach().cpu(), kept, strict=True)]

    rows = ragged(ids)
    columns: dict[str, list[Any]] = {"tokens": [pieces(codec, row) for row in rows]}
    if own is not None and bool((kept & ~own.bool().cpu()).any()):
        columns["own"] = [[int(each) for each in row] for row in ragged(own.bool())]
    for name, table in values.items():
        if table is not None:
            columns[name] = [[round(each, _DECIMALS) for each in row] for row in ragged(table.float())]
    return columns


def pieces(codec: Codec, row: list[int]) -> list[str]:
    """What each token adds to the text of a completion; joined they are the text.

    A token is decoded after the one before it, as some tokenizers give a text's first token without its space. Tokens
    that hold a part of a character add nothing; it comes with its last.

    Args:
        codec: Tokens to text; without a tokenizer there is none.
        row: Token ids without padding.
    """
    if codec.tokenizer is None:
        return []
    found, start, read = [], 0, 0
    for end in range(1, len(row) + 1):
        before, after = codec.tokenizer.batch_decode([row[start:read], row[start:end]], skip_special_tokens=False)
        if after.endswith("\ufffd") and end < len(row):
            found.append("")
            continue
        found.append(after[len(before) :])
        start, read = read, end
    return found
