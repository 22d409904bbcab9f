"""A policy with a critic: who the critic is, what it thinks of a rollout, how it learns, and where it is kept."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from alignment_modules.functional import aggregate_rows, value_loss
from alignment_modules.functional.ranges import Count, Natural, NonNegative, Positive, check_options
from alignment_modules.functional.statistics import RowSums, Statistic
from alignment_modules.policies.architecture import describe_size
from alignment_modules.policies.critic import as_classifier, build_critic, last_values, read_values, shared_head
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import PolicyConfig, check_vocabulary, is_fresh
from alignment_modules.policies.modes import disable_dropout, reading_mode
from alignment_modules.policies.placing import assemble
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.scoring import Ask, Scores
from alignment_modules.policies.segments import Reads
from alignment_modules.policies.value_head import ValueHead
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.makers import check_makers
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.policy_gradient import PolicyGradientModule, token_mean
from alignment_modules.training.sources import gather_names, loss_of

PRETRAINED = "critic-pretrain.ckpt"
SHARED_COEF = 0.1  # of the value loss on a shared trunk, as in TRL's PPO


class ActorCriticModule(PolicyGradientModule):
    """Base of paradigms with a critic, which learns the returns that `credit` gives.

    Each optimizer step of the policy comes after one of the critic on the same minibatch; with a shared trunk they are
    one, of two terms with units of their own.

    Args:
        critic: Who says what a state is worth: None, a copy of the policy with a scalar head that starts at 0; a folder
            or hub id of a causal language model (likewise) or of a reward model, which keeps its head; a
            `PolicyConfig`; a module that gives `[batch, time, 1]`; or "shared", a head on the policy's own trunk.
        critic_optimizer: Of a critic of its own; None: the policy's, at ten times its rate.
        critic_lr_scheduler: Of a critic of its own; None: the policy's.
        critic_pretrain_steps: Steps that the critic takes alone, before the first of the policy, on Monte-Carlo returns
            of the policy as it is. They are no steps of the run: `global_step` stands still.
        critic_pretrain_save_every: Rollouts of the pretraining between two checkpoints `critic-pretrain.ckpt` in the
            folder of the others, which count steps of the run and so save none meanwhile; the last is always saved.
        value_clip: How far from its value at the rollout a value may move the loss, in either direction; None: any.
        value_coef: Weight of the value loss on a shared trunk; None: 0.1.
        **gradient: Keywords of `PolicyGradientModule`.

    Raises:
        ValueError: If an option has a value that is not allowed, or would have no effect.
    """

    def __init__(
        self,
        *,
        critic: str | PolicyConfig | nn.Module | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        critic_lr_scheduler: LRSchedulerCallable | None = None,
        critic_pretrain_steps: Natural = 0,
        critic_pretrain_save_every: Count = 10,
        value_clip: Positive | None = 0.2,
        value_coef: NonNegative | None = None,
        **gradient: Any,
    ) -> None:
        check_options(ActorCriticModule.__init__, locals())
        shared = isinstance(critic, str) and critic == "shared"
        own: dict[str, Any] = {
            "critic_optimizer": critic_optimizer,
            "critic_lr_scheduler": critic_lr_scheduler,
            "critic_pretrain_steps": critic_pretrain_steps or None,
        }
        has = "shares the policy's trunk and optimizer" if shared else "has an optimizer of its own"
        for option, value in (own if shared else {"value_coef": value_coef}).items():
            if value is not None:
                given = option if callable(value) else f"{option}={value!r}"
                raise ValueError(f"{given} would have no effect: the critic {has} (critic={critic!r}); set it to null")
        if critic_optimizer is not None or critic_lr_scheduler is not None:
            check_makers(critic_optimizer or torch.optim.AdamW, critic_lr_scheduler, whose="critic_")
        super().__init__(**gradient)
        self.shared = shared
        self.critic = shared_head(self.policy) if shared else build_critic(critic, self.policy)
        if is_fresh(critic) or (critic is None and self._kept_frozen):
            self._kept_frozen = (*self._kept_frozen, "critic")
        self.make_critic_optimizer, self.make_critic_lr_scheduler = critic_optimizer, critic_lr_scheduler
        self.critic_pretrain_steps, self.pretrain_save_every = critic_pretrain_steps, critic_pretrain_save_every
        self.value_clip = value_clip
        self.value_coef = SHARED_COEF if value_coef is None else value_coef
        self.pretrained = self.pretraining_rollouts = 0
        self._read_along: list[tuple[Tensor, Tensor]] = []

    # Who steps

    def trained(self) -> dict[str, nn.Module]:
        """Policy and critic, an optimizer each; a shared trunk has one."""
        return super().trained() if self.shared else {"policy": self.policy, "critic": self.critic}

    def optimizer_for(self, name: str) -> OptimizerCallable:
        """The critic's, or the policy's at ten times its rate."""
        if name == "policy" or self.make_critic_optimizer is not None:
            return super().optimizer_for(name) if name == "policy" else self.make_critic_optimizer  # type: ignore[return-value]
        return self._ten_times

    def optimizer_option(self, name: str) -> str:
        """`critic_optimizer` for a critic that was given one."""
        own = name == "critic" and self.make_critic_optimizer is not None
        return "critic_optimizer" if own else super().optimizer_option(name)

    def scheduler_for(self, name: str) -> LRSchedulerCallable | None:
        """The critic's, or the policy's."""
        own = self.make_critic_lr_scheduler if name == "critic" else None
        return super().scheduler_for(name) if own is None else own

    def steps_of(self, name: str) -> int | float:
        """The critic takes those of its pretraining, too."""
        return super().steps_of(name) + (self.critic_pretrain_steps if name == "critic" else 0)

    @property
    def total_optimizer_steps(self) -> int | float:
        """Those of the policy: the batches of the critic's pretraining give none."""
        total, per_batch = super().total_optimizer_steps, self.optimizer_steps_per_batch
        if not self.critic_pretrain_steps or self.trainer.max_epochs == -1:
            return total
        batches = self.trainer.num_training_batches * (self.trainer.max_epochs or 1)
        left = (batches - ceil(self.critic_pretrain_steps / per_batch)) * per_batch
        if left < 1:
            raise ValueError(
                f"critic_pretrain_steps={self.critic_pretrain_steps} takes all of the run's {batches} batches (of "
                f"{per_batch} steps each): nothing is left for the policy"
            )
        return min(left, self.trainer.max_steps) if self.trainer.max_steps != -1 else left

    def train(self, mode: bool = True) -> "ActorCriticModule":
        """Also keeps dropout out of the critic: values of one state are compared."""
        super().train(mode)
        if mode and not self.shared:
            disable_dropout(self.critic)
        return self

    def setup(self, stage: str) -> None:
        """Also checks that the tokenizer's ids fit the critic."""
        super().setup(stage)
        if self.tokenizer is not None and not self.shared:
            check_vocabulary(self.critic, self.tokenizer, name="critic")

    # What it does

    @property
    def pretraining(self) -> bool:
        """Whether the critic still learns alone."""
        return self.pretrained < self.critic_pretrain_steps

    @property
    def rollout_step(self) -> int:
        """Counts the critic's steps alone, too, so that no rollout has the seeds of another."""
        return super().rollout_step + self.pretrained

    def learn(self, rollout: Rollout, *, given: bool, first: bool) -> None:
        """All optimizer steps on a rollout: of the critic alone while it is pretrained."""
        if not self.pretraining:
            return super().learn(rollout, given=given, first=first)
        parts = self.parts(rollout, passes=self.num_iterations, count=self.minibatches, first=first)
        for part in islice(parts, self.critic_pretrain_steps - self.pretrained):
            self.step_critic(part)
            self.pretrained += 1
        self.pretraining_rollouts += 1
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells how far the critic's pretraining is, and saves, every so many rollouts and after the last."""
        done, saver = self.pretraining_rollouts, self.trainer.checkpoint_callback
        if self.global_step or not done or (self.pretraining and done % self.pretrain_save_every):
            return
        found = self._train_meters.compute(self.reduce, partial(gather_names, self))
        self._train_meters.reset()  # what is logged with the policy's first step is of that step
        names = {"loss": "critic/loss", "explained variance": "critic/explained_variance"}
        told = ", ".join(f"{word} {found[name]:.3g}" for word, name in names.items() if name in found)
        rank_zero_info(f"critic pretraining: {self.pretrained} of {self.critic_pretrain_steps} steps, {told}")
        if saver is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = getattr(saver, "dirpath", None) or Path(self.trainer.default_root_dir) / "checkpoints"
        self.trainer.save_checkpoint(Path(folder) / PRETRAINED)

    def step(self, part: Rollout) -> None:
        """One step of the critic, if it has an optimizer, then one of the policy."""
        if not self.shared:
            self.step_critic(part)
        super().step(part)

    def step_critic(self, part: Rollout) -> None:
        """One step of the critic on a minibatch of a rollout."""
        pieces = part.micro_batches(self.micro_batch_size)
        self.update(pieces, part.empty(), objective=self.value_objective, of="critic")

    def more_units(self, rollout: Rollout) -> dict[str, Tensor]:
        """The weights of `more_terms` in a piece, [N], from masks alone."""
        return {}

    def more_terms(self, rollout: Rollout, scores: Scores) -> dict[str, Term]:
        """Terms of the policy's objective beside the surrogate, with units of their own.

        Args:
            rollout: A piece.
            scores: Of its trained tokens.
        """
        return {}

    def units(self, rollout: Rollout) -> dict[str, Tensor] | None:
        """The weight of each of the policy's terms in a piece; None where there is the surrogate alone."""
        more = self.more_units(rollout) | ({"value": rollout.trained.sum(dim=1)} if self.shared else {})
        if not more:
            return None
        mask = rollout.trained.to(self.device, non_blocking=True)
        return {"policy": self.reduced(torch.zeros(mask.shape, device=mask.device), mask, rollout).weights} | more

    def objective(self, rollout: Rollout) -> Objective:  # type: ignore[override]
        """The surrogate of a piece of a rollout, what is beside it, and the value loss on a shared trunk."""
        reading = read(self.policy, self.segments_of(rollout, self.targets(rollout)))
        scores = self.score_reading(reading, rollout.support, ask=self.asked())
        found = self.policy_objective(rollout, scores)
        more, statistics = self.more_terms(rollout, scores), found.statistics
        statistics |= {f"loss/{name}": Statistic(term.total, term.weight) for name, term in more.items()}
        if self.shared:
            sums, seen = self.value_sums(rollout, self.values(reading))
            more["value"], statistics = Term.of_rows(*sums, self.value_coef), statistics | seen
        if not more:
            return found
        terms = {"policy": found.terms["loss"]} | more
        return replace(found, terms=terms, statistics=statistics | {"loss": loss_of(terms)})

    def targets(self, rollout: Rollout) -> Tensor:
        """[N, T] bool, on the host: all trained tokens, of which hardly any has no advantage."""
        return rollout.trained

    def value_objective(self, rollout: Rollout) -> Objective:
        """The critic's loss on a piece of a rollout, summed over the trained tokens."""
        values = self.values(read(self.critic, self.segments_of(rollout, rollout.trained)))
        sums, statistics = self.value_sums(rollout, values)
        return Objective.of_rows(*sums, statistics, name="critic/loss")

    def value_sums(self, rollout: Rollout, values: Tensor) -> tuple[RowSums, dict[str, Statistic]]:
        """The value loss of a piece of a rollout, summed over each row's trained tokens, and what is logged of it.

        Args:
            rollout: The piece.
            values: [N, T], the critic's now.
        """
        mask, old, returns = rollout.trained.to(self.device, non_blocking=True), rollout.values, rollout.returns
        losses = value_loss(values, old, returns, mask, clip=self.value_clip)  # type: ignore[arg-type]
        sums = aggregate_rows(losses, mask, reduction="token_mean")
        statistics = {"loss/value_avg": sums.mean}
        if self.logging_due and self.value_clip is not None:
            free = value_loss(values, old, returns, mask, clip=None)  # type: ignore[arg-type]
            statistics["val/clipfrac_avg"] = token_mean((losses > free).to(losses), mask)
        return sums, statistics

    @torch.no_grad()
    def value_rollout(self, rollout: Rollout, *, last: bool) -> tuple[Tensor, Tensor]:
        """The critic's values of a rollout, float32: [N, T] of all that the policy wrote, and [N] of the last states.

        Args:
            rollout: Of the whole batch.
            last: Whether the last states' are wanted; otherwise they are 0.

        Raises:
            NonFiniteLogits: If one is not finite; it names the step.
        """
        model = self.policy if self.shared else self.critic
        reads: Reads = "targets+last" if last else "targets"
        seen, self._read_along = self._read_along, []

        def values_of(piece: Rollout) -> list[Tensor]:
            reading = read(model, self.segments_of(piece, piece.own, reads))
            values = self.values(reading)
            return [values, self.last_values(reading) if last else values.new_zeros(len(values))]

        if sum(len(values) for values, _ in seen) == len(rollout.ids) > 0:
            found = [torch.cat(parts).float() for parts in zip(*seen, strict=True)]
        else:
            with reading_mode(model):
                found = self.over_pieces(rollout, values_of)
        if not bool(torch.stack([part.isfinite().all() for part in found]).all()):
            raise self.not_finite("critic")
        return found[0], found[1]

    def annotate(self, rollout: Rollout) -> Rollout:
        """Adds log-probabilities, values, returns and advantages."""
        self._read_along = []
        return super().annotate(rollout)

    def score_piece(
        self,
        model: nn.Module,
        rollout: Rollout,
        targets: Tensor,
        *,
        ask: Collection[Ask] = (),
        over_support: bool = True,
    ) -> Scores:
        """Also reads the values of a shared trunk that is scored for the rollout, which is then not read again."""
        if not self.shared or model is not self.policy or targets is not rollout.own or torch.is_grad_enabled():
            return super().score_piece(model, rollout, targets, ask=ask, over_support=over_support)
        reading = read(model, self.segments_of(rollout, targets, "targets+last"))
        self._read_along.append((self.values(reading), self.last_values(reading)))
        return self.score_reading(reading, rollout.support if over_support else None, ask=ask)

    def values(self, reading: Reading) -> Tensor:
        """The critic's values [N, T] of the targets of a reading of it, or of the trunk that it shares."""
        return self.critic(reading) if self.shared else read_values(reading)

    def last_values(self, reading: Reading) -> Tensor:
        """Likewise [N] of the rows' last states."""
        return self.critic.last(reading) if isinstance(self.critic, ValueHead) else last_values(reading)

    def describe(self) -> dict[str, str]:
        """Adds who the critic is, and how it learns."""
        clip = "none" if self.value_clip is None else f"{self.value_clip:g}"
        loss = f"half the larger squared error, value_clip {clip}"
        if self.shared:
            head = f"a head on the policy's trunk; {loss}, value_coef {self.value_coef:g}"
            return super().describe() | {"critic": head}
        optimizer = "its own optimizer" if self.make_critic_optimizer else "the policy's optimizer, ten times its rate"
        return super().describe() | {
            "critic": f"{describe_size(self.critic)}; {loss}; {optimizer}",
            "pretraining": f"{self.critic_pretrain_steps} steps of the critic alone, on Monte-Carlo returns",
        }

    # What is kept

    def extra_state(self) -> dict[str, Any]:
        """Adds how far the critic's pretraining is."""
        return super().extra_state() | {"pretrained": [self.pretrained, self.pretraining_rollouts]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up the pretraining."""
        super().load_extra_state(state)
        self.pretrained, self.pretraining_rollouts = state["pretrained"]

    def export(self, directory: str | Path, *, lora: Literal["merge", "adapter"] = "merge") -> Path:
        """Writes the policy, and the critic beside it, merged, into `critic`: a reward model that a critic can be."""
        written, critic = super().export(directory, lora=lora), self.critic
        if isinstance(critic, ValueHead):
            policy, head = assemble(self.policy), assemble(critic)
            if policy is None or not isinstance(head, ValueHead):  # another process puts them together
                return written
            critic = as_classifier(policy, head)
        export_policy(critic, written / "critic", self.tokenizer, stop_token_ids=self.codec.data_stops)
        return written

    def _ten_times(self, groups: Any) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(groups)
        for group in optimizer.param_groups:
            if group.get("lr") is not None:  # None: it sets its own
                group["lr"] = 10 * group["lr"]
        return optimizer
