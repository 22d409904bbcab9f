"""Statistics of micro-batches and ranks, added up on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alignment_modules.functional.sources import PRESENT
from alignment_modules.functional.statistics import Kind, Statistic

Reduce = Callable[[Tensor, str], Tensor]
Gather = Callable[[dict[str, int]], list[dict[str, int]]]


class Meters:
    """Statistics added up on the device until they are asked for.

    Example:
        >>> meters = Meters()
        >>> meters.update({"loss": Statistic(torch.tensor(6.0), 2.0)})
        >>> meters.update({"loss": Statistic(torch.tensor(2.0), 6.0)})
        >>> meters.compute(lambda values, how: values)
        {'loss': 1.0}
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Kind, str], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def update(self, statistics: Mapping[str, Statistic]) -> None:
        """Adds one micro-batch. Does not wait for the device."""
        for name, (total, weight, kind) in statistics.items():
            key = (kind, name)
            value = total.detach().double() if total.device.type != "mps" else total.detach().float()
            if kind not in ("min", "max"):
                value = value.reshape(-1)
                if not isinstance(weight, Tensor):
                    weight = value.new_full((), weight)
                sums = torch.cat([value, weight.to(value).reshape(-1)])
                self._add(key, sums)
            else:
                self._add(key, value)

    def absorb(self, other: Meters) -> None:
        """Adds all that others hold."""
        for key, value in other._values.items():
            self._add(key, value)

    def _add(self, key: tuple[Kind, str], value: Tensor) -> None:
        held = self._values.get(key)
        if held is None:
            self._values[key] = value
            return
        held = held.to(value.device)  # what a checkpoint held is on the module's device, what rewards gave on the host
        pick = {"min": torch.minimum, "max": torch.maximum}.get(key[0], torch.add)
        self._values[key] = pick(held, value)

    @property
    def of_sources(self) -> bool:
        """Whether some of it is told of rows of one source."""
        return ("source", PRESENT) in self._values

    def compute(self, reduce: Reduce, gather: Gather = lambda names: [names]) -> dict[str, float]:
        """Combines the ranks and returns plain numbers; a mean without units and an extreme of nothing are left out.

        Args:
            reduce: `reduce(tensor, "sum" | "min" | "max")` over all ranks. It is called once a kind that is present, so
                all ranks must hold statistics of the same names, but for those of kind "source": of these it is enough
                that all ranks hold some.
            gather: What each rank has, names with sizes, of all ranks; called where there are statistics of sources.

        Raises:
            ValueError: If what is told of a source has the name of something else that is logged.
        """
        results: dict[str, float] = {}
        devices = {value.device for value in self._values.values()}
        # Host-side numbers, such as rewards and times, join those of the accelerator.
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        kinds: tuple[Kind, ...] = ("mean", "std", "var", "gap", "difference", "sum", "explained", "min", "max")
        sources = self._of_sources(reduce, gather, device) if self.of_sources else {}
        for kind in kinds:
            how = kind if kind in ("min", "max") else "sum"
            names = sorted(name for held, name in self._values if held == kind)
            if not names:
                continue
            values = reduce(torch.stack([self._values[kind, name].to(device) for name in names]), how).tolist()
            for name, value in zip(names, values, strict=True):
                if kind in ("std", "var"):
                    total, squares, count = value
                    if count > 0:  # of a single unit: 0
                        variance = max(squares - total * total / count, 0.0) / max(count - 1, 1)
                        results[name] = math.sqrt(variance) if kind == "std" else variance
                elif kind == "gap":
                    *sums, count = value
                    if count > 0:
                        results[name] = sum(map(abs, sums)) / count
                elif kind == "difference":
                    one, other, count, others = value
                    if count > 0 and others > 0:
                        results[name] = one / count - other / others
                elif kind == "sum":
                    if (number := _sum_of_means(value)) is not None:
                        results[name] = number
                elif kind == "explained":
                    error, errors, target, targets, count = value
                    spread = count * targets - target * target
                    if spread > 1e-12 * count * targets:  # targets that are all equal have no variance to explain
                        results[name] = 1.0 - (count * errors - error * error) / spread
                elif kind != "mean":
                    if math.isfinite(value):
                        results[name] = value
                elif value[1] != 0:
                    results[name] = value[0] / value[1]
        for name in sources.keys() & results.keys():
            raise ValueError(
                f"a source of the data is called {name.partition('/')[0]!r}, and what is logged of it would be called "
                f"{name!r}, like something else: give it another name"
            )
        return results | sources

    def _of_sources(self, reduce: Reduce, gather: Gather, device: torch.device) -> dict[str, float]:
        """What is told of the sources that any rank has seen."""
        held = {name: value for (kind, name), value in self._values.items() if kind == "source"}
        sizes: dict[str, int] = {}
        for names in gather({name: len(value) for name, value in held.items()}):
            sizes |= names
        known = {name: torch.zeros(size, dtype=held[PRESENT].dtype) for name, size in sorted(sizes.items())} | held
        sums = reduce(torch.cat([value.to(device) for value in known.values()]), "sum").cpu()
        parts = zip(known, sums.split([len(value) for value in known.values()]), strict=True)
        means = {name: _sum_of_means(part.tolist()) for name, part in parts if name != PRESENT}
        return {name: mean for name, mean in means.items() if mean is not None}

    def reset(self) -> None:
        """Forgets everything."""
        self._values.clear()

    def copy(self) -> Meters:
        """The same sums, which later updates of either leave alone."""
        other = Meters()
        other._values = dict(self._values)  # tensors are replaced, never changed
        return other

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The sums of this rank by kind and name, on the CPU."""
        state: dict[str, dict[str, Tensor]] = {}
        for (kind, name), value in self._values.items():
            state.setdefault(kind, {})[name] = value.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> None:
        """Takes the place of everything held so far.

        Args:
            state: What `state_dict` gave.
            device: Where the sums go.
        """
        self._values = {(kind, name): value.to(device) for kind in state for name, value in state[kind].items()}  # type: ignore[misc]


def _sum_of_means(sums: list[float]) -> float | None:
    """What totals and, behind them, as many counts say together; a term without units adds nothing."""
    pairs = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
    return sum(total / count for total, count in pairs if count > 0) if any(count > 0 for _, count in pairs) else None
