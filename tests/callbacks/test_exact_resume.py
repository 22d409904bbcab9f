"""ExactResume: a resumed run draws what the uninterrupted one draws."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from alignment_modules.callbacks import ExactResume


class Draws(Callback):
    def __init__(self):
        self.draws = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.draws.append((torch.rand(()).item(), random.random(), np.random.rand()))


class CountingLoader(DataLoader):
    """A loader that resumes in the middle of an epoch, in order."""

    def __init__(self, rows):
        super().__init__(rows, batch_size=4)
        self.start = self.seen = 0

    def __iter__(self):
        start, self.start = self.start, 0
        self.seen = start
        for row in range(start, len(self)):
            self.seen = row + 1
            yield self.dataset[row * 4 : row * 4 + 4]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.start = state["seen"]


ROWS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("manual", [0, 2])
def test_resume_equals_the_uninterrupted_run(tmp_path, boring, make_trainer, manual):
    whole, whole_draws = boring(manual=manual, noise=1.0), Draws()
    make_trainer(ExactResume(seed=5), whole_draws, max_epochs=2).fit(whole, CountingLoader(ROWS))

    first, first_draws = boring(manual=manual, noise=1.0), Draws()
    per_batch = max(manual, 1)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="mid", every_n_train_steps=8 * per_batch)
    trainer = make_trainer(
        ExactResume(seed=5), first_draws, saver, enable_checkpointing=True, max_steps=8 * per_batch, max_epochs=2
    )
    trainer.fit(first, CountingLoader(ROWS))

    torch.manual_seed(77)
    random.seed(78)
    np.random.seed(79)
    second, second_draws = boring(manual=manual, noise=1.0), Draws()
    trainer = make_trainer(ExactResume(seed=5), second_draws, max_epochs=2)
    trainer.fit(second, CountingLoader(ROWS), ckpt_path=tmp_path / "mid.ckpt")

    assert len(whole_draws.draws) == 12
    assert first_draws.draws + second_draws.draws == whole_draws.draws
    assert first.losses + second.losses == whole.losses
    assert torch.equal(second.layer.weight, whole.layer.weight)
    assert len(set(whole_draws.draws)) == 12


def draws_of(seed, boring, make_trainer, loader, **kwargs):
    draws = Draws()
    make_trainer(ExactResume(seed), draws, **kwargs).fit(boring(), loader)
    return draws.draws


def test_seeds_differ_and_the_run_seed_is_the_default(boring, make_trainer, loader, monkeypatch):
    first, second = draws_of(1, boring, make_trainer, loader), draws_of(2, boring, make_trainer, loader)
    assert not set(first) & set(second)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert draws_of(None, boring, make_trainer, loader) == second


def test_batches_of_one_accumulation_window_differ(boring, make_trainer, loader):
    draws = draws_of(1, boring, make_trainer, loader, accumulate_grad_batches=3)
    assert len(set(draws)) == 6


def test_negative_seed():
    with pytest.raises(ValueError, match="seed=-1 must be an integer from 0"):
        ExactResume(-1)
