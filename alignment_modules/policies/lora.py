"""LoRA through `peft`: attaching adapters, switching them off, merging them.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) replaces a frozen linear map `W x` by `W x + (alpha / r) B A x`
with a trainable `A` of shape `[r, in]` and a trainable `B` of shape `[out, r]` that starts at zero. With the adapter
switched off the model is its own base, which is why a LoRA policy needs no second model as its reference.

`peft` is imported when an adapter is made or met, never by importing this module.
"""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from alignment_modules.functional.ranges import Count, Positive, Range, check_options
from alignment_modules.policies.added_tokens import ends, is_untrained, tied, token_ids, trains_rows
from alignment_modules.policies.forward import classifies

logger = logging.getLogger(__name__)


@dataclass
class LoraConfig:
    """Which low-rank adapters to train on top of a frozen model.

    Attributes:
        r: Rank of the update, at least 1.
        alpha: The update is scaled by `alpha / r`, or by `alpha / sqrt(r)` with `use_rslora`.
        dropout: Probability of zeroing the adapter's input while training, in [0, 1).
        target_modules: "all-linear" (every linear layer but the head), a regular expression over full module names, or
            a list of name endings such as `["q_proj", "v_proj"]`.
        exclude_modules: Name endings that stay without an adapter.
        modules_to_save: Name endings of modules that are trained whole beside the adapters.
        use_rslora: Scale by `alpha / sqrt(r)` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        use_dora: Also train each output's magnitude (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
    """

    r: Count = 16
    alpha: Positive = 32
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freezes a transformers model and wraps it with fresh adapters, initialised from the global torch seed.

    Args:
        model: A transformers causal language model, or a sequence classifier, whose head is trained whole. The rows of
            tokens that were added to it are trained, too.
        config: What to adapt.

    Returns:
        A `peft.PeftModel` whose trainable parameters are the adapters (with `modules_to_save` and the rows of added
        tokens) alone.

    Raises:
        ValueError: An option is out of range, names a module that does not exist, or would adapt a tied embedding or
            one whose rows are trained.
    """
    _check_options(config)
    names = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        endings = getattr(config, field)
        for ending in endings if isinstance(endings, list) else []:
            _check_ending(field, ending, names)
    _check_tied(model, config, names)
    rows = _trained_rows(model, config)

    import peft

    adapter = peft.LoraConfig(
        task_type="SEQ_CLS" if classifies(model) else "CAUSAL_LM",  # the first also trains the head whole
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        trainable_token_indices=rows,
    )
    try:
        with warnings.catch_warnings():
            # peft sets the first right for Conv1D by itself, and makes the deprecated call of the second itself.
            for message in ("fan_in_fan_out is set to False", "`is_gradient_checkpointing` is deprecated"):
                warnings.filterwarnings("ignore", message=message)
            return peft.get_peft_model(model, adapter)  # type: ignore[arg-type,unused-ignore]
    except (ValueError, TypeError) as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora.target_modules={config.target_modules!r} adapts nothing in {type(model).__name__}; its linear "
            "layers are "
            f"called {linear}. Allowed: 'all-linear', a regular expression over full names, or a list of endings. "
            f"({error})"
        ) from error


def _check_options(config: LoraConfig) -> None:
    check_options(LoraConfig, vars(config), "lora.")
    if not config.target_modules:
        raise ValueError(
            f"lora.target_modules={config.target_modules!r} is empty. Allowed: 'all-linear', a regular expression, or "
            "a list of name endings."
        )
    if isinstance(config.target_modules, list):
        for field in ("exclude_modules", "modules_to_save"):
            both = set(config.target_modules) & set(getattr(config, field) or [])
            if both:
                raise ValueError(
                    f"lora.target_modules and lora.{field} both name {sorted(both)}; a module can be in one of them "
                    "only."
                )


def _check_ending(field: str, ending: str, names: list[str]) -> None:
    """Refuses a typo, which peft ignores as long as another ending matches."""
    if any(name == ending or name.endswith(f".{ending}") for name in names):
        return
    known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    close = difflib.get_close_matches(ending, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"lora.{field} names {ending!r}, but no module is called that.{hint} There are {known}.")


def _check_tied(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """An adapter on one of two tied modules would untie them silently."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if embedding is None or head is None or embedding.weight is not head.weight:
        return
    tied = [name for name in names if model.get_submodule(name) is embedding or model.get_submodule(name) is head]
    for field in ("target_modules", "modules_to_save"):
        endings = getattr(config, field)
        hit = (
            [e for e in endings if any(n == e or n.endswith(f".{e}") for n in tied)]
            if isinstance(endings, list)
            else []
        )
        if hit:
            raise ValueError(
                f"lora.{field} names {hit}, but {tied} share one weight (tie_word_embeddings=True) and adapting one "
                "would untie them. "
                "Leave them out, or use a model without tied embeddings."
            )


def _trained_rows(model: nn.Module, config: LoraConfig) -> dict[str, list[int]] | None:
    """Ids whose rows are trained, by the name of the module; None: no token was added."""
    ids = sorted(token_ids(model).values())
    if not ids:
        return None
    found = ends(model)
    for name, module in found:
        for field in ("target_modules", "modules_to_save"):
            endings = getattr(config, field)
            for ending in endings if isinstance(endings, list) else []:
                if name == ending or name.endswith(f".{ending}"):
                    raise ValueError(
                        f"lora.{field} names {ending!r}, whose rows of policy.added_tokens are trained beside the "
                        "adapters; leave one of the two out."
                    )
        if getattr(module, "bias", None) is not None:
            raise ValueError(
                f"policy.added_tokens={list(token_ids(model))} under lora: {name!r} has a bias, whose entries would "
                "not be trained. Train such a model whole."
            )
    return dict.fromkeys([name for name, _ in (found[:1] if tied(model) else found)], ids)


def adapter_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists (name, module) of the outermost modules that `peft` put in place of others, in registration order."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in _every_layer(module):
        if not found or not name.startswith(f"{found[-1][0]}."):
            found.append((name, child))
    return found


def _every_layer(module: nn.Module) -> list[tuple[str, Any]]:
    """The same with those inside of others: of a module's several parameters each has a layer around the former."""
    if "peft" not in sys.modules:  # nobody can have made an adapter
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(name, child) for name, child in module.named_modules() if isinstance(child, kinds)]


def has_adapter(module: nn.Module) -> bool:
    """Whether the module holds adapters that can be switched off."""
    return bool(adapter_layers(module))


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[nn.Module]:
    """Runs a block with every adapter of the policy switched off; afterwards all `requires_grad` flags are as before.

    Args:
        policy: A model with adapters.

    Yields:
        The policy, which now computes what its base computes.
    """
    layers = [layer for _, layer in _every_layer(policy)]
    disabled = [layer.disable_adapters for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield policy
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, flag in trainable:  # peft's switch resets these to its own idea of them
            parameter.requires_grad_(flag)


def adapter_is_identity(policy: nn.Module) -> bool:
    """Whether switching the adapters off changes nothing now, and will restore this state after any training.

    False for an adapter that was trained before (its base is not the policy as it stands) and when parameters of the
    base are trainable too. Kinds of adapter other than LoRA count as not identical.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    own: set[int] = set()
    for _, layer in _every_layer(policy):
        if type(layer).__name__ == "TrainableTokensLayer":  # of a wrapper, which is another of the layers
            continue
        if isinstance(layer, ModulesToSaveWrapper):
            saved = [layer.modules_to_save[name] for name in layer.active_adapters]
            if any(not _equal(layer.original_module, module) for module in saved):
                return False
            own.update(id(p) for module in saved for p in module.parameters())
        elif trains_rows(layer):
            if not is_untrained(layer):
                return False
            own.update(id(p) for p in layer.token_adapter.trainable_tokens_delta.parameters())
        elif isinstance(layer, LoraLayer):
            ups = [layer.lora_B[n] for n in layer.active_adapters if n in layer.lora_B]
            values: list[Tensor] = [p for up in ups for p in up.parameters()]
            values += [layer.lora_embedding_B[n] for n in layer.active_adapters if n in layer.lora_embedding_B]
            if layer.merged or any(bool(value.detach().any()) for value in values if not value.is_meta):
                return False
            base = {id(p) for p in layer.get_base_layer().parameters()}
            own.update(id(p) for p in layer.parameters() if id(p) not in base)
        else:
            return False
    return all(id(p) in own for p in policy.parameters() if p.requires_grad)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(left[key].is_meta or torch.equal(left[key], right[key]) for key in left)


def attach_adapter_folder(base: nn.Module, folder: str, revision: str | None = None) -> nn.Module:
    """Loads a saved adapter onto its base model, where it can be switched off (`adapter_off`).

    Args:
        base: The model that the adapter was trained on.
        folder: Folder or hub id that holds `adapter_config.json` and `adapter_model.safetensors`.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A `peft.PeftModel`, frozen.

    Raises:
        ValueError: The adapter does not fit the base, is of a kind that cannot be switched off, or is not in
            safetensors format.
    """
    import peft

    if Path(folder).is_dir() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder!r} holds adapter_config.json but no adapter_model.safetensors (pickled weights are not loaded)."
        )
    try:
        adapter = peft.PeftConfig.from_pretrained(folder, revision=revision)
        if classifies(base):  # a language model's adapter fits its trunk as well
            adapter.task_type = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model: Any = peft.PeftModel.from_pretrained(base, folder, config=adapter, revision=revision)  # type: ignore[arg-type,unused-ignore]
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if missing:
            raise ValueError(missing[0])
        if not adapter_layers(model):
            raise ValueError("adapters of this kind cannot be merged")
    except Exception as error:  # a truncated file raises safetensors' own error
        raise _does_not_fit(folder, base, error) from error
    return model


def merge_adapter_folder(base: nn.Module, folder: str, revision: str | None = None) -> nn.Module:
    """Loads a saved adapter onto its base model and merges it.

    Args:
        base: As in `attach_adapter_folder`, and so are the others.
        folder: Folder or hub id.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The base with the adapter's update added to its weights, all parameters trainable.

    Raises:
        ValueError: As `attach_adapter_folder`, or the adapter cannot be merged.
    """
    model: Any = attach_adapter_folder(base, folder, revision)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # of whatever type each kind of layer raises
        raise _does_not_fit(folder, base, error) from error
    return merged.requires_grad_(True)


def _does_not_fit(folder: str, base: nn.Module, error: Exception) -> ValueError:
    return ValueError(f"The adapter in {folder!r} cannot be merged into its base {type(base).__name__}: {error}")
