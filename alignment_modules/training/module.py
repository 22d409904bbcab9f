"""AlignmentModule: what every paradigm shares: optimizer, exact normalisation, logging, checkpoints and export.

A paradigm says what its objective is (`objective(batch) -> Objective`: a sum, its weight, statistics). This base makes
the gradient of one optimizer step equal to the gradient of `sum(total) / sum(weight)` over all micro-batches and ranks:
the totals are backpropagated as they are, and the gradients divided once, before clipping, by the window's weight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from alignment_modules.evaluation import EvaluationConfig, Evaluator, Measured
from alignment_modules.evaluation.text import TextPrompts
from alignment_modules.functional.ranges import check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.architecture import (
    check_trainable_types,
    check_trainer,
    describe_size,
    own_stop_ids,
    refuse_compiled,
)
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.frozen import companions
from alignment_modules.policies.load import (
    PolicyConfig,
    build_policy,
    check_vocabulary,
    is_fresh,
    load_tokenizer,
    vocabulary_size,
)
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.policies.probing import prepare
from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import Engine, InProcessEngine
from alignment_modules.training import publishing
from alignment_modules.training.checkpoint import CheckpointContract
from alignment_modules.training.frozen_weights import frozen_children
from alignment_modules.training.hyperparameters import PlainHyperparameters, keep_hyperparameters
from alignment_modules.training.input_start import InputStart
from alignment_modules.training.makers import check_makers, make_optimizers
from alignment_modules.training.meters import Meters
from alignment_modules.training.objective import Objective, with_value
from alignment_modules.training.pieces import SEGMENTS, check_keys, count_tokens, reads_as_carried
from alignment_modules.training.recording import curriculum_of
from alignment_modules.training.sharded import ShardedModule
from alignment_modules.training.sources import of_sources
from alignment_modules.training.steps import finish_step, tell_clipped
from alignment_modules.training.window import TINY, Window


class AlignmentModule(CheckpointContract, ShardedModule, InputStart, PlainHyperparameters, L.LightningModule):
    """Common base of all paradigms.

    Args:
        policy: What is trained: a folder or hub id, a `PolicyConfig`, or any `nn.Module` that maps `input_ids`
            [batch, time] to logits [batch, time, vocabulary] (a tensor, or an object with `.logits`).
        optimizer: Called with parameter groups; biases, norms and other vectors get no weight decay.
        lr_scheduler: Called with the optimizer; stepped once an optimizer step. Ours find out the run's length.
        tokenizer: A tokenizer, or the folder of one; None: the Trainer's datamodule's. To generate, judge and export.
        evaluation: How `test` and `predict` generate and judge.
        override_lr: Whether a run that resumes takes `optimizer`'s learning rate as it is given now. Otherwise the
            optimizer goes on as it was saved, and another rate than the checkpoint's is refused.
    """

    paradigm: ClassVar[str] = "base"
    compares_log_probs: ClassVar[bool] = False
    """Whether log-probabilities of two models are compared, so that dropout must be off."""
    batch_keys: ClassVar[tuple[str, ...]] = ()
    """What a batch must hold to be trained or validated on."""
    bar: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that the progress bar shows."""
    head: ClassVar[Literal["lm", "scalar"]] = "lm"
    """What the policy gives for a token: the distribution of the next one, or a number."""
    generates: ClassVar[bool] = True
    """Whether the policy writes: then `test`, `predict` and `generate` are there."""
    balances_experts: ClassVar[bool] = False
    """Whether the load-balancing loss of a mixture of experts is added where its configuration asks for it."""
    max_grad_norm: float | None = None

    def __init__(
        self,
        *,
        policy: str | PolicyConfig | nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: str | object | None = None,
        evaluation: EvaluationConfig | None = None,
        override_lr: bool = False,
    ) -> None:
        check_makers(optimizer, lr_scheduler)
        check_options(AlignmentModule.__init__, locals())
        super().__init__()
        keep_hyperparameters(self)
        self.policy = build_policy(policy, head=self.head, balanced=self.balances_experts)
        self._kept_frozen = ("policy",) if is_fresh(policy) else ()
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.override_lr = override_lr
        stops = own_stop_ids(self.policy, vocabulary_size(self.policy))
        self.codec = Codec(load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, stops)
        self.engine: Engine = InProcessEngine(self.codec)
        if evaluation is not None and not self.generates:
            raise ValueError(f"evaluation={evaluation!r} is not allowed: {type(self).__name__} writes nothing")
        self.evaluation = EvaluationConfig(**evaluation) if isinstance(evaluation, Mapping) else evaluation
        self.evaluation = self.evaluation or EvaluationConfig()
        self.evaluator = Evaluator(self.engine, self.evaluation, codec=self.codec) if self.generates else None
        self._train_meters = Meters()
        self._eval_meters: dict[int, Meters] = {}
        self.windows: dict[str, Window] = {"policy": Window()}

    # What a paradigm or a user's subclass overrides

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The objective of one micro-batch: total, weight and statistics."""
        raise TypeError(f"{type(self).__name__} does not define objective(batch)")

    def segments(self, batch: Mapping[str, Any]) -> Any:
        """What `objective` reads of a batch: built on the host, then carried along as the batch's `segments`."""
        return None

    def trained(self) -> dict[str, nn.Module]:
        """What each optimizer moves, by name; only the steps of "policy" count as steps of the run.

        Together the entries hold every trainable parameter once. More than one need an `UpdateModule`.
        """
        return {"policy": self}

    def optimizer_for(self, name: str) -> OptimizerCallable:
        """What makes the optimizer of an entry of `trained`."""
        return self.make_optimizer

    def scheduler_for(self, name: str) -> LRSchedulerCallable | None:
        """What makes the schedule of an entry of `trained`; None: its rate stays."""
        return self.make_lr_scheduler

    def steps_of(self, name: str) -> int | float:
        """Steps of the whole run that the optimizer of an entry of `trained` takes."""
        return self.total_optimizer_steps

    def describe(self) -> dict[str, str]:
        """What is printed at the start of `fit`: the resolved objective, line by line."""
        held = {name: companion.describe() for name, companion in companions(self).items()}
        return {"paradigm": self.paradigm, "policy": describe_size(self.policy)} | held

    def extra_metrics(self, batch: dict[str, Any], objective: Objective) -> dict[str, Statistic]:
        """More statistics to log for one micro-batch."""
        return {}

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """How much one batch holds: `tokens` (without padding), `samples` and `padding`."""
        return count_tokens(batch)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, time, vocabulary] of the policy."""
        output = self.policy(input_ids) if attention_mask is None else self.policy(input_ids, attention_mask)
        return output if isinstance(output, Tensor) else output.logits

    def setup(self, stage: str) -> None:
        """Takes the datamodule's tokenizer where none was given, and checks that its ids fit the policy.

        Raises:
            ValueError: If they do not, the Trainer clips at NaN or trains in float16, or all of the module is compiled.
        """
        refuse_compiled(self)
        prepare(self.policy)
        check_trainer(self.trainer, stage)
        data = getattr(self.trainer, "datamodule", None)
        self.codec.data_stops = tuple(getattr(data, "stop_token_ids", ()))
        if self.tokenizer is None:
            self.tokenizer = getattr(data, "tokenizer", None)
        if self.tokenizer is not None:
            check_vocabulary(self.policy, self.tokenizer)
            for name, companion in companions(self).items():
                if companion.module is not None:
                    check_vocabulary(companion.module, self.tokenizer, name=name)

    def configure_optimizers(self) -> Any:
        """An optimizer, and a schedule that counts its steps, for each entry of `trained`."""
        check_trainable_types(self)
        return make_optimizers(self, self.trained())

    @property
    def total_optimizer_steps(self) -> int | float:
        """Optimizer steps of the whole run; infinite where neither epochs nor steps are bounded."""
        return self.trainer.estimated_stepping_batches

    def train(self, mode: bool = True) -> "AlignmentModule":
        """Training mode, but for what is frozen as a whole, and for dropout where it must be off."""
        super().train(mode)
        for child in frozen_children(self).values():
            child.eval()
        if mode and self.compares_log_probs:
            disable_dropout(self.policy)
        return self

    def on_fit_start(self) -> None:
        """Sets modes and forgets what an interrupted fit left half done."""
        self.train()
        self.zero_grad(set_to_none=True)
        self._train_meters.reset()
        self.windows = {name: self.windows.get(name) or Window() for name in self.trained()}
        for window in self.windows.values():
            window.reset()
        self.window.learnt = True

    @property
    def window(self) -> Window:
        """The policy's: its steps are the run's."""
        return self.windows["policy"]

    def on_train_start(self) -> None:
        """Takes up what a checkpoint left, and prints the resolved objective."""
        super().on_train_start()
        width = max(map(len, lines := self.describe()))
        rank_zero_info("\n".join(f"  {key:<{width}}  {value}" for key, value in lines.items()))

    def on_train_epoch_start(self) -> None:
        """No optimizer step of this epoch was taken or skipped yet."""
        self.window.learnt = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuses a batch of another paradigm, and adds its `segments` while it still is on the host."""
        trainer = self._trainer
        if trainer is None or (self.generates and (trainer.testing or trainer.predicting)):
            return batch
        if not trainer.training and "prompts" not in self.batch_keys and self._measures_completions(batch):
            return batch
        self.check_batch(batch)
        found = self.segments(batch) if reads_as_carried(self) else None
        return batch if found is None else {**batch, SEGMENTS: found}

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted validation left."""
        self._eval_meters.clear()
        if self.evaluator is not None:
            self.evaluator.restart()

    def on_test_epoch_start(self) -> None:
        """Forgets what an interrupted test left."""
        self.on_validation_epoch_start()

    def on_predict_epoch_start(self) -> None:
        """Counts prompts anew."""
        self.on_validation_epoch_start()

    def check_batch(self, batch: Any) -> None:
        """Checks that a batch is what this paradigm takes.

        Raises:
            ValueError: If it is not a dictionary or lacks a key.
        """
        check_keys(batch, self.batch_keys, type(self).__name__)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean of the micro-batch, whose gradient is that of the sum.

        Lightning and its callbacks read the value; the gradients are normalised before the optimizer step. Without a
        Trainer (in `L.Fabric` or a loop of your own) nobody does that later: value and gradient are the mean's.
        """
        objective = of_sources(self.objective(batch), batch)
        mean = objective.total / objective.weight.clamp(min=TINY)
        if self._trainer is None:
            return mean
        self.window.tokens = self.window.tokens + self.count_tokens(batch)["tokens"]
        return with_value(self.record(batch, objective), mean)

    def record(self, batch: Any, objective: Objective, of: str = "policy") -> Tensor:
        """Adds a micro-batch's weight and statistics to the open step; returns what is to be backpropagated."""
        more = self.extra_metrics(batch, objective) | curriculum_of(self) if of == "policy" else {}
        self._train_meters.update(objective.statistics | more)
        self.free_companions()
        return self.windows[of].add(objective)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation means: of prompts completions are judged, where a verifier can do so."""
        if not self._measures_completions(batch) or self.writer.judges(batch):
            self.record_evaluation(self.measure(batch).statistics, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Adds a batch to the means of the test; returns the completions as `rows`, for callbacks that write them."""
        measured = self.measure(batch)
        self.record_evaluation(measured.statistics, dataloader_idx)
        return {"rows": measured.rows}

    def measure(self, batch: dict[str, Any]) -> Measured:
        """What is measured of a batch: of prompts what the evaluator says of completions, else the objective."""
        if self._measures_completions(batch):
            return self.writer.test(self.policy, batch)
        objective = of_sources(self.objective(batch), batch)
        return Measured(objective.statistics | self.extra_metrics(batch, objective), [])

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Rows for a JSONL file; `Evaluator.predict` says which."""
        return self.writer.predict(self.policy, batch)

    def generate(
        self,
        batch: Mapping[str, Any] | TextPrompts,
        parameters: SamplingParameters | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        step: int = 0,
    ) -> Any:
        """Completions of a batch of prompts, sampled in eval mode; the policy's own modes are put back after.

        For text it answers in text: `module.generate("1+1=")`, also for messages and lists of either (`complete_text`).
        """
        return self.writer.generate(self.policy, batch, parameters, num_samples=num_samples, seed=seed, step=step)

    def record_evaluation(self, statistics: Mapping[str, Statistic], dataloader_idx: int) -> None:
        """Adds statistics to the means of a validation or test loader."""
        publishing.hold(self, statistics, dataloader_idx)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of policy and data, where there is one."""
        return self.codec.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.codec.tokenizer = tokenizer

    @property
    def writer(self) -> Evaluator:
        """The evaluator.

        Raises:
            ValueError: If the policy writes nothing.
        """
        if self.evaluator is None:
            raise ValueError(f"{type(self).__name__} writes nothing: it can neither generate nor predict")
        return self.evaluator

    def _measures_completions(self, batch: Any) -> bool:
        return self.evaluator is not None and isinstance(batch, Mapping) and "prompts" in batch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the weight of the window; Lightning clips after this.

        A step without a single target, over all micro-batches and ranks, moves nothing: neither weights nor momentum
        nor weight decay. It counts as a step, so that schedules and `max_steps` are those of any other data.
        """
        finish_step(self, optimizer)

    def configure_gradient_clipping(self, optimizer: Any, *options: Any, **more: Any) -> None:
        """Lightning's own, after which callbacks may look at what is stepped with."""
        super().configure_gradient_clipping(optimizer, *options, **more)
        if self.trainer.gradient_clip_val:
            tell_clipped(self, optimizer)

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Combines a tensor over all ranks: "sum", "min" or "max"; without a Trainer there is one."""
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        # A copy: the collective writes into what it is given.
        return self.trainer.strategy.reduce(values.to(self.device, copy=True), reduce_op=how)

    def on_train_epoch_end(self) -> None:
        """Logs the steps of the epoch that no interval has logged.

        Raises:
            ValueError: If no step of the epoch had a target; of one that was cut short, if no step of the run had any.
        """
        publishing.end_epoch(self)

    @property
    def logging_due(self) -> bool:
        """Whether the optimizer step now being built will be logged: costly statistics are computed only then."""
        return self._trainer is not None and publishing.is_logged(self.trainer, self.global_step + 1)

    def log_step(self, step: int) -> None:
        """Logs the means since the last logged step where this optimizer step is one to log."""
        if publishing.is_logged(self.trainer, step):
            publishing.publish_training(self, step)
        self._keep_totals(step)

    def publish(self, values: Mapping[str, float], stage: publishing.Stage, step: int | None = None) -> None:
        """Sends numbers to progress bar, callbacks and loggers; the horizontal axis is the optimizer step."""
        publishing.publish(self, values, stage, self.global_step if step is None else step, (*self.bar, "exact_match"))

    def on_validation_epoch_end(self) -> None:
        """Publishes the validation means."""
        publishing.publish_evaluation(self, "val")

    def on_test_epoch_end(self) -> None:
        """Publishes the test means."""
        publishing.publish_evaluation(self, "test")

    def export(self, directory: str | Path, *, lora: Literal["merge", "adapter"] = "merge") -> Path:
        """Writes the policy, and the tokenizer where there is one, in Hugging Face format."""
        return export_policy(self.policy, directory, self.tokenizer, lora=lora, stop_token_ids=self.codec.data_stops)
