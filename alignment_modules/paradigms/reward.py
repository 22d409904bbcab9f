"""Reward modelling on preference pairs (Bradley-Terry): one number for a prompt and its completion."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignment_modules.functional import reward_pair_loss
from alignment_modules.functional.ranges import NonNegative, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.reading import read
from alignment_modules.policies.segments import Segments
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective
from alignment_modules.training.pairs import PAIR_KEYS, pair_rows, pair_segments

_BINS = 10  # of the calibration error, equally wide over probabilities from 0.5 to 1


class RewardModule(AlignmentModule):
    r"""A reward model, trained on batches of prompt, chosen and rejected completion.

    With `r` the model's number for a prompt and a completion, read at the last token, the loss of a pair is
    `-log sigmoid(r(chosen) - r(rejected) - margin) + center_coef * (r(chosen) + r(rejected))^2`, averaged over the
    pairs of the whole optimizer step. Prompts are computed once a pair; an empty prompt is valid.

    The policy has a scalar head: `PolicyConfig(head="scalar")`, a folder, whose language model gets a fresh head, or a
    module that gives `[batch, time, 1]`. What it exports is a reward for `GRPOModule(rewards="runs/reward/export")`.

    Args:
        center_coef: Pull of the rewards to 0 (arXiv:2312.09244 uses 0.01), since their differences leave it open.
        **common: Keywords of `AlignmentModule`: policy, optimizer, lr_scheduler, tokenizer.

    Raises:
        ValueError: If an option has a value that is not allowed, or the policy has no scalar head.
    """

    paradigm = "reward"
    batch_keys = PAIR_KEYS
    head = "scalar"
    generates = False
    compares_log_probs = True  # the rewards of a pair are compared, so dropout must be off as well
    bar = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(self, *, center_coef: NonNegative = 0.0, **common: Any) -> None:
        check_options(RewardModule.__init__, locals())
        super().__init__(**common)
        self.center_coef = center_coef

    def segments(self, batch: Mapping[str, Any]) -> Segments:
        """Each completion's last token, behind the prompt that it shares."""
        return pair_segments(batch, takes=["margin"], reads="last")

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The loss summed over the pairs whose completions both have a token."""
        reading = read(self.policy, batch.get("segments") or self.segments(batch))
        rewards = reading.outputs(reading.last)
        if rewards.shape[1:] != (1,):
            raise ValueError(
                f"policy {type(self.policy).__name__} gives {rewards.shape[-1]} numbers for a token; a reward is one: "
                "use PolicyConfig(head='scalar'), or a module that gives [batch, time, 1]"
            )
        rewards = rewards.view(-1, 2)
        counted = batch["chosen_attention_mask"].any(dim=1) & batch["rejected_attention_mask"].any(dim=1)
        margins = batch.get("margin")
        losses = reward_pair_loss(
            rewards[:, 0],
            rewards[:, 1],
            margins=None if margins is None else margins.to(rewards),
            center_coef=self.center_coef,
        )
        statistics, rows = _statistics(rewards.detach(), counted), pair_rows(rewards, counted)
        return Objective.of_rows(losses * counted, counted, statistics, rows)

    def describe(self) -> dict[str, str]:
        """Adds the loss and its normaliser."""
        return super().describe() | {
            "loss": f"-log sigmoid(chosen - rejected - margin), center_coef {self.center_coef}",
            "normaliser": "pairs of the optimizer step, over all micro-batches and ranks",
        }


def _statistics(rewards: Tensor, counted: Tensor) -> dict[str, Statistic]:
    """What else is logged of rewards `[pairs, 2]`, over the pairs that are `counted` `[pairs]`."""
    differences = rewards[:, 0] - rewards[:, 1]
    right = (differences > 0).to(differences)
    weight = counted.sum()
    found = {"rewards/mean": Statistic((rewards.mean(dim=1) * counted).sum(), weight)}
    for kind, beyond in (("min", torch.inf), ("max", -torch.inf)):
        held = torch.where(counted[:, None], rewards, beyond).flatten()
        held = torch.cat([held, held.new_full((1,), beyond)])
        found[f"rewards/{kind}"] = Statistic(held.min() if kind == "min" else held.max(), kind=kind)  # type: ignore[arg-type]
    # The model gives the better side this probability; it is right as often as that where it is calibrated.
    confidence = torch.sigmoid(differences.abs())
    place = ((confidence - 0.5) * 2 * _BINS).long().clamp(max=_BINS - 1)
    gaps = confidence.new_zeros(_BINS).index_add(0, place, (right - confidence) * counted)
    return found | {"rewards/calibration_error": Statistic(gaps, weight, "gap")}
