"""What matters of a run: a few lines at its start, a summary at its end."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import lightning as L
import torch
from lightning.pytorch import Callback

from alignment_modules.callbacks.bar import end_bar
from alignment_modules.callbacks.logged_metrics import LoggedMetrics
from alignment_modules.functional.ranges import check_options
from alignment_modules.policies.context import context_length

_LEAST, _MOST = "least", "most"
_SHOWN = {  # metrics of the summary, and which of their values is the best
    "train/loss": _LEAST,
    "train/mean_token_accuracy": _MOST,
    "train/rewards/accuracies": _MOST,
    "train/rewards/margins": _MOST,
    "train/reward": _MOST,
    "train/completions/mean_length": None,
    "val/loss": _LEAST,
    "val/mean_token_accuracy": _MOST,
    "val/rewards/accuracies": _MOST,
    "val/reward": _MOST,
    "val/exact_match": _MOST,
}
_ACT = "align fit --config grpo --model.policy.path {export} --data.train QUESTIONS"
_NEXT = {  # what one usually does with the exported policy
    "pretrain": "align fit --config sft --model.policy.path {export} --data.train DEMONSTRATIONS",
    "sft": "align fit --config dpo --model.policy.path {export} --data.train PAIRS",
    "reward": "align fit --config grpo --model.policy.path POLICY --model.rewards {export} --data.train QUESTIONS",
    "dpo": _ACT,
    "orpo": _ACT,
    "cpo": _ACT,
    "kto": _ACT,
    "distillation": _ACT,
    "online_dpo": "align test --config online_dpo --model.policy.path {export} --data.test QUESTIONS",
    "grpo": "align test --config grpo --model.policy.path {export} --data.test QUESTIONS",
    "ppo": "align test --config ppo --model.policy.path {export} --data.test QUESTIONS",
}


class RunReport(LoggedMetrics, Callback):
    """Prints what is trained on what for how long and where to, and at the end what came of it. Only rank 0 prints.

    Works with any LightningModule; one with `describe()` says itself what its objective and policy are.

    Args:
        enabled: False prints nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_options(RunReport.__init__, locals())
        self.enabled = enabled
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._started: float | None = None
        self._there: dict[Path, tuple[int, int]] = {}  # files of the run's folder before the fit
        self._first_step = 0
        self._stopped: list[str] = []  # why runs before this one stopped early, which checkpoints remember

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remembers what lies in the run's folder, which need not be the run's alone."""
        if stage == "fit" and self.enabled and trainer.is_global_zero:
            self._there = _files_below(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier fit; where nothing is left to train, no training starts."""
        self._history.clear()
        self._started = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the beginning."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._stopped = _stopped_early(trainer)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.enabled:
            _print(trainer, _beginning(trainer, pl_module))

    def on_logged(self, trainer: L.Trainer, step: int, metrics: dict[str, float]) -> None:
        """Keeps the metrics that the summary shows."""
        for name in _SHOWN.keys() & metrics.keys():
            self._history.setdefault(name, []).append((step, metrics[name]))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the summary."""
        if self.enabled and trainer.is_global_zero:
            end_bar(trainer)
            if self._started is None:
                done = f"nothing was left to train after optimizer step {trainer.global_step}"
            else:
                steps, seconds = trainer.global_step - self._first_step, time.monotonic() - self._started
                done = f"{steps} optimizer steps in {_duration(seconds)}, peak memory {_peak_memory(pl_module)}"
            lines = {"done": done}
            if early := [reason for reason in _stopped_early(trainer) if reason not in self._stopped]:
                lines["stopped early"] = " ".join(early)
            lines |= self._metrics()
            root = Path(trainer.default_root_dir)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                if written := _written(root, self._there):
                    lines["files"] = f"{root}: {written}"
                following = _NEXT.get(getattr(pl_module, "paradigm", ""))
                if following and (root / "export").is_dir():
                    lines["next"] = following.format(export=root / "export")
            _print(trainer, lines)

    def _metrics(self) -> dict[str, str]:
        lines = {}
        for name, best in _SHOWN.items():
            values = self._history.get(name, [])
            if values and not (name == "train/loss" and "train/reward" in self._history):  # a surrogate says little
                text = f"first {values[0][1]:.4g}, last {values[-1][1]:.4g}"
                if best is not None:
                    step, value = (min if best is _LEAST else max)(values, key=lambda entry: entry[1])
                    text += f", best {value:.4g} at step {step}"
                lines[name] = text
        return lines


def _beginning(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    reports: Mapping[str, Mapping[str, Any]] = getattr(getattr(trainer, "datamodule", None), "reports", {})
    counts = [_counted(split, report) for split, report in reports.items()]
    batches = trainer.num_training_batches
    endless = math.isinf(batches)
    total: Any = getattr(module, "total_optimizer_steps", None) or trainer.estimated_stepping_batches
    most = "at most " if getattr(module, "may_take_fewer_steps", False) else ""
    length = f"{most}{total} optimizer steps" if math.isfinite(total) and total > 0 else "no limit"
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    rows = f" of {size} rows" if size else ""
    split = f"{trainer.world_size} processes" if trainer.world_size > 1 else "one process"
    accumulated = trainer.accumulate_grad_batches
    own = {"objective": type(module).__name__, "policy": f"{trained:,} parameters trained"}
    return ({} if hasattr(module, "describe") else own) | {
        "data": "; ".join(counts) or f"{batches} batches an epoch",
        "steps": f"{length}; {'batches' if endless else f'an epoch has {batches} batches'}{rows} on {split}"
        + (f", {accumulated} of them a step" if accumulated > 1 else ""),
        "writes to": str(trainer.default_root_dir),
        **_beyond_context(trainer, module),
    }


def _beyond_context(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """A warning where training rows are longer than what the policy was made for; rotary positions take them all."""
    data: Any = getattr(trainer, "datamodule", None)
    longest = getattr(data, "reports", {}).get("train", {}).get("longest", 0)
    policy, kept = getattr(module, "policy", None), min(longest, getattr(data, "max_length", longest))
    limit = context_length(policy) if isinstance(policy, torch.nn.Module) else None
    if limit is None or kept <= limit:
        return {}
    return {"warning": f"rows of up to {kept} tokens, and the policy was made for {limit} (max_position_embeddings)"}


def _stopped_early(trainer: L.Trainer) -> list[str]:
    """What callbacks say that stopped the run, in Lightning's words."""
    said = [callback.stopping_reason_message for callback in trainer.early_stopping_callbacks]
    return [reason.removesuffix(" Signaling Trainer to stop.") for reason in said if reason]


def _counted(split: str, report: Mapping[str, Any]) -> str:
    """What was read of a split; a stream, of which passes are counted, is read in training."""
    if "passes" in report:
        return f"{split} a stream"
    tokens = f", {report['tokens']:,} tokens" if "tokens" in report else ""
    return f"{split} {report.get('kept', report['rows']):,} rows{tokens}"


def _print(trainer: L.Trainer, lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    trainer.print("\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()))


def _files_below(root: Path) -> dict[Path, tuple[int, int]]:
    """When each file below a folder was last written, in nanoseconds, and its bytes; hidden entries are left out."""
    found = {}
    for entry in root.glob("[!.]*"):
        for path in entry.rglob("*") if entry.is_dir() else [entry]:
            with contextlib.suppress(OSError):  # another program may remove it meanwhile
                if path.is_file():
                    found[path] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def _written(root: Path, before: Mapping[Path, tuple[int, int]]) -> str:
    """The entries of the run's folder with files that are new or changed, each with the size of those."""
    sizes: dict[str, int] = {}
    for path, found in sorted(_files_below(root).items()):
        if before.get(path) != found:
            name, *inner = path.relative_to(root).parts
            entry = f"{name}/" if inner else name
            sizes[entry] = sizes.get(entry, 0) + found[1]
    return ", ".join(f"{entry} ({_size(size)})" for entry, size in sizes.items())


def _peak_memory(module: L.LightningModule) -> str:
    if module.device.type == "cuda":
        return f"{_size(torch.cuda.max_memory_allocated(module.device))} of the GPU"
    if resource is None:
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return _size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _size(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes or hours else ""]
    return " ".join([*filter(None, parts), f"{rest} s" if minutes or hours else f"{seconds:.1f} s"])
