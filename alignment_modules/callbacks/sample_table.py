"""What the policy writes while it learns: rollouts as a table in TensorBoard and as JSONL."""

import contextlib
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from alignment_modules.callbacks.jsonl import to_json_line
from alignment_modules.functional.ranges import Count, check_options

_MARKUP = str.maketrans({**{mark: f"&#{ord(mark)};" for mark in "\\`*_|~[]"}, "\r": "", "\n": "<br>"})


class SampleTable(Callback):
    """Shows the first rows of the module's `last_rollout` every so many optimizer steps.

    `last_rollout` is a dictionary of lists of equal length: an id, prompt, completion, one entry per reward, reward,
    advantage, truncated, and whatever else the module adds. The table goes to every logger with TensorBoard's
    `add_text`, as `samples`; the same rows, uncut, go to a JSONL file. It is opt-in because it shows the data, and
    TensorBoard has no password. Only rank 0 writes. A write that fails is a warning.

    Args:
        every_n_steps: Optimizer steps between two tables; the first batch is always shown.
        rows: Completions shown.
        path: The JSONL file; None: `samples.jsonl` in the Trainer's `default_root_dir`. Rows are appended.
        max_characters: Longest text in the table; the JSONL file holds it whole.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self, every_n_steps: Count = 50, rows: Count = 8, path: str | None = None, max_characters: Count = 1000
    ) -> None:
        check_options(SampleTable.__init__, locals())
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.path = path
        self.max_characters = max_characters
        self._last_shown: int | None = None
        self._failed: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module that has no rollouts.

        Raises:
            TypeError: If the module has no `last_rollout`.
        """
        if stage == "fit" and not hasattr(pl_module, "last_rollout"):
            raise TypeError(f"SampleTable needs {type(pl_module).__name__}.last_rollout; it has none")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows nothing twice: a resumed run goes on where it stands."""
        self._last_shown = trainer.global_step if trainer.global_step else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the table where one is due."""
        step = trainer.global_step
        due = self._last_shown is None or step // self.every_n_steps > self._last_shown // self.every_n_steps
        if not (due and trainer.is_global_zero):
            return
        rows = _rows(pl_module.last_rollout, self.rows)
        if not rows:
            return
        self._last_shown = step
        for logger in trainer.loggers:
            with self._going_on(str(getattr(logger, "log_dir", None) or logger.save_dir)):
                add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                if callable(add_text):
                    add_text("samples", self._table(rows), global_step=step)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(self.path) if self.path else Path(trainer.default_root_dir) / "samples.jsonl"
            with self._going_on(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(to_json_line({"step": step, **row}) for row in rows)

    @contextlib.contextmanager
    def _going_on(self, path: str) -> Iterator[None]:
        """Makes a failed write a warning, once for each path: samples are not worth a run."""
        try:
            yield
        except OSError as error:
            if path not in self._failed:
                self._failed.add(path)
                rank_zero_warn(f"cannot write samples to {path!r}: {error.strerror or error}. Training goes on")

    def _table(self, rows: list[dict[str, Any]]) -> str:
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns)]
        lines += [[self._cell(row[column]) for column in columns] for row in rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _cell(self, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        text = str(value)
        if len(text) > self.max_characters:
            text = text[: self.max_characters] + "…"
        # what a model writes must neither break the table nor vanish as markup
        return html.escape(text, quote=False).translate(_MARKUP)


def _rows(rollout: Any, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a dictionary of lists; none of an empty one.

    Raises:
        ValueError: If the lists differ in length.
    """
    if not rollout:
        return []
    columns: dict[str, Sequence[Any]] = {
        name: values.tolist() if hasattr(values, "tolist") else values for name, values in rollout.items()
    }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"last_rollout must hold lists of one length; found {lengths}")
    total = min(count, next(iter(lengths.values())))
    return [{name: values[row] for name, values in columns.items()} for row in range(total)]
