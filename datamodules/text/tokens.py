"""What every use of a tokenizer here shares: ids of texts, texts of ids, and its first tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


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


def read(tokenizer: Any, rows: Iterable[np.ndarray]) -> list[str]:
    """Text of each row of ids, `[time]`, special tokens and spaces as they are."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [str(tokenizer.decode(ids.tolist(), **options)) for ids in rows]
