"""A critic: a model that says what return a state is worth, and how its values are read."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.policies.adapters import adapter_is_identity, has_adapter, merged_copy
from alignment_modules.policies.compiling import compile_as
from alignment_modules.policies.config import PolicyConfig, dtype_name, from_mapping
from alignment_modules.policies.forward import find_head, language_model
from alignment_modules.policies.input_start import is_marked, start_later
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.offloading import offload_as
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.quantization import carry_marks, carry_shapes, quantized_layers
from alignment_modules.policies.reading import Reading
from alignment_modules.policies.value_head import ValueHead
from alignment_modules.policies.weights import building_device


def build_critic(critic: str | PolicyConfig | nn.Module | None, policy: nn.Module) -> nn.Module:
    """Builds the critic of a policy, in training mode, its head in float32.

    Args:
        critic: A folder or hub id of a causal language model, whose new head starts at 0, or of a reward model, which
            keeps its head (loaded in the policy's dtype); a configuration, whose `head` is taken as "scalar"; a module
            that gives `[batch, time, 1]`; or None: a copy of the policy with a head that starts at 0 (and, where the
            policy has adapters, with fresh adapters of the same kind on its merged weights). A folder's model and a
            copy are compiled where the policy is.
        policy: The policy, built.

    Raises:
        ValueError: If it cannot be built, or None is given for a policy without hidden states.
    """
    as_policy = critic is None or isinstance(critic, (str, os.PathLike))
    if critic is None:
        model = _adapted_as(policy, scalar_copy(policy))
    else:
        if isinstance(critic, (str, os.PathLike)):
            critic = PolicyConfig(path=os.fspath(critic), dtype=dtype_name(policy))
        elif isinstance(critic, Mapping):
            critic = from_mapping(critic)
        if isinstance(critic, PolicyConfig):
            critic = replace(critic, head="scalar")
        try:
            model = build_policy(critic, head="scalar", zero_head=True)
        except (ValueError, ImportError) as error:
            raise type(error)(f"critic: {str(error).replace('policy.', 'critic.')}") from error
    prepare(model)
    if as_policy:
        offload_as(policy, compile_as(policy, model))
    inner = language_model(model)
    head = None if inner is None else find_head(inner)
    if head is not None and isinstance(head.linear, nn.Linear):
        head.linear.to(torch.promote_types(head.linear.weight.dtype, torch.float32))
    return model.train()


def scalar_copy(policy: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """A sequence classifier of one output with a policy's trunk, copied and merged, and a head `score` that is 0.

    Args:
        policy: A causal language model of transformers, also with peft adapters.
        dequantize: Whether a quantized trunk is copied in full precision, as it always is where its adapters have been
            trained; otherwise it stays quantized.

    Raises:
        ValueError: If the policy is another module, has no sequence classifier of its kind, or its adapters cannot be
            merged.
    """
    _head_of(policy, "critic=None is a copy of the policy with a scalar head")
    import transformers

    twin: Any
    if not has_adapter(policy):
        twin = copy.deepcopy(policy)
    elif quantized_layers(policy) and not dequantize and adapter_is_identity(policy):
        twin = copy.deepcopy(policy).unload()  # type: ignore[operator]
    else:
        twin = merged_copy(policy)
    if has_adapter(policy) and not dequantize and adapter_is_identity(policy):
        carry_shapes(policy.get_base_model(), twin)  # type: ignore[operator]
    config = twin.config
    config.num_labels = 1
    try:
        with torch.device("meta"):  # only the shell: neither drawn nor held
            shell: Any = transformers.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise ValueError(
            f"critic=None: {type(twin).__name__} has no sequence classifier that a copy could be ({error})"
        ) from error
    trunk: Any = twin.base_model
    setattr(shell, shell.base_model_prefix, trunk)
    width, like = shell.score.in_features, next(trunk.parameters())
    shell.score = nn.Linear(width, 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(shell.score.weight)
    shell.config = config  # the one that the trunk reads
    shell.name_or_path = config.name_or_path = ""  # these weights are on no disk
    carry_marks(twin, shell)
    return shell


def read_values(reading: Reading) -> Tensor:
    """A critic's values `[rows, time]` float32 of the targets, 0 elsewhere; differentiable.

    The value of a target is that of the state that predicts it: what is expected before its token is known.

    Raises:
        ValueError: If the critic gives more than one number for a token.
    """
    return reading.place(_numbers(reading, reading.targets))


def last_values(reading: Reading) -> Tensor:
    """A critic's values `[rows]` float32 of the rows' last states, 0 for a row without tokens.

    Raises:
        ValueError: As `read_values`, or if the last states were not asked for.
    """
    return _numbers(reading, reading.last) * reading.segments.has_last()


def _numbers(reading: Reading, states: Tensor) -> Tensor:
    outputs = reading.outputs(states)
    if outputs.shape[-1] != 1:
        raise ValueError(f"critic gives {outputs.shape[-1]} numbers for a token; a value is one: [batch, time, 1]")
    return outputs[:, 0]


def _adapted_as(policy: Any, model: nn.Module) -> nn.Module:
    """With fresh adapters such as the policy has; as it is where it has none."""
    if not has_adapter(policy):
        return model
    import peft

    adapter = copy.deepcopy(policy.peft_config[policy.active_adapter])
    adapter.task_type, adapter.base_model_name_or_path = "SEQ_CLS", None  # whose head is trained whole
    adapted: Any = peft.get_peft_model(model, adapter)
    adapted.adapter_lr_ratio = getattr(policy, "adapter_lr_ratio", 1.0)
    if is_marked(policy):
        start_later(adapted)
    return adapted


def shared_head(policy: nn.Module) -> ValueHead:
    """A value head on a policy's own trunk, starting at 0, on the policy's device.

    Raises:
        ValueError: If the policy's hidden states cannot be told from its outputs.
    """
    width = _head_of(policy, "critic='shared' is a head on the policy's trunk").in_features
    with building_device():
        return ValueHead(width)


def as_classifier(policy: nn.Module, head: ValueHead) -> nn.Module:
    """A copy of a shared trunk with its value head, as a sequence classifier, to be exported.

    Args:
        policy: The trunk.
        head: What `shared_head` gave.
    """
    twin: Any = scalar_copy(policy, dequantize=True)
    twin.score.to(head.weight.dtype)
    with torch.no_grad():
        twin.score.weight.copy_(head.weight[None])
    return twin


def _head_of(policy: nn.Module, what: str) -> nn.Linear:
    inner = language_model(policy)
    head = None if inner is None else find_head(inner)
    if head is None:
        raise ValueError(
            f"{what}, and the hidden states of {type(policy).__name__} cannot be told from its outputs: give a critic "
            "that gives one number for each token, [batch, time, 1]"
        )
    return head.linear  # type: ignore[return-value]
