"""Texts of a chat template as pieces that end with a special token: what several texts share is tokenised once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from datamodules.text.tokens import tokenise


class Pieces:
    """Gives the ids of texts, as `tokenise` does, and tokenises each distinct piece of them once.

    A tokenizer takes its added tokens out of a text first, and then normalises, splits and tokenises what stands
    between them, each part for itself. So ids do not change where a text is cut behind such a token and the rest is
    tokenised behind the token alone (behind it, since some tokenizers put a space before what stands first). The
    completions of one prompt, and a conversation up to each of its replies, share most of their pieces.

    Args:
        tokenizer: A `transformers` tokenizer. Where its added tokens do not work so, texts are tokenised as they are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cuts = _cutting_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, self._cuts))) if self._cuts else None

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 `[time]`, with no special token added.

        Raises:
            ValueError: A text holds a lone surrogate.
        """
        if self._pattern is None:
            return tokenise(self.tokenizer, texts)
        cut = [list(self._pieces(text)) for text in texts]
        distinct = list(dict.fromkeys(piece for pieces in cut for piece in pieces))
        found = dict(zip(distinct, tokenise(self.tokenizer, [before + body for before, body in distinct]), strict=True))
        for piece in distinct:
            if piece[0]:
                found[piece] = found[piece][1:]
        return [
            np.concatenate([found[piece] for piece in pieces]) if pieces[1:] else found[pieces[0]] for pieces in cut
        ]

    def _pieces(self, text: str) -> Iterator[tuple[str, str]]:
        """Each piece with the token that stands before it, or nothing before the first."""
        matches = [] if self._pattern is None else list(self._pattern.finditer(text))
        edges, before = [0, *(match.end() for match in matches)], ""
        for (start, end), match in zip(pairwise(edges), matches, strict=True):
            yield before, text[start:end]
            before = match.group()
        if edges[-1] < len(text) or not matches:
            yield before, text[edges[-1] :]


def _cutting_tokens(tokenizer: Any) -> list[str]:
    """Added tokens that a tokenizer takes out of every text, wherever they stand and whatever stands beside them.

    Only those that its chat template writes matter. None where the tokenizer does not tell its added tokens, or where
    it would have to read them as text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
        return []
    texts = [str(token) for token in added.values()]
    written = _written(tokenizer)
    found = []
    for token in added.values():
        plain = not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        text = str(token)
        if plain and text in written and text.strip() == text and not any(_overlaps(text, other) for other in texts):
            found.append(text)
    return found


def _written(tokenizer: Any) -> set[str]:
    """The added tokens that a chat template names, and those that it writes by the name of their role."""
    template = getattr(tokenizer, "chat_template", None) or ""
    sources = "\n".join(template.values() if isinstance(template, dict) else [template])
    texts: Iterable[str] = map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())
    return {text for text in texts if text and text in sources} | {tokenizer.eos_token}


def _overlaps(text: str, other: str) -> bool:
    """Whether `other` may be read where `text` stands, in whole or from a place before it."""
    ends = any(text.startswith(other[-count:]) for count in range(1, min(len(text), len(other))))
    return ends or (text != other and text in other)
