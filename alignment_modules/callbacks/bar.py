"""The progress bar: one line that says how far a run is, how long it takes, and what it is waiting for."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from alignment_modules.callbacks.line import Line
from alignment_modules.functional.ranges import Range, check_options
from alignment_modules.functional.waiting import listen

_NUMBERS = 3


def end_bar(trainer: L.Trainer) -> None:
    """Ends a rich progress bar: while it lives it breaks long lines, so that a command in them cannot be copied.

    Args:
        trainer: The Trainer whose bar it is.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, trainer.lightning_module, "fit")


class StepBar(ProgressBar):
    """One line: optimizer steps of the whole run, the time that is left, three numbers, and what is being waited for.

    It works with any LightningModule; those of this library choose the numbers (`bar`) and tell what takes long, such
    as sampling. In a terminal the line is drawn over, in a notebook it is one output that changes; elsewhere, as in a
    log file, a line is written every so often.

    Args:
        file_seconds: Seconds between two lines where the output is no terminal.
    """

    def __init__(self, file_seconds: Annotated[float, Range(0.0)] = 30.0) -> None:
        check_options(StepBar.__init__, locals())
        super().__init__()
        self.file_seconds = file_seconds
        self._enabled = True
        self._line: Line | None = None
        self._end_listening: Callable[[], None] = lambda: None
        self._waiting = ""
        self._word, self._done, self._total = "", 0, math.inf
        self._first, self._since = 0, 0.0
        self._outer: tuple[str, int, float, int, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_line": None, "_end_listening": None, "_trainer": None}

    def disable(self) -> None:
        """Shows nothing, as on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the line again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the line."""
        if self._line is not None:
            self._line.clear()
        print(*args, **{"file": sys.stdout, **kwargs})

    def _begin(self, word: str, total: float, done: int = 0) -> None:
        if not self._enabled:
            return
        if self._line is None:
            self._line = Line(self.file_seconds)
            self._end_listening = listen(self._hear)
        self._word, self._total, self._done = word, total, done
        self._first, self._since = done, time.monotonic()
        self._waiting = ""
        self._show()

    def _hear(self, what: str, done: int, total: int) -> None:
        self._waiting = f"{what} {done:,}/{total:,}" if total else what
        self._show()

    def _advance(self, done: int) -> None:
        self._done, self._waiting = done, ""
        self._show()

    def _show(self, *, last: bool = False) -> None:
        if self._line is not None and (last or self._line.due()):
            self._line.draw(self.text(self._line.width), last=last)

    def _end(self, *, keep: bool = True) -> None:
        if self._line is None:
            return
        self._waiting = ""
        if keep and self._line.kind != "file":
            self._show(last=True)
        self._line.end()
        self._line = None
        self._end_listening()

    def text(self, width: int) -> str:
        """The line as it is now.

        Args:
            width: Most columns.
        """
        known = math.isfinite(self._total)
        parts = [f"{self._done:,}/{int(self._total):,}" if known else f"{self._done:,}"]
        seconds = time.monotonic() - self._since
        if known and self._done >= self._total:
            parts.append(f"in {_clock(seconds)}")
        elif known and self._done > self._first:
            parts.append(f"{_clock(seconds / (self._done - self._first) * (self._total - self._done))} left")
        parts += [self._waiting] if self._waiting else []
        room = width - len(self._word) - sum(len(part) + 2 for part in parts)
        for number in self._numbers():
            if len(number) + 2 <= room:
                parts.insert(len(parts) - bool(self._waiting), number)
                room -= len(number) + 2
        drawn = _bar(self._done / self._total, min(room - 2, 20)) if known and self._total and room >= 7 else ""
        return "  ".join(filter(None, [self._word, drawn, *parts]))[:width]

    def _numbers(self) -> list[str]:
        if self._trainer is None or self._outer is not None:
            return []
        found: Mapping[str, Any] = self._trainer.progress_bar_metrics
        validated = [name for name in ("val/exact_match", "val/reward", "val/loss") if name in found][:1]
        own = [f"train/{name}" for name in getattr(self._trainer.lightning_module, "bar", ())]
        own = [name for name in own if name in found] or [name for name in found if name not in ("v_num", *validated)]
        chosen = [*own[: _NUMBERS - len(validated)], *validated]
        return [f"{_short(name)} {float(found[name]):.4g}" for name in chosen]

    # Lightning

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows that the first validation batches are tried."""
        self._begin("trying validation", math.inf)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes that off again."""
        self._end(keep=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins with the step that the run begins with."""
        self._outer = None
        total = float(getattr(pl_module, "total_optimizer_steps", None) or trainer.estimated_stepping_batches)
        self._begin("fit", total if total > 0 else math.inf, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the step."""
        self._advance(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the last line on the screen."""
        self._done = trainer.global_step
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the validation in the place of the fit's line, or begins one."""
        if trainer.sanity_checking:
            return
        total = float(sum(trainer.num_val_batches))
        if self._line is not None:
            self._outer = (self._word, self._done, self._total, self._first, self._since)
            self._done = trainer.global_step
        self._begin("validation", total)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Shows the batch."""
        self._advance(self._done + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on with the fit's line, or ends."""
        if trainer.sanity_checking:
            return
        if self._outer is not None:
            self._word, self._done, self._total, self._first, self._since = self._outer
            self._outer = None
        elif trainer.state.fn == "validate":
            self._end()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count the batches of all loaders."""
        self._begin("test", float(sum(trainer.num_test_batches)))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count the batches of all loaders."""
        self._begin("predict", float(sum(trainer.num_predict_batches)))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the last line on the screen."""
        self._end()

    on_predict_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves the screen to the error."""
        self._end()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets the run."""
        self._end()


def _short(name: str) -> str:
    """What the line calls a metric.

    >>> [_short(name) for name in ("train/mean_token_accuracy", "train/completions/mean_length", "val/exact_match")]
    ['token accuracy', 'length', 'val exact match']
    """
    words = name.rpartition("/")[2].removeprefix("mean_").replace("_", " ")
    return f"val {words}" if name.startswith("val/") else words


def _clock(seconds: float) -> str:
    """A time as hours, minutes and seconds.

    >>> _clock(59.7), _clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(share: float, cells: int) -> str:
    full = round(min(max(share, 0.0), 1.0) * cells)
    encoding = (getattr(sys.stderr, "encoding", None) or "ascii").lower()
    done, left = ("█", "░") if encoding.startswith("utf") else ("#", "-")
    return done * full + left * (cells - full)
