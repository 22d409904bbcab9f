"""The router of a mixture of experts, where the model's configuration asks for its load to be balanced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignment_modules.functional.router import expert_counts, load_balancing_loss, router_shares
from alignment_modules.policies.forward import language_model
from alignment_modules.policies.modes import eval_mode
from alignment_modules.policies.weights import has_weights

COEFFICIENT = "router_aux_loss_coef"
# How far our loss may lie from the model's own: what rounding to 16 bits does to its mean probabilities.
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What a model may raise that does not give what it is asked for.
_REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@dataclass(frozen=True)
class Router:
    """How a mixture of experts is balanced.

    Attributes:
        top_k: Experts that a token is sent to in each layer.
        coefficient: Weight of the load-balancing loss.
    """

    top_k: int
    coefficient: float


def find_router(policy: nn.Module) -> Router | None:
    """Finds out whether a policy's configuration asks for the load-balancing loss, and whether ours is the model's own.

    A configuration asks for it with `output_router_logits=True` and `router_aux_loss_coef` above 0. The model's own
    `aux_loss` on a few random tokens is then compared with ours, so that a family with another formula is left alone. A
    model without weights, which only shows shapes, is believed.

    Args:
        policy: Any module, also with peft adapters.

    Returns:
        The router; None where nothing is asked for, or the model balances its experts by another formula.
    """
    model = language_model(policy)
    if model is None:
        return None
    config = model.config.get_text_config()
    coefficient, top_k = getattr(config, COEFFICIENT, None), getattr(config, "num_experts_per_tok", None)
    if not getattr(config, "output_router_logits", False) or not coefficient or coefficient < 0 or not top_k:
        return None
    router = Router(int(top_k), float(coefficient))
    return router if not has_weights(model) or _is_the_models_own(model, router) else None


def _is_the_models_own(model: Any, router: Router) -> bool:
    """Compares the loss of one row."""
    weight = model.get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (1, 7), generator=torch.Generator().manual_seed(0)).to(weight.device)
    with eval_mode(model), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            output = model(input_ids=ids, use_cache=False)
            layers, expected = output.router_logits, output.aux_loss
            counts = torch.stack([expert_counts(layer, router.top_k) for layer in layers]).sum(0)
            shares = router_shares(counts, router.top_k)
            ours = torch.cat([load_balancing_loss(layer, shares).flatten() for layer in layers]).mean()
        except _REFUSALS:
            return False
    tolerance = _TOLERANCES.get(layers[0].dtype, 1e-4)
    return bool(torch.isclose(ours.float(), torch.as_tensor(expected).float(), rtol=tolerance, atol=0))
