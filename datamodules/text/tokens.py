"""What every use of a tokenizer here shares: ids of texts, its first tokens, and text that continues given tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Texts whose own tokens seldom merge with what follows; a piece is tokenised behind one of them.
_ANCHORS = ("\n", "=", "a", "0")


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int32 `[time]`, with no special token added.

    Raises:
        ValueError: A text holds a lone surrogate, half of a character that the tokenizer cannot read.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            _refuse_surrogates(text)
        raise
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start} of {around!r}; "
            "only whole Unicode characters can be tokenised"
        ) from None


def first_tokens(tokenizer: Any) -> np.ndarray:
    """What the tokenizer writes before any text, int32 `[time]` (a begin-of-sequence token, or nothing)."""
    for probe in ("a", "0"):
        body = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(probe)["input_ids"])
        for start in range(len(whole) - len(body) + 1 if body else 0):
            if whole[start : start + len(body)] == body:
                return np.asarray(whole[:start], dtype=np.int32)
    empty = list(tokenizer("")["input_ids"])
    while empty and empty[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        empty.pop()  # an end token is ours to place
    return np.asarray(empty, dtype=np.int32)


def first_text(tokenizer: Any) -> str:
    """The first tokens as a template's expression, empty where there are none."""
    first = first_tokens(tokenizer).tolist()
    if first == [tokenizer.bos_token_id]:
        return "{{ bos_token }}"
    return "{{ " + json.dumps("".join(tokenizer.convert_ids_to_tokens(first))) + " }}" if first else ""


def starts_with(ids: np.ndarray, head: np.ndarray) -> bool:
    """Whether `ids` begin with `head`."""
    return np.array_equal(ids[: len(head)], head)


def continuation(tokenizer: Any, head: np.ndarray, piece: str, whole: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Ids of a piece of text behind the ids `head`, for where the whole text's own ids do not begin with `head`.

    Many tokenizers put a space before every text, so a piece tokenised alone would gain one. Of the ways to tokenise
    the piece, the first is taken that reads, behind `head`, as the whole text does.

    Args:
        tokenizer: The tokenizer.
        head: Ids of the text before the piece, `[time]`.
        piece: The text that continues it.
        whole: Ids of the text with the piece, tokenised as one.
        context: Ids of the text before the piece, tokenised as one.

    Returns:
        int32 `[time]`.
    """
    if not piece:
        return whole[:0]
    wanted = _read(tokenizer, whole)
    for ids in _ways(tokenizer, piece, whole, context):
        if _read(tokenizer, np.concatenate((head, ids))) == wanted:
            return ids
    return tokenise(tokenizer, [piece])[0]


def _ways(tokenizer: Any, piece: str, whole: np.ndarray, context: np.ndarray) -> Iterator[np.ndarray]:
    if starts_with(whole, context):
        yield whole[len(context) :]
    yield tokenise(tokenizer, [piece])[0]
    for anchor in _ANCHORS:
        before, both = tokenise(tokenizer, [anchor, anchor + piece])
        if len(before) and starts_with(both, before):
            yield both[len(before) :]


def _read(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
