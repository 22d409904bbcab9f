"""Token ids of markup with foreign text in it: what that text spells never becomes a control token."""

from __future__ import annotations

import re
from typing import Any

# Texts whose own tokens seldom merge with what follows; a piece is tokenised behind one of them.
_ANCHORS = ("\n", "=", "a", "0")
_PRIVATE = range(0xF0000, 0xFFFFE)


class PlainText:
    """Tokenises rendered conversations, parts of which are to stay text.

    Control tokens are the special tokens and the added ones that the chat template writes. Where a foreign text spells
    one, a mark is put behind its first character before the template is rendered; the rendering is cut at the marks,
    and its pieces are tokenised apart. A text that spells none is tokenised as the template's own is, in one piece.

    Args:
        tokenizer: As in transformers, slow or fast.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = _control_tokens(tokenizer)
        self._single = {token for token in tokens if len(token) == 1}
        self._control = set(tokens.values()) - {getattr(tokenizer, "unk_token_id", None)}
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._normalised = any(getattr(token, "normalized", False) and str(token) in tokens for token in added)
        self._anchors: dict[str, list[int]] = {}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._first = re.compile(f"(?={self._spelled.pattern}).", re.DOTALL)

    @staticmethod
    def mark(*texts: str) -> str:
        """A character that none of the texts holds."""
        held = set().union(*texts)
        return next(letter for letter in map(chr, _PRIVATE) if letter not in held)

    def guarded(self, text: str, mark: str) -> str:
        """A foreign text with marks, so that `ids` of it hold no control token.

        Args:
            text: The text; it does not hold the mark.
            mark: As `mark` gives it.
        """
        found = self._marked(text, mark)
        if self._normalised and not self._control.isdisjoint(self.ids(found, mark)):
            return mark.join(text)  # a normaliser makes a control token of it
        return found

    def length_that_fits(self, text: str, longest: int) -> int:
        """How many characters of a foreign text make no more than `longest` tokens."""
        fits, mark = 0, self.mark(text)
        for piece in self._marked(text, mark).split(mark):
            length = self._beginning(piece, longest)
            fits += length
            if length < len(piece):
                break
            longest -= len(self._piece(piece, ""))
        return fits

    def _beginning(self, piece: str, longest: int) -> int:
        fits, above = 0, max(1, 2 * longest)
        while above < len(piece) and len(self._piece(piece[:above], "")) <= longest:
            fits, above = above, 2 * above
        if above >= len(piece):
            if len(self._piece(piece, "")) <= longest:
                return len(piece)
            above = len(piece)
        while above - fits > 1:
            middle = (fits + above) // 2
            fits, above = (middle, above) if len(self._piece(piece[:middle], "")) <= longest else (fits, middle)
        return fits

    def _marked(self, text: str, mark: str) -> str:
        if self._single:  # what cannot be cut is taken out
            text = "".join("\ufffd" if letter in self._single else letter for letter in text)
        return self._first.sub(lambda match: match.group() + mark, text)

    def ids(self, text: str, mark: str, behind: str | None = "") -> list[int]:
        """Ids of a text, with no special token added.

        Args:
            text: The text, cut where the mark stands.
            mark: As `mark` gives it.
            behind: The token that stands before the text, which some tokenizers look at; empty: some text does; None:
                nothing does.

        Returns:
            The ids, without that of the token before.
        """
        first, *others = text.split(mark)
        found = self._encode(first) if behind is None else self._piece(first, behind)
        for piece in others:
            found += self._piece(piece, "")
        return found

    def control_tokens(self, text: str) -> list[tuple[int, str]]:
        """The control tokens that a text spells, each with its place."""
        return [(match.start(), match.group()) for match in self._spelled.finditer(text)]

    def _piece(self, text: str, behind: str) -> list[int]:
        """Ids of a text that stands within another one: no space is put before it that only begins texts."""
        if behind:
            return self._encode_behind(behind, text) or self._encode(text)
        control = self._spelled.search(text)
        plain = text[: control.start()] if control else text
        for anchor in _ANCHORS if plain else ():
            # what follows the first control token no longer sees what stands before
            ids = self._encode_behind(anchor, plain)
            if ids and self._decode(self._anchors[anchor] + ids) == anchor + plain:
                return ids if plain == text else self._encode_behind(anchor, text) or self._encode(text)
        return self._encode(text)

    def _encode_behind(self, before: str, text: str) -> list[int]:
        """Ids of a text behind another one; none where the two share a token."""
        if before not in self._anchors:
            self._anchors[before] = self._encode(before)
        ids, both = self._anchors[before], self._encode(before + text)
        return both[len(ids) :] if both[: len(ids)] == ids else []

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and those added ones that the chat template writes, by their text; white space is text."""
    template = getattr(tokenizer, "chat_template", None) or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else str(template)
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in special}
    for index, token in added.items():
        if getattr(token, "special", False) or str(token) in special or str(token) in written:
            found[str(token)] = int(index)
    return {text: index for text, index in found.items() if text.strip()}
