"""Lesson 1, the optimizer: from gradient descent to AdamW, with a schedule and clipping, in plain tensors.

Training looks for weights w that make a loss L(w) small. All it knows is the slope at the present place, the gradient
g = dL/dw, and all that an optimizer decides is how far to go, in which direction, given the slopes so far. The tests
hold every step here to that of `torch.optim`.

Run `python examples/tutorial/optimizer_from_scratch.py`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Optimizer:
    """Keeps the weights, alone or in groups ({"params": weights, "lr": ...}), and what is remembered of each."""

    memories = 0  # how many tensors are remembered of each weight, all 0 at the start

    def __init__(self, parameters: Iterable[Any], **options: float) -> None:
        given = list(parameters)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.param_groups = [options | group | {"params": list(group["params"])} for group in groups]
        self.steps = 0
        self.memory = [[torch.zeros_like(w) for _ in range(self.memories)] for w, _ in self.weights()]

    def weights(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Each weight with its group."""
        return [(weight, group) for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        """Moves every weight that has a gradient."""
        self.steps += 1
        for (weight, group), memory in zip(self.weights(), self.memory, strict=True):
            if weight.grad is not None:
                self.move(weight, weight.grad, memory, group)

    def move(self, weight: Tensor, gradient: Tensor, memory: list[Tensor], group: dict[str, Any]) -> None:
        """Changes `weight` and `memory` in place: what a subclass says."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Forgets the gradients: autograd adds to what is there."""
        for weight, _ in self.weights():
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: a checkpoint without it starts its moments anew."""
        return {"steps": self.steps, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another optimizer was."""
        self.steps, self.memory = state["steps"], state["memory"]


class SGD(Optimizer):
    """Gradient descent, with momentum.

    Without momentum: w <- w - lr * g. Near a minimum L is a bowl, sum_i c_i w_i^2 / 2, and each step multiplies w_i by
    (1 - lr * c_i). The steepest direction bounds the rate (lr < 2 / c_max, or it explodes); the flattest then crawls.

    Momentum adds up what the gradients agree on and cancels what they dispute: b <- momentum * b + g, w <- w - lr * b.
    Along a constant slope it goes 1 / (1 - momentum) times as far.
    """

    memories = 1

    def __init__(self, parameters: Iterable[Any], lr: float, momentum: float = 0.0) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)

    def move(self, weight: Tensor, gradient: Tensor, memory: list[Tensor], group: dict[str, Any]) -> None:
        """One step of a weight."""
        (velocity,) = memory
        velocity.mul_(group["momentum"]).add_(gradient)
        weight.sub_(group["lr"] * velocity)


class Adam(Optimizer):
    """Adam (arXiv:1412.6980): each weight has a rate of its own, made of the size of its own gradients.

    m <- beta1 * m + (1 - beta1) * g          the mean of the last gradients (about 1 / (1 - beta1) of them),
    v <- beta2 * v + (1 - beta2) * g^2        and of their squares,
    w <- w - lr * m' / (sqrt(v') + eps)       with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) at step t.

    Both means start at 0 and are too small by exactly these factors after t steps; without the correction the first
    steps would be wrong by (1 - beta1) / sqrt(1 - beta2), about 3. The ratio has no unit: multiply the loss by 1000,
    and nothing changes. A step is about lr long, or less where the gradients do not agree.

    `weight_decay` here is the old way, L2: the gradient of weight_decay * |w|^2 / 2 is added to g.
    """

    memories = 2

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def move(self, weight: Tensor, gradient: Tensor, memory: list[Tensor], group: dict[str, Any]) -> None:
        """One step of a weight."""
        mean, square = memory
        gradient = gradient + group["weight_decay"] * weight
        mean.mul_(group["beta1"]).add_((1 - group["beta1"]) * gradient)
        square.mul_(group["beta2"]).add_((1 - group["beta2"]) * gradient.square())
        corrected = mean / (1 - group["beta1"] ** self.steps), square / (1 - group["beta2"] ** self.steps)
        weight.sub_(group["lr"] * corrected[0] / (corrected[1].sqrt() + group["eps"]))


class AdamW(Adam):
    """Adam with decoupled decay (arXiv:1711.05101): w <- (1 - lr * weight_decay) * w, beside Adam's step.

    With L2 the decay passes through Adam's division, so a weight with large gradients hardly decays. Decoupled, all
    weights decay alike, and the strength of the decay no longer hangs on the size of the loss.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.01, **more: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, **more)

    def move(self, weight: Tensor, gradient: Tensor, memory: list[Tensor], group: dict[str, Any]) -> None:
        """One step of a weight."""
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        super().move(weight, gradient, memory, group | {"weight_decay": 0.0})


def schedule(step: int, total: int, warmup: int = 0, shape: str = "cosine") -> float:
    """What the rate is multiplied by at a step, counted from 0.

    It rises over `warmup` steps, while Adam's mean of squares is still made of few gradients, and then falls towards 0
    at the end of the run: a large rate finds the valley, a small one its floor.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / (total - warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[shape]


@torch.no_grad()
def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shortens the gradient, all weights' as one vector, to `max_norm` and keeps its direction; returns its length."""
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def descend(make: Callable[[list[Tensor]], Optimizer], scale: float = 1.0, steps: int = 50) -> list[float]:
    """The loss, given times `scale`, at each step down a valley that is 100 times as steep across as along."""
    optimizer, losses = make([weight := torch.ones(2, requires_grad=True)]), []
    rate = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        loss = (torch.tensor([1.0, 100.0]) * weight.square()).sum() / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        (scale * loss).backward()
        optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
        optimizer.step()
    return losses


def decayed(make: Callable[[list[Tensor]], Optimizer]) -> list[float]:
    """What decay leaves of two weights of 1 whose gradients are noise, small for one and large for the other."""
    optimizer, random = make([weight := torch.ones(2, requires_grad=True)]), torch.Generator().manual_seed(0)
    for _ in range(500):
        weight.grad = torch.randn(2, generator=random) * torch.tensor([0.01, 10.0])
        optimizer.step()
    return weight.tolist()


def main() -> None:
    """Prints how the optimizers go down a valley, and what decay does in Adam and in AdamW."""
    print("loss in a valley, at step           0         10         25         49   at 49, loss * 1000")
    for name, make in {
        "SGD, lr 0.019": lambda weights: SGD(weights, lr=0.019),
        "momentum 0.8, lr 0.019": lambda weights: SGD(weights, lr=0.019, momentum=0.8),
        "Adam, lr 0.1": lambda weights: Adam(weights, lr=0.1),
    }.items():
        losses = [descend(make)[step] for step in (0, 10, 25, 49)] + [descend(make, scale=1000)[49]]
        print(f"{name:<26}" + "".join(f"{loss:11.2g}" for loss in losses))
    print("\nweights of 1 after 500 steps of noise as gradients     small gradients   large gradients")
    for name, make in {
        "Adam, L2 of 0.1": lambda weights: Adam(weights, lr=1e-3, weight_decay=0.1),
        "AdamW, decay of 1": lambda weights: AdamW(weights, lr=1e-3, weight_decay=1.0),
    }.items():
        print(f"{name:<50}" + "".join(f"{weight:18.2f}" for weight in decayed(make)))


if __name__ == "__main__":
    main()
