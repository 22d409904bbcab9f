"""Policies from a folder, a hub id or a configuration, and their tokenizers.

`transformers` is imported when something is loaded, never by importing this module. Only safetensors are read, and
code that comes with a model runs only where `trust_remote_code` asks for it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alignment_modules.policies.adapter_folders import attach_adapter_folder, merge_adapter_folder
from alignment_modules.policies.added_tokens import add_tokens
from alignment_modules.policies.architecture import check_text_only, warn_of_left_out_losses
from alignment_modules.policies.compiling import compile_layers
from alignment_modules.policies.config import (
    DTYPES,
    Head,
    PolicyConfig,
    adapter_config,
    check_holds_adapter,
    check_options,
    from_mapping,
    listing,
    resolve_folder,
)
from alignment_modules.policies.export import read_note
from alignment_modules.policies.forward import classifies, language_model
from alignment_modules.policies.lora import LoraConfig, add_lora
from alignment_modules.policies.offloading import offload_activations
from alignment_modules.policies.parts import train_part
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.quantization import check_stored, loading_options, mark_shapes, quantized_layers, settle
from alignment_modules.policies.recomputing import enable_checkpointing, free_embedding_output
from alignment_modules.policies.router import COEFFICIENT, find_router
from alignment_modules.policies.tokenizers import check_vocabulary, load_tokenizer, vocabulary_size
from alignment_modules.policies.weights import building_device, read_model, shapes_only, start_head

__all__ = [
    "LoraConfig",
    "PolicyConfig",
    "build_policy",
    "check_head",
    "check_vocabulary",
    "is_fresh",
    "load_tokenizer",
    "vocabulary_size",
]

logger = logging.getLogger(__name__)


def is_fresh(policy: Any) -> bool:
    """Whether a policy specification makes a model of random weights, which are not there to be loaded once more."""
    config = policy.get("config") if isinstance(policy, Mapping) else getattr(policy, "config", None)
    return config is not None and not isinstance(policy, nn.Module)


def build_policy(
    policy: str | PolicyConfig | nn.Module,
    *,
    trainable: bool = True,
    head: Head | None = None,
    merge: bool = True,
    balanced: bool = False,
    zero_head: bool = False,
) -> nn.Module:
    """Gives the module that a policy specification describes, ready to be read (see `policies.probing`).

    Args:
        policy: A folder or hub id, a configuration (a mapping with its fields is accepted too), or a module, which is
            returned as it is.
        trainable: Whether the module is to be trained; a quantized model without LoRA is refused then.
        head: The head that is needed: "lm" or "scalar". A path alone gets it; what comes with another is refused. None:
            any will do.
        merge: Whether the adapter of a folder that holds one is merged into its base; otherwise it is attached, frozen,
            and can be switched off.
        balanced: Whether the load-balancing loss of a mixture of experts is added where `find_router` finds one;
            otherwise a warning says that it is left out.
        zero_head: Whether a scalar head that comes with no weights starts at 0, as a critic's; otherwise it is drawn.

    Returns:
        The module, on the CPU, in training mode as any new `nn.Module` (a module given ready stays as it was).

    Raises:
        ValueError: The specification contradicts itself, or the model cannot be loaded or built from it.
        ImportError: `quantization` without its package.
    """
    with building_device():
        model = _build(policy, trainable, head, merge, zero_head)
    check_head(model, head)
    prepare(model)
    if trainable:
        warn_of_left_out_losses(model, [COEFFICIENT] if balanced and find_router(model) is not None else [])
    return model


def check_head(model: nn.Module, head: Head | None) -> None:
    """Refuses a transformers model with another head than the one needed; other modules cannot be told.

    Args:
        model: The policy.
        head: "lm", "scalar" (of one output), or None for any.

    Raises:
        ValueError: If it has the other one, or gives several numbers for a text.
    """
    inner = language_model(model)
    if inner is None or head is None:
        return
    if classifies(inner) != (head == "scalar"):
        wanted = "a scalar head" if head == "scalar" else "a language-modelling head"
        raise ValueError(
            f"policy={type(inner).__name__} has no {wanted.partition(' ')[2]}; {wanted} is needed here: "
            f"PolicyConfig(head={head!r})"
        )
    if head == "scalar" and inner.config.num_labels != 1:
        raise ValueError(
            f"policy={type(inner).__name__} gives {inner.config.num_labels} numbers for a text (num_labels of its "
            "configuration); a scalar head gives one"
        )


def _build(
    policy: str | PolicyConfig | nn.Module, trainable: bool, head: Head | None, merge: bool, zero_head: bool
) -> nn.Module:
    if isinstance(policy, nn.Module):
        config: Any = getattr(policy, "config", None)
        if hasattr(config, "to_dict"):
            check_text_only(config.to_dict(), f"policy={type(policy).__name__}")
        return policy
    if isinstance(policy, (str, os.PathLike)):
        policy = PolicyConfig(path=os.fspath(policy), head=head or "lm")
    elif isinstance(policy, Mapping):
        policy = from_mapping(policy)
    elif not isinstance(policy, PolicyConfig):
        raise ValueError(
            f"policy={policy!r} of type {type(policy).__name__}: allowed are a path, a PolicyConfig or a "
            "torch.nn.Module."
        )
    check_options(policy, trainable)
    if head not in (None, policy.head):
        raise ValueError(f"policy.head={policy.head!r}: {head!r} is needed here")
    model = _load(policy, merge, zero_head, trainable) if policy.path is not None else _fresh(policy, zero_head)
    new_tokens: list[str] = []
    if policy.added_tokens:
        tokenizer = load_tokenizer(
            str(policy.path), trust_remote_code=policy.trust_remote_code, revision=policy.revision
        )
        if add_tokens(model, tokenizer, policy.added_tokens):
            if policy.quantization is not None:
                raise ValueError(
                    f"policy.added_tokens={policy.added_tokens!r} with policy.quantization={policy.quantization!r}: "
                    "what is trained could not be exported, since the base with these tokens is on no disk. Write that "
                    "base first (`export_policy`), without quantization, and train from its folder."
                )
            _forget_folder(model)
            new_tokens = policy.added_tokens
    if policy.trainable is not None or policy.frozen is not None:
        train_part(model, policy.trainable, policy.frozen, new_tokens=new_tokens)
    if policy.gradient_checkpointing:
        enable_checkpointing(model, policy.gradient_checkpointing)
    if policy.lora is not None:
        if policy.config is not None:
            logger.warning("lora on a fresh model: the adapters are trained on top of random weights that stay frozen.")
        model = add_lora(model, policy.lora)
    if policy.gradient_checkpointing:
        free_embedding_output(model)
    if policy.compile:
        compile_layers(model)
    if policy.activation_offloading:
        offload_activations(model)
    return model.train()


def _load(policy: PolicyConfig, merge: bool, zero_head: bool, trainable: bool) -> nn.Module:
    frozen = policy.lora is not None or not trainable or not (merge and policy.merge_adapter)
    path = resolve_folder(str(policy.path), "policy.path")
    adapter = adapter_config(path, policy.revision)
    if adapter is None:
        check_holds_adapter(policy, path)
        return _from_pretrained(path, policy, policy.revision, zero_head, frozen)
    if adapter.get("task_type") == "SEQ_CLS" and policy.head == "lm":
        raise ValueError(
            f"policy.path={path!r} holds the adapter of a sequence classifier: policy.head='scalar' reads it"
        )
    merge = merge and policy.merge_adapter
    if policy.quantization is not None and merge:
        raise ValueError(
            f"policy.quantization={policy.quantization!r}: {path!r} holds an adapter, and merging it into quantized "
            "weights would round it away. Load it without quantization, export it merged, and quantize that folder, or "
            "train it further with policy.merge_adapter=false."
        )
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{path!r} holds an adapter whose adapter_config.json names no base model (base_model_name_or_path)."
        )
    try:
        base = resolve_folder(base, "base_model_name_or_path")
        model = _from_pretrained(base, policy, adapter.get("revision"), zero_head, frozen)
    except ValueError as error:
        raise ValueError(f"The base model of the adapter in {path!r} cannot be loaded: {error}") from error
    if not merge:
        return attach_adapter_folder(model, path, policy.revision, trainable=trainable)
    if quantized_layers(model):
        raise ValueError(
            f"policy.path={path!r} holds an adapter on weights that are stored quantized, and merging would round it "
            "away: policy.merge_adapter=false keeps it an adapter."
        )
    if not shapes_only():  # a merged adapter leaves every shape as it was
        model = merge_adapter_folder(model, path, policy.revision)
    _forget_folder(model)
    return model


def _forget_folder(model: Any) -> None:
    """These weights exist nowhere on disk: a later adapter must not claim the folder's as its base."""
    model.name_or_path = model.config.name_or_path = ""


def _from_pretrained(path: str, policy: PolicyConfig, revision: str | None, zero_head: bool, frozen: bool) -> nn.Module:
    _check_model_folder(path)
    import transformers

    config = _raw_config(path, revision)
    check_text_only(config, f"policy.path={path!r}")
    check_stored(config, path, policy.quantization, frozen=frozen)
    classifier = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    if classifier and policy.head == "lm":
        raise ValueError(
            f"policy.path={path!r}: its model is a sequence classifier, which has no distribution of the next token; "
            "give a language model, or policy.head='scalar' for a reward model"
        )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if policy.attn_implementation is not None:
        options["attn_implementation"] = policy.attn_implementation
    if policy.quantization is not None:
        options |= loading_options(policy.quantization, DTYPES.get(policy.dtype))
    if policy.head == "scalar":
        auto, kind = transformers.AutoModelForSequenceClassification, "sequence-classification model"
        options |= {} if classifier else {"num_labels": 1}
    else:
        auto, kind = transformers.AutoModelForCausalLM, "causal language model"
    try:
        dtype = DTYPES.get(policy.dtype, "auto")
        model, report = read_model(auto, path, dtype=dtype, trust_remote_code=policy.trust_remote_code, **options)
    except Exception as error:  # transformers raises almost every type here, from OSError to SafetensorError
        where = (
            "the folder"
            if Path(path).is_dir()
            else f"neither a folder (looked at {Path(path).absolute()}) nor loadable from the hub:"
        )
        hint = (
            " Set policy.trust_remote_code=true to run code that comes with the model."
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ValueError(
            f"policy.path={path!r}: {where} cannot be loaded as a {kind}.{hint} ({type(error).__name__}: {error})"
        ) from error
    # transformers draws missing weights at random with a warning, and so would train a half-random model.
    if policy.head == "scalar" and "score.weight" in report["missing_keys"]:
        start_head(model, zero_head)
        report["missing_keys"] = set(report["missing_keys"]) - {"score.weight"}
        report["unexpected_keys"] = set(report["unexpected_keys"]) - {"lm_head.weight"}
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise ValueError(
            f"policy.path={path!r}: {len(missing)} weights of {type(model).__name__} are missing or of another shape, "
            f"first {missing[:3]}."
        )
    if report["unexpected_keys"]:
        logger.warning(
            "%s holds weights that %s does not use: %s",
            path,
            type(model).__name__,
            sorted(report["unexpected_keys"])[:3],
        )
    check_head(model, policy.head)
    if shapes_only() and policy.quantization is not None:
        mark_shapes(model, policy.quantization)
    settle(model)
    return model


def _raw_config(path: str, revision: str | None) -> dict[str, Any]:
    """What config.json says, before weights are read; empty where it cannot be read, which loading explains."""
    import transformers

    try:
        return transformers.PretrainedConfig.get_config_dict(path, revision=revision)[0]
    except (OSError, ValueError):
        return {}


def _check_model_folder(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        return
    weights = list(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        plain = read_note(folder).get("format") == "module"
        hint = (
            " It is the export of a plain module: build that module yourself and use safetensors.torch.load_model."
            if plain
            else f" The policy that a run wrote is in {folder / 'export'}."
            if (folder / "export" / "config.json").is_file()
            else ""
        )
        raise ValueError(f"policy.path={path!r}: the folder has no config.json; it holds {listing(folder)}.{hint}")
    if not weights and shapes_only():
        logger.warning("policy.path=%r: the folder has no *.safetensors, which a run needs", path)
    elif not weights:
        raise ValueError(
            f"policy.path={path!r}: the folder has no *.safetensors (pickled weights are not loaded); it holds "
            f"{listing(folder)}."
        )


def _fresh(policy: PolicyConfig, zero_head: bool) -> nn.Module:
    import transformers

    config = _architecture(dict(policy.config or {}))
    check_text_only(config.to_dict(), "policy.config")
    options = {} if policy.attn_implementation is None else {"attn_implementation": policy.attn_implementation}
    scalar = policy.head == "scalar"
    auto = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    if scalar:
        config.num_labels = 1
    try:
        model = auto.from_config(config, dtype=DTYPES[policy.dtype], **options)
    except Exception as error:  # whatever the architecture makes of impossible sizes
        kind = "sequence-classification model" if scalar else "causal language model"
        raise ValueError(
            f"policy.config={policy.config!r} cannot be built as a {kind} ({type(error).__name__}: {error})"
        ) from error
    if scalar:
        start_head(model, zero_head)
    return model


def _architecture(options: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = options.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3)
        hint = f" Close to it: {close}." if close else " Examples: 'llama', 'qwen3', 'gpt2'."
        raise ValueError(
            f"policy.config.model_type={model_type!r} is not a model type that transformers "
            f"{transformers.__version__} knows.{hint}"
        )
    given = list(options)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.setdefault(name, None)  # a type's default ids belong to somebody else's vocabulary
    try:
        config = transformers.AutoConfig.for_model(model_type, **options)
        default = transformers.AutoConfig.for_model(model_type)
    except Exception as error:  # strict configurations raise errors of their own, others divide by zero
        raise ValueError(f"policy.config for model_type={model_type!r} is not valid: {error}") from error
    # A configuration keeps any key it is given; one that its type does not know would have no effect.
    unknown = [key for key in given if key in vars(config) and not hasattr(default, key)]
    if unknown:
        known = sorted(key for key in {*vars(default), *type(default).attribute_map} if not key.startswith("_"))
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Allowed are {known}."
        raise ValueError(
            f"policy.config has {unknown[0]!r}={options[unknown[0]]!r}, which model_type={model_type!r} does not "
            f"know.{hint}"
        )
    return config
