"""What a run holds of weights, gradients and optimizer states, counted before it runs."""

from math import ceil
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from alignment_modules.cli.inspection.findings import Memory
from alignment_modules.policies.quantization import bytes_of
from alignment_modules.training.module import AlignmentModule


def measure_memory(module: AlignmentModule, processes: int = 1) -> Memory:
    """What weights, gradients, optimizer states and frozen models take through a run: an estimate of no activations.

    Bytes are counted; the optimizer's own by a step on gradients that, on the meta device, take no place.

    Args:
        module: The module, best built in `without_weights`. A module with a schedule needs its Trainer.
        processes: How many have weights, gradients and optimizer states in common.

    Raises:
        ValueError: If optimizer or schedule cannot be made for this module.
    """
    made: Any = module.configure_optimizers()
    made = made if isinstance(made, list) else [made]
    optimizers: list[Optimizer] = [entry["optimizer"] if isinstance(entry, dict) else entry for entry in made]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    policy = list(module.policy.parameters())
    return Memory(
        parameters=sum(parameter.numel() for parameter in policy),
        trained=sum(parameter.numel() for parameter in trained),
        weights=sum(_share(parameter, processes) for parameter in trained),
        # One optimizer steps after the other, and each step lets go of all gradients.
        gradients=max(_bytes_trained(entry, processes) for entry in module.trained().values()),
        optimizer=_state_bytes(optimizers, processes) if all(parameter.is_meta for parameter in trained) else None,
        frozen=sum(_share(p, processes) for p in module.parameters() if not p.requires_grad),
        optimizer_name=type(optimizers[0]).__name__,
        processes=processes,
    )


def _bytes_trained(entry: nn.Module, processes: int) -> int:
    return sum(_share(parameter, processes) for parameter in entry.parameters() if parameter.requires_grad)


def _share(tensor: Tensor, processes: int) -> int:
    """Bytes that the first of several processes holds of a tensor, whose rows are dealt to them."""
    rows = len(tensor) if tensor.dim() else 0
    return bytes_of(tensor) * ceil(rows / processes) // rows if rows else bytes_of(tensor)


def _state_bytes(optimizers: list[Optimizer], processes: int) -> int | None:
    total = 0
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        try:
            optimizer.step()
        except Exception:  # one that looks at numbers, or needs a closure
            return None
        held = [value for state in optimizer.state.values() for value in state.values()]
        total += sum(_share(value, processes) for value in held if isinstance(value, Tensor))
        optimizer.zero_grad(set_to_none=True)
    return total
