"""When a completion ends: stop tokens and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopStrings:
    """Tells which completions end with the token that completes a stop string.

    Only the completion is searched, special tokens included, so a stop string that starts inside the prompt does not
    count. A stop string may span tokens and a token may hold more than the stop string.

    Args:
        strings: Stop strings, none empty.
        tokenizer: Anything with `decode(ids, skip_special_tokens=False) -> str`.

    Raises:
        ValueError: If there is no tokenizer or a stop string is empty.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={tuple(strings)!r} needs a tokenizer, got tokenizer=None.")
        if any(not string for string in strings):
            raise ValueError(f"stop_strings must not hold an empty string, got {tuple(strings)!r}.")
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token writes at least one byte, save for rare empty ones, so this many last tokens hold any stop string.
        self.window = max(len(string.encode()) for string in strings) + 8
        self._endings = {string[-1] for string in strings}
        self._may_complete: dict[int, bool] = {}

    def completed(self, ids: Tensor) -> list[bool]:
        """Whether each row's last token completes a stop string.

        Args:
            ids: `[rows, time]` completions so far.
        """
        rows = ids[:, -self.window :].tolist()
        return [self._can_end(row[-1]) and self._found(row) for row in rows]

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the last token of a whole completion, however it was made, completes a stop string.

        Args:
            ids: The completion's tokens.
        """
        row = list(ids[-self.window :])
        before, after = self._decode(row[:-1]), self._decode(row)
        return any(after.count(string) > before.count(string) for string in self.strings)

    def _can_end(self, token: int) -> bool:
        """Whether a token's own text may hold the last character of a stop string (looked up once per token)."""
        known = self._may_complete.get(token)
        if known is None:
            text = self._decode([token])
            # Bytes of a half character and dropped blanks only show in context.
            unclear = not text or "\ufffd" in text or any(ending.isspace() for ending in self._endings)
            known = unclear or any(ending in text for ending in self._endings)
            self._may_complete[token] = known
        return known

    def _found(self, row: list[int]) -> bool:
        text = self._decode(row)
        return any(string in text for string in self.strings)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def stop_table(stop_token_ids: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:
    """Lookup table `[vocabulary]` bool of the tokens that end a completion.

    Raises:
        ValueError: If a stop token is outside the vocabulary.
    """
    outside = [token for token in stop_token_ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"stop_token_ids {outside} are outside the policy's vocabulary of {vocabulary} tokens.")
    table = torch.zeros(vocabulary, dtype=torch.bool)
    table[list(stop_token_ids)] = True
    return table.to(device)
