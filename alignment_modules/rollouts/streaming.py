"""A completion as text while it is being written."""

from collections.abc import Callable

from torch import Tensor

from alignment_modules.rollouts.codec import Codec

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character


class TextStream:
    """Hands over the text of one completion as far as it is certain; for `watch` of `draw`.

    A character whose bytes are spread over several tokens is held back until it is whole, and so are stop tokens.

    Args:
        codec: Tokens to text.
        show: Gets each new piece of text, none of them empty.

    Attributes:
        shown: What was handed over so far.
        ids: All tokens so far.
    """

    def __init__(self, codec: Codec, show: Callable[[str], None]) -> None:
        self.codec, self.show = codec, show
        self.shown = ""
        self.ids: list[int] = []

    def __call__(self, ids: Tensor) -> None:
        """Takes the ids `[time so far, 1]`."""
        self.ids = ids[:, 0].tolist()
        self._hand_over(self.codec.decode([self.ids])[0].rstrip(_UNFINISHED))

    def finish(self) -> str:
        """The text of all tokens so far; hands over what was held back."""
        text = self.codec.decode([self.ids])[0] if self.ids else ""
        self._hand_over(text)
        return text

    def _hand_over(self, text: str) -> None:
        # A tokenizer may rewrite what it gave before: then only the end tells what it is.
        if len(text) > len(self.shown) and text.startswith(self.shown):
            new, self.shown = text[len(self.shown) :], text
            self.show(new)
