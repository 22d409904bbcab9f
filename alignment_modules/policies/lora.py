"""LoRA through `peft`: which adapters a policy gets.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) replaces a frozen linear map `W x` by `W x + (alpha / r) B A x`
with a trainable `A` of shape `[r, in]` and a trainable `B` of shape `[out, r]` that starts at zero. With the adapter
switched off the model is its own base, which is why a LoRA policy needs no second model as its reference.

`peft` is imported when an adapter is made or met, never by importing this module.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from alignment_modules.functional.ranges import Count, Positive, Range, check_options
from alignment_modules.policies.adapter_start import start_from_base, starts_from_base
from alignment_modules.policies.added_tokens import ends, tied, token_ids
from alignment_modules.policies.forward import classifies
from alignment_modules.policies.input_start import start_later, starts_from_inputs


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
        init: What the adapters start with. "kaiming" and "gaussian" draw `A` and have `B` at 0. "pissa" starts from the
            principal part of each weight (https://arxiv.org/abs/2404.02948), "pissa_niter_16" from an approximation of
            it that is faster on wide layers, "olora" from a QR decomposition (https://arxiv.org/abs/2406.01775). "eva"
            has `B` at 0 and `A` at the main directions of what each layer reads of the run's first batch
            (https://arxiv.org/abs/2410.07170). The policy starts as its base with any of them.
        lr_ratio: The adapters' learning rate, in that of the optimizer. 10 makes of a rate that is right for all
            weights one that is right for adapters (Schulman et al. 2025, "LoRA Without Regret").
    """

    r: Count = 16
    alpha: Positive = 32
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["kaiming", "gaussian", "pissa", "pissa_niter_16", "olora", "eva"] = "kaiming"
    lr_ratio: Positive = 1.0


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
        ValueError: An option is out of range, names a module that does not exist, contradicts another, or would adapt a
            tied embedding or one whose rows are trained.
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
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        trainable_token_indices=rows,
    )
    try:
        with warnings.catch_warnings():
            # peft sets the first right for Conv1D by itself, and makes the deprecated call of the second itself.
            for message in ("fan_in_fan_out is set to False", "`is_gradient_checkpointing` is deprecated"):
                warnings.filterwarnings("ignore", message=message)
            adapted: Any = peft.get_peft_model(model, adapter)  # type: ignore[arg-type,unused-ignore]
    except (ValueError, TypeError) as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora.target_modules={config.target_modules!r} adapts nothing in {type(model).__name__}; its linear "
            "layers are "
            f"called {linear}. Allowed: 'all-linear', a regular expression over full names, or a list of endings. "
            f"({error})"
        ) from error
    if starts_from_base(config.init):
        start_from_base(adapted, config.init)
    if starts_from_inputs(config.init):
        start_later(adapted)
    adapted.adapter_lr_ratio = config.lr_ratio
    return adapted


def _check_options(config: LoraConfig) -> None:
    if config.init in ("corda", "lora_ga"):
        raise ValueError(
            f"lora.init={config.init!r} is not supported: it decomposes weights by covariances or gradients on data. "
            "'eva' starts from what the layers read, 'pissa' and 'olora' from the weights."
        )
    check_options(LoraConfig, vars(config), "lora.")
    if not config.target_modules:
        raise ValueError(
            f"lora.target_modules={config.target_modules!r} is empty. Allowed: 'all-linear', a regular expression, or "
            "a list of name endings."
        )
    if starts_from_base(config.init):
        for field, why in (
            ("dropout", "would drop the start, a large part of the weights, but not what takes it away"),
            ("use_dora", "trains the magnitudes of a base that keeps this part"),
        ):
            if getattr(config, field):
                raise ValueError(
                    f"lora.{field}={getattr(config, field)!r} with lora.init={config.init!r}: it {why}; leave one of "
                    "the two out"
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
