"""Ids of a text that continues given tokens, whatever a tokenizer puts in front of texts."""

from __future__ import annotations

import numpy as np

from datamodules.text.together import Ids, Reading, Way
from datamodules.text.tokens import starts_with

# Texts whose own tokens seldom merge with what follows; a piece is tokenised behind one of them.
_ANCHORS = ("\n", "=", "a", "0")


def continuation(head: np.ndarray, piece: str, whole: np.ndarray, context: np.ndarray) -> Way[np.ndarray]:
    """Ids of a piece of text behind the ids `head`, for where the whole text's own ids do not begin with `head`.

    Many tokenizers put a space before every text, so a piece tokenised alone would gain one. Of the ways to tokenise
    the piece, the first is taken that reads, behind `head`, as the whole text does.

    Args:
        head: Ids of the text before the piece, `[time]`.
        piece: The text that continues it.
        whole: Ids of the text with the piece, tokenised as one.
        context: Ids of the text before the piece, tokenised as one.

    Returns:
        int32 `[time]`.
    """
    if not piece:
        return whole[:0]
    if starts_with(whole, context) and (yield from _reads(head, whole[len(context) :], whole)):
        return whole[len(context) :]
    (alone,) = yield Ids((piece,))
    if (yield from _reads(head, alone, whole)):
        return alone
    for anchor in _ANCHORS:
        before, both = yield Ids((anchor, anchor + piece))
        if len(before) and starts_with(both, before) and (yield from _reads(head, both[len(before) :], whole)):
            return both[len(before) :]
    return alone


def _reads(head: np.ndarray, ids: np.ndarray, whole: np.ndarray) -> Way[bool]:
    """Whether ids read behind `head` as the whole text does."""
    found, wanted = yield Reading((np.concatenate((head, ids)), whole))
    return found == wanted
