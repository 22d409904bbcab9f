"""Looks at a whole run that has not begun: its data, its length, its memory, and its rewards."""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, inf, isnan
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from alignment_modules.cli.inspection.acting import actions_of, with_prompts
from alignment_modules.cli.inspection.findings import Inspection, Judged, Plan, RewardUse, Row
from alignment_modules.cli.inspection.gather import read_epoch, rows_of
from alignment_modules.cli.inspection.memory import measure_memory
from alignment_modules.policies.weights import has_weights
from alignment_modules.rewards import RewardError, RewardSet, SequenceClassifier
from alignment_modules.rollouts.codec import columns_of, real_tokens
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.training.acting import ActingModule
from alignment_modules.training.episodes import EpisodeModule
from alignment_modules.training.module import AlignmentModule


class PlannedTrainer(Trainer):
    """A Trainer that knows how many batches an epoch has before it has begun.

    Attributes:
        batches: Batches of an epoch and of this process; None: not known.
    """

    batches: int | None = None

    @property
    def estimated_stepping_batches(self) -> int | float:
        """What the Trainer itself would estimate from its loader: optimizer steps where it takes them."""
        if self.max_epochs in (None, -1) or self.batches is None:
            return inf if self.max_steps == -1 else self.max_steps
        steps = ceil(self.batches / self.accumulate_grad_batches) * max(self.max_epochs or 0, 1)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)


def inspect_run(
    module: AlignmentModule,
    datamodule: LightningDataModule,
    trainer: PlannedTrainer,
    rows: int = 5,
    completion: str | None = None,
) -> Inspection:
    """Takes a run through the checks of its set-up, and through one epoch of its data, without a step.

    Args:
        module: The module, best built in `without_weights`.
        datamodule: Its data.
        trainer: Its Trainer.
        rows: How many rows to show.
        completion: What rewards are to judge beside each row's own completion and an empty one.

    Raises:
        ValueError: Where a run would be refused, with the run's own message.
    """
    if completion is not None and not isinstance(module, ActingModule):
        raise ValueError(f"completion={completion!r}: {type(module).__name__} has no rewards to judge it; leave it out")
    module.trainer = datamodule.trainer = trainer
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    trainer.training = True
    module.configure_callbacks()
    datamodule.prepare_data()
    datamodule.setup("fit")
    module.setup("fit")
    trainer.precision_plugin.convert_module(module)  # as the Trainer does before the first step
    batches = _count_batches(trainer, datamodule)
    judging = _Judging(module, completion) if isinstance(module, ActingModule) else None
    show = judging.rows_of if judging else lambda batch, count: rows_of(batch, module.tokenizer, count)
    found = read_epoch(datamodule, show, rows, limit=batches, check=module.check_batch)
    _check_validation(module, datamodule, trainer)
    trainer.batches = batches
    memory = measure_memory(module, _sharing(trainer))
    return replace(
        found,
        title=f"{type(module).__name__} on {found.title}",
        plan=_plan(module, trainer, found.sizes.batches),
        memory=memory,
        rewards=judging.uses() if judging else (),
        actions=actions_of(episodes) if (episodes := _episodes(module)) is not None else None,
        problems=tuple(dict.fromkeys(judging.problems)) if judging else (),
    )


def _episodes(module: AlignmentModule) -> Episodes | None:
    """What runs the episodes of training, or else of evaluation."""
    own = module.episodes if isinstance(module, EpisodeModule) else None
    return own or getattr(module.evaluator, "episodes", None)


def _count_batches(trainer: Trainer, datamodule: LightningDataModule) -> int | None:
    """Batches of an epoch of this process as far as the Trainer goes; None: the loader does not tell."""
    limit, loader = trainer.limit_train_batches, datamodule.train_dataloader()
    known = len(loader) if hasattr(loader, "__len__") else None
    if isinstance(limit, float):
        return None if known is None else int(known * limit)
    return limit if known is None or limit is None else min(known, limit)


def _check_validation(module: AlignmentModule, datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Checks a first batch of each loader that is validated on, where there is any."""
    if "validation" not in getattr(datamodule, "reports", {}):
        return
    trainer.validating = True
    found = datamodule.val_dataloader()
    for loader in found if isinstance(found, list) else [found]:
        for batch in loader:
            module.on_before_batch_transfer(batch, 0)
            break
    trainer.training = True


def _plan(module: AlignmentModule, trainer: PlannedTrainer, batches: int) -> Plan:
    options = trainer.distributed_sampler_kwargs or {}
    completions = None
    if isinstance(module, ActingModule):
        completions = (module.actor.num_generations, module.actor.sampling.max_completion_length)
    return Plan(
        processes=int(options.get("num_replicas", 1)),
        batches=batches,
        accumulate=trainer.accumulate_grad_batches,
        steps_per_batch=getattr(module, "optimizer_steps_per_batch", 1),
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        steps=module.total_optimizer_steps,
        completions=completions,
    )


def _sharing(trainer: Trainer) -> int:
    """How many processes have weights, gradients and optimizer states in common."""
    strategy = trainer.strategy
    return strategy.num_nodes * strategy.num_processes if isinstance(strategy, ModelParallelStrategy) else 1


def _computes(reward: Any) -> bool:
    """Whether a reward is more than the shapes of a model."""
    return not isinstance(reward, SequenceClassifier) or has_weights(reward.model)


class _Judging:
    """Shows rows with what the rewards of an acting module say of completions that are given."""

    def __init__(self, module: ActingModule, completion: str | None) -> None:
        self.module, self.completion = module, completion
        self.problems: list[str] = []

    def uses(self) -> tuple[RewardUse, ...]:
        rewards = self.module.rewards
        wanted = rewards.wanted()
        columns = zip(rewards.names, rewards.weights, rewards.functions, strict=True)
        return tuple(RewardUse(name, weight, wanted[name], _computes(function)) for name, weight, function in columns)

    def _judge_episodes(self) -> set[str]:
        """The rewards that ask for whole episodes."""
        return {name for name, asked in self.module.rewards.wanted().items() if "episodes" in asked}

    def rows_of(self, batch: dict[str, Any], count: int) -> list[Row]:
        rows = rows_of(batch, self.module.tokenizer, count)
        if self.module.episodes is not None and "responses" not in batch:
            rows = with_prompts(rows, batch, self.module.episodes, self.module.actor.seed)
        if isinstance(batch.get("rewards"), Tensor) or self._judge_episodes() == {*self.module.rewards.names}:
            return rows  # judged already, or by what a text alone does not tell
        return [replace(row, judged=tuple(self._judge(batch, number))) for number, row in enumerate(rows)]

    def _judge(self, batch: Mapping[str, Any], number: int) -> list[Judged]:
        own = batch["completion"][number] if isinstance(batch.get("completion"), list) else None
        given = {"the row's own completion": own, "--completion": self.completion, "an empty completion": ""}
        return [self._values(batch, number, what, text) for what, text in given.items() if text is not None]

    def _values(self, batch: Mapping[str, Any], number: int, what: str, text: str) -> Judged:
        rewards, codec, values = self.module.rewards, self.module.codec, dict[str, float | None]()
        ids = codec.require_tokenizer()(text, add_special_tokens=False)["input_ids"]
        [prompt_ids] = real_tokens(batch["prompts"][number][None], batch["prompt_attention_mask"][number][None])
        prompt = codec.prompts(batch)[number]
        columns = {name: [column[number]] for name, column in columns_of(batch).items()}
        for function, name in zip(rewards.functions, rewards.names, strict=True):
            values[name] = None
            if not _computes(function) or name in self._judge_episodes():
                continue
            try:
                table = RewardSet([function])(
                    prompts=[prompt], completions=[text], prompt_ids=[prompt_ids], completion_ids=[ids], columns=columns
                )
            except RewardError as error:
                self.problems.append(f"{what}: {error}")
                continue
            value = float(table.values[0, 0])
            values[name] = None if isnan(value) else value
        known = [w * v for w, v in zip(rewards.weights, values.values(), strict=True) if v is not None]
        return Judged(what, text, values, sum(known) if known else None)
