"""Coefficients that follow what they regulate: of the KL penalty and of the entropy bonus."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from alignment_modules.functional.ranges import Finite, NonNegative, Positive, Range, Share, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.training.meters import Reduce

KL_HORIZON = 10_000
"""Completions over which the coefficient of the KL penalty changes by up to a fifth: the released code of the paper."""
ENTROPY_DELTA = 0.005
"""Steps of the coefficient of the entropy bonus, the paper's."""
_LARGEST_ERROR = 0.2
Delta = Annotated[float, Range(0, 1, "(]")]


class Controller(ABC):
    """A coefficient that changes once a rollout, by a mean over the tokens of all its updates and of all ranks.

    What was measured is added up on its device, and the coefficient is computed there: nothing waits for it.

    Attributes:
        value: 0-dim float64 (float32 where a device has no other): the coefficient as it stands.
    """

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(float(value), dtype=torch.float64)
        self._sums: Tensor | None = None

    @property
    def coefficient(self) -> Tensor:
        """0-dim: what the rollout's loss or reward takes."""
        return self.value

    def forget(self) -> None:
        """Begins a rollout: forgets what was measured in one that was broken off."""
        self._sums = None

    def measure(self, mean: Statistic) -> None:
        """Adds what one piece of the rollout shows.

        Args:
            mean: The sum over the piece's tokens, and their number.
        """
        pair = torch.stack([torch.as_tensor(part, device=mean.total.device) for part in mean[:2]]).detach()
        pair = pair.to(torch.float32 if pair.device.type == "mps" else torch.float64)
        self._sums = pair if self._sums is None else self._sums + pair

    def step(self, reduce: Reduce, completions: int, device: torch.device | str = "cpu") -> None:
        """Ends the rollout: changes the coefficient by what was measured; by nothing where there were no tokens.

        Args:
            reduce: `reduce(tensor, "sum")` over all ranks, each of which must call this.
            completions: The rollout's completions on this rank.
            device: Where the sums are added up.
        """
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        sums = torch.zeros(2, dtype=dtype, device=device) if self._sums is None else self._sums
        count = torch.full((1,), float(completions), dtype=sums.dtype, device=sums.device)
        total, tokens, rows = reduce(torch.cat([sums, count]), "sum").unbind()
        self._sums = None
        measured = torch.where(tokens > 0, total / tokens.clamp(min=1), torch.nan)
        self.follow(measured, rows)

    @abstractmethod
    def follow(self, measured: Tensor, completions: Tensor) -> None:
        """Changes the coefficient.

        Args:
            measured: 0-dim, the mean a token; NaN: there were none.
            completions: 0-dim, those of the rollout.
        """

    @abstractmethod
    def describe(self) -> str:
        """The rule, in words."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as plain numbers. It waits for the device."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.value = torch.tensor(state["value"], dtype=torch.float64)
        self._sums = None


class KLController(Controller):
    """Moves the coefficient of the KL penalty so that the divergence comes to a target.

    After a rollout of `n` completions with the mean divergence `d` a token, the coefficient is multiplied by
    `1 + clip(d / target - 1, -0.2, 0.2) * n / horizon` (arXiv:1909.08593; `n / horizon` is at most 1).

    Args:
        coefficient: To begin with; 0 would stay 0.
        target: The divergence to come to, in nats a token, by the estimator in use: what is logged as `kl`.
        horizon: Completions after which the coefficient has changed by up to a fifth.

    Raises:
        ValueError: If one is not above 0.

    Example:
        >>> controller = KLController(0.1, target=0.5, horizon=100)
        >>> controller.measure(Statistic(torch.tensor(12.0), 20.0))  # 0.6 nats a token: a fifth too much
        >>> controller.step(lambda values, how: values, 10)
        >>> round(controller.value.item(), 6)
        0.102
    """

    def __init__(self, coefficient: Positive, *, target: Positive, horizon: Positive = KL_HORIZON) -> None:
        check_options(KLController.__init__, locals())
        super().__init__(coefficient)
        self.target, self.horizon = target, horizon

    def follow(self, measured: Tensor, completions: Tensor) -> None:
        """Multiplies the coefficient by up to a fifth more or less."""
        error = (measured / self.target - 1).clamp(-_LARGEST_ERROR, _LARGEST_ERROR).nan_to_num(nan=0.0)
        self.value = self.value.to(measured) * (1 + error * (completions / self.horizon).clamp(max=1.0))

    def describe(self) -> str:
        """In words."""
        return f"adapted to {self.target:g} nats a token over {self.horizon:g} completions"


class EntropyController(Controller):
    """Raises the coefficient of the entropy bonus while the entropy is low, and takes the bonus away while it is high.

    After each rollout the coefficient grows by `delta` where the mean entropy a token was at most `target`, else it
    shrinks by `delta`, within [0, 1]. It counts only while the entropy is at most `target` (Skywork-OR1,
    arXiv:2505.22312). The entropy is that of the rollout before, as in TRL: that of the present one is known
    only once its loss is computed. The first rollout has no bonus.

    Args:
        coefficient: To begin with.
        target: The entropy to keep, in nats a token: what is logged as `entropy`.
        delta: By how much the coefficient changes.

    Raises:
        ValueError: If `coefficient` is not within [0, 1], `delta` not within (0, 1], or `target` is negative.

    Example:
        >>> controller = EntropyController(0.0, target=0.2)
        >>> for entropy in (0.1, 0.1, 0.3):
        ...     controller.measure(Statistic(torch.tensor(entropy)))
        ...     controller.step(lambda values, how: values, 8)
        ...     print(round(controller.coefficient.item(), 6), round(controller.value.item(), 6))
        0.005 0.005
        0.01 0.01
        0.0 0.005
    """

    def __init__(self, coefficient: Share = 0.0, *, target: NonNegative, delta: Delta = ENTROPY_DELTA) -> None:
        check_options(EntropyController.__init__, locals())
        super().__init__(coefficient)
        self.target, self.delta = target, delta
        self._low = torch.tensor(False)

    @property
    def coefficient(self) -> Tensor:
        """0-dim: `value` while the entropy is low, else 0."""
        return self.value * self._low

    def follow(self, measured: Tensor, completions: Tensor) -> None:
        """Adds or takes away `delta`."""
        low, value = measured <= self.target, self.value.to(measured)
        changed = torch.where(low, value + self.delta, value - self.delta).clamp(0.0, 1.0)
        known = ~measured.isnan()
        self.value = torch.where(known, changed, value)
        self._low = torch.where(known, low, self._low.to(low.device))

    def state_dict(self) -> dict[str, Any]:
        """Also whether the entropy was low."""
        return {**super().state_dict(), "low": bool(self._low)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        super().load_state_dict(state)
        self._low = torch.tensor(state["low"])

    def describe(self) -> str:
        """In words."""
        return f"adapted by steps of {self.delta:g} while the entropy is at most {self.target:g} nats a token, else 0"


class Coefficients:
    """Strength of the KL penalty and of the entropy bonus: numbers, or what their controllers make of them.

    Args:
        beta: Of the KL penalty, to begin with.
        entropy_coef: Of the entropy bonus, to begin with.
        kl_target: What the divergence is to come to (`KLController`); None: `beta` stays.
        kl_horizon: Its horizon; None: 10,000.
        entropy_target: What the entropy is to stay above (`EntropyController`); None: `entropy_coef` stays.
        entropy_coef_delta: Its step; None: 0.005.

    Raises:
        ValueError: If an option would have no effect, or is outside its range.
    """

    def __init__(
        self,
        beta: NonNegative,
        entropy_coef: Finite = 0.0,
        *,
        kl_target: Positive | None = None,
        kl_horizon: Positive | None = None,
        entropy_target: NonNegative | None = None,
        entropy_coef_delta: Delta | None = None,
    ) -> None:
        check_options(Coefficients.__init__, locals())
        self.beta, self.entropy_coef = beta, entropy_coef
        self.controllers: dict[str, Controller] = {}
        if kl_target is not None:
            if not beta:
                raise ValueError(f"kl_target={kl_target:g} needs beta above 0: what it adapts begins there")
            self.controllers["kl"] = KLController(beta, target=kl_target, horizon=kl_horizon or KL_HORIZON)
        elif kl_horizon is not None:
            raise ValueError(f"kl_horizon={kl_horizon:g} is given, but kl_target=None: only an adapted beta reads it")
        if entropy_target is not None:
            if not 0 <= entropy_coef <= 1:
                raise ValueError(f"entropy_coef={entropy_coef:g} must be from 0 to 1 where entropy_target adapts it")
            delta = entropy_coef_delta or ENTROPY_DELTA
            self.controllers["entropy"] = EntropyController(entropy_coef, target=entropy_target, delta=delta)
        elif entropy_coef_delta is not None:
            raise ValueError(
                f"entropy_coef_delta={entropy_coef_delta:g} is given, but entropy_target=None: only an adapted "
                "entropy_coef reads it"
            )

    @property
    def kl(self) -> Tensor | float:
        """Strength of the KL penalty in the present rollout."""
        return self.controllers["kl"].coefficient if "kl" in self.controllers else self.beta

    @property
    def entropy(self) -> Tensor | float | None:
        """Weight of the entropy bonus in the present rollout; None: nobody reads the entropy."""
        return self.controllers["entropy"].coefficient if "entropy" in self.controllers else self.entropy_coef or None

    def begin(self) -> None:
        """Begins a rollout: forgets what was measured in one that was broken off."""
        for controller in self.controllers.values():
            controller.forget()

    def measure(self, name: str, mean: Statistic) -> Statistic:
        """Shows a mean over the tokens of a piece to the controller of "kl" or "entropy"; returns it as it is."""
        if name in self.controllers:
            self.controllers[name].measure(mean)
        return mean

    def step(self, reduce: Reduce, completions: int, device: torch.device | str = "cpu") -> None:
        """Ends a rollout (`Controller.step`)."""
        for controller in self.controllers.values():
            controller.step(reduce, completions, device)

    def statistics(self, device: torch.device | str = "cpu") -> dict[str, Statistic]:
        """What is logged of the present rollout: `kl_coef` and `entropy_coef`, where they are adapted."""
        return {f"{name}_coef": Statistic(one.coefficient.to(device)) for name, one in self.controllers.items()}

    def describe(self, name: str) -> str:
        """The rule of the controller of "kl" or "entropy", after a comma; empty where there is none."""
        return f", {self.controllers[name].describe()}" if name in self.controllers else ""

    def state_dict(self) -> dict[str, Any]:
        """Of each controller, by name."""
        return {name: controller.state_dict() for name, controller in self.controllers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; a controller that was not there then begins anew."""
        for name, controller in self.controllers.items():
            if name in state:
                controller.load_state_dict(state[name])
