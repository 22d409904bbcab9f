"""What paradigms that learn from their own samples share: the keywords of their actor, and how it is looked at."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from alignment_modules.functional.ranges import (
    Count,
    Finite,
    Natural,
    NonNegative,
    Positive,
    Range,
    Seed,
    Share,
    check_options,
)
from alignment_modules.functional.support import Support
from alignment_modules.functional.waiting import tell
from alignment_modules.policies.frozen import Frozen
from alignment_modules.policies.modes import reading_mode
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.scoring import Ask, Scores, score
from alignment_modules.policies.segments import Reads, Segments
from alignment_modules.rewards import RewardError
from alignment_modules.rewards.judged_rows import check_judges
from alignment_modules.rollouts import NonFiniteLogits
from alignment_modules.rollouts.actor import Actor
from alignment_modules.rollouts.codec import columns_of
from alignment_modules.rollouts.given import check_given_rollout
from alignment_modules.rollouts.limits import check_limits
from alignment_modules.rollouts.parameters import SamplingOptions
from alignment_modules.rollouts.rollout import Rollout
from alignment_modules.training.episodes import EpisodeModule
from alignment_modules.training.objective import EarlyRead
from alignment_modules.training.recording import tell_scores
from alignment_modules.training.updates import UpdateModule


class ActingModule(EpisodeModule, UpdateModule):
    """Base of paradigms that learn from their own samples: builds their `actor`.

    A batch may bring its own `responses` [batch * G, time] with `response_mask` (the token exists), and with or without
    `response_loss_mask` (the policy wrote it), `rewards` [batch * G] (or [batch * G, rewards], each by itself) and
    `old_logprobs` [batch * G, time]: what it brings is not sampled, judged or scored again. It does not say what a
    filter kept: given completions are scored over the whole vocabulary, and so must their `old_logprobs` be, or their
    ratio is off by the mass that was kept.

    Args:
        rewards: Reward functions: objects, import paths, or folders of reward models; None: that of `environments`.
        reward_weights: One weight a reward, with or without one more for that of the environments; None: all 1.
        num_generations: G, completions of each prompt.
        max_completion_length: Longest completion in tokens.
        temperature: Sampling temperature, more than 0; policy, old policy and reference are scored with the same.
        top_p: Nucleus size. What is kept where a token is drawn is recorded, and the policy is scored over it.
        top_k: Number of likeliest tokens kept; 0 keeps all. Recorded likewise.
        min_p: Tokens below this share of the likeliest are dropped; 0 keeps all. Recorded likewise.
        stop_strings: Completions also end with these strings.
        missing_eos_penalty: Taken from the reward of each completion that ends without a stop, judged or given.
        seed: Seed of the samples; None: the global seed. Each sample has its own, made of this seed, the optimizer
            step, the prompt's index and the sample's number, so that a rollout can be repeated alone.
        **common: Keywords of `EpisodeModule` (environments, tools, max_turns, max_tool_calls, tool_options),
            `EngineModule` (engine), `UpdateModule` (micro_batch_size, max_grad_norm) and `AlignmentModule` (policy,
            optimizer, lr_scheduler, tokenizer, evaluation).
    """

    compares_log_probs = True
    batch_keys = ("prompts", "prompt_attention_mask")
    tells_scores: ClassVar[bool] = True
    """Whether the data module hears of rewards (`tell_scores`)."""

    def __init__(
        self,
        *,
        rewards: str | list[str | Callable] | Callable | None = None,
        reward_weights: list[Finite] | None = None,
        num_generations: Count = 8,
        max_completion_length: Count = 256,
        temperature: Positive = 1.0,
        top_p: Annotated[float, Range(0, 1, "(]")] = 1.0,
        top_k: Natural = 0,
        min_p: Share = 0.0,
        stop_strings: list[str] | None = None,
        missing_eos_penalty: NonNegative = 0.0,
        seed: Seed | None = None,
        **common: Any,
    ) -> None:
        check_options(ActingModule.__init__, locals())
        super().__init__(**common)
        self.rewards = self.reward_set(rewards, reward_weights).limit_to(max_completion_length)
        sampling = SamplingOptions(max_completion_length, temperature, top_p, top_k, min_p, list(stop_strings or ()))
        self.engine.check("", sampling)
        self.actor = Actor(
            self.engine,
            self.rewards,
            sampling,
            num_generations,
            codec=self.codec,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed,
            missing_eos_penalty=missing_eos_penalty,
            episodes=self.episodes,
        )
        self.rollout: Rollout | None = None
        self.kept_ratios: list[Tensor] | None = None  # of the logged steps, [tokens] each, once someone asks: a list
        self._finite: Tensor | bool = True
        self._early_finite = EarlyRead(True)

    def configure_model(self) -> None:
        """Also shards reward models."""
        super().configure_model()
        if self.device_mesh is not None:
            self.rewards.shard(self.device_mesh["data_parallel"])

    @property
    def fewest_completions(self) -> int:
        """Completions that a prompt needs at least."""
        return 1

    @property
    def compares_with_greedy(self) -> bool:
        """Whether a rollout also judges a greedy completion of each prompt."""
        return False

    @property
    def last_rollout(self) -> dict[str, list[Any]]:
        """The last rollout in words, for sample tables: an entry a completion in each column."""
        return self.actor.rows(self.rollout)

    def first_samples(self, count: int) -> dict[str, list[Any]]:
        """The first completions of the last rollout, token by token (`Actor.rows`); empty before the first rollout.

        Args:
            count: How many.
        """
        return self.actor.rows(self.rollout, count)

    def check_batch(self, batch: Any) -> None:
        """Also checks that what a batch brings of a rollout belongs together, and that the rewards' columns are there.

        Raises:
            ValueError: If a key or column is missing, what is given does not fit together (`check_given_rollout`), a
                row's limit or rewards are not the module's, or rewards are to read what no tokenizer can decode.
        """
        super().check_batch(batch)
        check_given_rollout(batch)
        prompts, fewest = len(batch["prompts"]), self.fewest_completions
        check_limits(batch, prompts, self.actor.sampling.max_completion_length)
        check_judges(batch, self.rewards.names, prompts)
        if "responses" in batch and len(batch["responses"]) < fewest * prompts:
            raise ValueError(
                f"responses has {len(batch['responses'])} rows for {prompts} prompts: {type(self).__name__} compares a "
                f"prompt's completions with each other and needs at least {fewest} of each"
            )
        judged = ["rewards", "greedy_rewards"] if self.compares_with_greedy else ["rewards"]
        if not all(isinstance(batch.get(name), Tensor) for name in judged):
            self.codec.require_tokenizer()
            self.rewards.check_columns([*columns_of(batch), *self.columns_of_episodes(batch)])

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """What the last rollout holds, for `num_tokens` and the throughput; prompts count once, whatever their samples.

        Before the first rollout it is what the batch holds.
        """
        if self.rollout is None:
            return super().count_tokens(batch)
        masks = (self.rollout.prompt_mask, self.rollout.mask)
        tokens = masks[0].sum() + masks[1].sum()
        return {
            "tokens": tokens + self.actor.seen.greedy_tokens,
            "samples": len(self.rollout.ids),
            "padding": sum(mask.numel() for mask in masks) - tokens,
        }

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judges one greedy completion of each prompt: by the rewards, and as `test` does where it can."""
        greedy = self.actor.complete(self.policy, batch, self.global_step, greedy=True, compared=True)
        same = greedy if self.writer.episodes is self.episodes else None
        tested = self.writer.test(self.policy, batch, same).statistics if self.writer.judges(batch) else {}
        self.record_evaluation(tested | self.actor.judge(batch, greedy), dataloader_idx)

    def describe(self) -> dict[str, str]:
        """Adds how completions are drawn and judged."""
        sampling = self.actor.sampling
        return super().describe() | {
            "rewards": ", ".join(self.rewards.names)
            + f", less {self.actor.missing_eos_penalty:g} without a stop" * bool(self.actor.missing_eos_penalty),
            "sampling": f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, "
            f"min_p {sampling.min_p:g}, at most {sampling.max_completion_length} tokens, seed {self.actor.seed}",
        }

    @property
    def rollout_step(self) -> int:
        """What the seeds of a rollout are made of: the optimizer steps taken so far."""
        return self.global_step

    def roll_out(self, batch: Mapping[str, Any]) -> Rollout:
        """Acts, and counts what was done.

        Raises:
            RewardError: If no completion of any rank has a reward.
        """
        rollout = self.act(batch)
        self._train_meters.update(self.actor.statistics)
        self.window.tokens = self.window.tokens + self.count_tokens(batch)["tokens"]
        return rollout

    def act(self, batch: Mapping[str, Any], draw: int = 0) -> Rollout:
        """Completions of a batch with their rewards.

        Args:
            batch: What the loader gave.
            draw: How many batches were acted on since the last step.

        Raises:
            RewardError: If no completion of any rank has a reward.
        """
        self._finite = True
        options = {"with_greedy": True} if self.compares_with_greedy else {}
        self.rollout = self.actor.roll_out(self.policy, batch, step=self.rollout_step, draw=draw, **options)
        if not int(self.reduce((~self.rollout.rewards.isnan()).sum().to(self.device), "max")):
            given = isinstance(batch.get("rewards"), Tensor)
            whose = "the batch's rewards are" if given else f"{', '.join(map(repr, self.rewards.names))} gave"
            raise RewardError(
                f"optimizer step {self.global_step + 1} has nothing to learn from: {whose} None or NaN for all "
                "completions"
            )
        self.engine.sleep()  # all ranks have their completions
        self.actor.statistics |= tell_scores(getattr(self._trainer, "datamodule", None), self, batch, self.rollout)
        return self.rollout

    def parts(self, rollout: Rollout, *, passes: int, count: int, first: bool) -> Iterator[Rollout]:
        """A rollout's minibatches in random order, pass after pass, until the run has all its steps.

        Args:
            rollout: Of the whole batch.
            passes: How often the rollout is gone through.
            count: Minibatches in a pass.
            first: Whether it is an epoch's first, which no last, shorter batch is.

        Raises:
            ValueError: If the first has fewer prompts on every rank than a pass has minibatches.
        """
        order = torch.Generator().manual_seed(self.actor.seed + self.global_step)
        largest = self.largest(rollout)
        if first:
            self.check_minibatches(largest, count)
        for _ in range(passes):
            # Of a last, shorter batch no rank may have anything left; of none at all one step is still counted.
            for part in islice(rollout.minibatches(count, order), max(largest, 1)):
                if self.trainer.max_steps != -1 and self.global_step >= self.trainer.max_steps:
                    self.batch_cut_short = True
                    return
                yield part

    def check_minibatches(self, largest: int, count: int) -> None:
        """Checks that a pass can have so many minibatches.

        Raises:
            ValueError: If the rank with most prompts has fewer.
        """
        if largest < count:
            raise ValueError(f"minibatches={count} is more than the {largest} prompts of a batch")

    def largest(self, rollout: Rollout) -> int:
        """The prompts of a rollout on the rank that has most."""
        return int(self.reduce(torch.tensor(len(rollout), device=self.device), "max"))

    def segments_of(self, rollout: Rollout, targets: Tensor, reads: Reads = "targets") -> Segments:
        """A piece of a rollout as `read` takes it, on this module's device.

        Args:
            rollout: The piece.
            targets: [N, T] bool, on the host: which tokens are asked about.
            reads: As in `Segments`.
        """
        rows = rollout.prompt_ids, rollout.prompt_mask, rollout.ids, rollout.mask, targets
        return Segments.from_prompts(*rows, reads=reads).to(self.device)

    def score_piece(
        self,
        model: nn.Module,
        rollout: Rollout,
        targets: Tensor,
        *,
        ask: Collection[Ask] = (),
        over_support: bool = True,
    ) -> Scores:
        """Scores [N, T] of a piece of a rollout, at the temperature that it was sampled with.

        Args:
            model: The policy, or what is compared with it.
            rollout: The piece.
            targets: [N, T] bool, on the host: which tokens are scored.
            ask: As in `score`.
            over_support: Whether the distributions are over the rollout's `support`, where it has one, as those are
                that were sampled from; else over the whole vocabulary.
        """
        support = rollout.support if over_support else None
        return self.score_reading(read(model, self.segments_of(rollout, targets)), support, ask=ask)

    def score_reading(self, reading: Reading, support: Support | None = None, *, ask: Collection[Ask] = ()) -> Scores:
        """Scores [N, T] of a piece of a rollout that was read, at the temperature that it was sampled with.

        Args:
            reading: Of the policy, or of what is compared with it.
            support: As in `score`.
            ask: As in `score`.
        """
        scores = score(reading, temperature=self.actor.sampling.temperature, support=support, ask=ask)
        if torch.is_grad_enabled():
            self._finite = self._finite & torch.where(scores.mask, scores.token_logps.detach(), 0.0).isfinite().all()
            self._early_finite = EarlyRead(self._finite)
        return scores

    def score_rollout(
        self,
        rollout: Rollout,
        companion: Frozen | None = None,
        *,
        trained_only: bool = False,
        over_support: bool | None = None,
    ) -> Tensor:
        """Log-probabilities [N, T] of `scores_of`."""
        options = {"trained_only": trained_only, "over_support": over_support}
        return self.scores_of(rollout, companion, **options).token_logps  # type: ignore[arg-type]

    @torch.no_grad()
    def scores_of(
        self,
        rollout: Rollout,
        companion: Frozen | None = None,
        *,
        ask: Collection[Ask] = (),
        trained_only: bool = False,
        over_support: bool | None = None,
    ) -> Scores:
        """Scores [N, T] of all that the policy wrote, 0 elsewhere, in micro-batches.

        Args:
            rollout: Of the whole batch.
            companion: Who scores; None: the policy itself.
            ask: As in `score`, but for "accuracy".
            trained_only: Whether what is left out of the loss is not scored either.
            over_support: As in `score_piece`; None: for the policy alone. A companion did not sample: what the policy's
                filters kept is not its own.

        Raises:
            NonFiniteLogits: If a log-probability is not finite; it names the step.
        """
        over = companion is None if over_support is None else over_support
        asked = list(ask)

        def told(piece: Rollout) -> list[Tensor]:
            targets = piece.trained if trained_only else piece.own
            scores = self.score_piece(model, piece, targets, ask=asked, over_support=over)
            return [scores.token_logps, *(getattr(scores, name) for name in asked)]

        with reading_mode(self.policy) if companion is None else companion.reading() as model:
            token_logps, *more = self.over_pieces(rollout, told)
        if not bool(token_logps.isfinite().all()):
            raise self.not_finite("policy" if companion is None else "reference")
        mask = (rollout.trained if trained_only else rollout.own).to(token_logps.device, non_blocking=True)
        return Scores(token_logps, mask, **dict(zip(asked, more, strict=True)))

    def over_pieces(self, rollout: Rollout, compute: Callable[[Rollout], Sequence[Tensor]]) -> list[Tensor]:
        """What is computed of a rollout in micro-batches, whole groups each: tensors of [N, ...] on this device.

        Args:
            rollout: Of the whole batch.
            compute: From a piece of n completions to tensors [n, ...], float32 where they are not integers.
        """
        size = max((self.micro_batch_size or len(rollout.ids)) // rollout.group, 1)
        # At least one piece, which has the shapes; as many on each rank, since sharded weights are gathered together.
        count = int(self.reduce(torch.tensor(max(-(-len(rollout) // size), 1), device=self.device), "max"))
        found = []
        for start in range(0, count * size, size):
            tell("scoring", start * rollout.group, len(rollout.ids))
            found.append(compute(rollout.select(slice(start, start + size))))
        return [torch.cat(parts).float() for parts in zip(*found, strict=True)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Also refuses to step on log-probabilities that are not finite.

        Raises:
            NonFiniteLogits: If a piece of the step had some; it names the step.
        """
        if not self._early_finite.item():
            raise self.not_finite("policy")
        super().on_before_optimizer_step(optimizer)

    def not_finite(self, who: str) -> NonFiniteLogits:
        """The error about a model's logits, with the step that is being prepared."""
        return NonFiniteLogits(
            f"optimizer step {self.global_step + 1}: {who} gave logits that are not finite; its weights or inputs may "
            "hold NaN or infinity."
        )
