"""Which completions each of several rewards is to judge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

REWARD_NAMES = "reward_names"
"""A batch's list, one entry a prompt: the names of the rewards that judge it; None: all."""


def judged_rows(names: Sequence[str], judges: Sequence[Sequence[str] | None] | None, count: int) -> Tensor | None:
    """`[count, rewards]` bool: which completions each reward judges; None: all judge all.

    Args:
        names: Of the rewards.
        judges: For each of P prompts (a prompt's completions are neighbours) the names of those that judge it; None:
            all.
        count: Completions, a multiple of P.

    Raises:
        ValueError: If a name is none of the rewards'.

    >>> judged_rows(["right", "short"], [("right",), None], 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    if judges is None or all(own is None for own in judges):
        return None
    check_names(names, judges)
    table = torch.tensor([[own is None or name in own for name in names] for own in judges])
    return table.repeat_interleave(count // len(judges), dim=0)


def check_names(
    names: Sequence[str], judges: Sequence[Sequence[str] | None], sources: Sequence[str] | None = None
) -> None:
    """Checks that rows name rewards that there are.

    Args:
        names: Of the rewards.
        judges: As in `judged_rows`.
        sources: Where each row is from, for the message.

    Raises:
        ValueError: If a row names none, or something else.
    """
    for row, own in enumerate(judges):
        if own is None:
            continue
        whose = f" (source {sources[row]!r})" if sources else ""
        if isinstance(own, str) or not own:
            raise ValueError(
                f"row {row} of a batch{whose} has {REWARD_NAMES}={own!r}; it must be a tuple of at least one name, or "
                "None: all rewards"
            )
        for name in own:
            if name not in names:
                raise ValueError(
                    f"row {row} of a batch{whose} is to be judged by {name!r}, which is none of the module's rewards: "
                    f"{', '.join(names)}"
                )


def check_judges(batch: Mapping[str, Any], names: Sequence[str], rows: int) -> None:
    """Checks the rewards that a batch's rows name, if they do.

    Args:
        batch: As the loader gives it.
        names: Of the rewards.
        rows: Its prompts.

    Raises:
        ValueError: If a row names none or what is no reward, or there is another number of entries.
    """
    judges = batch.get(REWARD_NAMES)
    if judges is None:
        return
    if len(judges) != rows:
        raise ValueError(f"`{REWARD_NAMES}` has {len(judges)} entries for {rows} rows")
    check_names(names, judges, batch.get("source_name"))
