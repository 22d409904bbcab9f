"""SampleTable: rollouts as a TensorBoard table and as JSONL."""

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from alignment_modules.callbacks import SampleTable


def test_jsonl_without_a_logger(tmp_path, boring, make_trainer, loader, read_jsonl):
    make_trainer(SampleTable(every_n_steps=4, rows=5)).fit(boring(), loader)
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 4, 4]
    assert rows[0] == {
        "step": 1,
        "id": "0/0/0",
        "prompt": "1+1=",
        "completion": "<b>2</b>|\nend",
        "exact_match": 1.0,
        "reward": 1.0,
        "advantage": 0.5,
        "truncated": False,
    }
    assert rows[1]["exact_match"] is None
    assert rows[3]["id"] == "3/0/1"


def test_table_in_tensorboard_is_short_and_cannot_be_broken(tmp_path, boring, make_trainer, loader, read_events):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")]
    table = SampleTable(every_n_steps=100, rows=1, max_characters=10)
    make_trainer(table, logger=loggers).fit(boring(manual=2), loader)
    ((step, text),) = read_events(tmp_path)["samples/text_summary"]
    assert step == 2
    lines = text.splitlines()
    assert lines[0] == "| id | reward | advantage | completion |"
    assert lines[2] == "| 0/0/0 | 1 | 0.5 | &lt;b&gt;2&lt;/b&gt;&#124;… |"
    assert len(lines) == 3


def test_manual_steps_that_jump_over_the_interval(tmp_path, boring, make_trainer, loader, read_jsonl):
    make_trainer(SampleTable(every_n_steps=5, rows=1, path=str(tmp_path / "a" / "b.jsonl"))).fit(
        boring(manual=3), loader
    )
    assert [row["step"] for row in read_jsonl(tmp_path / "a" / "b.jsonl")] == [3, 6, 12, 15]


def test_a_resumed_run_appends_and_repeats_nothing(tmp_path, boring, make_trainer, loader, read_jsonl):
    trainer = make_trainer(SampleTable(every_n_steps=6, rows=1))
    trainer.fit(boring(), loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    make_trainer(SampleTable(every_n_steps=6, rows=1), max_epochs=2).fit(
        boring(), loader, ckpt_path=tmp_path / "end.ckpt"
    )
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 6, 12]


def test_no_rollout_yet_writes_nothing(tmp_path, boring, make_trainer, loader):
    module = boring()
    original = module.training_step

    def forgetful(batch, batch_idx):
        loss = original(batch, batch_idx)
        module.last_rollout = {}
        return loss

    module.training_step = forgetful
    make_trainer(SampleTable()).fit(module, loader)
    make_trainer(SampleTable(), fast_dev_run=True).fit(boring(), loader)
    assert not (tmp_path / "samples.jsonl").exists()


def test_mistakes(boring, make_trainer, loader):
    with pytest.raises(ValueError, match="rows=0 must be an integer from 1"):
        SampleTable(rows=0)
    with pytest.raises(ValueError, match="every_n_steps=-3 must be an integer from 1"):
        SampleTable(every_n_steps=-3)
    with pytest.raises(TypeError, match=r"SampleTable needs BoringModel.last_rollout"):
        make_trainer(SampleTable()).fit(BoringModel(), loader)
    module = boring()
    original = module.training_step

    def uneven(batch, batch_idx):
        loss = original(batch, batch_idx)
        module.last_rollout["reward"] = [1.0]
        return loss

    module.training_step = uneven
    with pytest.raises(ValueError, match=r"last_rollout must hold lists of one length; found .*'reward': 1"):
        make_trainer(SampleTable()).fit(module, loader)
