"""A full disk and unwritable folders: curves and samples never end a run; other messages name the file."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter

from alignment_modules.callbacks import (
    CompareRuns,
    CompletionWriter,
    ExportPolicy,
    Histograms,
    SampleTable,
    TensorBoard,
)
from alignment_modules.callbacks.steady_logging import keep_training
from alignment_modules.policies.export import export_policy


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def logged(boring, make_trainer, loader):
    """Fits with a logger and a table of samples."""

    def fit(logger, *callbacks, **options):
        keep_training(logger)
        trainer = make_trainer(SampleTable(every_n_steps=1), *callbacks, logger=logger, **options)
        module = boring()
        step = module.training_step

        def training_step(batch, batch_idx):
            loss = step(batch, batch_idx)
            logger.log_metrics({"train/loss": float(loss)}, step=module.global_step)
            return loss

        module.training_step = training_step
        trainer.fit(module, loader)
        return trainer

    return fit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard(logged, tmp_path, monkeypatch):
    written, write = [], RecordWriter.write

    def until_full(self, data):
        written.append(data)
        return write(self, data) if len(written) < 4 else full()

    monkeypatch.setattr(RecordWriter, "write", until_full)
    logger = TensorBoardLogger(tmp_path / "curves", name="", version="")
    with pytest.warns(UserWarning, match=r"(TensorBoardLogger cannot|cannot write samples) .*curves.*No space") as seen:
        trainer = logged(logger)
    assert trainer.global_step == 6
    assert len([warning for warning in seen if "No space left" in str(warning.message)]) <= 2
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["add_summary", "add_histogram", "add_scalar", "add_custom_scalars"])
def test_options_and_histograms_on_a_full_disk(logged, tmp_path, monkeypatch, method):
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    monkeypatch.setattr(FileWriter if method == "add_summary" else SummaryWriter, method, full)
    with pytest.warns(UserWarning, match=r"TensorBoard cannot .*curves.*No space"):
        trainer = logged(TensorBoard(str(tmp_path / "curves")), CompareRuns(), Rolls())
    assert trainer.global_step == 6


class Rolls(Histograms):
    """Histograms of a module that has no rollout."""

    def on_train_start(self, trainer, pl_module):
        pl_module.rollout = SimpleNamespace(
            rewards=torch.ones(2), own=torch.ones(2, 3), advantages=torch.tensor([0.5, -0.5])
        )

    def setup(self, trainer, pl_module, stage):
        """Nothing to refuse."""


def test_curves_come_back_when_there_is_space_again(tmp_path, monkeypatch, read_events):
    monkeypatch.setattr("alignment_modules.callbacks.steady_logging._AGAIN", 0.0)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    keep_training(logger)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    with monkeypatch.context() as patch:
        patch.setattr(type(logger.experiment), "add_scalar", full)
        with pytest.warns(UserWarning, match="cannot write to"):
            logger.log_metrics({"a": 2.0}, step=2)
        logger.log_metrics({"a": 3.0}, step=3)
    logger.log_metrics({"a": 4.0}, step=4)
    logger.finalize("success")
    # Two files of the same second are read in the order of a counter in their names: 10 before 9.
    assert sorted(read_events(tmp_path)["a"]) == [(1, 1.0), (4, 4.0)]


def test_a_full_disk_under_another_logger(logged, tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path / "table", flush_logs_every_n_steps=1)
    monkeypatch.setattr(type(logger.experiment), "save", full)
    with pytest.warns(UserWarning, match=r"CSVLogger cannot write to .*table.*No space left on device"):
        assert logged(logger).global_step == 6


def test_other_errors_of_a_logger_are_not_hidden(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    keep_training(logger)
    with pytest.raises(ValueError, match="you tried to log"):
        logger.log_metrics({"a": object()}, step=1)


@pytest.mark.parametrize("path", ["/dev/full", "{folder}/file/samples.jsonl"])
def test_samples(boring, make_trainer, loader, tmp_path, path):
    (tmp_path / "file").touch()
    path = path.format(folder=tmp_path)
    trainer = make_trainer(SampleTable(every_n_steps=1, path=path))
    with pytest.warns(UserWarning, match=rf"cannot write samples to '{path}': (No space left|File exists)") as seen:
        trainer.fit(boring(), loader)
    assert trainer.global_step == 6
    assert len([warning for warning in seen if "cannot write" in str(warning.message)]) == 1


@pytest.mark.parametrize("path", ["/dev/full", "{folder}/file/predictions.jsonl"])
def test_predictions(boring, make_trainer, loader, tmp_path, path):
    (tmp_path / "file").touch()
    path = path.format(folder=tmp_path)
    with pytest.raises(OSError, match=rf"cannot write '{path}': (No space left on device|File exists)"):
        make_trainer(CompletionWriter(path)).predict(boring(), loader)


def test_predictions_of_several_processes(tmp_path):
    from alignment_modules.callbacks.completion_writer import _join

    target = tmp_path / "all.jsonl"
    target.symlink_to("/dev/full")
    (tmp_path / "all.jsonl.rank0").write_text('{"index": 0}\n')
    with pytest.raises(OSError, match=r"cannot write '.*all.jsonl': No space left on device"):
        _join(target, 1)
    assert (tmp_path / "all.jsonl.rank0").read_text() == '{"index": 0}\n'


def test_an_export(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    policy = torch.nn.Linear(2, 2)
    with pytest.raises(OSError, match=r"cannot write the export '.*/file/export': .*; nothing was left there"):
        export_policy(policy, tmp_path / "file" / "export")
    export_policy(policy, tmp_path / "export")
    monkeypatch.setattr("alignment_modules.policies.export._write_json", full)
    with pytest.raises(OSError, match=r"'.*/export': No space left on device; the export there is untouched"):
        export_policy(policy, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "file"]


def test_an_export_at_the_end_comes_after_the_last_checkpoint(boring, make_trainer, loader, tmp_path):
    from alignment_modules.callbacks import AtomicCheckpointIO, Checkpoints, StopAndSave

    module = boring()
    module.export = lambda directory, lora: full()
    callbacks = [ExportPolicy(), Checkpoints(), StopAndSave("so")]
    trainer = make_trainer(*callbacks, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(module, loader)
    assert (tmp_path / "checkpoints" / "epoch=0-step=6.ckpt").exists()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_exported_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    former = os.umask(umask)
    try:
        export_policy(torch.nn.Linear(2, 2), tmp_path / "export")
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()} == {0o666 & ~umask}
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o777 & ~umask
