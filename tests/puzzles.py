"""What stands for the package reasoning-gym where it is not installed: its factory, with sums and with a short task."""

import dataclasses
import random
import sys
import types

import numpy as np


@dataclasses.dataclass
class Sums:
    """Config and data set in one; the package draws problem i from seed + i, too."""

    max_terms: int = 2
    seed: int = 0
    size: int = 500

    def __post_init__(self):
        assert self.max_terms > 1, "max_terms must be above 1"

    def __getitem__(self, index):
        drawn = random.Random(self.seed + index)
        terms = [drawn.randint(0, 99) for _ in range(self.max_terms)]
        metadata = {"terms": tuple(terms), "first": np.int64(terms[0]), "names": [np.str_("a")]}
        return {"question": " + ".join(map(str, terms)) + " =", "answer": str(sum(terms)), "metadata": metadata}

    def score_answer(self, answer, entry):
        assert isinstance(entry["metadata"]["terms"], tuple)
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


class Few(Sums):
    def __getitem__(self, index):
        if index >= 30:
            raise IndexError(index)
        return super().__getitem__(index)


class Odd(Sums):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"metadata": object()}


class Broken(Sums):
    def score_answer(self, answer, entry):
        raise RuntimeError("no")


def install(monkeypatch):
    """Puts it where the package would be."""
    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"chain_sum": Sums, "few": Few, "odd": Odd, "broken": Broken}
    factory.create_dataset = lambda name, **parameters: factory.DATASETS[name](**parameters)
    package = types.ModuleType("reasoning_gym")
    package.factory = factory
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def remove(monkeypatch):
    """As if there were no such package."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
