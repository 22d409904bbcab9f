"""What is logged: exact means, at optimizer steps, under documented names; and the hooks a subclass can override."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from alignment_modules import SFTModule, Statistic
from alignment_modules.objective import Meters


def batch(rows, seed=0, width=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (rows, width), generator=generator)
    lengths = torch.randint(2, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width)[None] < lengths
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}


def cut(whole, size):
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, len(whole["labels"]), size)]


@pytest.fixture
def make(tiny_llama):
    def factory(cls=SFTModule, **options):
        return cls(
            policy=copy.deepcopy(tiny_llama), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options
        )

    return factory


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_tags_and_steps(make, train, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    train(make(), cut(batch(24), 2), logger=logger, accumulate_grad_batches=2, log_every_n_steps=3)
    found = events(tmp_path)
    assert {
        f"train/{name}"
        for name in (
            "loss",
            "mean_token_accuracy",
            "entropy",
            "num_tokens",
            "grad_norm",
            "learning_rate",
        )
    } <= found.keys()
    assert [step for step, _ in found["train/loss"]] == [1, 3, 6]  # optimizer steps, not batches


def test_logged_means_do_not_depend_on_the_split(make, train):
    whole = batch(8)
    one = train(make(), [whole]).callback_metrics
    for size in (1, 3):
        parts = cut(whole, size)
        other = train(make(), parts, accumulate_grad_batches=len(parts)).callback_metrics
        for name in ("loss", "mean_token_accuracy", "entropy", "grad_norm", "num_tokens"):
            assert float(other[f"train/{name}"]) == pytest.approx(float(one[f"train/{name}"]), rel=1e-5), name


def test_a_logged_mean_covers_all_steps_since_the_last_one(make, train):
    frozen = make()
    frozen.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    batches = [batch(4, seed) for seed in range(4)]
    logged = train(frozen, batches, log_every_n_steps=4).callback_metrics["train/loss"]
    # Step 1 is logged alone; the mean at step 4 covers steps 2 to 4.
    union = {key: torch.cat([b[key] for b in batches[1:]]) for key in batches[0]}
    expected = train(make(), [union]).callback_metrics["train/loss"]
    assert float(logged) == pytest.approx(float(expected), abs=1e-6)


def test_the_steps_that_no_interval_reaches_are_logged_with_the_epoch(make, train, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = train(make(), cut(batch(10), 2), logger=logger, log_every_n_steps=50)
    assert [step for step, _ in events(tmp_path)["train/loss"]] == [1, 5]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(events(tmp_path)["train/loss"][1][1])


def test_statistics_of_host_and_device_are_combined():
    meters, seen = Meters(), []
    meters.update({"on_device": Statistic(torch.ones((), device="meta"), 2.0), "on_host": Statistic(torch.ones(()))})

    def reduce(values, how):
        seen.append(values.device.type)
        return torch.ones(values.shape)

    assert meters.compute(reduce) == {"on_device": 1.0, "on_host": 1.0}
    assert seen == ["meta"]


def test_two_validation_loaders_are_logged_apart(make):
    loaders = [torch.utils.data.DataLoader([batch(4, seed=seed)], batch_size=None) for seed in (0, 1)]
    module, trainer = make(), L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    apart = trainer.validate(module, loaders)
    alone = [trainer.validate(module, loader)[0]["val/loss"] for loader in loaders]
    both = {name: value for found in apart for name, value in found.items()}
    assert [both[f"val/loss/dataloader_idx_{i}"] for i in (0, 1)] == alone


def test_objects_of_a_subclass_stay_out_of_the_checkpoint(train, tmp_path, tiny_llama):
    class Distilled(SFTModule):
        def __init__(self, *, teacher, weight=0.5, **common):
            super().__init__(**common)
            self.teacher = [teacher]

    module = Distilled(teacher=copy.deepcopy(tiny_llama), policy=copy.deepcopy(tiny_llama), weight=0.25)
    train(module, [batch(2)]).save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert found["weight"] == 0.25
    assert not found.keys() & {"teacher", "policy"}


def test_evaluation_does_not_depend_on_the_batch_size(make):

    whole, results = batch(7), []
    for size in (1, 2, 7):
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        loader = torch.utils.data.DataLoader(cut(whole, size), batch_size=None)
        results.append(trainer.validate(make(), loader, verbose=False)[0])
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)


def test_num_tokens_survives_a_checkpoint(make, train, tmp_path):

    whole = batch(8)
    trainer = train(make(), [whole])
    tokens = int(whole["attention_mask"].sum())
    assert trainer.callback_metrics["train/num_tokens"] == tokens
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    resumed.fit(make(), torch.utils.data.DataLoader([whole], batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.callback_metrics["train/num_tokens"] == 2 * tokens


def test_hooks_of_a_subclass(make, train, tmp_path, capsys, caplog):
    class Mine(SFTModule):
        def describe(self):
            return super().describe() | {"flavour": "mine"}

        def extra_metrics(self, batch, objective):
            return {"rows": Statistic(torch.tensor(float(len(batch["labels"]))))}

        def extra_state(self):
            return {"seen": 3}

        def load_extra_state(self, state):
            self.seen = state["seen"]

        def count_tokens(self, batch):
            return {"tokens": torch.tensor(5), "samples": 1, "padding": 0}

    with caplog.at_level("INFO"):
        trainer = train(make(Mine), [batch(4)])
    assert "mine" in caplog.text
    assert trainer.callback_metrics["train/rows"] == 4
    assert trainer.callback_metrics["train/num_tokens"] == 5
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = make(Mine)
    restored.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert restored.seen == 3
