"""Statistics of micro-batches and ranks, added up on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alignment_modules.functional.statistics import Kind, Statistic

Reduce = Callable[[Tensor, str], Tensor]


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

    def compute(self, reduce: Reduce) -> dict[str, float]:
        """Combines the ranks and returns plain numbers; a mean without units and an extreme of nothing are left out.

        Args:
            reduce: `reduce(tensor, "sum" | "min" | "max")` over all ranks. It is called once a kind that is present, so
                all ranks must hold statistics of the same names.
        """
        results: dict[str, float] = {}
        devices = {value.device for value in self._values.values()}
        # Host-side numbers, such as rewards and times, join those of the accelerator.
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        kinds: tuple[Kind, ...] = ("mean", "std", "var", "gap", "difference", "sum", "explained", "min", "max")
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
                    totals, counts = value[: len(value) // 2], value[len(value) // 2 :]
                    if any(count > 0 for count in counts):  # a term without units adds nothing
                        pairs = zip(totals, counts, strict=True)
                        results[name] = sum(total / count for total, count in pairs if count > 0)
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
        return results

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
