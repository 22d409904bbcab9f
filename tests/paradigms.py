"""One row a paradigm: all that the contract tests know of it. A new paradigm is one entry of `ROWS`.

A batch is made of numbered rows, so that a test cuts, orders and pads it by asking for other numbers, other widths and
the other side.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from alignment_modules import AlignmentModule, get_module_class
from tests.batches import (
    entry,
    judged_pairs,
    never_called,
    pairs,
    rollouts,
    rollouts_of_two_rewards,
    supervised,
    unpaired,
    weighted,
)
from tests.models import Plain, Stops, critic_beside, flat, other_than
from tests.row import Paradigm, Resume

SUMS = [(a, b) for a in range(6) for b in range(4)]


# Rows of data files, as a user has them

SOURCES: dict[str, list[dict[str, Any]]] = {
    "documents": [{"text": f"{a}+{b}={a + b}"} for a, b in SUMS],
    "demonstrations": [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]}
        | ({"weight": 0.5 * a} if b == 1 else {})
        for a, b in SUMS
    ],
    "pairs": [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in SUMS],
    "labelled": [{"prompt": f"{a}+{b}=", "completion": f"{a + b + a % 2}", "label": a % 2 == 0} for a, b in SUMS],
    "questions": [{"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": f"{a + b}"} for a, b in SUMS],
}

# The table

IN_REWARD = {"kl_estimator": "k1", "kl_placement": "reward"}
OTHER = object()  # in a variant: a frozen model near the policy
NO_REFERENCE = {"beta": 0.0, "reference": None}
WEIGHTLESS = {"weights": entry("loss_weights", 0.0)}
_NO_TARGET = {"labels": entry("labels", -100), "attention mask": entry("attention_mask", 0, "labels")}
_SUPERVISED = {
    "dft": {"loss": "dft"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
}
_NO_PAIR = {
    "chosen empty": entry("chosen_attention_mask", 0),
    "both empty": entry("chosen_attention_mask", 0, "rejected_attention_mask"),
}

ROWS: dict[str, Paradigm] = {
    "pretrain": Paradigm(
        batch=supervised,
        nothing=_NO_TARGET,
        variants=_SUPERVISED,
        first={"train/loss": pytest.approx(math.log(40), rel=1e-6)},  # a sum of rounded terms
        first_policy=flat,
        source="documents",
    ),
    "sft": Paradigm(
        batch=supervised,
        nothing=_NO_TARGET,
        variants=_SUPERVISED,
        batches={"weighted": weighted},
        first={"train/loss": pytest.approx(math.log(40), rel=1e-6)},  # a sum of rounded terms
        first_policy=flat,
        source="demonstrations",
    ),
    "reward": Paradigm(
        batch=judged_pairs,
        nothing=_NO_PAIR,
        variants={"centred": {"center_coef": 0.1}},
        first={"train/loss": float(torch.tensor(2.0).log()), "train/rewards/margins": 0.0},
        first_policy=flat,
        first_without=("margin",),
        outputs=1,
        source="pairs",
    ),
    "dpo": Paradigm(
        batch=pairs,
        nothing=_NO_PAIR | {"nothing written": entry("rejected_loss_mask", 0)},
        options=lambda other: {"reference": other, "beta": 0.5},
        variants={
            **{loss: {"loss": loss} for loss in ("ipo", "sigmoid_norm", "apo_zero")},
            "with nll": {"nll_coef": 0.3},
            "mpo": {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            "wpo": {"wpo": True, "loss": "hinge"},
            "ld": {"ld_alpha": 0.5, "dpop_coef": 5.0},
            **{loss: {"loss": loss, "max_grad_norm": None} for loss in ("aot", "aot_unpaired")},
        },
        first={"train/loss": float(torch.tensor(2.0).log()), "train/rewards/margins": 0.0},
        first_options={"reference": None},
        source="pairs",
        recipe={"metrics": ("--model.wpo=true", "--model.nll_coef=0.1", "--model.log_logits=true")},
    ),
    "orpo": Paradigm(
        batch=pairs,
        nothing=_NO_PAIR | {"nothing written": entry("rejected_loss_mask", 0)},
        options=lambda other: {"beta": 0.5},
        variants={
            "on prompts": {"nll_on_prompt": True},
            "of tokens": {"nll_unit": "tokens", "max_grad_norm": None},
            "of all tokens": {"nll_unit": "tokens", "nll_on_prompt": True, "max_grad_norm": None},
        },
        # every token is as likely, so the odds are the same
        first={
            "train/loss": pytest.approx(math.log(40) + 0.1 * math.log(2), rel=1e-6),
            "train/log_odds_ratio": pytest.approx(-math.log(2), rel=1e-6),
            "train/log_odds_chosen": pytest.approx(0.0, abs=1e-6),
        },
        first_policy=flat,
        first_options={"beta": 0.1},
        source="pairs",
    ),
    "cpo": Paradigm(
        batch=pairs,
        nothing=_NO_PAIR | {"nothing written": entry("rejected_loss_mask", 0)},
        options=lambda other: {"loss": "simpo"},
        variants={
            "cpo": {"loss": "sigmoid"},
            "hinge": {"loss": "hinge", "beta": 0.2},
            "ipo": {"loss": "ipo"},
            "alpha": {"alpha": 0.25},
        },
        first={"train/loss": pytest.approx(math.log1p(math.e), rel=1e-6)},
        first_policy=flat,
        source="pairs",
    ),
    "kto": Paradigm(
        batch=unpaired,
        nothing={
            "empty": entry("completion_attention_mask", 0),
            "nothing written": entry("completion_loss_mask", 0),
        },
        kind="update",
        options=lambda other: {"reference": other, "beta": 0.5, "max_grad_norm": None},
        variants={
            "apo": {"loss": "apo_zero_unpaired"},
            "weighted": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        },
        first={"train/loss": 0.5, "train/kl": 0.0, "train/rewards/margins": 0.0},
        first_options={"reference": None},
        source="labelled",
        resume=Resume(("--trainer.max_epochs", "3", "--model.micro_batch_size", "2"), start=8, kill=9),
    ),
    "distillation": Paradigm(
        batch=supervised,
        nothing=_NO_TARGET,
        options=lambda other: {"teacher": other},
        variants={
            "forward": {"divergence": "forward", "temperature": 0.7},
            "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
            "on policy": {"on_policy_share": 1.0, "max_completion_length": 6, "temperature": 1.5},
            "half on policy": {"on_policy_share": 0.5, "max_completion_length": 4, "seed": 1},
        },
        batches={"weighted": weighted},
        first=dict.fromkeys(("train/nll_loss", "train/entropy"), pytest.approx(math.log(40), rel=1e-6)),
        first_policy=flat,
        needs={"teacher": "other"},
        source="demonstrations",
        recipe={"metrics": ("--model.on_policy_share=0.9", "--model.max_completion_length=64")},
        resume=Resume(
            ("--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2", "--model.on_policy_share", "0.5",
             "--model.max_completion_length", "4"),
        ),
    ),
    "online_dpo": Paradigm(
        batch=rollouts,
        nothing={
            "not judged": entry("rewards", torch.nan, group=4),
            "tied": entry("rewards", 0.3, group=4),
            "empty": entry("response_mask", False, group=4),
        },
        kind="acting",
        options=lambda other: {
            "rewards": never_called,
            "max_completion_length": 8,
            "max_grad_norm": None,
            "reference": other,
            "beta": 0.5,
        },
        variants={
            "ipo": {"loss": "ipo"},
            "ipo of sums": {"loss": "ipo", "ipo_logps": "sum", "beta": 0.1},
            "hinge": {"loss": "hinge", "temperature": 0.7},
        },
        sizes=((2,), (3,), (4,), (8,)),
        first={"train/loss": float(torch.tensor(2.0).log()), "train/rewards/margins": 0.0, "train/objective/kl": 0.0},
        first_options={"reference": None},
        source="questions",
        recipe={
            "short": ("--model.max_completion_length=4",),
            "metrics": ("--model.max_completion_length=64",),
        },
        resume=Resume(
            ("--trainer.max_epochs", "2", "--model.num_iterations", "2", "--model.minibatches", "2",
             "--model.micro_batch_size", "3", "--model.max_completion_length", "6"),
            every=4, start=16, kill=21, inside=True,
        ),
    ),
    "grpo": Paradigm(
        batch=rollouts,
        nothing={
            "not judged": entry("rewards", torch.nan, group=4),
            "empty": entry("response_mask", False, group=4),
        },
        kind="acting",
        options=lambda other: {
            "rewards": never_called,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_grad_norm": None,
            "epsilon": 0.5,
            "reference": other,
            "beta": 0.1,
        },
        variants={
            "dynamic sampling": {"dynamic_sampling": 1},
            "adapted": {"kl_target": 0.01, "kl_horizon": 100, "entropy_coef": 0.05, "entropy_target": 3.0},
            **{loss: {"loss": loss} for loss in ("grpo", "dr_grpo")},
            "cispo": {"loss": "cispo", "epsilon": None},
            "cispo without reference": {"loss": "cispo", "epsilon": None, **NO_REFERENCE},
            **{f"{loss} without reference": {"loss": loss, **NO_REFERENCE} for loss in ("grpo", "dapo", "dr_grpo")},
            **{loss: {"loss": loss, "epsilon": None, **NO_REFERENCE} for loss in
               ("luspo", "sapo", "vespo", "dppo_tv", "dppo_kl", "reinforce")},
            "gmpo": {"loss": "gmpo", **NO_REFERENCE},
            "clip_cov": {"loss": "clip_cov", "loss_options": {"share": 0.2, "covariance_low": -9.0}, **NO_REFERENCE},
            "kl_cov": {"loss": "kl_cov", "epsilon": None, "loss_options": {"share": 0.2}, **NO_REFERENCE},
            "gspo": {"loss": "grpo", "importance_level": "sequence", **NO_REFERENCE},
            "gspo token": {"loss": "grpo", "importance_level": "sequence_token"},
            "sapo sequence": {"loss": "sapo", "importance_level": "sequence", "epsilon": None},
            "top entropy": {"top_entropy_quantile": 0.4},
            "tis": {"correction": "tis"},
            "geometric": {"correction": {"level": "geometric", "action": "mask", "low": 0.4, "high": 1.3}},
            "opsm": {"correction": {"level": "sequence", "metric": "k1", "action": "mask", "high": 0.1,
                                    "where": "negative", "against": "policy"}, **NO_REFERENCE},
            "prompt mean": {"reduction": "prompt_mean"},
            "teacher": {"loss": "dr_grpo", "teacher": OTHER, "teacher_coef": 0.3, **NO_REFERENCE},
            "rloo mean": {"reduction": "sequence_mean_token_sum", "delta": 2.0},
            **{baseline: {"baseline": baseline}
               for baseline in ("leave_one_out", "length_weighted", "pass_at_k", "greedy", "optimal_token")},
            **{scale: {"scale_rewards": scale} for scale in ("batch", "mean")},
            "optimal_token whitened": {"baseline": "optimal_token", "scale_rewards": "batch_tokens"} | IN_REWARD,
            "reinforce_pp": {"baseline": "none", "scale_rewards": "batch_tokens"} | IN_REWARD,
            "remax": {"baseline": "greedy"} | IN_REWARD,
            "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "rewards": [never_called] * 2},
        },
        variant_batches={"gdpo": rollouts_of_two_rewards},
        slow_variants=("leave_one_out", "length_weighted", "pass_at_k", "greedy", "remax", "batch", "mean",
                       "optimal_token whitened"),
        sizes=((1,), (2,), (3,), (4,), (8,), (9,)),
        first={"train/importance_ratio/mean": 1.0, "train/kl": 0.0},
        first_options={"reference": None},
        first_without=("old_logprobs",),
        source="questions",
        recipe={
            "short": ("--model.max_completion_length=4",),
            "metrics": ("--model.beta=0.1", "--model.max_completion_length=64", "--model.kl_target=0.1",
                        "--model.entropy_target=1.0"),
        },
        # a batch is four optimizer steps; epoch 1 goes from step 12 to step 24
        resume=Resume(
            ("--trainer.max_epochs", "2", "--model.num_iterations", "2", "--model.minibatches", "2",
             "--model.micro_batch_size", "3", "--model.beta", "0.05", "--model.max_completion_length", "6",
             "--model.kl_target", "0.001", "--model.kl_horizon", "30", "--model.entropy_target", "9",
             "--model.top_p", "0.9"),
            every=4, start=16, kill=21, inside=True,
        ),
    ),
}  # fmt: skip

ROWS["ppo"] = replace(
    ROWS["grpo"],
    options=lambda other: {
        "rewards": never_called,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_grad_norm": None,
        "epsilon": 0.5,
        "reference": other,
        "beta": 0.1,
        "critic": critic_beside(other),
        "critic_optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
    },
    variants={
        "copied": {"critic": None},
        "shared": {"critic": "shared", "critic_optimizer": None, "value_coef": 0.5},
        "positive nll": {"positive_nll_coef": 0.3, "whiten_advantages": False},
        "shared with nll": {"critic": "shared", "critic_optimizer": None, "positive_nll_coef": 0.3, "loss": "grpo"},
        "length adaptive": {"length_adaptive_alpha": 0.4, "gamma": 0.9, "critic_lam": 0.9},
        "turns": {"gae_unit": "turn", "kl_estimator": "k3", "kl_placement": "loss", "lam": 0.5},
        "corrected": {"correction": "tis"},
        "scaled": {"normalize_rewards": True, "reward_clip": 1.5, "value_clip": None, "entropy_coef": 0.01},
        "bootstrap": {"truncation": "bootstrap", "missing_eos_penalty": 0.5, "tokenizer": Stops()},
        "masked": {"truncation": "mask", "tokenizer": Stops()},
        "adaptive": {"kl_target": 0.1, "kl_horizon": 100, "entropy_target": 5.0, "entropy_coef": 0.01},
    },
    variant_batches={},
    slow_variants=("copied", "positive nll", "length adaptive", "masked", "adaptive"),
    first={"train/val/ratio": 1.0, "train/objective/kl": 0.0, "train/policy/approxkl_avg": 0.0},
    recipe={
        "short": ("--model.max_completion_length=4",),
        "metrics": (
            "--model.max_completion_length=64",
            "--model.num_generations=2",
            "--model.kl_target=0.1",
            "--model.entropy_target=1.0",
        ),
    },
)

# What `make test` proves of the expensive promises; `make slow` proves them of every row.
OF_A_KIND = {"automatic": "sft", "update": "kto", "acting": "grpo"}


def cells() -> list[Any]:
    """Every row under its own options, each of its variants, and on each of its batches: `name`, `row`, `options`.

    A variant is cut in every other of the row's ways: single rows and pieces that cross groups are among them.
    """
    found = [(name, row, {}, name, False) for name, row in ROWS.items()]
    found += [
        (
            name,
            replace(row, batch=row.variant_batches.get(key, row.batch), sizes=row.sizes[::2]),
            more,
            f"{name} {key}",
            key in row.slow_variants,
        )
        for name, row in ROWS.items()
        for key, more in row.variants.items()
    ]
    found += [
        (name, replace(row, batch=batch, nothing=row.nothing | WEIGHTLESS), {}, f"{name} {key}", False)
        for name, row in ROWS.items()
        for key, batch in row.batches.items()
    ]
    return [
        pytest.param(name, row, options, id=label.replace(" ", "_"), marks=pytest.mark.slow if slow else ())
        for name, row, options, label, slow in found
    ]


def expensive(names: Sequence[str] = tuple(ROWS)) -> list[Any]:
    """Names as parameters; all but one of a kind are slow."""
    return [pytest.param(name, marks=() if name in OF_A_KIND.values() else pytest.mark.slow) for name in names]


def plain(row: Paradigm) -> nn.Module:
    """A policy that is no model of transformers."""
    torch.manual_seed(1)
    return Plain(row.outputs or 40)


def headed(name: str, policy: nn.Module) -> nn.Module:
    """A language model with the head that a paradigm reads; other policies as they are."""
    if ROWS[name].outputs is None or not hasattr(policy, "lm_head"):
        return policy
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(4)
    config = copy.deepcopy(policy.config)
    config.num_labels = ROWS[name].outputs
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model


def build(name: str, policy: nn.Module, *, other: nn.Module | None = None, **options: Any) -> AlignmentModule:
    """A paradigm's module on a policy, by its row's options and more."""
    policy = headed(name, policy)
    other = other or other_than(policy)
    given = ROWS[name].options(other) | options
    given = {option: copy.deepcopy(other) if value is OTHER else value for option, value in given.items()}
    return get_module_class(name)(policy=policy, **given)
