"""Throughput: rates against a clock that the test moves, on logging steps only."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger

from alignment_modules.callbacks import Throughput
from alignment_modules.callbacks import throughput as throughput_module

TAGS = ["train/tokens_per_second", "train/samples_per_second", "train/padding_share"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now` moves."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: Clock.now)
    return Clock


def counts(rows):
    return (rows > 0).sum().item(), (rows <= 0).sum().item()


@pytest.mark.parametrize("manual", [0, 2])
def test_rates_and_axis(tmp_path, boring, make_trainer, loader, clock, read_events, manual):
    module = boring(manual=manual)
    original = module.training_step

    def slow_step(batch, batch_idx):
        clock.now += 0.5
        return original(batch, batch_idx)

    def slow_validation(batch, batch_idx):
        clock.now += 100.0

    module.training_step, module.validation_step = slow_step, slow_validation
    per_batch = max(manual, 1)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer(Throughput(), logger=logger, log_every_n_steps=2 * per_batch, val_check_interval=1)
    trainer.fit(module, loader, loader)
    events = read_events(tmp_path)
    rows = loader.dataset
    for position, step in enumerate([2 * per_batch, 4 * per_batch, 6 * per_batch]):
        tokens, padding = counts(rows[position * 8 : position * 8 + 8])
        expected = dict(zip(TAGS, [tokens / 1.0, 8 / 1.0, padding / 32], strict=True))
        for tag in TAGS:
            assert events[tag][position] == (step, pytest.approx(expected[tag], rel=1e-6))
    assert all(len(events[tag]) == 3 for tag in TAGS)


def test_an_interval_that_a_batch_jumps_over_is_still_logged(tmp_path, boring, make_trainer, loader, read_events):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(Throughput(), logger=logger, log_every_n_steps=5).fit(boring(manual=3), loader)
    assert [step for step, _ in read_events(tmp_path)[TAGS[0]]] == [6, 12, 15]


def test_without_a_logger_the_numbers_are_there(boring, make_trainer, loader):
    trainer = make_trainer(Throughput(prog_bar=True))
    trainer.fit(boring(), loader)
    assert set(TAGS) <= set(trainer.callback_metrics)
    assert set(trainer.progress_bar_metrics) & set(TAGS) == {TAGS[0]}
    assert trainer.callback_metrics[TAGS[0]] > 0


def test_tensor_counts_are_read_only_on_logging_steps(boring, make_trainer, loader):
    reads = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function.__name__ in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
                reads.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    module = boring()
    module.count_tokens = lambda batch: {
        "tokens": torch.tensor(3).as_subclass(Watched),
        "samples": 1,
        "padding": torch.tensor(0).as_subclass(Watched),
    }
    make_trainer(Throughput(), log_every_n_steps=3).fit(module, loader)
    assert len(reads) <= 2
    make_trainer(Throughput(), log_every_n_steps=0).fit(boring(), loader)


def test_a_module_that_cannot_count(make_trainer, loader):
    with pytest.raises(TypeError, match=r"Throughput needs BoringModel.count_tokens\(batch\)"):
        make_trainer(Throughput()).fit(BoringModel(), loader)
