"""What a checkpoint of this library holds beside Lightning's own entries, and what it refuses to load."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from alignment_modules.frozen import FrozenWeights, put_back
from alignment_modules.objective import Meters
from alignment_modules.optimization import Schedule
from alignment_modules.policies.reference import fingerprint
from alignment_modules.position import settle, take_up
from alignment_modules.training.window import Window

_KEY = "alignment_module"

Totals = tuple[Meters, Tensor | float, int]  # what is not logged yet, tokens, and steps without targets


class CheckpointContract(L.LightningModule):
    """Keeps what is not trained out of checkpoints, stays strict on every other key, and checks where one came from.

    A checkpoint names its paradigm, the number of tokens trained on, the fingerprints of its reference and of the
    policy's frozen weights, and whatever `extra_state` adds (plain numbers, strings, lists, dictionaries and tensors,
    so that it loads with `weights_only=True`).
    """

    paradigm: ClassVar[str]
    reference: nn.Module | None
    windows: dict[str, Window]
    _train_meters: Meters
    batch_cut_short: bool = False
    """Whether `max_steps` was reached with steps of the last batch still to take."""
    _kept_totals: tuple[tuple[int, Totals], ...] = ()
    _saves_frozen: bool = False
    _frozen: FrozenWeights | None = None
    _restored: dict[str, Any] | None = None

    def extra_state(self) -> dict[str, Any]:
        """More state for the checkpoint, of plain types and tensors."""
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
        if position == "rewound":
            totals = dict(self._kept_totals).get(self.global_step, totals)
        meters, tokens, without_targets = totals
        checkpoint[_KEY] = {
            "paradigm": self.paradigm,
            "num_tokens": float(tokens),
            "steps_without_targets": without_targets,
            "reference": self._reference_fingerprint(),
            "extra": self.extra_state(),
            "meters": per_rank(self.trainer, meters.state_dict()),
            "batch_cut_short": self.batch_cut_short,
            "left_out": self._leave_out_frozen(checkpoint["state_dict"]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses checkpoints of another paradigm and, to resume, against another reference or of another optimizer.

        Raises:
            ValueError: If the checkpoint was not written by this paradigm or holds what was trained on other frozen
                weights, or a fit resumes from it and its reference had other weights, the command line now names
                another optimizer, or `max_steps` ended that run in the middle of a batch.
        """
        entry = checkpoint.get(_KEY)
        found = "no module of this library" if entry is None else f"paradigm {entry['paradigm']!r}"
        if entry is None or entry["paradigm"] != self.paradigm:
            raise ValueError(
                f"{self._checkpoint_name()} was written by {found}; {type(self).__name__} resumes only paradigm "
                f"{self.paradigm!r}. To start from its weights, give the exported folder as `policy`."
            )
        resumes = self._trainer is not None and self._trainer.state.fn == "fit"
        if resumes and entry["reference"] != (now := self._reference_fingerprint()):
            raise ValueError(
                f"{self._checkpoint_name()} was trained against {_describe(entry['reference'])}, this run has "
                f"{_describe(now)}: pass the same `reference` (or, where it is a copy of the policy, the same "
                "`policy`) as in the first run"
            )
        if resumes:
            self._check_batch_is_whole(entry, checkpoint["global_step"])
            self._keep_typed_optimizer(checkpoint)
        if left_out := entry.get("left_out"):
            put_back(checkpoint["state_dict"], super().state_dict(), left_out, self._checkpoint_name())
        policy = self.windows["policy"]
        policy.num_tokens, policy.skipped = entry["num_tokens"], entry.get("steps_without_targets", 0)
        self._restored = {**entry, "schedules": checkpoint.get("lr_schedulers", [])}
        self.load_extra_state(entry["extra"])

    def on_train_start(self) -> None:
        """Puts back the loaders and the sums of what is not logged yet."""
        take_up(self.trainer)
        self.batch_cut_short, self._frozen = False, None if self._saves_frozen else FrozenWeights(self)
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

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights but the reference's (a sharded, distributed checkpoint keeps them: its loader demands it)."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if not self._saves_shards():
            for key in [key for key in state if key.startswith(f"{prefix}reference.")]:
                del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads strictly; only the reference's keys may be absent.

        Raises:
            RuntimeError: If `strict` and the keys differ otherwise, or shapes differ; nothing was loaded then.
        """
        whole = {**dict(self._reference_items()), **state_dict}
        own = super().state_dict()
        missing, unknown = [key for key in own if key not in whole], [key for key in whole if key not in own]
        if strict and (missing or unknown):
            raise RuntimeError(
                f"{self._checkpoint_name()} does not fit {type(self).__name__}. Missing key(s) in state_dict: "
                f"{_some(missing)}. Unexpected key(s) in state_dict: {_some(unknown)}. Build the module as in the run "
                "that wrote the checkpoint."
            )
        return super().load_state_dict(whole, strict=strict, assign=assign)

    def _leave_out_frozen(self, state: dict[str, Any]) -> dict[str, str]:
        """Takes the policy's frozen weights out of a checkpoint, where they can be loaded again and are whole."""
        if self._frozen is None or not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return {}
        return self._frozen.leave_out(self, state, describe=self.trainer.is_global_zero)

    def _check_batch_is_whole(self, entry: dict[str, Any], step: int) -> None:
        """Refuses to go on in the middle of a batch, whose samples are gone."""
        if entry.get("batch_cut_short") and not 0 <= self.trainer.max_steps <= step:
            raise ValueError(
                f"{self._checkpoint_name()} cannot be continued exactly: max_steps={step} ended its run with optimizer "
                f"steps of the last batch still to take, and the samples they need are gone. Resume from an earlier "
                "checkpoint, or start a new run with the exported folder as `policy`; a max_steps at the end of a "
                f"batch can be extended ({getattr(self, 'optimizer_steps_per_batch', 1)} steps a batch)"
            )

    def _keep_typed_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Lets the optimizer options of the command line win over those that its saved state would bring back."""
        then = checkpoint.get("hyper_parameters", {}).get("optimizer")
        now = self.hparams.get("optimizer")
        if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
            return
        if then.get("class_path") != now.get("class_path"):
            raise ValueError(
                f"{self._checkpoint_name()} holds the state of optimizer {then.get('class_path')}, but optimizer="
                f"{now.get('class_path')}: resume with the same, or give the exported folder as `policy`"
            )
        old, new = then.get("init_args") or {}, now.get("init_args") or {}
        for option in [option for option in new if option in old and old[option] != new[option]]:
            rank_zero_info(f"optimizer.{option}: {new[option]} as given now; the checkpoint had {old[option]}")
            for state in [*checkpoint.get("optimizer_states", ()), *checkpoint.get("lr_schedulers", ())]:
                _replace(state, option, old[option], new[option])

    def _checkpoint_name(self) -> str:
        path = None if self._trainer is None else getattr(self._trainer, "ckpt_path", None)
        return f"checkpoint {str(path)!r}" if path else "this checkpoint"

    def _reference_items(self) -> Iterator[tuple[str, Any]]:
        if self.reference is not None:
            for key, value in self.reference.state_dict().items():
                yield f"reference.{key}", value

    def _reference_fingerprint(self) -> str | None:
        if self.reference is None:
            return None
        if not hasattr(self, "_cached_fingerprint"):
            self._cached_fingerprint = fingerprint(self.reference)
        return self._cached_fingerprint

    def _saves_shards(self) -> bool:
        trainer = self._trainer
        return trainer is not None and getattr(trainer.strategy, "_save_distributed_checkpoint", False)


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


def _describe(reference: str | None) -> str:
    return "no reference" if reference is None else f"a reference with fingerprint {reference[:12]}"


def _some(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def _replace(state: dict[str, Any], option: str, old: Any, new: Any) -> None:
    """Puts a new value of an option into the saved state of an optimizer or a schedule."""
    for group in state.get("param_groups", ()):
        if option == "lr":  # a schedule has moved it away from what was given
            group["lr"] = new if group["lr"] == old else group["lr"] * new / old
            group.update({"initial_lr": new} if "initial_lr" in group else {})
        elif group.get(option) == old or group.get(option) == tuple(old if isinstance(old, list) else [old]):
            group[option] = new  # not where the group has its own value, as vectors have for weight decay
    if option == "lr" and "base_lrs" in state:
        state["base_lrs"] = [new] * len(state["base_lrs"])
