"""Histograms of a rollout in TensorBoard, and that ratios are kept only for who asks."""

import copy

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from alignment_modules import GRPOModule
from alignment_modules.callbacks import Histograms


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 40, (2, 3), generator=generator)
    return {
        "prompts": ids,
        "prompt_attention_mask": torch.ones_like(ids),
        "responses": torch.randint(8, 40, (8, 5), generator=generator),
        "response_mask": (torch.arange(5) < torch.arange(8)[:, None] % 4 + 2).long(),
        "rewards": torch.tensor([1.0, 0.0, float("nan"), 3.0, 0.5, 2.0, 1.0, 4.0]),
        "index": [0, 1],
    }


@pytest.fixture
def module(tiny_llama):
    return GRPOModule(
        policy=copy.deepcopy(tiny_llama),
        rewards=lambda completions: [0.0] * len(completions),
        num_generations=4,
        num_iterations=2,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )


@pytest.fixture
def read_histograms():
    def read(folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
        events.Reload()
        return {tag: {e.step: e.histogram_value for e in events.Histograms(tag)} for tag in events.Tags()["histograms"]}

    return read


def test_what_is_spread(module, train, tmp_path, read_histograms):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    train(module, [batch()] * 2, logger=[logger, CSVLogger(tmp_path / "csv")], callbacks=[Histograms()])
    logger.finalize("success")
    found = {tag.removeprefix("histograms/"): values for tag, values in read_histograms(tmp_path).items()}
    assert found.keys() == {"reward", "advantage", "length", "importance_ratio"}
    assert all(values.keys() == {2, 4} for values in found.values())
    last = {tag: values[4] for tag, values in found.items()}
    assert (last["reward"].num, last["reward"].min, last["reward"].max, last["reward"].sum) == (7, 0, 4, 11.5)
    assert last["advantage"].num == 7
    assert last["advantage"].sum == pytest.approx(0, abs=1e-5)
    assert (last["length"].num, last["length"].sum) == (8, 28)
    ratios = last["importance_ratio"]  # of both steps: the first is compared with itself
    assert ratios.num == 2 * 24
    assert ratios.min < 1 < ratios.max
    assert module.kept_ratios is None


def test_only_logged_steps_and_nothing_without_a_writer(module, train, tmp_path, read_histograms):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    train(module, [batch()] * 3, logger=logger, callbacks=[Histograms()], log_every_n_steps=4)
    logger.finalize("success")
    assert {tuple(values) for values in read_histograms(tmp_path).values()} == {(2, 4)}
    asked = []

    class Asks(Histograms):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            asked.append(pl_module.kept_ratios)

    train(module, [batch()], callbacks=[Asks()])
    train(module, [batch()], logger=TensorBoardLogger(tmp_path / "off"), callbacks=[Asks(enabled=False)])
    assert asked == [None, None]


def test_training_is_the_same(module, train, tmp_path):
    other = copy.deepcopy(module)
    train(module, [batch()] * 2)
    train(other, [batch()] * 2, logger=TensorBoardLogger(tmp_path), callbacks=[Histograms()])
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_module_without_rollouts_is_refused(make_trainer, loader):
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match=r"Histograms needs BoringModel.rollout; it has none"):
        make_trainer(Histograms()).fit(BoringModel(), loader)
