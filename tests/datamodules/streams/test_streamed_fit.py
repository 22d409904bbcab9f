"""Streams under a Lightning Trainer: what ends a run, when it validates, and where a checkpoint stands."""

import json

import lightning as L
import pytest
import torch

from alignment_modules.callbacks import RunReport
from datamodules import SFTDataModule, StreamOptions

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(50)]


class Notes(L.LightningModule):
    """Notes the batches it gets; fails at one of them."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.weight, self.fails_at = torch.nn.Parameter(torch.zeros(1)), fails_at
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise RuntimeError("out of memory")
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append(len(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def data(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(**options):
        stream = {"train": str(tmp_path / "rows.jsonl"), "stream": StreamOptions(buffer_size=12)}
        return SFTDataModule(tokenizer=tokenizer, batch_size=4, max_length=24, **{**stream, **options})

    return make


def trainer(root, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=root, **{**quiet, "enable_checkpointing": False, **options})


def fit(data, tmp_path, module=None, ckpt_path=None, **options):
    module = module or Notes()
    trainer(tmp_path, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "trainer.max_steps=-1: the training rows are a stream, which has no end"),
        ({"max_epochs": 3}, "trainer.max_steps=-1: the training rows are a stream"),
        ({"limit_train_batches": 5, "max_epochs": -1}, "trainer.max_steps=-1: the training rows are a stream"),
        ({"max_steps": 3, "limit_train_batches": 0.5}, "trainer.limit_train_batches=0.5: a stream has no number of"),
        ({"max_steps": 3, "overfit_batches": 2}, "trainer.overfit_batches=2 needs training rows that can be read"),
    ],
)
def test_what_does_not_fit_a_stream_is_refused(options, words, data, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(data(), tmp_path, **options)


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_a_validation_that_would_never_come_is_refused(interval, data, tmp_path):
    with pytest.raises(ValueError, match=f"trainer.val_check_interval={interval}: a stream has no end of an epoch"):
        fit(data(validation=ROWS[:5]), tmp_path, max_steps=3, val_check_interval=interval)


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({"max_steps": 9, "val_check_interval": 4}, [4, 8]),
        ({"max_epochs": 3, "limit_train_batches": 3}, [3, 6, 9]),
        ({"max_steps": 9, "limit_val_batches": 0}, []),
    ],
)
def test_validation(options, validated, data, tmp_path):
    module = Notes()
    seen = fit(data(validation=ROWS[:5]), tmp_path, module, **options)
    assert module.validated == validated
    assert seen == fit(data(), tmp_path, max_steps=9)  # an epoch goes on where the last one ended


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 5}], ids=["endless", "epochs"])
def test_a_checkpoint_of_any_module_resumes_exactly(workers, options, data, tmp_path):
    whole = fit(data(num_workers=workers), tmp_path, max_steps=14, **options)
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = data(num_workers=workers)
    fit(first, tmp_path, max_steps=8, callbacks=[saver], enable_checkpointing=True, **options)
    for step in (3, 5, 8):
        path = tmp_path / f"step={step}.ckpt"
        assert fit(data(), tmp_path, ckpt_path=path, max_steps=14, **options) == whole[step:]


def test_a_batch_that_failed_is_given_again(data, tmp_path):
    whole = fit(data(), tmp_path, max_steps=6)
    run = trainer(tmp_path, max_steps=6)
    module, rows = Notes(fails_at=3), data()
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(module, datamodule=rows)
    run.save_checkpoint(tmp_path / "failed.ckpt")
    assert fit(data(), tmp_path, ckpt_path=tmp_path / "failed.ckpt", max_steps=6) == whole[3:]


def test_a_run_tells_that_it_reads_a_stream(data, tmp_path, capsys):
    fit(data(num_workers=2), tmp_path, max_steps=3, callbacks=[RunReport()])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["data", "train", "a", "stream"] for line in lines)
    assert any("3 optimizer steps; batches of 4 rows on one process" in line for line in lines)


def test_passes_of_several_workers(data, tmp_path):
    read = data(num_workers=2)
    fit(read, tmp_path, max_steps=20)
    assert read.reports["train"]["passes"] == 1
    assert 60 < read.reports["train"]["rows"] < 130
