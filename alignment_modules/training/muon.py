"""Muon for a model's hidden matrices and AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from alignment_modules.functional.ranges import NonNegative, Positive, Range, check_options
from alignment_modules.training.parameter_groups import ParameterGroups

MUON = "muon"
"""Name of the parameter groups that Muon steps."""


class MuonWithAdamW(Optimizer):
    """torch's Muon for hidden matrices (arXiv:2502.16982), torch's AdamW for every other parameter.

    A hidden matrix maps hidden states to hidden states: a parameter of two dimensions that belongs neither to the
    embedding nor to the head and has more than one row and column. Its step is its momentum, orthogonalised by a
    Newton-Schulz iteration in bfloat16, so that every direction is moved as far. The factors A and B of LoRA are such
    matrices, each orthogonalised for itself. Embeddings, heads, biases, norms, and the experts of a mixture that are
    held in one tensor go to AdamW.

    The matrices' groups are called "muon" and stand first; the others keep their names ("decay", "no_decay").

    Args:
        params: What a module of this library hands its optimizer (`parameter_groups(module)`); or groups with names,
            of which those called "muon" hold the matrices.
        lr: Learning rate of both. With `adjust_lr_fn="match_rms_adamw"` one that suits AdamW suits Muon, too.
        weight_decay: Decoupled weight decay of both; a group may have its own, as biases and norms do.
        momentum: Share of Muon's momentum that a step keeps, within [0, 1).
        nesterov: Whether Muon looks ahead along its momentum.
        ns_steps: Newton-Schulz iterations of a step.
        adjust_lr_fn: How a matrix of n rows and m columns scales Muon's rate: "match_rms_adamw", by
            `0.2 sqrt(max(n, m))`, which gives steps of AdamW's size; "original", by `sqrt(max(1, n / m))`.
        adamw_lr_ratio: AdamW's rate as a multiple of `lr`; for "original", whose rates are larger.
        betas: AdamW's decay rates of the gradient's first and second moment, each within [0, 1).
        eps: Added to AdamW's denominator.

    Raises:
        ValueError: An option is out of range, there is no matrix for Muon, a matrix is sharded (FSDP2), or the
            parameters come without names.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.1,
        momentum: Annotated[float, Range(0, 1, "[)")] = 0.95,
        nesterov: bool = True,
        ns_steps: Annotated[int, Range(1, 99)] = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        adamw_lr_ratio: Positive = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: Positive = 1e-8,
    ) -> None:
        check_options(MuonWithAdamW.__init__, locals())
        if (
            not isinstance(betas, list | tuple)
            or len(betas) != 2
            or any(beta not in Range(0, 1, "[)") for beta in betas)
        ):
            raise ValueError(f"betas={betas!r} must be two finite numbers in [0, 1)")
        groups = _split(params)
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"lr": lr * adamw_lr_ratio, "betas": betas, "eps": eps}
        filled = [(muon if group["name"] == MUON else adamw) | group for group in groups]
        super().__init__(filled, {"lr": lr, "weight_decay": weight_decay})
        for _ in self._parts():  # torch checks the options, and fills in those that are its own
            pass

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; parameters without a gradient stay as they are.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.step()
        return loss

    def describe(self) -> str:
        """How much each of the two moves, for people."""
        counts = []
        for label, inside in (("Muon", True), ("AdamW", False)):
            held = [p for group in self.param_groups if (group["name"] == MUON) is inside for p in group["params"]]
            counts.append(f"{label} for {len(held)} tensors ({sum(p.numel() for p in held):,} parameters)")
        return ", ".join(counts)

    def _parts(self) -> Iterator[Optimizer]:
        """Torch's own two over these groups and this state: they hold nothing themselves."""
        for kind, inside in ((Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if (group["name"] == MUON) is inside]
            if groups:
                part: Any = kind(groups)
                part.state = self.state
                yield part


def _split(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups with names, Muon's first."""
    groups = params.split(MUON) if isinstance(params, ParameterGroups) else list(params)
    if any(not isinstance(group, dict) or "name" not in group for group in groups):
        raise ValueError(
            "params: MuonWithAdamW cannot tell hidden matrices from embeddings and heads; give "
            "parameter_groups(module), or groups such as {'name': 'muon', 'params': matrices} and "
            "{'name': 'adamw', 'params': others}"
        )
    matrices: list[Tensor] = [p for group in groups if group["name"] == MUON for p in group["params"]]
    if not matrices:
        raise ValueError(
            "optimizer=MuonWithAdamW has no hidden matrix to step: nothing of two dimensions is trained beside "
            "embeddings and heads; use torch.optim.AdamW"
        )
    if sharded := [p for p in matrices if hasattr(p, "full_tensor")]:
        raise ValueError(
            f"optimizer=MuonWithAdamW is not allowed with sharded weights (a {type(sharded[0]).__name__} of shape "
            f"{tuple(sharded[0].shape)}): Muon orthogonalises whole matrices. Use torch.optim.AdamW, or strategy ddp"
        )
    if odd := [p for p in matrices if p.ndim != 2]:
        raise ValueError(f"params: the group 'muon' holds a tensor of shape {tuple(odd[0].shape)}; Muon takes matrices")
    return groups
