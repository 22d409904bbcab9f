import ast
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule, UnpairedDataModule
from datamodules.loader import ResumableLoader


class Recorder(L.LightningModule):
    """Remembers which rows each step saw."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("out of luck")
        self.seen.append((self.current_epoch, batch_idx, batch["index"]))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tokenized(Dataset):
    """A source that brings its own tokenizer."""

    def __init__(self, size: int = 20):
        self.size = size

    @property
    def tokenizer(self):
        return self._tokenizer

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"prompt": f"{index}+1=", "completion": str(index + 1)}


def prompts(tokenizer, workers=0, **options):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(22)]
    return PromptDataModule(train=rows, tokenizer=tokenizer, batch_size=4, num_workers=workers, **options)


def trainer(folder, **options):
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return L.Trainer(default_root_dir=folder, enable_model_summary=False, **{**defaults, **options})


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("validation", [False, True])
def test_resume_gives_the_same_rows(tmp_path, tokenizer, workers, validation):
    """6 batches an epoch: kill at the start, middle and end of epochs, resume, see exactly the rest."""
    extra = {"validation": [{"prompt": "1"}]} if validation else {}
    whole = Recorder()
    trainer(tmp_path, callbacks=[every_step(tmp_path)]).fit(whole, datamodule=prompts(tokenizer, workers, **extra))
    assert len(whole.seen) == 18
    orders = [[row for e, _, rows in whole.seen if e == n for row in rows] for n in range(3)]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    for step in (2, 6, 8, 12) if workers == 0 else (8, 12):
        resumed = Recorder()
        path = tmp_path / f"step={step}.ckpt"
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert state[0]["batches_seen"] in (step % 6, 6)
        trainer(tmp_path).fit(resumed, datamodule=prompts(tokenizer, workers, **extra), ckpt_path=str(path))
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_the_end_of_an_epoch(tmp_path, tokenizer, workers):
    whole, save = Recorder(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[save]).fit(whole, datamodule=prompts(tokenizer, workers))
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, datamodule=prompts(tokenizer, workers), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.seen == whole.seen[6:]


def test_resume_in_a_run_of_steps(tmp_path, tokenizer):
    whole = Recorder()
    options = {"max_epochs": -1, "max_steps": 16}
    trainer(tmp_path, callbacks=[every_step(tmp_path)], **options).fit(whole, datamodule=prompts(tokenizer))
    for step in (4, 6, 9, 12):
        resumed = Recorder()
        path = str(tmp_path / f"step={step}.ckpt")
        trainer(tmp_path, **options).fit(resumed, datamodule=prompts(tokenizer), ckpt_path=path)
        assert [s[1:] for s in resumed.seen] == [s[1:] for s in whole.seen[step:]]


def test_limited_epochs_start_at_their_first_batch(tmp_path, tokenizer):
    module = Recorder()
    trainer(tmp_path, limit_train_batches=2, max_epochs=2).fit(module, datamodule=prompts(tokenizer))
    loader = prompts(tokenizer).train_dataloader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected += [batch["index"] for batch, _ in zip(loader, range(2), strict=False)]
    assert [rows for _, _, rows in module.seen] == expected


def test_a_batch_whose_step_failed_comes_again(tmp_path, tokenizer):
    whole = Recorder()
    trainer(tmp_path).fit(whole, datamodule=prompts(tokenizer))
    failing = Recorder(fail_at=8)
    run = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(failing, datamodule=prompts(tokenizer))
    run.save_checkpoint(tmp_path / "failed.ckpt")
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, datamodule=prompts(tokenizer), ckpt_path=str(tmp_path / "failed.ckpt"))
    assert failing.seen + resumed.seen == whole.seen


def test_other_data_is_refused(tmp_path, tokenizer):
    trainer(tmp_path, callbacks=[every_step(tmp_path)], max_steps=2).fit(Recorder(), datamodule=prompts(tokenizer))
    other = PromptDataModule(train=[{"prompt": "7"}] * 22, tokenizer=tokenizer, batch_size=4)
    with pytest.raises(ValueError, match="cannot resume the training data: fingerprint was"):
        trainer(tmp_path).fit(Recorder(), datamodule=other, ckpt_path=str(tmp_path / "step=2.ckpt"))


@pytest.mark.parametrize(
    ("module", "row", "change"),
    [
        (PromptDataModule, {"prompt": "1", "answer": "1"}, {"answer": "2"}),
        (PromptDataModule, {"prompt": "1", "completion": "1"}, {"completion": "2"}),
        (PromptDataModule, {"prompt": "1", "answer": torch.tensor([1])}, {"answer": torch.tensor([2])}),
        (PromptDataModule, {"prompt": "1", "tests": {"in": [1]}}, {"tests": {"in": [2]}}),
        (UnpairedDataModule, {"prompt": "1", "completion": "2", "label": True}, {"label": False}),
    ],
)
def test_other_answers_and_labels_are_refused(tokenizer, module, row, change):
    def loader(changed):
        return module(train=[row, changed], tokenizer=tokenizer).train_dataloader()

    loader(dict(row)).load_state_dict(loader(row).state_dict())
    with pytest.raises(ValueError, match="cannot resume the training data: fingerprint was"):
        loader(row | change).load_state_dict(loader(row).state_dict())


def test_objects_of_no_data_do_not_hinder_a_resume(tokenizer):
    """Such as images: their text holds an address that another process would not have."""

    def loader():
        return PromptDataModule(train=[{"prompt": "1", "image": object()}], tokenizer=tokenizer).train_dataloader()

    loader().load_state_dict(loader().state_dict())


def test_a_subclass_with_its_own_validation_loader(tmp_path, tokenizer):
    class Own(PromptDataModule):
        def val_dataloader(self):
            return torch.utils.data.DataLoader([{"index": [7]}], batch_size=None)

    class Validated(Recorder):
        def validation_step(self, batch, batch_idx):
            self.validated = batch["index"]

    module = Validated()
    data = Own(train=[{"prompt": "1"}] * 4, tokenizer=tokenizer)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    assert module.validated == [7]


def test_overfit_and_predict_still_work(tmp_path, tokenizer):
    module = Recorder()
    trainer(tmp_path, overfit_batches=1, max_epochs=2).fit(module, datamodule=prompts(tokenizer))
    assert [rows for _, _, rows in module.seen] == [[0, 1, 2, 3]] * 2
    module.predict_step = lambda batch, batch_idx: batch["index"]
    data = PromptDataModule(predict=[{"prompt": "1"}] * 5, tokenizer=tokenizer, batch_size=2)
    assert trainer(tmp_path).predict(module, datamodule=data) == [[0, 1], [2, 3], [4]]


def test_setup_does_each_split_once(tokenizer):
    data = prompts(tokenizer, test=[{"prompt": "1"}])
    data.setup("fit")
    table = data.train_dataloader().dataset
    data.setup("fit")
    data.setup(None)
    assert data.train_dataloader().dataset is table
    assert isinstance(data.train_dataloader(), ResumableLoader)
    assert set(data.reports) == {"train", "test"}


def test_no_work_when_made():
    for module in (PretrainDataModule, SFTDataModule, PreferenceDataModule, PromptDataModule):
        module(train="nowhere.jsonl", tokenizer="nowhere/at/all")


def test_tokenizer_of_the_source(tokenizer):
    source = Tokenized()
    source._tokenizer = tokenizer
    assert SFTDataModule(train=source).tokenizer is tokenizer
    assert SFTDataModule(train=source).stop_token_ids == (0,)


def test_heavy_packages_are_imported_late():
    for file in (Path(__file__).parents[2] / "datamodules").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("transformers", "datasets", "peft")], file


def test_command_line(tmp_path):
    """A path, a Dataset by class path and a list of rows all parse from YAML; names complete without their package."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")

    def parse(options, name="SFTDataModule"):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"class_path": name, "init_args": options}))
        parsed = parser.parse_args([f"--data={config}"])
        return getattr(parser, "instantiate", parser.instantiate_classes)(parsed).data

    data = parse({"train": "rows.jsonl", "tokenizer": "runs/a", "overflow": "drop", "columns": {"q": "prompt"}})
    assert isinstance(data, SFTDataModule)
    assert data.sources["train"] == "rows.jsonl"
    source = parse({"train": {"class_path": "Tokenized", "init_args": {"size": 5}}}, "PromptDataModule").sources[
        "train"
    ]
    assert isinstance(source, Tokenized)
    assert len(source) == 5
    assert parse({"train": [{"prompt": "a"}]}, "PretrainDataModule").sources["train"] == [{"prompt": "a"}]
    assert isinstance(parse({"train": "a"}, "PreferenceDataModule"), PreferenceDataModule)
    with pytest.raises(jsonargparse.ArgumentError, match="overflow"):
        parse({"overflow": "cut"})


DDP = """
import sys, json
sys.path[:0] = {paths!r}
from test_lightning import Recorder, prompts, trainer, every_step
from conftest import build_tokenizer
folder = sys.argv[1]
for name, path in (("whole", None), ("resumed", folder + "/step=4.ckpt")):
    module = Recorder()
    run = trainer(folder, devices=2, strategy="ddp", callbacks=[] if path else [every_step(folder)], max_epochs=2)
    data = prompts(build_tokenizer(), validation=[{{"prompt": "1"}}] * 3)
    run.fit(module, datamodule=data, ckpt_path=path)
    with open(f"{{folder}}/{{name}}-{{run.global_rank}}.json", "w") as file:
        json.dump(module.seen, file)
"""


@pytest.mark.distributed
def test_resume_on_two_processes(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(DDP.format(paths=[str(here), str(here.parents[1])]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, resumed = (
        [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "resumed")
    )
    for rank in range(2):
        assert len(whole[rank]) == 6  # 22 rows, 2 ranks x 4 rows: 3 batches an epoch
        assert resumed[rank] == whole[rank][4:]
    for number in range(2):
        rows = [row for rank in whole for epoch, _, index in rank if epoch == number for row in index]
        assert sorted(rows) == list(range(22))


def test_the_first_prompts_of_the_validation_rows(tokenizer):
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(5)]
    data = SFTDataModule(train=rows, validation=rows[1:], tokenizer=tokenizer, max_length=8)
    batch = data.first_prompts(2)
    assert batch["prompts"].shape == batch["prompt_attention_mask"].shape == (2, 4)
    assert (batch["prompt"], batch["completion"], batch["index"]) == (["1+1=", "2+1="], ["2", "3"], [0, 1])
    assert len(data.first_prompts(9)["index"]) == 4
    assert not data.reports  # looking is no reading of a split
    assert SFTDataModule(train=rows, tokenizer=tokenizer).first_prompts(2) is None
    text = [{"text": "1+1=2"}]
    assert PretrainDataModule(train=text, validation=text, tokenizer=tokenizer).first_prompts(2) is None
    pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
    shared = PreferenceDataModule(train=pairs, validation=pairs, tokenizer=tokenizer).first_prompts(2)
    assert shared["prompt"] == ["1+1="]


def test_a_loader_that_nobody_uses_any_more_ends_its_workers(tokenizer):
    """At once: what is left to the end of the program waits for workers that heed no signal."""
    before, loader = multiprocessing.active_children(), prompts(tokenizer, workers=1).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    [worker] = [process for process in multiprocessing.active_children() if process not in before]
    started = time.monotonic()
    gc.disable()
    try:
        del loader, iterator
        assert not worker.is_alive()
    finally:
        gc.enable()
    assert time.monotonic() - started < 5
