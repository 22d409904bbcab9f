"""What a policy specification may say, and whether it contradicts itself."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from alignment_modules.functional.ranges import check_options as check_types
from alignment_modules.policies.adapter_start import starts_from_base
from alignment_modules.policies.lora import LoraConfig
from alignment_modules.policies.quantization import Quantization, check_kind, check_packages
from alignment_modules.policies.recomputing import Recomputed

_log = logging.getLogger(__name__)

Head = Literal["lm", "scalar"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class PolicyConfig:
    """Where a language model comes from and how it is held. Give exactly one of `path` and `config`.

    Attributes:
        path: Folder in Hugging Face format, or a hub id. A folder that holds a PEFT adapter is loaded by merging it
            into its base, unless `merge_adapter` is off.
        config: Architecture of a fresh model: `model_type` (for example `llama`) and any key of that type's
            configuration. Weights are drawn from the global torch seed. Token ids that are not given are none,
            whatever the type's own defaults.
        dtype: "float32", "bfloat16", "float16", "float64", or, with `path`, "auto" for the type that the weights are
            stored in.
        attn_implementation: An attention that transformers knows, such as "sdpa" or "eager"; none leaves the choice to
            transformers.
        lora: Train low-rank adapters and freeze the rest.
        trainable: Train only the parameters whose full names match one of these patterns of the shell, such as
            `model.layers.3.*`; none: all. Not with `lora`, which trains adapters.
        frozen: Patterns of parameters that are not trained, of those that `trainable` leaves.
        quantization: Holds the linear layers but the head in fewer bits, for a frozen base under `lora`, or for a model
            that is not trained: "4bit" (NF4, double quantization) or "8bit" (LLM.int8(), which also rounds activations)
            through bitsandbytes, or "int8_weight_only" through torchao.
        gradient_checkpointing: Recompute activations in the backward pass; less memory, more time. True: those of each
            layer, about a third more time. "selective": all but the results of each layer's matrix products and of its
            attention. A number n of 2 or more: those of each n-th layer.
        activation_offloading: Keep what the backward pass needs in the host's memory until then; less memory of the
            accelerator, more time. With `gradient_checkpointing` these are the inputs of the layers.
        compile: Compile the forward pass of each layer with `torch.compile`, for training and scoring; completions are
            drawn without it. The first steps wait for the C++ compiler, which must be there.
        head: "lm" gives the distribution of the next token, "scalar" one number for each state (a reward or a value),
            by a linear map without bias, `score.weight` `[1, hidden]`. The folder of a sequence-classification model of
            one output keeps its own; any other model gets a fresh one, normal with variance 1 / (hidden + 1)
            (arXiv:2009.01325), drawn from the global torch seed. Under `lora` it is trained whole.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run model code that comes with `path`. Only for code that you have read.
        added_tokens: Tokens that the policy is to know beside those of `path`, such as a chat template's. Each new one
            starts as the mean of the rows that are there; under `lora` the rows of all that are named are trained
            beside the adapters. The data's tokenizer must know them, too (`added_tokens` of a data module).
        merge_adapter: Whether the adapter of a `path` that holds one is merged into its base. Off, it stays an adapter:
            of the policy it is trained further, its base frozen; a reference or teacher shares the base of a policy
            with adapters, which is loaded once, and has the policy's dtype and quantization.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    lora: LoraConfig | None = None
    trainable: list[str] | None = None
    frozen: list[str] | None = None
    quantization: Quantization | None = None
    gradient_checkpointing: Recomputed = False
    activation_offloading: bool = False
    compile: bool = False
    head: Head = "lm"
    revision: str | None = None
    trust_remote_code: bool = False
    added_tokens: list[str] | None = None
    merge_adapter: bool = True


def from_mapping(values: Mapping[str, Any]) -> PolicyConfig:
    """Makes a configuration of the mapping that a checkpoint's hyperparameters hold.

    Raises:
        ValueError: A key is not an option.
    """
    known = [f.name for f in fields(PolicyConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"policy has no option {unknown[0]!r}; allowed are {known}.")
    options = dict(values)
    if isinstance(options.get("lora"), Mapping):
        options["lora"] = LoraConfig(**options["lora"])
    return PolicyConfig(**options)


def check_options(policy: PolicyConfig, trainable: bool) -> None:
    """Refuses values that are out of range and options that contradict each other or would have no effect.

    Args:
        policy: The specification.
        trainable: Whether the model is to be trained.

    Raises:
        ValueError: The message names the option, its value and what is allowed.
        ImportError: `quantization` without its package.
    """
    if isinstance(policy.quantization, str):
        check_kind(policy.quantization)
    check_types(PolicyConfig, vars(policy), "policy.")
    if (policy.path is None) == (policy.config is None):
        given = "both are" if policy.path is not None else "neither is"
        raise ValueError(
            "policy takes exactly one of 'path' (a folder or hub id) and 'config' (a fresh model's architecture); "
            f"{given} given."
        )
    if policy.path is not None and not policy.path.strip():
        raise ValueError(f"policy.path={policy.path!r} is empty; give a folder in Hugging Face format or a hub id.")
    if policy.dtype not in DTYPES and not (policy.dtype == "auto" and policy.path is not None):
        raise ValueError(f"policy.dtype={policy.dtype!r}: allowed are {list(DTYPES)}, and 'auto' together with 'path'.")
    if policy.dtype == "float16" and trainable and policy.lora is None and policy.merge_adapter:
        raise ValueError(
            "policy.dtype='float16' cannot be trained: updates of float16 weights underflow. Use 'float32' with "
            "Trainer(precision='bf16-mixed'), or 'bfloat16'; a reference, or a base under lora, may be float16."
        )
    _check_compile(policy)
    if policy.activation_offloading and not trainable:
        raise ValueError("policy.activation_offloading=True has no effect: this model is never trained; leave it out.")
    if policy.quantization is not None:
        _check_quantization(policy, trainable)
    _check_added_tokens(policy)
    if not policy.merge_adapter:
        _check_kept_adapter(policy)
    _check_part(policy, trainable)
    if policy.lora is not None and not trainable:
        raise ValueError(
            "reference.lora: a fresh adapter changes nothing and a reference is never trained; leave 'lora' out."
        )
    if policy.config is not None:
        for name in ("revision", "trust_remote_code"):
            if getattr(policy, name):
                raise ValueError(
                    f"policy.{name}={getattr(policy, name)!r} has no effect with 'config'; it belongs to 'path'."
                )
    elif policy.revision is not None and Path(str(policy.path)).expanduser().is_dir():
        raise ValueError(
            f"policy.revision={policy.revision!r} has no effect for the local folder {policy.path!r}; it belongs to a "
            "hub id."
        )


def _check_compile(policy: PolicyConfig) -> None:
    if not policy.compile:
        return
    if policy.gradient_checkpointing == "selective":
        raise ValueError(
            "policy.gradient_checkpointing='selective' would have no effect with policy.compile=True: a compiled layer "
            "shows no single product that could be kept. Allowed beside it are true, false and a number."
        )
    if policy.quantization is not None:
        raise ValueError(
            f"policy.compile=True is not for quantized layers (policy.quantization={policy.quantization!r}): leave one "
            "of the two out."
        )


def _check_quantization(policy: PolicyConfig, trainable: bool) -> None:
    given = f"policy.quantization={policy.quantization!r}"
    if policy.config is not None:
        raise ValueError(f"{given} needs 'path': a fresh model has no trained weights to quantize.")
    if trainable and policy.lora is None:
        raise ValueError(f"{given} needs 'lora': quantized weights cannot be trained themselves.")
    if policy.dtype == "float64":
        raise ValueError(
            f"{given} with policy.dtype='float64': quantized layers compute in 'float32', 'bfloat16' or 'float16'."
        )
    if policy.lora is not None and starts_from_base(policy.lora.init):
        raise ValueError(
            f"policy.lora.init={policy.lora.init!r} with {given}: it starts from weights that are not quantized; use "
            "init='kaiming', or leave quantization out."
        )
    check_packages(str(policy.quantization))


def _check_kept_adapter(policy: PolicyConfig) -> None:
    for name, why in (
        ("config", "a fresh model has no saved adapter"),
        ("lora", "fresh adapters would be trained beside it; leave one of the two out"),
        ("added_tokens", "its base would be another model; train with tokens added to the merged model"),
        ("trainable", "the adapter alone is trained"),
        ("frozen", "the adapter alone is trained"),
    ):
        if getattr(policy, name) is not None:
            raise ValueError(f"policy.merge_adapter=False contradicts policy.{name}: {why}.")


def _check_added_tokens(policy: PolicyConfig) -> None:
    tokens = policy.added_tokens
    if tokens is None:
        return
    if policy.config is not None:
        raise ValueError(
            f"policy.added_tokens={tokens!r} needs 'path': a fresh model has no tokenizer; give it a vocab_size that "
            "holds them, and the data `added_tokens`."
        )
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            raise ValueError(
                f"policy.added_tokens={tokens!r}: {token!r} is {'blank' if not token.strip() else 'named twice'}."
            )


def _check_part(policy: PolicyConfig, trainable: bool) -> None:
    for name in ("trainable", "frozen"):
        patterns = getattr(policy, name)
        if patterns is None:
            continue
        given = f"policy.{name}={patterns!r}"
        if not patterns:
            raise ValueError(f"{given} is empty: give patterns of parameter names such as 'model.layers.3.*'.")
        if not trainable:
            raise ValueError(f"{given} has no effect: this model is never trained; leave it out.")
        if policy.lora is not None:
            raise ValueError(
                f"{given} contradicts policy.lora, under which the adapters alone are trained: choose them by "
                "lora.target_modules and lora.exclude_modules, and what is trained whole by lora.modules_to_save."
            )


def resolve_folder(path: str, name: str = "path") -> str:
    """Tells a local folder from a hub id.

    Args:
        path: Folder (with `~` allowed) or hub id.
        name: What to call it in an error.

    Returns:
        The folder with `~` expanded, or the hub id unchanged.

    Raises:
        ValueError: It can only be a folder, and there is none.
    """
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        return str(expanded)
    if (
        path.count("/") > 1
        or path.startswith((".", "~", "/"))
        or path.endswith("/")
        or "\\" in path
        or expanded.exists()
    ):
        found = "a file, not a folder" if expanded.exists() else "missing"
        raise ValueError(
            f"{name}={path!r} is {found} (looked at {expanded.absolute()}). Give a folder in Hugging Face format or a "
            "hub id."
        )
    _tell_of_folder(path, name)
    return path


@functools.cache
def _tell_of_folder(path: str, name: str) -> None:
    """Says once that a folder which could have been meant is not there: asking a hub out of reach takes long."""
    above = Path(path).parent
    if path.count("/") == 1 and above.is_dir():
        there = sorted(entry.name for entry in above.iterdir() if entry.is_dir())[:10]
        _log.warning("%s=%r: no such folder; %s/ holds %s. It is taken for a hub id.", name, path, above, there)


def adapter_config(path: str, revision: str | None) -> dict[str, Any] | None:
    """What a folder's or hub id's adapter_config.json says; None where it holds no adapter.

    Raises:
        ValueError: The file is not valid JSON.
    """
    if Path(path).is_dir():
        file: Path | str | None = Path(path) / "adapter_config.json"
        if not Path(str(file)).is_file():
            return None
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        try:
            file = find_adapter_config_file(path, revision=revision)
        except OSError:  # not on the hub either: loading the model says what is wrong
            return None
        if file is None:
            return None
    try:
        return json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}") from error


def check_holds_adapter(policy: PolicyConfig, path: str) -> None:
    """Refuses `merge_adapter=False` for a folder or hub id without an adapter, where it would have no effect.

    Raises:
        ValueError: Naming the folder.
    """
    if not policy.merge_adapter:
        raise ValueError(
            f"policy.merge_adapter=False has no effect: {path!r} holds no adapter (adapter_config.json). Leave it out, "
            "or give the folder of an adapter."
        )


def dtype_name(policy: nn.Module) -> str:
    """The name of the type that a module's weights have, for a model that is to go with it; else "float32"."""
    names = {dtype: known for known, dtype in DTYPES.items()}
    dtype = next((p.dtype for p in policy.parameters() if p.is_floating_point()), torch.float32)
    return names.get(dtype, "float32")


def listing(folder: Path) -> list[str]:
    """What a folder holds, for a message: at most 12 names."""
    names = sorted(entry.name for entry in folder.iterdir())
    return names if len(names) <= 12 else [*names[:12], f"and {len(names) - 12} more"]
