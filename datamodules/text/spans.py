"""Replies in a conversation's text, and the tokens that each of them is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from datamodules.text.continuing import continuation
from datamodules.text.together import Ids, Way
from datamodules.text.tokens import starts_with


class Span(NamedTuple):
    """A reply in a conversation, as positions of characters or of tokens.

    Attributes:
        opening: Where a sampler starts to write; None where the conversation rewrites what came before.
        start: Where the supervised part starts.
        end: Where it ends.
    """

    opening: int | None
    start: int
    end: int


class SpanEncoder:
    """Tokenises conversations so that no token lies across the start or the end of a reply.

    Args:
        tokenizer: A `transformers` tokenizer.
        ends: Ids of the tokens that end a turn; may grow until the first call.
    """

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends

    def encode(self, text: str, spans: list[Span]) -> Way[tuple[np.ndarray, list[Span]]]:
        """Ids of a text and the tokens of its spans, each up to its stop token and with it.

        The stop token is appended to the last span where the text has none.

        Args:
            text: The text.
            spans: Replies in it, as positions of characters.

        Raises:
            ValueError: The text has no stop token, and the tokenizer neither.
        """
        ids, place = yield from self._cut(
            text, {position for span in spans for position in span if position is not None}
        )
        found = [
            Span(None if span.opening is None else place[span.opening], place[span.start], place[span.end])
            for span in spans
        ]
        stops = [self._stop_in(ids, span.start, span.end) for span in found]
        if stops[-1] is None:  # the template closes the last turn behind its span, or not at all
            end = found[-1].end
            tail = next((i for i in range(end, len(ids)) if int(ids[i]) in self.ends), None)
            if tail is None:
                ids = self._append_eos(ids[:end])
                found[-1] = found[-1]._replace(end=len(ids))
            else:
                found = [span._replace(end=self._through(ids, span.end, int(ids[tail]))) for span in found]
            stops = [self._stop_in(ids, span.start, span.end) for span in found]
        return ids, [
            span if stop is None else span._replace(end=stop + 1) for span, stop in zip(found, stops, strict=True)
        ]

    def _cut(self, text: str, cuts: Iterable[int]) -> Way[tuple[np.ndarray, dict[int, int]]]:
        """Ids of a text and the token position of each character cut; no token lies across a cut.

        Up to a cut the text is tokenised as a whole where that begins with the ids of the cut before it (what the model
        sees when it starts to write there); else the part between the two is tokenised apart.
        """
        edges = sorted({*cuts, len(text)})
        # Templates write special tokens themselves; adding them again would double the first one.
        heads = yield Ids(tuple(text[:edge] for edge in edges))
        ids = context = heads[0][:0]
        place, last = {}, 0
        for edge, head in zip(edges, heads, strict=True):
            if starts_with(head, ids):
                ids = head
            else:
                ids = np.concatenate((ids, (yield from continuation(ids, text[last:edge], head, context))))
            place[edge] = len(ids)
            last, context = edge, head
        return ids, place

    def _through(self, ids: np.ndarray, end: int, stop_id: int) -> int:
        """End of a span moved behind its stop token, if only white space lies between."""
        position = end
        while position < len(ids) and int(ids[position]) != stop_id:
            if int(ids[position]) in self.ends or self._text(ids[position : position + 1]).strip():
                return end
            position += 1
        return position + 1 if position < len(ids) else end

    def _stop_in(self, ids: np.ndarray, start: int, end: int) -> int | None:
        """Position of the special token that ends a span (only white space may follow), or None."""
        for position in range(end - 1, start - 1, -1):
            if int(ids[position]) in self.ends:
                return position
            if self._text(ids[position : position + 1]).strip():
                return None
        return None

    def _append_eos(self, ids: np.ndarray) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the chat template writes no stop token and the tokenizer has no eos_token; set one")
        return np.append(ids, np.int32(eos))

    def _text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist()))
