"""A run that goes on from a checkpoint reads the rows and takes the steps that the uninterrupted run takes."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from alignment_modules import GRPOModule, SFTModule
from alignment_modules.training.schedules import CosineSchedule
from alignment_modules.training.window import Window
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder

ROWS = [{"input_ids": torch.tensor([n + 1, 2, n % 5 + 3, 4])} for n in range(14)]
ROWS = [{**row, "labels": row["input_ids"], "attention_mask": torch.ones(4, dtype=torch.long)} for row in ROWS]
BATCHES = 7  # in an epoch


class OwnData(L.LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(ROWS, UniformOrder(len(ROWS), batch_size=2))


class EagerLoader(DataLoader):
    """A foreign loader: its iterator keeps the position of when it was made, and its state means nothing to us."""

    def __init__(self):
        super().__init__(ROWS, batch_size=2)
        self.start = self.seen = 0

    def __iter__(self):
        batches, self.seen, self.start = list(super().__iter__())[self.start :], self.start, 0
        return map(self.count, iter(batches))

    def count(self, batch):
        self.seen += 1
        return batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.start = state["seen"]


class OneCycleModule(SFTModule):
    """A user's module, which asks Lightning itself for the run's length."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(Callback):
    def __init__(self):
        self.read, self.validated = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.read.append((trainer.current_epoch, batch_idx, batch["input_ids"][:, 0].tolist()))

    def on_validation_end(self, trainer, module):
        self.validated.append((trainer.current_epoch, trainer.global_step))


class At(Callback):
    """Does something after a batch, counted over all epochs."""

    def __init__(self, batch, action):
        self.batch, self.action, self.count = batch, action, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            self.action(trainer)


@pytest.fixture
def run(tiny_llama, tmp_path):
    def fit(*callbacks, module=SFTModule, data=OwnData, resume=None, folder="whole", **options):
        schedule = None if module is OneCycleModule else CosineSchedule
        learner = module(
            policy=copy.deepcopy(tiny_llama), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), lr_scheduler=schedule
        )
        watch = Watch()
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        trainer = L.Trainer(**(settings | options), enable_model_summary=False, callbacks=[watch, *callbacks, saver])
        source = data()
        given = {"datamodule": source} if isinstance(source, L.LightningDataModule) else {"train_dataloaders": source}
        trainer.fit(learner, ckpt_path=resume, **given)
        watch.end = (
            {name: value.clone() for name, value in learner.state_dict().items()},
            trainer.optimizers[0].state_dict(),
            trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        )
        return watch

    fit.folder = tmp_path
    return fit


def assert_equal(left, right):
    leaves, structure = tree_flatten(left)
    others, same = tree_flatten(right)
    assert structure == same
    for leaf, other in zip(leaves, others, strict=True):
        assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other


def lone_loader():
    return OwnData().train_dataloader()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("module", "data"), [(SFTModule, OwnData), (OneCycleModule, lone_loader), (SFTModule, EagerLoader)]
)
def test_every_checkpoint_continues_exactly(run, module, data, accumulate):
    options = {"module": module, "data": data, "accumulate_grad_batches": accumulate}
    whole = run(**options)
    steps = -(-BATCHES // accumulate)
    for step in {1, steps - 1, steps, steps + 1, 2 * steps - 1}:  # both epochs, and the end of one
        resumed = run(**options, resume=run.folder / "whole" / f"step={step}.ckpt", folder="again")
        batches = BATCHES * (step // steps) + min(step % steps * accumulate, BATCHES)
        assert resumed.read == whole.read[batches:]
        assert_equal(resumed.end, whole.end)


def test_a_second_resume_continues_exactly(run):
    """The first falls on the end of an epoch, and the second into the epoch after it."""
    whole = run(max_epochs=3)
    run(At(2, lambda trainer: setattr(trainer, "should_stop", True)), max_epochs=3, folder="b",
        resume=run.folder / "whole" / "step=7.ckpt")  # fmt: skip
    resumed = run(max_epochs=3, resume=run.folder / "b" / "step=9.ckpt", folder="c")
    assert resumed.read == whole.read[9:]
    assert_equal(resumed.end, whole.end)


@pytest.mark.parametrize(
    ("first", "epochs", "accumulate", "data"),
    [
        (2, 2, 1, OwnData),
        (7, 2, 1, OwnData),
        (7, 2, 1, EagerLoader),
        (2, -1, 2, OwnData),
        (4, -1, 2, EagerLoader),
        (4, 1, 1, OwnData),
        (2, 1, 2, EagerLoader),
    ],
)
def test_a_run_that_max_steps_ended_is_extended(run, first, epochs, accumulate, data):
    options = {"max_epochs": epochs, "accumulate_grad_batches": accumulate, "data": data}
    whole = run(max_steps=9, **options)

    def total(steps):
        return min(steps, epochs * -(-BATCHES // accumulate)) if epochs > 0 else steps

    end_of_epoch = ModelCheckpoint(run.folder / "ends", filename="end")
    before = run(end_of_epoch, max_steps=first, folder="first", **options)
    with pytest.warns(UserWarning, match=f"has {total(9)} optimizer steps, and had {total(first)} when its checkpoint"):
        after = run(max_steps=9, resume=run.folder / "ends" / "end.ckpt", folder="more", **options)
    assert before.read + after.read == whole.read


def test_a_run_that_was_stopped_in_an_epoch_goes_on(run):
    whole = run()
    stop = At(3, lambda trainer: setattr(trainer, "should_stop", True))
    before = run(stop, ModelCheckpoint(run.folder / "ends", filename="end"), folder="first")
    after = run(resume=run.folder / "ends" / "end.ckpt", folder="more")
    assert before.read + after.read == whole.read
    assert_equal(after.end, whole.end)


@pytest.mark.parametrize("batch", [1, 5, 7, 9])
def test_a_checkpoint_within_a_step_takes_that_step_again(run, batch):
    """Of three batches, from its first batch on."""
    whole = run(accumulate_grad_batches=3)
    path = run.folder / "within.ckpt"
    run(At(batch, lambda trainer: trainer.save_checkpoint(path)), accumulate_grad_batches=3, folder="b")
    resumed = run(accumulate_grad_batches=3, resume=path, folder="c")
    assert resumed.read == whole.read[batch - batch % BATCHES % 3 :]
    assert_equal(resumed.end, whole.end)


def test_a_foreign_loader_within_a_step_leaves_out_what_the_step_had_read(run, monkeypatch):
    """Its position cannot be put back: the step is taken with the batch that follows alone, divided by its weight."""
    path = run.folder / "within.ckpt"

    def save(trainer):
        with pytest.warns(UserWarning, match=r"after 2 of its 3 batches.*leaves these out"):
            trainer.save_checkpoint(path)

    whole = run(At(5, save), accumulate_grad_batches=3, data=EagerLoader)
    assert "window" not in torch.load(path, weights_only=True)["alignment_module"]
    divisors, close = [], Window.close
    monkeypatch.setattr(Window, "close", lambda *given: divisors.append((closed := close(*given)).divisor) or closed)
    resumed = run(accumulate_grad_batches=3, resume=path, folder="b", data=EagerLoader)
    assert resumed.read == whole.read[5:]
    assert [float(divisor) for divisor in divisors] == [6, 6, 18, 18, 6]  # tokens: 2 rows of 3 in each batch


class Fails(Exception):
    pass


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("moment", ["objective", "on_train_batch_start", "on_train_batch_end", "backward"])
def test_a_checkpoint_on_an_exception_continues_exactly(run, monkeypatch, moment, accumulate):
    whole = run(accumulate_grad_batches=accumulate)
    calls, call = [], getattr(SFTModule, moment)

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise Fails
        return call(*args, **kwargs)

    kept = ModelCheckpoint(run.folder / "kept", filename="kept", save_on_exception=True, every_n_epochs=9)
    monkeypatch.setattr(SFTModule, moment, fail)
    with pytest.raises(Fails):
        run(kept, accumulate_grad_batches=accumulate, folder="b")
    monkeypatch.undo()
    (path,) = (run.folder / "kept").iterdir()
    resumed = run(accumulate_grad_batches=accumulate, resume=path, folder="c")
    done = 5 if moment == "on_train_batch_end" else 4
    assert resumed.read == whole.read[done // accumulate * accumulate :]
    assert_equal(resumed.end, whole.end)


def test_half_a_gradient_is_in_no_checkpoint(run, monkeypatch):
    """Of a loader whose position cannot be put back, the batches of the open step are lost, and nothing else."""
    calls, backward = [], SFTModule.backward

    def fail(self, loss):
        backward(self, loss)
        calls.append(1)
        if len(calls) == 5:  # the second of the three batches of a step
            raise Fails

    kept = ModelCheckpoint(run.folder / "kept", filename="kept", save_on_exception=True, every_n_epochs=9)
    monkeypatch.setattr(SFTModule, "backward", fail)
    with pytest.raises(Fails):
        run(kept, accumulate_grad_batches=3, folder="b", data=EagerLoader)
    monkeypatch.undo()
    path = run.folder / "kept" / "kept.ckpt"
    saved = torch.load(path, weights_only=True)
    assert "window" not in saved["alignment_module"]
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 3
    resumed = run(accumulate_grad_batches=3, resume=path, folder="c", data=EagerLoader)
    assert [rows for _, _, rows in resumed.read[:2]] == [[11, 12], [13, 14]]


def validating(run, *callbacks, **options):
    class Both(OwnData):
        def val_dataloader(self):
            return DataLoader(ROWS[:2], batch_size=2)

    return run(*callbacks, data=Both, num_sanity_val_steps=0, **options)


@pytest.mark.parametrize("interval", [2, 7])
def test_a_validation_that_was_due_is_run_once(run, interval):
    after = ModelCheckpoint(run.folder / "validated", filename="{step}", save_top_k=-1, every_n_epochs=1)
    whole = validating(run, after, val_check_interval=interval)
    assert len(whole.validated) == 6 if interval == 2 else 2
    for step in (1, 2, 3, 7, 8, 9):
        resumed = validating(
            run, resume=run.folder / "whole" / f"step={step}.ckpt", val_check_interval=interval, folder="b"
        )
        assert resumed.validated == [at for at in whole.validated if at[1] >= step]
        assert resumed.read == whole.read[step:]
    for path in (run.folder / "validated").iterdir():  # written when it was over
        step = int(path.stem.removeprefix("step="))
        resumed = validating(run, resume=path, val_check_interval=interval, folder="c")
        assert resumed.validated == [at for at in whole.validated if at[1] > step]
        assert resumed.read == whole.read[step:]


def test_a_rollout_cut_short_cannot_be_continued(tiny_llama, tmp_path):
    batch = {
        "prompts": torch.tensor([[1, 2], [3, 4]]),
        "prompt_attention_mask": torch.ones(2, 2, dtype=torch.long),
        "responses": torch.tensor([[5, 6], [7, 8], [9, 5], [6, 7]]),
        "response_mask": torch.ones(4, 2, dtype=torch.long),
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.0]),
    }

    def fit(steps, resume=None):
        module = GRPOModule(
            policy=copy.deepcopy(tiny_llama),
            rewards=lambda completions: [0.0] * len(completions),
            num_iterations=2,
            num_generations=2,
        )
        kept = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, callbacks=[kept],
                            enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(module, DataLoader([batch] * 4, batch_size=None), ckpt_path=resume)
        return trainer.global_step

    assert fit(3) == 3
    assert fit(3, tmp_path / "step=3.ckpt") == 3  # nothing left to do
    with pytest.raises(ValueError, match="max_steps=3 ended its run with optimizer steps of the last batch still to"):
        fit(6, tmp_path / "step=3.ckpt")
    assert fit(4) == 4
    assert fit(6, tmp_path / "step=4.ckpt") == 6
