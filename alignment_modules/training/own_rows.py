"""Rows of a batch that the policy writes itself, in place of those that the data gives."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from alignment_modules.functional.logprobs import IGNORED_TARGET
from alignment_modules.functional.ranges import Seed, Share
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.sharded import gathered
from alignment_modules.rollouts.codec import Codec, columns_of, prompt_indices, real_tokens
from alignment_modules.rollouts.engines import Engine, EngineError
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.rollouts.environments.rewards import failed
from alignment_modules.rollouts.environments.statistics import episode_statistics
from alignment_modules.rollouts.limits import LIMITS, check_kept, check_limits
from alignment_modules.rollouts.parameters import SamplingOptions
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.statistics import length_statistics
from alignment_modules.training.loss_weights import LOSS_WEIGHTS
from alignment_modules.training.pieces import SEGMENTS, check_keys

PROMPTS = ("prompts", "prompt_attention_mask")
_GIVEN = ("input_ids", "labels", "attention_mask", *PROMPTS, SEGMENTS)


class OwnRows:
    """Replaces the supervised part of a share of a batch's rows by completions of the policy as it is.

    A row's prompt is what stands before its first supervised token, its first token at least. Which rows are replaced,
    and by what, depends on the seed, the step and the rows' `index` alone, so that a batch may be cut anyhow.

    With environments or tools a replaced row becomes an episode, which begins with the row's column `prompt`. The
    policy's own tokens are its supervised ones; it has none where its environment failed.

    Args:
        share: Of the rows; with 1 a batch may hold prompts alone.
        sampling: How the completions are drawn.
        seed: Of both.
        episodes: Has completions of several turns made; None: they are of one turn.
    """

    def __init__(
        self, share: Share, sampling: SamplingOptions, seed: Seed, *, episodes: Episodes | None = None
    ) -> None:
        self.share, self.sampling, self.seed, self.episodes = share, sampling, seed, episodes

    def describe(self) -> str:
        """Whose the completions are, and how they are drawn, in words."""
        longest, temperature = self.sampling.max_completion_length, self.sampling.temperature
        return (
            f"the policy's own in {self.share:.0%} of the rows, at most {longest} tokens, temperature {temperature:g}, "
            f"seed {self.seed}"
        )

    def check(self, batch: Mapping[str, Any], name: str) -> bool:
        """Whether a batch can be written on; else others may say what it lacks.

        Args:
            batch: As the loader gives it.
            name: Who reads it, for the messages.

        Raises:
            ValueError: If it holds prompts alone and not all rows are the policy's, or more than a prompt and one
                completion a row, or weights of tokens that will not be there, or a limit beyond the longest completion.
        """
        if not isinstance(batch, Mapping):
            return False
        rows = batch.get(PROMPTS[0], batch.get("input_ids"))
        if rows is not None:
            check_limits(batch, len(rows), self.sampling.max_completion_length)
        for key, why in (("position_ids", "rows are packed"), (LOSS_WEIGHTS, "given tokens have weights")):
            if key in batch:
                raise ValueError(
                    f"on_policy_share={self.share:g}: a batch for {name} holds {key!r}, so its {why}, and the policy "
                    "cannot write them anew"
                )
        if PROMPTS[0] not in batch:
            return False
        check_keys(batch, PROMPTS, name)
        if self.share < 1:
            raise ValueError(
                f"on_policy_share={self.share:g}: a batch for {name} holds prompts alone, with nothing for the other "
                "rows to learn: use on_policy_share=1, or rows with a completion"
            )
        return True

    def write(
        self, policy: nn.Module, engine: Engine, codec: Codec, batch: Mapping[str, Any], step: int
    ) -> tuple[dict[str, Any], dict[str, Statistic]]:
        """A batch of `input_ids`, `labels` and `attention_mask`, on the same device, and what is logged of the writing.

        Args:
            policy: Who writes.
            engine: Samples.
            codec: Knows the stop tokens.
            batch: Of rows with labels, or of prompts.
            step: Counter of optimizer steps.

        Raises:
            NonFiniteLogits: If the policy's logits are not finite; it names the step.
            EngineError: If the engine gives no completions; it names the step.
        """
        rows, indices = _rows(batch), prompt_indices(batch)
        drawn = Seeds(indices, self.seed, step).uniforms(1, 1, turn=1)[:, 0]  # turn 0 is the samples'
        own = [row for row, one in enumerate(rows) if one.start and float(drawn[row]) < self.share]
        told = self._statistics(None)
        try:
            engine.push(policy)  # as the next line: another process may have rows where this one has none
            with gathered(policy):
                if own:
                    written = self._written(policy, engine, codec, batch, rows, own, step)
                    for row, one in zip(own, _completed(written, [rows[row] for row in own]), strict=True):
                        rows[row] = one
                    told = self._statistics(written)
        except (NonFiniteLogits, EngineError) as error:
            raise type(error)(f"optimizer step {step + 1}: {error}") from error
        tensors = {
            "input_ids": _padded([row.ids for row in rows], 0),
            "labels": _padded([row.labels for row in rows], IGNORED_TARGET),
            "attention_mask": _padded([[1] * len(row.ids) for row in rows], 0),
        }
        kept = {name: value for name, value in batch.items() if name not in _GIVEN}
        kept |= {name: value.to(_device(batch)) for name, value in tensors.items()}
        return kept, engine.statistics() | told

    def _written(
        self,
        policy: nn.Module,
        engine: Engine,
        codec: Codec,
        batch: Mapping[str, Any],
        rows: "list[_Row]",
        own: list[int],
        step: int,
    ) -> Completions:
        """One completion of each of the rows that are the policy's own."""
        indices, limits = prompt_indices(batch), batch.get(LIMITS)
        seeds = Seeds([indices[row] for row in own], self.seed, step)
        parameters = self.sampling.parameters(stop_token_ids=codec.stop_token_ids)
        limits = None if limits is None else [limits[row] for row in own]
        if self.episodes is not None:
            columns = {name: [values[row] for row in own] for name, values in columns_of(batch).items()}
            acting = {**columns, LIMITS: limits, "prompts": batch[_ids_of(batch)][own]}
            written = self.episodes.run(policy, engine, acting, parameters, seeds=seeds)
        else:
            prompts = Prompts.from_rows([rows[row].ids[: rows[row].start] for row in own], _device(batch))
            written = engine.generate(prompts.limited(limits), parameters, num_samples=1, seeds=seeds)
        return check_kept(written, limits, type(engine).__name__)

    def _statistics(self, written: Completions | None) -> dict[str, Statistic]:
        """What is told of what was written; the same names where nothing was."""
        mask, truncated = torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
        if written is not None:
            mask, truncated = written.mask.cpu(), written.truncated.cpu()
        told = length_statistics(mask, truncated)
        if self.episodes is None:
            return told
        return told | episode_statistics(written.episodes or [] if written is not None else [])


class _Row(NamedTuple):
    """A row without padding; `start` tokens are its prompt, 0 where there is nothing to write."""

    ids: list[int]
    labels: list[int]
    start: int


def _completed(written: Completions, rows: Sequence[_Row]) -> list[_Row]:
    """Rows with other completions, of which what the policy wrote is supervised."""
    prompts = [row.ids[: row.start] for row in rows]
    if written.prompts is not None:
        prompts = real_tokens(written.prompts.ids, written.prompts.mask)
    own = written.mask if written.own is None else written.own
    if written.episodes is not None:
        own = own & ~failed(written.episodes).to(own.device)[:, None]
    labels = real_tokens(written.ids.masked_fill(~own, IGNORED_TARGET), written.mask)
    return [
        _Row([*prompt, *ids], [*[IGNORED_TARGET] * len(prompt), *label], len(prompt))
        for prompt, ids, label in zip(prompts, real_tokens(written.ids, written.mask), labels, strict=True)
    ]


def _rows(batch: Mapping[str, Any]) -> list[_Row]:
    if PROMPTS[0] in batch:
        prompts = real_tokens(*(batch[key] for key in PROMPTS))
        return [_Row(ids, [IGNORED_TARGET] * len(ids), len(ids)) for ids in prompts]
    real = _real(batch)
    given = zip(real_tokens(batch["input_ids"], real), real_tokens(batch["labels"], real), strict=True)
    return [_Row(ids, labels, _start(labels)) for ids, labels in given]


def _start(labels: list[int]) -> int:
    supervised = [place for place, label in enumerate(labels) if label != IGNORED_TARGET]
    return max(supervised[0], 1) if supervised else 0


def _real(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _padded(rows: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _ids_of(batch: Mapping[str, Any]) -> str:
    return PROMPTS[0] if PROMPTS[0] in batch else "input_ids"


def _device(batch: Mapping[str, Any]) -> torch.device:
    return batch[_ids_of(batch)].device
