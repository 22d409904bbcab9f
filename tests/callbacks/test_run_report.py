"""The report says what runs and what came of it; the watch warns once of what teaches nothing."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from alignment_modules import SFTModule
from alignment_modules.callbacks import LearningWatch, RunReport
from alignment_modules.cli.recipes import recipes
from alignment_modules.paradigms import PARADIGMS
from datamodules import SFTDataModule


class Logs:
    """Makes a module log one number a step under each name, after its callbacks as our modules do."""

    def __init__(self, module, **curves):
        self.module, self.curves = module, {name.replace("__", "/"): values for name, values in curves.items()}
        module.on_train_batch_end = self

    def __call__(self, outputs, batch, batch_idx):
        for name, values in self.curves.items():
            value = values[min(self.module.global_step, len(values)) - 1]
            self.module.log(name, value, logger=False, batch_size=1)


def test_beginning_and_end(boring, make_trainer, loader, capsys, tmp_path):
    module = boring()
    Logs(module, train__loss=[3.0, 2.0, 1.0, 0.5, 2.5, 1.5], val__loss=[0.7])
    (tmp_path / "export").mkdir()
    module.on_train_end = (tmp_path / "export" / "weights").touch
    module.paradigm = "sft"
    make_trainer(RunReport(), log_every_n_steps=1).fit(module, loader)
    lines = capsys.readouterr().out.splitlines()
    start, end = lines[:5], lines[5:]
    assert [line.split()[0] for line in start] == ["objective", "policy", "data", "steps", "writes"]
    assert "Boring" in start[0]
    assert "an epoch has 6 batches on one process" in start[3]
    assert str(tmp_path) in start[4]
    assert "6 optimizer steps in" in end[0]
    assert "peak memory" in end[0]
    told = {line.split()[0]: line for line in end}
    assert "first 3, last 1.5, best 0.5 at step 4" in told["train/loss"]
    assert "export/" in told["files"]
    assert f"--model.policy.path {tmp_path / 'export'}" in told["next"]


@pytest.mark.parametrize("paradigm", [module.paradigm for module in PARADIGMS])
def test_every_paradigm_says_what_comes_next(paradigm, boring, make_trainer, loader, capsys, tmp_path):
    module = boring()
    module.paradigm = paradigm
    (tmp_path / "export").mkdir()
    make_trainer(RunReport()).fit(module, loader)
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[0] == "next"
    assert str(tmp_path / "export") in command
    assert command[command.index("--config") + 1] in recipes()


def test_a_module_that_describes_itself_is_not_described_twice(boring, make_trainer, loader, capsys):
    module = boring()
    module.describe = dict
    make_trainer(RunReport()).fit(module, loader)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["data", "steps", "writes"]


def test_a_number_of_steps_that_is_a_bound_is_said_to_be_one(boring, make_trainer, loader, capsys):
    module = boring()
    module.may_take_fewer_steps = True
    make_trainer(RunReport()).fit(module, loader)
    assert "steps      at most 6 optimizer steps; an epoch has" in capsys.readouterr().out


def test_nothing_left_to_train(boring, make_trainer, loader, capsys):
    make_trainer(RunReport(), max_epochs=0).fit(boring(), loader)
    done = capsys.readouterr().out.splitlines()[0]
    assert done.startswith("done")
    assert "nothing was left to train after optimizer step 0" in done


def test_only_files_that_the_run_wrote_are_told(boring, make_trainer, loader, capsys, tmp_path):
    for name in ("pairs.jsonl", "kept/old", "kept/changed", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    report = RunReport()
    make_trainer(report).fit(boring(), loader)
    assert "\nfiles" not in capsys.readouterr().out
    module = boring()

    def write():
        for name in ("kept/changed", "new.csv", ".new"):
            (tmp_path / name).write_text("written")

    module.on_train_end = write
    make_trainer(report).fit(module, loader)
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("files")]
    assert told.split("  ")[-1] == f"{tmp_path}: kept/ (7 B), new.csv (7 B)"
    make_trainer(report).fit(boring(), loader)
    assert "\nfiles" not in capsys.readouterr().out


@pytest.mark.parametrize("manual", [0, 3])
def test_metrics_are_read_at_logging_steps(boring, make_trainer, loader, capsys, manual):
    module = boring(manual=manual)
    Logs(module, train__loss=[float(step) for step in range(1, 30)])
    make_trainer(RunReport(), log_every_n_steps=4).fit(module, loader)
    steps = 6 * max(manual, 1)
    assert f"first {max(manual, 1)}, last {steps}" in capsys.readouterr().out


def test_silence(boring, make_trainer, loader, capsys):
    make_trainer(RunReport(enabled=False), LearningWatch()).fit(boring(), loader)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ({"train__frac_reward_zero_std": [1.0]}, "in no group did the rewards differ"),
        ({"train__completions__clipped_ratio": [0.75]}, "75% of the completions were cut off"),
        ({"train__entropy": [0.5, 0.001]}, "the entropy is 0.001 nats a token"),
    ],
)
def test_each_trouble_is_told_once(boring, make_trainer, loader, capsys, curves, said):
    module = boring()
    Logs(module, train__reward=[0.0], **curves)
    make_trainer(LearningWatch(patience=3), log_every_n_steps=1, max_epochs=3).fit(module, loader)
    out = capsys.readouterr().out
    assert out.count("warning:") == 1
    assert said in out


@pytest.mark.parametrize(
    "curves",
    [
        {"train__frac_reward_zero_std": [1.0, 1.0, 0.9] * 6},
        {"train__completions__clipped_ratio": [0.5]},
        {"train__entropy": [0.02]},
    ],
)
def test_no_warning_where_something_is_learnt(boring, make_trainer, loader, capsys, curves):
    module = boring()
    Logs(module, train__reward=[0.0], **curves)
    make_trainer(LearningWatch(patience=3), log_every_n_steps=1, max_epochs=3).fit(module, loader)
    assert "warning:" not in capsys.readouterr().out


def test_truncated_rows(boring, make_trainer, capsys, loader):
    from lightning.pytorch import LightningDataModule

    class Cut(LightningDataModule):
        reports = {"train": {"rows": 24, "kept": 24, "truncated": 20, "tokens": 96}}

        def train_dataloader(self):
            return loader

    make_trainer(LearningWatch(), RunReport()).fit(boring(), datamodule=Cut())
    out = capsys.readouterr().out
    assert "20 of 24 training rows were truncated" in out
    assert "train 24 rows, 96 tokens" in out


def test_why_a_run_stopped_early_is_told_once(boring, make_trainer, loader, capsys):
    early = EarlyStopping("val/loss", patience=1, check_on_train_epoch_end=True)
    module = boring()
    Logs(module, val__loss=[0.7])
    trainer = make_trainer(early, RunReport(), max_epochs=9)
    trainer.fit(module, loader)
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped early")]
    assert told.split("  ")[-1] == (
        "Monitored metric val/loss did not improve in the last 1 records. Best score: 0.700."
    )
    again = boring()
    Logs(again, val__loss=[0.1])
    make_trainer(early, RunReport(), max_epochs=1).fit(again, loader)  # it remembers the other run's reason
    assert "stopped early" not in capsys.readouterr().out


def test_rows_beyond_what_the_policy_was_made_for_are_told(model_folder, capsys, make_trainer):
    limit = json.loads((Path(model_folder) / "config.json").read_text())["max_position_embeddings"]
    rows = [{"prompt": "a", "completion": "b" * limit}] * 2
    for most, told in ((limit, False), (limit + 9, True)):
        data = SFTDataModule(train=rows, tokenizer=model_folder, max_length=most, batch_size=2)
        make_trainer(RunReport()).fit(SFTModule(policy=model_folder), data)
        assert (f"and the policy was made for {limit}" in capsys.readouterr().out) == told
