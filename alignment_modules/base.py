"""AlignmentModule: what every paradigm shares: optimizer, exact normalisation, logging, checkpoints and export.

A paradigm says what its objective is (`objective(batch) -> Objective`: a sum, its weight, statistics). This base makes
the gradient of one optimizer step equal to the gradient of `sum(total) / sum(weight)` over all micro-batches and ranks:
the totals are backpropagated as they are, and the gradients divided once, just before clipping, by the weight added up
over the window. How a step is split therefore does not change it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from alignment_modules.checkpointing import CheckpointContract
from alignment_modules.clipping import GuardedClipping
from alignment_modules.evaluation import EvaluationConfig, GenerationSteps
from alignment_modules.frozen import frozen_children
from alignment_modules.functional.ranges import check_options
from alignment_modules.hyperparameters import PlainHyperparameters, keep_hyperparameters
from alignment_modules.makers import check_makers, check_rate
from alignment_modules.objective import EarlyRead, Meters, Objective, Statistic, with_value
from alignment_modules.optimization import bind_total_steps, parameter_groups
from alignment_modules.policies.architecture import check_trainable_types, refuse_compiled
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.frozen import companions
from alignment_modules.policies.load import PolicyConfig, build_policy, check_vocabulary, is_fresh, load_tokenizer
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.publishing import Publishing
from alignment_modules.rewards import ExactMatch, RewardSet

_TINY = 1e-30  # instead of 0 as the weight of nothing
_NO_TARGETS = "labels all -100, empty completions, or groups with fewer than two rewards"


class AlignmentModule(
    GenerationSteps, CheckpointContract, Publishing, PlainHyperparameters, GuardedClipping, L.LightningModule
):
    """Common base of all paradigms.

    Args:
        policy: What is trained: a folder or hub id, a `PolicyConfig`, or any `nn.Module` that maps `input_ids`
            [batch, time] to logits [batch, time, vocabulary] (a tensor, or an object with `.logits`).
        optimizer: Called with parameter groups; biases, norms and other vectors get no weight decay.
        lr_scheduler: Called with the optimizer; stepped once an optimizer step. The schedules of
            `alignment_modules.optimization` fill in the run's total number of optimizer steps themselves.
        tokenizer: A tokenizer, or the folder of one. None: the tokenizer of the Trainer's datamodule. Needed only to
            generate, to call rewards and to export.
        evaluation: How `test` and `predict` generate and judge.
        override_lr: Whether a run that resumes takes `optimizer`'s learning rate as it is given now. Otherwise the
            optimizer goes on as it was saved, and another rate than the checkpoint's is refused.
    """

    paradigm: ClassVar[str] = "base"
    compares_log_probs: ClassVar[bool] = False
    """Whether log-probabilities of two models are compared, so that dropout must be off."""
    batch_keys: ClassVar[tuple[str, ...]] = ()
    """What a batch must hold to be trained or validated on."""

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
        self.policy = build_policy(policy)
        self._saves_frozen = is_fresh(policy)
        self.make_optimizer = optimizer
        self.override_lr = override_lr
        self.make_lr_scheduler = lr_scheduler
        self.tokenizer: Any = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        given = EvaluationConfig(**evaluation) if isinstance(evaluation, Mapping) else evaluation
        self.evaluation = given or EvaluationConfig()
        self.verifier = RewardSet([self.evaluation.verifier or ExactMatch()], option="evaluation.verifier")
        self._train_meters = Meters()
        self._eval_meters: dict[int, Meters] = {}
        self._window_weight: Tensor | float = 0.0
        self._window_tokens: Tensor | float = 0.0
        self._window_total: Tensor | float = 0.0
        self._num_tokens: Tensor | float = 0.0
        self._steps_without_targets = 0
        self._learnt: bool | None = True  # an epoch that is resumed in its middle is not judged
        self._own_weight: EarlyRead | None = None
        self._loss_scale: Tensor | None = None

    # What a paradigm or a user's subclass overrides

    def objective(self, batch: dict[str, Any]) -> Objective:
        """The objective of one micro-batch: total, weight and statistics."""
        raise TypeError(f"{type(self).__name__} does not define objective(batch)")

    def describe(self) -> dict[str, str]:
        """What is printed at the start of `fit`: the resolved objective, line by line."""
        held = {name: companion.describe() for name, companion in companions(self).items()}
        return {"paradigm": self.paradigm, "policy": _count_parameters(self.policy)} | held

    def extra_metrics(self, batch: dict[str, Any], objective: Objective) -> dict[str, Statistic]:
        """More statistics to log for one micro-batch."""
        return {}

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """How much one batch holds: `tokens` (without padding), `samples` and `padding`."""
        # A loss mask says which of the tokens are scored, and adds none.
        counted = [key for key in batch if key.endswith("mask") and not key.endswith("loss_mask")]
        masks = [batch[key] for key in counted if isinstance(batch[key], Tensor)]
        if not masks:
            masks = [torch.ones_like(batch["input_ids"])]
        tokens = torch.stack([mask.sum() for mask in masks]).sum()
        return {"tokens": tokens, "samples": len(masks[0]), "padding": sum(m.numel() for m in masks) - tokens}

    # Lightning

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, time, vocabulary] of the policy."""
        output = self.policy(input_ids) if attention_mask is None else self.policy(input_ids, attention_mask)
        return output if isinstance(output, Tensor) else output.logits

    def setup(self, stage: str) -> None:
        """Takes the datamodule's tokenizer where none was given, and checks that its ids fit the policy.

        Raises:
            ValueError: If they do not, the Trainer clips gradients at NaN, or all of the module is compiled.
        """
        refuse_compiled(self)
        if math.isnan(self.trainer.gradient_clip_val or 0.0):
            raise ValueError(f"Trainer(gradient_clip_val={self.trainer.gradient_clip_val}) must be a number, or null")
        if self.tokenizer is None:
            self.tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if self.tokenizer is not None:
            check_vocabulary(self.policy, self.tokenizer)
            for name, companion in companions(self).items():
                if companion.module is not None:
                    check_vocabulary(companion.module, self.tokenizer, name=name)

    def configure_optimizers(self) -> Any:
        """Optimizer over the trainable parameters; the schedule counts optimizer steps."""
        check_trainable_types(self)
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.make_lr_scheduler is None:
            return optimizer
        check_rate(optimizer)
        scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if not self.automatic_optimization:
                raise ValueError(
                    f"lr_scheduler={type(scheduler).__name__} waits for a metric, but {type(self).__name__} steps its "
                    "schedule after every optimizer step: choose one that counts steps"
                )
            monitor = getattr(scheduler, "monitor", "train/loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        bind_total_steps(scheduler, self.total_optimizer_steps, strict=not self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
        self._window_weight = self._window_tokens = self._window_total = 0.0
        self._own_weight = self._loss_scale = None
        self._learnt = True

    def on_train_start(self) -> None:
        """Takes up what a checkpoint left, and prints the resolved objective."""
        super().on_train_start()
        width = max(map(len, lines := self.describe()))
        rank_zero_info("\n".join(f"  {key:<{width}}  {value}" for key, value in lines.items()))

    def on_train_epoch_start(self) -> None:
        """No optimizer step of this epoch was taken or skipped yet."""
        self._learnt = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuses a batch of another paradigm."""
        self.check_batch(batch)

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted validation left."""
        self._eval_meters.clear()

    def on_test_epoch_start(self) -> None:
        """Forgets what an interrupted test left."""
        super().on_test_epoch_start()
        self._eval_meters.clear()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuses a batch of another paradigm."""
        self.check_batch(batch)

    def check_batch(self, batch: Any) -> None:
        """Checks that a batch is what this paradigm takes.

        Raises:
            ValueError: If it is not a dictionary or lacks a key.
        """
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        missing = [key for key in self.batch_keys if not isinstance(batch, Mapping) or key not in batch]
        if missing:
            hint = "Does the data module belong to another paradigm?"
            if "completion_input_ids" in found:
                hint = "No module trains on unpaired preferences yet"
            raise ValueError(
                f"a batch for {type(self).__name__} must hold {', '.join(self.batch_keys)}; this one lacks "
                f"{', '.join(missing)}: it holds {found}. {hint}"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean of the micro-batch, whose gradient is that of the sum.

        Lightning and its callbacks read the value; the gradients are normalised before the optimizer step. Without a
        Trainer (in `L.Fabric` or a loop of your own) nobody does that later: value and gradient are the mean's.
        """
        if self._trainer is None:
            objective = self.objective(batch)
            return objective.total / objective.weight.clamp(min=_TINY)
        objective = self.record(batch)
        return with_value(self.scaled(objective), objective.total / objective.weight.clamp(min=_TINY))

    def scaled(self, objective: Objective) -> Tensor:
        """What is backpropagated: the total; where gradients are 16-bit floats, brought near the size of a mean.

        A sum over thousands of tokens would overflow them. The factor is a power of 2, fixed at the first micro-batch
        and the same on all ranks, so that it changes no digit; `on_before_optimizer_step` takes it back.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            return objective.total
        if self._loss_scale is None:
            largest = self.reduce(objective.weight.detach().float(), "max").clamp(min=1.0)
            self._loss_scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)
        return objective.total * self._loss_scale

    def record(self, batch: dict[str, Any]) -> Objective:
        """Evaluates the objective of a micro-batch and adds its weight and statistics to the current window."""
        objective = self.objective(batch)
        self._window_weight = self._window_weight + objective.weight.detach()
        self._window_total = self._window_total + objective.total.detach()
        self._own_weight = EarlyRead(self._window_weight)
        self._train_meters.update(objective.statistics | self.extra_metrics(batch, objective))
        if self.automatic_optimization:
            self._window_tokens = self._window_tokens + self.count_tokens(batch)["tokens"]
        return objective

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the validation means, which do not depend on the batch size."""
        self.evaluate_objective(batch, dataloader_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the weight of the window; Lightning clips after this, on unscaled gradients.

        A step without a single target, over all micro-batches and ranks, moves nothing: neither weights nor momentum
        nor weight decay. It counts as a step, so that schedules and `max_steps` are those of any other data.
        """
        window = torch.stack(
            [
                torch.as_tensor(v, device=self.device, dtype=torch.float32)
                for v in (self._window_weight, self._window_tokens, self._window_total)
            ]
        )
        weight, tokens, total = self.reduce(window, "sum").unbind()
        # What this rank added up is known before its backward pass ends; only where it is nothing, all ranks' counts.
        skipped = not (self._own_weight and self._own_weight.item()) and not float(weight)
        self._num_tokens = self._num_tokens + tokens
        self._window_weight = self._window_tokens = self._window_total = 0.0
        self._own_weight = None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if skipped:
            self._skip_step(parameters)
        else:
            self._learnt = True
            self._normalise(parameters, weight)
            # For callbacks, at each step and without waiting for the device; `self.log` would take a millisecond.
            self.trainer.callback_metrics["train/loss"] = total / weight
        if self.logging_due:
            rate = optimizer.param_groups[0]["lr"]
            if rate is not None:  # some optimizers set their own
                self._train_meters.update({"learning_rate": Statistic(torch.as_tensor(rate, dtype=torch.float32))})
        if self.automatic_optimization:  # before the callbacks' on_train_batch_end
            self.log_step(self.global_step + 1)

    def _normalise(self, parameters: list[nn.Parameter], weight: Tensor) -> None:
        # Lightning divided each loss by accumulate_grad_batches, and the strategy averaged over ranks.
        windows = self.trainer.accumulate_grad_batches if self.automatic_optimization else 1
        scale = windows * self.trainer.world_size / weight.clamp(min=_TINY)
        scale = scale if self._loss_scale is None else scale / self._loss_scale
        gradients: list[Any] = [p.grad for p in parameters]
        torch._foreach_mul_(gradients, scale)
        norm = self.clip(gradients)
        if self.logging_due:
            norm = torch.nn.utils.get_total_norm(gradients) if norm is None else norm
            self._train_meters.update(
                {"grad_norm": Statistic(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)}
            )

    def _skip_step(self, parameters: list[nn.Parameter]) -> None:
        """Takes the gradients away: an optimizer leaves a parameter without one, and its state, alone."""
        for parameter in parameters:
            parameter.grad = None
        self._learnt = bool(self._learnt)
        self._steps_without_targets += 1
        if self._steps_without_targets == 1:
            rank_zero_warn(
                f"optimizer step {self.global_step + 1} is skipped: not one target in the batches of all its "
                f"micro-batches and ranks ({_NO_TARGETS}). train/steps_without_targets counts such steps"
            )

    def clip(self, gradients: list[Tensor]) -> Tensor | None:
        """Clips normalised, unscaled gradients where the module does so itself; returns their norm before that."""
        return None

    def on_train_epoch_end(self) -> None:
        """Logs the steps of the epoch that no interval has logged.

        Raises:
            ValueError: If no step of the epoch had a target. One that was cut short is judged only where no step of the
                whole run had any.
        """
        over = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self._learnt is False and (over or self._steps_without_targets == self.global_step):
            raise ValueError(
                f"nothing to learn in epoch {self.current_epoch}: not one of its optimizer steps had a target "
                f"({_NO_TARGETS}). Look at the data's masks and lengths"
            )
        unlogged = self._train_meters.copy()
        if self._train_meters and self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._publish_training(self.global_step)
        if not over:
            self._train_meters = unlogged  # a run that goes on logs them at its own next step
        self._keep_totals(self.global_step)

    def log_step(self, step: int) -> None:
        """Logs the means since the last logged step where this optimizer step is one to log."""
        if self._is_logged(step):
            self._publish_training(step)
        self._keep_totals(step)

    def _publish_training(self, step: int) -> None:
        values = self._train_meters.compute(self.reduce)
        values["num_tokens"] = float(self._num_tokens)
        values["steps_without_targets"] = float(self._steps_without_targets)
        self._train_meters.reset()
        self.publish(values, "train", step)

    def export(self, directory: str | Path, *, lora: Literal["merge", "adapter"] = "merge") -> Path:
        """Writes the policy, and the tokenizer where there is one, in Hugging Face format."""
        return export_policy(
            self.policy, directory, self.tokenizer, lora=lora, stop_token_ids=self.data_stop_token_ids()
        )


def _count_parameters(module: nn.Module) -> str:
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{type(module).__name__}, {total:,} parameters, {trainable:,} of them trained"
