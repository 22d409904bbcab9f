"""Predictions as JSONL, written while they come."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from alignment_modules.callbacks.jsonl import naming, to_json_line
from alignment_modules.functional.ranges import check_options


class CompletionWriter(Callback):
    """Writes the rows that `predict_step` returns, and those that `test_step` returns as `rows`, one line a row.

    Rows are a list of dictionaries, or a dictionary of lists of equal length. Every batch is flushed, so an interrupted
    run leaves what it had. With several processes each writes a part beside
    the file (`NAME.rank1` and so on), and rank 0 joins them at the end, by the rows' `index` where all have one.

    Args:
        path: The JSONL file of `predict`; None: `predictions.jsonl` in the Trainer's `default_root_dir`. It is
            overwritten.
        test_path: That of `test`; None: `test.jsonl` there.
        test: Whether `test` writes at all.
    """

    def __init__(self, path: str | None = None, test_path: str | None = None, test: bool = True) -> None:
        check_options(CompletionWriter.__init__, locals())
        self.path, self.test_path, self.test = path, test_path, test
        self._file: TextIO | None = None
        self._count = 0

    def _target(self, trainer: L.Trainer) -> Path:
        given, name = (self.test_path, "test.jsonl") if trainer.testing else (self.path, "predictions.jsonl")
        return Path(given) if given else Path(trainer.default_root_dir) / name

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the file; what an earlier run wrote stays until there are new rows.

        Raises:
            OSError: If it cannot be written.
        """
        self._open(trainer)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes one batch.

        Raises:
            TypeError: If `predict_step` returned something else than rows.
            OSError: If they cannot be written.
        """
        self._write(outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the file, joins the ranks' parts and says where they are."""
        self._finish(trainer, "predictions")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens no file yet: a test need not have rows."""
        self._count = 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes one batch where there are rows.

        Raises:
            OSError: If they cannot be written.
        """
        rows = outputs.get("rows") if isinstance(outputs, dict) else None
        if rows and self.test and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self._file is None:
                self._open(trainer)
            self._write(rows)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the file, joins the ranks' parts and says where they are."""
        self._finish(trainer, "tested completions")

    def _open(self, trainer: L.Trainer) -> None:
        target = self._target(trainer)
        part = target if trainer.world_size == 1 else _part(target, trainer.global_rank)
        with naming(part):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(part, "a", encoding="utf-8")  # noqa: SIM115  closed by the hooks below
        self._count = 0

    def _write(self, outputs: Any) -> None:
        if self._file is not None:
            lines = [to_json_line(row) for row in _rows(outputs)]
            with naming(Path(self._file.name)):
                if not self._count and os.fstat(self._file.fileno()).st_size:
                    self._file.truncate(0)
                self._file.writelines(lines)
                self._file.flush()
            self._count += len(lines)

    def _finish(self, trainer: L.Trainer, what: str) -> None:
        written = self._file is not None
        self._close()
        if trainer.world_size > 1:
            trainer.strategy.barrier("completion_writer")
            if written and trainer.is_global_zero:
                self._count = _join(self._target(trainer), trainer.world_size)
        if written:
            rank_zero_info(f"wrote {self._count} {what} to {self._target(trainer)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with naming(Path(file.name)):
                file.close()


def _part(target: Path, rank: int) -> Path:
    return target.with_name(f"{target.name}.rank{rank}")


def _rows(outputs: Any) -> Iterator[dict[str, Any]]:
    if outputs is None:
        return
    if isinstance(outputs, dict):
        columns = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in outputs.items()}
        if all(isinstance(values, list | tuple) for values in columns.values()):
            lengths = {name: len(values) for name, values in columns.items()}
            if len(set(lengths.values())) > 1:
                raise TypeError(f"predict_step must return lists of one length; found {lengths}")
            for entries in zip(*columns.values(), strict=True):
                yield dict(zip(columns, entries, strict=True))
            return
    if not isinstance(outputs, list | tuple) or not all(isinstance(row, dict) for row in outputs):
        raise TypeError(
            f"predict_step must return a list of dictionaries or a dictionary of lists for CompletionWriter; "
            f"it returned {type(outputs).__name__}"
        )
    yield from outputs


def _join(target: Path, world_size: int) -> int:
    """Puts the parts together; returns the number of rows."""
    lines: list[str] = []
    parts = [_part(target, rank) for rank in range(world_size)]
    for part in parts:
        if part.exists():  # another machine's part lies on that machine's disk
            lines += part.read_text(encoding="utf-8").splitlines(keepends=True)
    keys = [json.loads(line).get("index") for line in lines]
    if all(isinstance(key, int) for key in keys):
        lines = [lines[row] for row in sorted(range(len(lines)), key=keys.__getitem__)]
    with naming(target):  # the parts stay where this fails
        target.write_text("".join(lines), encoding="utf-8")
    for part in parts:
        part.unlink(missing_ok=True)
    return len(lines)
