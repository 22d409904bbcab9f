"""The progress bar: one line in a terminal, one output in a notebook, a line now and then in a file."""

import io
import json
import logging
import os
import pty
import re
import sys
import threading
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from alignment_modules.callbacks import StepBar, line
from alignment_modules.functional.waiting import tell

ROOT = Path(__file__).parents[2]


class Talking(L.LightningModule):
    """Ten steps that log numbers, wait, warn and validate."""

    bar = ("loss", "rewards/accuracies", "rewards/margins", "kl")

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fail_at = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        for done in range(3):
            tell("sampling", done, 16)
        if batch_idx == 4:
            warnings.warn("mind the gap", stacklevel=1)
            logging.getLogger("lightning.pytorch").warning("and the step")
        if batch_idx == self.fail_at:
            raise RuntimeError("no more")
        metrics = {
            "train/loss": 1.25,
            "train/rewards/accuracies": 0.5,
            "train/rewards/margins": 0.031234,
            "train/kl": 3.0,
        }
        self.trainer.progress_bar_metrics.update(metrics)
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        tell("judging: exact_match")
        self.trainer.progress_bar_metrics["val/exact_match"] = 0.75


@pytest.fixture
def always(monkeypatch):
    """Draws whenever there is something new."""
    monkeypatch.setattr(line.Line, "due", lambda drawn: True)


def fit(bar, module=None, **options):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[bar], val_check_interval=5, **options,
    )  # fmt: skip
    rows = DataLoader(torch.ones(10, 2))
    trainer.fit(module or Talking(), rows, DataLoader(torch.ones(3, 2)))
    return trainer


@pytest.fixture
def terminal(monkeypatch):
    """Runs something with standard error on a terminal of 80 columns; returns all that was written there."""

    def run(action):
        leader, follower = pty.openpty()
        os.set_blocking(leader, True)
        written = []

        def read():
            while True:
                try:
                    chunk = os.read(leader, 65536)
                except OSError:
                    return
                if not chunk:
                    return
                written.append(chunk)

        reader = threading.Thread(target=read)
        reader.start()
        handler = logging.StreamHandler()
        with open(follower, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            handler.setStream(stream)
            logging.getLogger("lightning.pytorch").addHandler(handler)
            try:
                action()
            finally:
                logging.getLogger("lightning.pytorch").removeHandler(handler)
                monkeypatch.undo()
        reader.join(timeout=10)
        os.close(leader)
        return b"".join(written).decode()

    return run


def drawn(text):
    """The line's contents, in order, without what others wrote."""
    parts = re.split(r"\r\x1b\[K|\r?\n", text)
    return [part for part in parts if part.startswith(("fit  ", "validation  ", "trying validation  "))]


def test_one_line_with_three_numbers_and_the_time_left(terminal, monkeypatch):
    monkeypatch.setattr(line.Line, "due", lambda drawn: True)
    lines = drawn(terminal(lambda: fit(StepBar())))
    assert max(map(len, lines)) <= 79  # the eightieth column would wrap
    assert any(
        re.match(r"fit  [█░]+  4/10  \d+:\d\d left  loss 1.25  accuracies 0.5  margins 0.03123$", it) for it in lines
    )
    assert any(it.endswith("sampling 2/16") and "left" in it for it in lines)
    assert any(re.match(r"validation  [█░]+  2/3  \d+:\d\d left  judging: exact_match$", it) for it in lines)
    assert re.match(r"fit  [█░]+  10/10  in \d+:\d\d  loss 1.25  accuracies 0.5  val exact match 0.75$", lines[-1])
    assert not any("kl" in it for it in lines)


def test_messages_stand_on_lines_of_their_own(terminal, monkeypatch):
    monkeypatch.setattr(line.Line, "due", lambda drawn: True)
    shown = warnings.showwarning
    text = terminal(lambda: fit(StepBar()))
    assert re.search(r"\r\x1b\[K[^\r\n]*mind the gap", text) or "mind the gap" not in text
    assert re.search(r"\r\x1b\[Kand the step\r?\n", text)
    assert warnings.showwarning is shown
    assert not [h for h in logging.getLogger("lightning.pytorch").handlers if h.filters]


def test_an_error_finds_the_screen_free(terminal, monkeypatch):
    monkeypatch.setattr(line.Line, "due", lambda drawn: True)
    module = Talking()
    module.fail_at = 6

    def run():
        with pytest.raises(RuntimeError, match="no more"):
            fit(StepBar(), module)

    text = terminal(run)
    assert text.endswith("\n")
    assert drawn(text)[-1].startswith("fit  ")
    tell("sampling", 1, 2)  # nobody listens


def test_a_file_gets_a_line_now_and_then(capsys):
    fit(StepBar())
    assert capsys.readouterr().err.count("fit") == 0  # less than half a minute
    fit(StepBar(file_seconds=0))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fit")]
    assert len(lines) >= 10
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_no_terminal_that_knows_utf_8(monkeypatch, capsys, always):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    fit(StepBar(file_seconds=0))
    assert b"####" in sys.stderr.buffer.getvalue()


def test_a_run_without_an_end_and_without_a_bar(capsys, always):
    bar = StepBar()
    bar._word, bar._done = "fit", 12345
    assert bar.text(79) == "fit  12,345"
    fit(StepBar(), enable_progress_bar=True, limit_val_batches=0)
    quiet = StepBar()
    quiet.disable()
    capsys.readouterr()
    fit(quiet)
    assert capsys.readouterr().err.count("fit") == 0


def test_every_width_holds_the_line():
    bar = StepBar()
    bar._word, bar._done, bar._total, bar._waiting = "validation", 123_456, 1_000_000.0, "judging: my_reward"
    for width in range(20, 120):
        assert len(bar.text(width)) <= width


def test_test_and_predict_count_their_batches(capsys):
    class Writes(Talking):
        test_step = Talking.validation_step

        def predict_step(self, batch, batch_idx):
            return []

    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[StepBar(file_seconds=0)], enable_checkpointing=False
    )
    rows = DataLoader(torch.ones(3, 2))
    trainer.test(Writes(), rows, verbose=False)
    trainer.predict(Writes(), rows)
    trainer.validate(Writes(), rows, verbose=False)
    shown = capsys.readouterr().err
    for word in ("test", "predict", "validation"):
        assert re.search(rf"^{word}  [█░#-]*\s*3/3", shown, flags=re.MULTILINE), word


NOTEBOOK = """
import lightning as L
from alignment_modules import SFTModule
from alignment_modules.callbacks import RunReport, StepBar
from datamodules import SFTDataModule

rows = [{{"prompt": f"{{a}}+1=", "completion": str(a + 1), "answer": str(a + 1)}} for a in range(9)] * 4
module = SFTModule(policy={folder!r})
trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_model_summary=False, callbacks=[StepBar(), RunReport()], default_root_dir={root!r})
trainer.fit(module, SFTDataModule(train=rows, validation=rows, tokenizer={folder!r}, batch_size=4))
"""


def test_a_notebook_shows_one_line_that_changes(model_folder, tmp_path):
    """Executed headless: the saved notebook holds the last state of the line, and short texts beside it."""
    import nbformat
    from nbclient import NotebookClient

    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(folder=model_folder, root=str(tmp_path)))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = notebook.cells[0].outputs
    lines = [output["data"]["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert len(lines) <= 3  # the sanity check's, and the fit's
    assert re.search(r"^fit  █+  18/18  in \d+:\d\d  loss ", lines[-1]), lines
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "18 optimizer steps" in printed
    assert "\r" not in printed
    assert len(printed.splitlines()) < 60, printed
    assert json.dumps(notebook)  # as it is saved
