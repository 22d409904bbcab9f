"""What every use of a tokenizer here shares: ids of texts, texts of ids, and its first tokens."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from functools import cache
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
        backend = _backend(tokenizer)
        if backend is None:
            encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        else:
            encoded = [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            _refuse_surrogates(text)
        raise
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def _backend(tokenizer: Any) -> Any:
    """What a call of the tokenizer comes down to, which gives the same ids for less; None where it may do more."""
    kind: Any = type(tokenizer)
    if not getattr(tokenizer, "is_fast", False) or not _calls_backend_alone(kind):
        return None
    backend = tokenizer.backend_tokenizer
    as_called = backend.truncation is None and backend.padding is None
    return backend if as_called and backend.encode_special_tokens == tokenizer.split_special_tokens else None


@cache
def _calls_backend_alone(kind: type) -> bool:
    """Whether a class of tokenizers adds nothing but a constructor to `PreTrainedTokenizerFast`."""
    from transformers import PreTrainedTokenizerFast

    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    added = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    return not any(
        inspect.isfunction(value) for one in added for name, value in vars(one).items() if name != "__init__"
    )


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
    return len(ids) >= len(head) and bool((ids[: len(head)] == head).all())


def read(tokenizer: Any, rows: Iterable[np.ndarray]) -> list[str]:
    """Text of each row of ids, `[time]`, special tokens and spaces as they are."""
    ids, backend = [row.tolist() for row in rows], _backend(tokenizer)
    if backend is not None:
        return list(backend.decode_batch(ids, skip_special_tokens=False))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [str(tokenizer.decode(one, **options)) for one in ids]
