"""Training a part of a model, chosen by the names of its parameters."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from alignment_modules.policies.added_tokens import ends

logger = logging.getLogger(__name__)


def train_part(
    model: nn.Module, trainable: Sequence[str] | None, frozen: Sequence[str] | None, *, new_tokens: Sequence[str] = ()
) -> None:
    """Freezes every parameter that is not to be trained.

    A pattern is one of the shell (`*`, `?`, `[...]`) and is compared with full names such as
    `model.layers.3.mlp.up_proj.weight`. A weight with two names, such as a tied head, is one: either name chooses it.

    Args:
        model: What is trained; all of it, so far.
        trainable: Patterns of what is trained; None: everything.
        frozen: Patterns of what is taken out of that; None: nothing.
        new_tokens: Tokens whose rows in embedding and head were just made, and so must be trained.

    Raises:
        ValueError: A pattern matches nothing, the patterns change nothing or leave nothing, or the rows of new tokens
            are frozen.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    chosen = set(names) if trainable is None else _matches(model, names, "trainable", trainable, set(names))
    if chosen == set(names) and trainable is not None:
        raise ValueError(
            f"policy.trainable={list(trainable)!r} names every parameter, so it has no effect: leave it out."
        )
    if frozen is not None:
        chosen = chosen - _matches(model, names, "frozen", frozen, chosen)
    if not chosen:
        given = f"policy.trainable={trainable!r} and " if trainable is not None else ""
        raise ValueError(f"{given}policy.frozen={frozen!r} leave nothing of {type(model).__name__} to train.")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    if new_tokens:
        _check_rows(model, new_tokens)


def _matches(
    model: nn.Module, names: dict[int, list[str]], option: str, patterns: Sequence[str], among: set[int]
) -> set[int]:
    """The parameters, by id, that an option's patterns choose among some."""
    found: set[int] = set()
    for pattern in patterns:
        every = {key for key, own in names.items() if any(fnmatchcase(name, pattern) for name in own)}
        if not every:
            raise ValueError(
                f"policy.{option} names {pattern!r}, which is no parameter of {type(model).__name__}."
                f"{_near(model, pattern)}"
            )
        if not every & among:
            raise ValueError(f"policy.{option} names {pattern!r}, of which policy.trainable chooses nothing.")
        found |= every
    for own in (names[key] for key in found if len(names[key]) > 1):
        chosen = [name for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if len(chosen) < len(own):
            others = [name for name in own if name not in chosen]
            logger.warning(
                "policy.%s names %r, which is one weight with %s: they are %s together",
                option,
                chosen[0],
                ", ".join(map(repr, others)),
                "trained" if option == "trainable" else "frozen",
            )
    return found


def _near(model: nn.Module, pattern: str) -> str:
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known += [f"{name}.*" for name, _ in model.named_modules() if name]
    close = difflib.get_close_matches(pattern, known, n=3)
    if f"{pattern}.*" in known:
        close = [f"{pattern}.*"]
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    return f" Names are such as {known[0]!r}; a pattern has * for any text."


def _check_rows(model: nn.Module, tokens: Sequence[str]) -> None:
    for name, module in ends(model):
        if any(not parameter.requires_grad for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"policy.added_tokens={list(tokens)!r} makes new rows in {name!r}, which policy.trainable and "
                "policy.frozen leave untrained: the tokens would stay the mean of the others. Train it, or start from "
                "a folder that knows the tokens."
            )
