"""What a checkpoint of this library holds beside Lightning's own entries, and what it refuses to load."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from alignment_modules.policies.frozen import Frozen, companions
from alignment_modules.policies.quantization import quantized_entries, quantized_layers
from alignment_modules.training.adapter_rates import check_ratio
from alignment_modules.training.frozen_weights import FrozenWeights, check_keys, others, put_back, some_of
from alignment_modules.training.meters import Meters
from alignment_modules.training.moved import tell_moved
from alignment_modules.training.position import settle, take_up
from alignment_modules.training.schedules import Schedule
from alignment_modules.training.sharded_checkpoints import ENTRY, ShardedCheckpoints
from alignment_modules.training.window import Window

AVERAGE = "weight_average"
"""A checkpoint's entry of a callback that averages weights and puts the average in the place of the weights.

It holds the callback's `state_key` ("callback"), how often it updated ("updates"), and two dictionaries of weights by
name, "average" and "training".
"""

Totals = tuple[Meters, Tensor | float, int]  # what is not logged yet, tokens, and steps without targets


class CheckpointContract(L.LightningModule):
    """Keeps what is not trained out of checkpoints, stays strict on every other key, and checks where one came from.

    A checkpoint names its paradigm, the number of tokens trained on, the fingerprints of its companions and of what
    else is frozen, and whatever `extra_state` adds (plain numbers, strings, lists, dictionaries and tensors, so that it
    loads with `weights_only=True`).
    """

    paradigm: ClassVar[str]
    override_lr: bool
    windows: dict[str, Window]
    _train_meters: Meters
    batch_cut_short: bool = False
    """Whether `max_steps` was reached with steps of the last batch still to take."""
    _kept_totals: tuple[tuple[int, Totals], ...] = ()
    _kept_frozen: tuple[str, ...] = ()
    """Children whose weights a checkpoint keeps, frozen or not."""
    _frozen: FrozenWeights | None = None
    _restored: dict[str, Any] | None = None

    def extra_state(self) -> dict[str, Any]:
        """More state for the checkpoint, of plain types and tensors; all ranks call this."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Receives what `extra_state` returned when the checkpoint was written."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds this library's entry, at a position from which a run continues exactly."""
        for logger in self.loggers:
            try:
                logger.save()  # what led to this checkpoint is on disk before it
            except OSError as error:
                rank_zero_warn(f"{type(logger).__name__} cannot write: {error}")
        position = settle(checkpoint, self.trainer.accumulate_grad_batches if self.automatic_optimization else 1)
        totals = self._totals()
        if position != "whole":
            totals = dict(self._kept_totals).get(self.global_step, totals)
        meters, tokens, without_targets = totals
        checkpoint[ENTRY] = {
            "paradigm": self.paradigm,
            "num_tokens": float(tokens),
            "steps_without_targets": without_targets,
            "companions": self._companions(),
            "extra": self.extra_state(),
            "meters": per_rank(self.trainer, meters.state_dict()),
            "batch_cut_short": self.batch_cut_short,
            "left_out": self._leave_out_frozen(checkpoint["state_dict"]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses checkpoints of another paradigm and, to resume, with other companions or of another optimizer.

        Raises:
            ValueError: If the checkpoint was not written by this paradigm or holds what was trained on other frozen
                weights, or a fit resumes from it and a companion had other weights, another part of the policy was
                trained, weights were averaged by a callback that is not there, the command line now names another
                optimizer or other options of it, or `max_steps` ended that run in the middle of a batch.
        """
        entry = checkpoint.get(ENTRY, {})
        found = f"paradigm {entry['paradigm']!r}" if entry else "no module of this library"
        if "companions" not in entry or entry["paradigm"] != self.paradigm:
            found += ", in an earlier version" if entry and "companions" not in entry else ""
            raise ValueError(
                f"{self._checkpoint_name()} was written by {found}; {type(self).__name__} resumes only paradigm "
                f"{self.paradigm!r}. To start from its weights, give the exported folder as `policy`. "
                f"{tell_moved(checkpoint.get('hyper_parameters'))}".rstrip()
            )
        resumes = self._trainer is not None and self._trainer.state.fn == "fit"
        if resumes:
            self._check_companions(entry["companions"])
            self._check_batch_is_whole(entry, checkpoint["global_step"])
            self._check_average(checkpoint.get(AVERAGE))
            self._check_part(checkpoint.get("hyper_parameters", {}))
            self._check_optimizers(checkpoint)
        if left_out := entry.get("left_out"):
            put_back(checkpoint["state_dict"], self.state_dict(), left_out, self._checkpoint_name())
        policy = self.windows["policy"]
        policy.num_tokens, policy.skipped = entry["num_tokens"], entry.get("steps_without_targets", 0)
        self._restored = {**entry, "schedules": checkpoint.get("lr_schedulers", [])}
        self.load_extra_state(entry["extra"])

    def on_train_start(self) -> None:
        """Puts back the loaders and the sums of what is not logged yet."""
        take_up(self.trainer)
        self.batch_cut_short, self._frozen = False, FrozenWeights(self, self._kept_frozen)
        entry, self._restored = self._restored or {}, None
        for config, saved in zip(self.trainer.lr_scheduler_configs, entry.get("schedules", []), strict=False):
            _warn_of_new_length(config.scheduler, saved)
        meters = entry.get("meters")
        if meters is not None and len(meters) == self.trainer.world_size:
            self._train_meters.load_state_dict(meters[self.global_rank], self.device)
        self._kept_totals = ()
        self._keep_totals(self.global_step)

    def _totals(self) -> Totals:
        policy = self.windows["policy"]
        return self._train_meters.copy(), policy.num_tokens, policy.skipped

    def _keep_totals(self, step: int) -> None:
        """Keeps the totals at the end of an optimizer step, for a checkpoint that is put back to it.

        Those of the step before stay: this one may still fail after it was counted.
        """
        self._kept_totals = (*self._kept_totals[-1:], (step, self._totals()))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads strictly, all or nothing. Quantized weights cannot be written to: they must be those that are there.

        Raises:
            RuntimeError: If `strict` and the keys differ, or quantized weights differ, and nothing was loaded; or if
                shapes differ.
        """
        own = self.state_dict()
        if strict:
            check_keys(own, state_dict, self._checkpoint_name(), self)
        held = quantized_entries(self, state_dict)
        if other := others(state_dict, own, held):
            raise RuntimeError(
                f"{self._checkpoint_name()} holds other quantized weights than {type(self).__name__}: "
                f"{some_of(other)}. Build the policy from the same base, with the same quantization"
            )
        rest = {key: value for key, value in state_dict.items() if key not in held}
        # The keys are compared above; torch would miss those of quantized layers, here and in companions.
        return super().load_state_dict(rest, strict=strict and not quantized_layers(self), assign=assign)

    def _leave_out_frozen(self, state: dict[str, Any]) -> dict[str, str]:
        """Takes the frozen weights out of a checkpoint, where they can be loaded again and are whole."""
        strategy = self.trainer.strategy
        shards = isinstance(strategy, ShardedCheckpoints)  # all its processes put a fingerprint together
        if self._frozen is None or not (shards or isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))):
            return {}
        return self._frozen.leave_out(self, state, describe=shards or self.trainer.is_global_zero)

    def _check_batch_is_whole(self, entry: dict[str, Any], step: int) -> None:
        """Refuses to go on in the middle of a batch, whose samples are gone."""
        if entry.get("batch_cut_short") and not 0 <= self.trainer.max_steps <= step:
            raise ValueError(
                f"{self._checkpoint_name()} cannot be continued exactly: max_steps={step} ended its run with optimizer "
                f"steps of the last batch still to take, and the samples they need are gone. Resume from an earlier "
                "checkpoint, or start a new run with the exported folder as `policy`; a max_steps at the end of a "
                f"batch can be extended ({getattr(self, 'optimizer_steps_per_batch', 1)} steps a batch)"
            )

    def _companions(self) -> dict[str, str]:
        """What each frozen companion is: its fingerprint, or how else a run that resumes gets it back."""
        return {name: _state(companion) for name, companion in companions(self).items()}

    def _check_companions(self, then: dict[str, str]) -> None:
        now = self._companions()
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{self._checkpoint_name()} was trained against {_describe(name, then)}, this run has "
                    f"{_describe(name, now)}: pass the same `{name}` (or, where it is a copy of the policy, the same "
                    "`policy`) as in the first run"
                )

    def _check_average(self, entry: Mapping[str, Any] | None) -> None:
        """Refuses to train on from an average, which a run without the callback would take for the weights."""
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        if entry is not None and entry["callback"] not in [callback.state_key for callback in callbacks]:
            raise ValueError(
                f"{self._checkpoint_name()} holds averaged weights, and those of the training beside them: resume with "
                f"the callback that wrote it, {entry['callback']}, or start a new run with the exported folder as "
                "`policy`"
            )

    def _check_part(self, then: Mapping[str, Any]) -> None:
        """Compares which part of the policy is trained, as far as hyperparameters say so."""
        before, now = then.get("policy"), self.hparams.get("policy")
        if before is None or now is None:
            return
        for name in ("trainable", "frozen"):
            old, new = _policy_option(before, name), _policy_option(now, name)
            if old != new:
                raise ValueError(
                    f"policy.{name}={new!r}, but {self._checkpoint_name()} was trained with {old!r}: give that, or "
                    "start a new run with the exported folder as `policy`"
                )

    def optimizer_option(self, name: str) -> str:
        """The option that makes the optimizer of an entry of `trained`."""
        return "optimizer"

    def _check_optimizers(self, checkpoint: dict[str, Any]) -> None:
        """Every optimizer goes on as it was saved; refuses what the command line would have one do otherwise."""
        module: Any = self
        names, then, now = list(module.trained()), checkpoint.get("hyper_parameters", {}), self.hparams
        check_ratio(then, now, self._checkpoint_name())
        moved = [*zip(names, checkpoint.get("optimizer_states", ()), strict=False)]
        scheduled = [name for name in names if module.scheduler_for(name) is not None]
        moved += zip(scheduled, checkpoint.get("lr_schedulers", ()), strict=False)
        for option in [key for key in now if key.endswith("_optimizer")]:
            if (then.get(option) is None) != (now[option] is None):
                given = "with" if now[option] is None else "without"
                raise ValueError(f"{self._checkpoint_name()} was written {given} {option}: resume with the same")
        for option in dict.fromkeys(map(self.optimizer_option, names)):
            states = [state for name, state in moved if self.optimizer_option(name) == option]
            self._check_optimizer(option, then.get(option), now.get(option), states)

    def _check_optimizer(self, name: str, then: Any, now: Any, states: list[dict[str, Any]]) -> None:
        """Compares an option with what it was; `states` are of its optimizers and their schedules."""
        if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
            return
        if then.get("class_path") != now.get("class_path"):
            raise ValueError(
                f"{self._checkpoint_name()} holds the state of optimizer {then.get('class_path')}, but {name}="
                f"{now.get('class_path')}: resume with the same, or give the exported folder as `policy`"
            )
        old, new = then.get("init_args") or {}, now.get("init_args") or {}
        changed = [option for option in new if option in old and old[option] != new[option]]
        if self.override_lr and "lr" in changed:
            changed.remove("lr")
            rank_zero_info(f"{name}.lr: {new['lr']} as given now; the checkpoint had {old['lr']}")
            for state in states:
                _change_rate(state, old["lr"], new["lr"])
        for option in changed:
            way = ", set override_lr=true to go on with the new one" if option == "lr" else ""
            raise ValueError(
                f"{name}.{option}={new[option]}, but {self._checkpoint_name()} goes on with its optimizer as it was "
                f"saved, with {old[option]}: give that{way}, or start a new run with the exported folder as `policy`"
            )

    def _checkpoint_name(self) -> str:
        path = None if self._trainer is None else getattr(self._trainer, "ckpt_path", None)
        return f"checkpoint {str(path)!r}" if path else "this checkpoint"


def per_rank(trainer: L.Trainer, value: Any) -> list[Any] | None:
    """A value of each rank, for a checkpoint that one of them writes.

    Args:
        trainer: The Trainer; all its ranks must call this.
        value: Plain values and CPU tensors.

    Returns:
        One entry a rank; None where a run of several was interrupted, since the others may be elsewhere.
    """
    if trainer.world_size == 1:
        return [value]
    if trainer.state.status == TrainerStatus.INTERRUPTED:
        return None
    values = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _warn_of_new_length(schedule: Any, saved: dict[str, Any]) -> None:
    """Says so where the steps before a checkpoint followed the schedule of a shorter or longer run."""
    before = saved.get("total_steps")
    if not isinstance(schedule, Schedule) or not schedule.needs_total_steps or before in (None, schedule.total_steps):
        return
    now, rate = schedule.total_steps, schedule.get_last_lr()[0]
    rank_zero_warn(
        f"{type(schedule).__name__}: this run has {now} optimizer steps, and had {before} when its checkpoint was "
        f"written at step {schedule.last_epoch}. From here on the learning rate follows the schedule of {now} steps: "
        f"it goes on from {rate:.3g}, where it stood at {saved['_last_lr'][0]:.3g}. A run of {now} steps from the "
        "start would have had other rates before"
    )


def _policy_option(policy: Any, name: str) -> Any:
    """An option of a policy, as hyperparameters hold one: a path, or its options by name."""
    options = policy.get("init_args", policy) if isinstance(policy, Mapping) else {}
    value = options.get(name)
    return None if value is None else list(value)


def _state(companion: Frozen) -> str:
    if companion.module is None and companion.adapter is None:
        return "the policy, adapter off"
    return "saved" if companion.saved else str(companion.fingerprint())


def _describe(name: str, held: Mapping[str, str]) -> str:
    state = held.get(name)
    if state is None or " " in state:
        return f"no {name}" if state is None else f"{state}, as {name}"
    return f"a {name} that is saved with it" if state == "saved" else f"a {name} with fingerprint {state[:12]}"


def _change_rate(state: dict[str, Any], old: float, new: float) -> None:
    """Scales the rates in the saved state of an optimizer or a schedule, which may have moved them."""

    def scaled(rate: Any) -> Any:
        return new if rate == old else rate * new / old

    for group in state.get("param_groups", ()):
        group.update({key: scaled(group[key]) for key in ("lr", "initial_lr") if key in group})
    state.update({key: [scaled(rate) for rate in state[key]] for key in ("base_lrs", "_last_lr") if key in state})
