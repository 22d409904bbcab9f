"""Problems of the package `reasoning-gym`: generators of puzzles, each of which judges answers itself."""

from __future__ import annotations

import ast
import hashlib
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.ranges import Count, Seed, check_options
from datamodules.tasks.problems import SPLITS, Split

# Of 20 cells of a question's hash: test 2, validation 1, train the rest.
_CELLS = 20
_SHARES = {"train": 17, "validation": 1, "test": 2}
# How many times as many problems are looked at as a split needs if none comes twice.
_PATIENCE = 20


class ReasoningGymPrompts(Dataset[dict[str, Any]]):
    """Distinct problems of one task of reasoning-gym, with what `ReasoningGymScore` needs to judge answers.

    Rows of `prompt`, `answer` (None where the task knows none), `task` (its name and parameters) and `entry` (the whole
    problem), the last two as text of Python literals. Which split a problem belongs to depends on its question alone:
    no question is in two splits, whatever the seeds.

    Args:
        task: Name of the task, such as "chain_sum".
        split: "train", "validation" or "test".
        size: Number of problems.
        seed: Seed of the draw.
        parameters: Parameters of the task, such as `{"max_terms": 3}`; None: its defaults.
        chat: Whether `prompt` is a conversation; else the question as text.

    Raises:
        ImportError: The package is missing.
        ValueError: There is no such task, it refuses its parameters, or it has too few distinct problems.
    """

    def __init__(
        self,
        *,
        task: str,
        split: Split,
        size: Count,
        seed: Seed = 0,
        parameters: dict[str, Any] | None = None,
        chat: bool = True,
    ) -> None:
        check_options(ReasoningGymPrompts.__init__, locals())
        given = dict(parameters or {})
        for name in ("seed", "size"):
            if name in given:
                raise ValueError(f"parameters={given} must not hold {name!r}, which is an option of its own")
        self.task, self.chat = repr((task, given)), chat
        self.entries = _draw(_generator(task, size, seed, given), f"task={task!r}", split, size)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        prompt = [{"role": "user", "content": entry["question"]}] if self.chat else entry["question"]
        return {"prompt": prompt, "answer": entry["answer"], "task": self.task, "entry": repr(entry)}


def _generator(task: str, size: int, seed: int, parameters: dict[str, Any]) -> Any:
    """The package's own data set."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError(
            f"ReasoningGymPrompts needs the package reasoning-gym ({error}): "
            "pip install 'alignment-modules[reasoning-gym]'"
        ) from error
    if task not in DATASETS:
        raise ValueError(f"task={task!r} must be one of {', '.join(sorted(DATASETS))}")
    # the package draws problem i from seed + i: neighbouring seeds would share all problems but one
    far = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    try:
        return create_dataset(task, seed=far, size=size, **parameters)
    except Exception as error:  # assertions, type errors and others
        raise ValueError(f"task={task!r} refuses size={size} and parameters={parameters}: {error}") from error


def _draw(generator: Any, name: str, split: str, size: int) -> list[dict[str, Any]]:
    """The first problems of a split, none twice."""
    found: dict[str, dict[str, Any]] = {}
    most = _PATIENCE * (size * _CELLS // _SHARES[split] + 10)
    for index in range(most):
        try:
            entry = {key: _plain(value) for key, value in generator[index].items()}
        except IndexError:  # tasks that are read from a file have an end
            break
        except Exception as error:
            raise ValueError(f"{name}: problem {index} cannot be made: {type(error).__name__}: {error}") from error
        if split_of_question(entry["question"]) == split and entry["question"] not in found:
            if not found and not _is_literal(entry):
                raise ValueError(f"{name}: its problems hold more than plain values, and cannot be kept as text")
            found[entry["question"]] = entry
            if len(found) == size:
                return list(found.values())
    raise ValueError(
        f"size={size}: {name} has {len(found)} distinct problems of the {split} split among its first {most}; take "
        "fewer, or parameters that allow more"
    )


def split_of_question(question: str) -> str:
    """The split that a question belongs to: 85 % train, 5 % validation, 10 % test.

    Args:
        question: Its text.
    """
    cell = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % _CELLS
    return SPLITS[2] if cell < 2 else SPLITS[1] if cell == 2 else SPLITS[0]


def _plain(value: Any) -> Any:
    """A value with Python's numbers and texts in the place of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple, set) else value


def _is_literal(entry: dict[str, Any]) -> bool:
    try:
        return bool(ast.literal_eval(repr(entry)) == entry)
    except (ValueError, SyntaxError):
        return False
