"""Adapters that start from what their layers read: EVA.

EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170) starts the rows of each `A` `[r, in]` at the right singular
vectors of the layer's inputs `X` `[tokens, in]` with the largest singular values, and `B` at 0. So the policy starts as
its base, and the first updates fall where the data varies most.

The paper approximates the vectors batch by batch until they settle. Here they are exact, as eigenvectors of `X^T X`,
which is summed over batches and processes. Each layer keeps its rank (the paper's rho is 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.adapters import lora_layers
from alignment_modules.policies.compiling import without_graphs
from alignment_modules.policies.forward import find_head, language_model, padded_states
from alignment_modules.policies.modes import reading_mode
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.sharded import agreed, cut_as, forward_pass, local

_MARK = "adapters_start_from_inputs"
_HELD = 2**30  # bytes of `X^T X` at once; more of them take more passes


def starts_from_inputs(init: str) -> bool:
    """Whether an initialisation takes its adapters from what their layers read."""
    return init == "eva"


def start_later(model: nn.Module) -> None:
    """Marks a model with fresh adapters as one that `find_waiting` finds.

    Args:
        model: A `peft.PeftModel`.

    Raises:
        ValueError: A layer is of another kind than a linear one, or reads fewer numbers than the rank.
    """
    for path, layer, name in _trained(model):
        if not isinstance(dict(layer.lora_A.items()).get(name), nn.Linear):
            raise ValueError(
                f"lora.init='eva' is for linear layers, and {path!r} is a {type(layer.get_base_layer()).__name__}: "
                "leave it out of lora.target_modules, or use lora.init='kaiming'"
            )
        if layer.r[name] > layer.in_features:
            raise ValueError(
                f"lora.r={layer.r[name]} with lora.init='eva': {path!r} reads {layer.in_features} numbers a token, "
                "which have as many directions; use at most that, or lora.init='kaiming'"
            )
    setattr(model, _MARK, True)


def is_marked(model: nn.Module) -> bool:
    """Whether a model's adapters start, or have started, from inputs."""
    return getattr(model, _MARK, False)


def find_waiting(module: nn.Module) -> dict[str, nn.Module]:
    """The models in a module whose adapters are to start from inputs and have not been trained, by name."""
    return {
        name: model
        for name, model in module.named_modules()
        if is_marked(model) and (layers := _trained(model)) and agreed(model, all(map(_is_fresh, layers)))
    }


def _trained(model: nn.Module) -> list[tuple[str, Any, str]]:
    """The layers with adapters that are trained: path, layer and the adapter's name."""
    found = [(path, layer, name) for path, layer in lora_layers(model) for name in layer.active_adapters]
    return [(path, layer, name) for path, layer, name in found if any(p.requires_grad for p in _of(layer, name))]


def _of(layer: Any, name: str) -> Iterator[nn.Parameter]:
    return (p for key, p in layer.named_parameters() if key.startswith("lora_") and key.split(".")[1] == name)


def _is_fresh(entry: tuple[str, Any, str]) -> bool:
    _, layer, name = entry
    return not bool(local(layer.lora_B[name].weight.detach()).any())


def input_directions(
    model: nn.Module, texts: Sequence[Segments | None], total: Callable[[Tensor], Tensor] = lambda values: values
) -> dict[str, Tensor]:
    """What the adapters of a model start with: the main directions of what their layers read.

    Nothing is drawn, and modes, weights and gradients stay as they are. Of a layer's inputs a matrix `[in, in]` is held
    in float64, 1 GiB of these in a pass over the texts; layers that read the same tensor share one.

    Args:
        model: With adapters for which `start_later` was called.
        texts: What is read, on the model's device, one forward pass each; None: nothing, while other processes read
            something. Their number is the same on all processes.
        total: Sums a tensor over the processes.

    Returns:
        By the layer's path `[r, in]` float32 on the host, orthonormal rows, that of the largest singular value first;
        the largest number of a row is positive.

    Raises:
        ValueError: There are fewer tokens than the rank, or a layer reads tokens apart from their rows.
    """
    ranks = {path: layer.r[name] for path, layer, name in _trained(model)}
    read = torch.tensor(sum(text.tokens for text in texts if text is not None), device=_device(model))
    tokens, largest = int(total(read)), max(ranks.values())
    if tokens < largest:
        raise ValueError(
            f"lora.init='eva' with lora.r={largest}: the first batch holds {tokens} tokens that are read, and as many "
            "directions as the rank are needed: give larger batches, or use lora.init='kaiming'"
        )
    layers = {path: layer for path, layer, _ in _trained(model)}
    found: dict[str, Tensor] = {}
    with reading_mode(model), without_graphs(model):
        together = _readers_of_one(model, layers, texts[0])
        for leaders in _batches({path: layers[path].in_features for path in together}):
            for leader, moments in _second_moments(model, {path: layers[path] for path in leaders}, texts).items():
                vectors = torch.linalg.eigh(total(moments)).eigenvectors.T.flip(0)
                for path in together[leader]:
                    found[path] = _signed(vectors[: ranks[path]]).float().cpu()
    if absent := [path for path in layers if path not in found]:
        raise ValueError(
            f"lora.init='eva': {absent[0]!r} read nothing of the first batch, and has no directions to start from: "
            "leave it out of lora.target_modules, or use lora.init='kaiming'"
        )
    return found


@torch.no_grad()
def set_directions(model: nn.Module, directions: Mapping[str, Tensor]) -> None:
    """Starts adapters with what `input_directions` found.

    Args:
        model: The same, or its twin on another process.
        directions: By the layer's path `[r, in]`.
    """
    for path, layer, name in _trained(model):
        weight = layer.lora_A[name].weight
        weight.copy_(cut_as(directions[path].to(weight), weight))


def _readers_of_one(model: nn.Module, layers: Mapping[str, nn.Module], text: Segments | None) -> dict[str, list[str]]:
    """Which layers are given one tensor, by the first of them."""
    found: dict[str, list[str]] = {}
    last: list[tuple[Any, str]] = [(None, "")]

    def note(path: str, inputs: Tensor) -> None:
        if inputs is not last[0][0]:
            last[0] = (inputs, path)
        if not any(path in others for others in found.values()):
            found.setdefault(last[0][1], []).append(path)

    with _listening(layers, note):
        _run(model, text)
    return found


def _batches(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """The layers in groups whose matrices may be held at once."""
    group: list[str] = []
    for path, width in widths.items():
        if group and sum(8 * widths[one] ** 2 for one in group) + 8 * width**2 > _HELD:
            yield group
            group = []
        group.append(path)
    yield group


def _second_moments(model: nn.Module, layers: Mapping[str, Any], texts: Sequence[Segments | None]) -> dict[str, Tensor]:
    """Of each layer `X^T X` `[in, in]` float64 of this process's texts."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": _device(model)}
    sums = {path: torch.zeros(layer.in_features, layer.in_features, **options) for path, layer in layers.items()}
    for text in texts:
        real = None if text is None else text.padded()[1] != 0

        def add(path: str, inputs: Tensor, real: Tensor | None = real) -> None:
            if real is not None:
                rows = _real_rows(path, inputs, real).to(**options)
                sums[path].addmm_(rows.T, rows)

        with _listening(layers, add):
            _run(model, text)
    return sums


def _real_rows(path: str, inputs: Tensor, real: Tensor) -> Tensor:
    """What a layer reads of tokens that are no padding, `[tokens, in]`."""
    if inputs.shape[:-1] == real.shape:
        return inputs[real]
    if inputs.dim() == 3 and len(inputs) == 1:  # a row that is read by itself has no padding
        return inputs[0]
    raise ValueError(
        f"lora.init='eva': {path!r} reads tokens apart from their rows, so that padding cannot be told: leave it out "
        "of lora.target_modules, or use lora.init='kaiming'"
    )


@contextmanager
def _listening(layers: Mapping[str, nn.Module], listener: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block the listener is told what each of the layers reads."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: listener(path, inputs[0]))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, text: Segments | None) -> None:
    """One forward pass over a text's rows; over a stand-in where there is none."""
    if text is None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=_device(model))
        text = Segments.from_labels(token, token, reads="last")
    hidden = prepare(model).hidden_states and find_head(language_model(model)) is not None
    forward_pass(model, lambda: padded_states(model, text, hidden=hidden).read)


def _device(model: nn.Module) -> torch.device:
    return local(next(model.parameters())).device


def _signed(vectors: Tensor) -> Tensor:
    """Either sign is a singular vector: that with which the largest number is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()
