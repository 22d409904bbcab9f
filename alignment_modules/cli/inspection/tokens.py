"""Token ids as text, one by one: what each adds to the text before it, with special tokens in full."""

from collections.abc import Sequence
from typing import Any

from alignment_modules.cli.inspection.findings import Token

_BEFORE = 8  # tokens that a token's text may depend on
_OPEN = 6  # tokens that one character may take
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def readable(tokenizer: Any, ids: Sequence[int], targets: Sequence[bool]) -> tuple[Token, ...]:
    """Tokens as text.

    Tokens that only together make a character become one, as far as they are all targets or all not. A token without
    text is shown by its id.

    Args:
        tokenizer: As in transformers: `decode`, and where it has them `all_special_ids` and `added_tokens_decoder`.
            None: ids are shown.
        ids: Token ids.
        targets: Whether each is a target.
    """
    if tokenizer is None:
        return tuple(Token(f"{token} ", bool(target)) for token, target in zip(ids, targets, strict=True))
    special = _special_ids(tokenizer)
    found, start = list[Token](), 0
    for end, token in enumerate(ids, start=1):
        text = _added(tokenizer, ids, start, end)
        goes_on = end < len(ids) and targets[end] == targets[start] and end - start < _OPEN
        if text.endswith(_REPLACEMENT) and goes_on and token not in special:
            continue
        found.append(Token(_written_out(text) or f"<id {token}>", bool(targets[start]), token in special))
        start = end
    return tuple(found)


def _added(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """What tokens add to the text of those before them: alone some tokenizers take their leading space."""
    first = max(0, start - _BEFORE)
    before = _decode(tokenizer, ids[first:start])
    both = _decode(tokenizer, ids[first:end])
    return both[len(before) :] if both.startswith(before) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not len(ids):
        return ""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)}


def _written_out(text: str) -> str:
    r"""Control characters by their names in Python, so that none moves a terminal's cursor: a newline is `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, length: int = 80) -> str:
    """A value in one line, control characters written out, cut to a length."""
    text = _written_out(text)
    return text if len(text) <= length else text[: length - 3] + "..."
