"""What the policy writes while it learns: as a page to open in a browser, as JSONL, and as tables of the loggers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from alignment_modules.callbacks.jsonl import to_json_line
from alignment_modules.callbacks.samples import Page, read_rows
from alignment_modules.callbacks.samples.greedy import prompts_to_show
from alignment_modules.callbacks.samples.tables import log_samples
from alignment_modules.functional.ranges import Count, check_options


class SampleTable(Callback):
    """Shows what the policy writes, every so many optimizer steps.

    Of a module that samples, the first completions of its last rollout: `first_samples(count)`, or where it has no such
    method, its `last_rollout`; either is a dictionary of lists of equal length (`write_page` says of what). Of any
    other that `generates`, greedy completions of the first validation rows' prompts, or of `prompts`; training is the
    same, bit for bit, with and without them.

    The rows go to a JSONL file, to a page beside it that a browser opens without anything else (`samples.html`), and to
    the loggers: as a table to Weights & Biases and MLflow, as a short text table to TensorBoard. It is opt-in because
    it shows the data, and TensorBoard has no password. Only rank 0 writes, and shows its own completions. A write that
    fails is a warning.

    Args:
        every_n_steps: Optimizer steps between two looks; the first step is always shown.
        rows: Completions shown.
        path: The JSONL file; None: `samples.jsonl` in the Trainer's `default_root_dir`. Rows are appended.
        page: Whether the page is written; it has the JSONL file's name and ends with `.html`.
        max_rows: Most rows of the page; above it some steps are left out. The JSONL file keeps all.
        max_characters: Longest completion in TensorBoard's table.
        prompts: What a module without rollouts completes; None: the prompts of the first validation rows.
        enabled: False shows and writes nothing.

    Raises:
        ValueError: If a number is not positive, or there are `prompts` but none in the list.
    """

    def __init__(
        self,
        every_n_steps: Count = 50,
        rows: Count = 16,
        path: str | None = None,
        page: bool = True,
        max_rows: Count = 2000,
        max_characters: Count = 120,
        prompts: list[str] | None = None,
        enabled: bool = True,
    ) -> None:
        check_options(SampleTable.__init__, locals())
        if prompts is not None and not all(prompts or [""]):
            raise ValueError(f"prompts={prompts!r} must be a list of texts, none of them empty, or null")
        self.every_n_steps, self.rows, self.path = every_n_steps, rows, path
        self.page, self.max_rows, self.max_characters = page, max_rows, max_characters
        self.prompts, self.enabled = prompts, enabled
        self._batch: Mapping[str, Any] | None = None
        self._page = Page(max_rows)
        self._last_shown: int | None = None
        self._failed: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module that writes nothing.

        Raises:
            TypeError: If the module has neither `last_rollout` nor an `evaluator`.
            ValueError: If `prompts` are given to a module that has rollouts of its own.
        """
        if stage != "fit" or not self.enabled:
            return
        samples, name = _samples(pl_module), type(pl_module).__name__
        if not samples and getattr(pl_module, "evaluator", None) is None:
            raise TypeError(f"SampleTable needs {name}.last_rollout, or a policy that generates; it has none")
        if samples and self.prompts is not None:
            raise ValueError(f"prompts={self.prompts!r} is not allowed with {name}, which shows its own rollouts")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up what is there: a resumed run shows nothing twice, and its page holds the earlier steps."""
        if not self.enabled:
            return
        self._last_shown = trainer.global_step if trainer.global_step else None
        self._page, self._batch = Page(self.max_rows), None
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            with self._going_on(str(path)):
                _cut_unfinished(path)
            self._page.add(_readable(path))
        if not _samples(pl_module):
            self._batch = prompts_to_show(trainer, pl_module, self.prompts, self.rows)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks and writes where that is due."""
        step = trainer.global_step
        due = self._last_shown is None or step // self.every_n_steps > self._last_shown // self.every_n_steps
        if not (self.enabled and due and step):
            return
        rows = self._look(trainer, pl_module)
        if not rows:
            return
        self._last_shown = step
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            with self._going_on(str(getattr(logger, "log_dir", None) or logger.save_dir)):
                log_samples(logger, rows, step, self.max_characters)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(self._path(trainer), [{"step": step, **row} for row in rows], type(pl_module).__name__)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> list[dict[str, Any]]:
        """The rows to show. On all ranks where they are written for it: some strategies compute only together."""
        if not _samples(module):
            return [] if self._batch is None else _rows(_complete(module, self._batch), self.rows)
        if not trainer.is_global_zero:
            return []
        first: Any = getattr(module, "first_samples", None)
        found: Any = first(self.rows) if callable(first) else module.last_rollout
        return _rows(found, self.rows)

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(self.path) if self.path else Path(trainer.default_root_dir) / "samples.jsonl"

    def _write(self, path: Path, rows: list[dict[str, Any]], title: str) -> None:
        with self._going_on(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(map(to_json_line, rows))
            if self.page:
                self._page.add(rows)
                self._page.write(path.with_suffix(".html"), title)

    @contextlib.contextmanager
    def _going_on(self, path: str) -> Iterator[None]:
        """Makes a failed write a warning, once for each path: samples are not worth a run."""
        try:
            yield
        except OSError as error:
            if path not in self._failed:
                self._failed.add(path)
                rank_zero_warn(f"cannot write samples to {path!r}: {error.strerror or error}. Training goes on")


def _samples(module: L.LightningModule) -> bool:
    return hasattr(module, "last_rollout")


def _complete(module: Any, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Greedy completions of the policy as it is, with torch's generators as they were."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        return module.evaluator.samples(module.policy, move_data_to_device(batch, module.device), module.global_step)


def _cut_unfinished(path: Path) -> None:
    """Removes the part of a line that a killed run left at the end of a file."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _readable(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none, and a warning, where it holds something else."""
    try:
        return read_rows(path)
    except (OSError, ValueError) as error:
        rank_zero_warn(f"the page of samples lacks those of earlier steps: {error}")
        return []


def _rows(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a dictionary of lists; none of an empty one.

    Raises:
        ValueError: If the lists differ in length.
    """
    if not columns:
        return []
    lists: dict[str, Sequence[Any]] = {
        name: values.tolist() if hasattr(values, "tolist") else values for name, values in columns.items()
    }
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"last_rollout must hold lists of one length; found {lengths}")
    total = min(count, next(iter(lengths.values())))
    return [{name: values[row] for name, values in lists.items()} for row in range(total)]
