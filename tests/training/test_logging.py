"""What is logged: exact means, at optimizer steps, under documented names; and the hooks a subclass can override."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner

from alignment_modules import SFTModule, Statistic
from alignment_modules.training.meters import Meters
from alignment_modules.training.schedules import LinearSchedule


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


def test_a_logged_mean_covers_all_steps_since_the_last_one(make, train, tmp_path):
    frozen, logger = make(), TensorBoardLogger(tmp_path, name="", version="")
    frozen.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    batches = [batch(4, seed) for seed in range(4)]
    train(frozen, batches, logger=logger, log_every_n_steps=4)
    # Step 1 is logged alone; the mean at step 4 covers steps 2 to 4.
    union = {key: torch.cat([b[key] for b in batches[1:]]) for key in batches[0]}
    expected = train(make(), [union]).callback_metrics["train/loss"]
    assert events(tmp_path)["train/loss"][1] == (4, pytest.approx(float(expected), abs=1e-6))


def test_the_steps_that_no_interval_reaches_are_logged_with_the_epoch(make, train, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = train(make(), cut(batch(10), 2), logger=logger, log_every_n_steps=50)
    found = events(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [1, 5]
    rate = float(trainer.callback_metrics["train/learning_rate"])
    assert rate == pytest.approx(found["train/learning_rate"][0][1])


class Watched(L.Callback):
    """What any callback sees at the end of a batch."""

    def __init__(self):
        self.outputs, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.outputs.append(float(outputs["loss"]))
        self.metrics.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))


@pytest.mark.parametrize("interval", [1, 50])
def test_callbacks_see_the_mean_of_the_step_just_taken(make, train, interval):
    def frozen():
        module = make()
        module.make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
        return module

    batches = [batch(rows, seed) for rows, seed in ((1, 0), (8, 1), (2, 2), (5, 3))]
    means = [float(train(frozen(), [one]).callback_metrics["train/loss"]) for one in batches]
    assert max(means) - min(means) > 0.01
    seen = Watched()
    train(frozen(), batches, callbacks=[seen], log_every_n_steps=interval)
    assert seen.outputs == pytest.approx(means, abs=1e-6)
    assert seen.metrics == pytest.approx(means, abs=1e-6)
    # With accumulation Lightning divides what a callback is handed; the metric is the mean of the whole step.
    train(frozen(), batches, callbacks=[seen := Watched()], log_every_n_steps=interval, accumulate_grad_batches=2)
    assert seen.outputs == pytest.approx([mean / 2 for mean in means], abs=1e-6)
    targets = [int((one["labels"][:, 1:] != -100).sum()) for one in batches]
    steps = [(means[i] * targets[i] + means[i + 1] * targets[i + 1]) / (targets[i] + targets[i + 1]) for i in (0, 2)]
    assert [seen.metrics[1], seen.metrics[3]] == pytest.approx(steps, abs=1e-6)


def test_a_checkpoint_is_named_after_the_loss_of_its_own_step(make, train, tmp_path):
    saver = ModelCheckpoint(
        tmp_path,
        monitor="train/loss",
        save_top_k=-1,
        every_n_train_steps=1,
        filename="{step}={train/loss:.5f}",
        auto_insert_metric_name=False,
    )
    batches = [batch(rows, seed) for rows, seed in ((1, 0), (8, 1), (2, 2))]
    train(make(), batches, callbacks=[saver, seen := Watched()], enable_checkpointing=True, log_every_n_steps=50)
    names = sorted(file.name for file in tmp_path.rglob("*.ckpt"))
    assert names == [f"{step}={loss:.5f}.ckpt" for step, loss in enumerate(seen.metrics, start=1)]


def test_the_tuner_sees_means(tiny_llama, tmp_path):
    """Rows of very different lengths: a sum would make the long ones look like a bad learning rate."""

    class Mean(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.policy, self.lr = copy.deepcopy(tiny_llama), 1e-3

        def training_step(self, batch, batch_idx):
            logits = self.policy(batch["input_ids"]).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    ours = SFTModule(policy=copy.deepcopy(tiny_llama), optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
    ours.lr = 1e-3
    rows = [batch(1, seed, width=4 if seed < 8 else 30) for seed in range(16)]
    for row in rows:
        row["labels"] = row["input_ids"]
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    found = []
    for module in (Mean(), ours):
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            max_epochs=1,
        )
        loader = torch.utils.data.DataLoader(rows, batch_size=None)
        finder = Tuner(trainer).lr_find(module, loader, num_training=16, update_attr=False, early_stop_threshold=None)
        found.append(finder.results["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_optimizer_that_sets_its_own_rate_logs_none(make, train):
    class OwnRate(torch.optim.SGD):
        def __init__(self, groups):
            super().__init__(groups, lr=0.1)
            for group in self.param_groups:
                group["lr"] = None

        def step(self, closure=None):
            return closure()

    module = make()
    module.make_optimizer = OwnRate
    metrics = train(module, [batch(4)]).callback_metrics
    assert "train/learning_rate" not in metrics
    assert "train/grad_norm" in metrics


def test_a_rate_held_in_a_tensor_is_logged(make, train):
    module = make()
    module.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.25))
    assert train(module, [batch(4)]).callback_metrics["train/learning_rate"] == 0.25


def without_targets(rows, seed=0):
    found = batch(rows, seed)
    return {**found, "labels": torch.full_like(found["labels"], -100)}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_without_targets_moves_nothing_and_is_counted(make, train, optimizer):
    """Neither momentum nor weight decay, wherever it stands, and the schedule goes on as with other data."""
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    snapshots, rates = [], []

    class Snapshots(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            snapshots.append(copy.deepcopy(module.policy.state_dict()))
            rates.append(trainer.callback_metrics["train/learning_rate"].item())

    module = make(lr_scheduler=lambda optimizer: LinearSchedule(optimizer))
    module.make_optimizer = lambda groups: optimizer(groups, lr=0.1, weight_decay=0.5, **options)
    batches = [batch(4), without_targets(4), batch(4, 1), without_targets(2)]
    with pytest.warns(UserWarning, match="optimizer step 2 is skipped: not one target") as warned:
        trainer = train(module, batches, callbacks=[Snapshots()])
    assert len([w for w in warned if "is skipped" in str(w.message)]) == 1
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(snapshots)]
    assert same == [True, False, True]
    assert trainer.callback_metrics["train/steps_without_targets"] == 2
    assert trainer.global_step == 4
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_an_epoch_without_a_target_is_an_error(make, train):
    with pytest.raises(ValueError, match=r"nothing to learn in epoch 0: .*labels all -100"):
        train(make(), [without_targets(4), without_targets(2)])
    train(make(), [without_targets(4), batch(2)])


def test_an_epoch_cut_short_is_judged_only_where_the_whole_run_learnt_nothing(make, train):
    batches = [without_targets(4), batch(2)]
    train(make(), batches, max_epochs=2, max_steps=3)  # the second epoch ends with its first step
    with pytest.raises(ValueError, match="nothing to learn in epoch 0"):
        train(make(), batches, max_steps=1)


class FailsAtStep(torch.optim.SGD):
    """After the step was counted and logged, as where memory runs out."""

    last = 2

    def step(self, closure=None):
        closure()
        self.last -= 1
        if not self.last:
            raise RuntimeError("no more memory")


@pytest.mark.parametrize("interval", [1, 50])
def test_a_step_that_fails_is_not_in_the_totals_of_a_checkpoint(make, train, tmp_path, interval):
    module = make()
    module.make_optimizer = lambda groups: FailsAtStep(groups, lr=0.1)
    saver = ModelCheckpoint(tmp_path, filename="kept", save_on_exception=True, every_n_epochs=9)
    with pytest.raises(RuntimeError, match="no more memory"):
        train(module, [batch(2), batch(3, 1)], callbacks=[saver], enable_checkpointing=True, log_every_n_steps=interval)
    saved = torch.load(tmp_path / "kept.ckpt", weights_only=True)["alignment_module"]
    assert saved["num_tokens"] == int(batch(2)["attention_mask"].sum())
    assert saved["meters"] == [{}]  # step 1 is logged with any interval


def test_what_an_epochs_end_has_logged_is_not_logged_again_after_a_failure(make, train, tmp_path):
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch:
                raise RuntimeError("no more memory")

    saver = ModelCheckpoint(tmp_path, filename="kept", save_on_exception=True, every_n_epochs=9)
    options = {"enable_checkpointing": True, "log_every_n_steps": 50, "max_epochs": 2}
    with pytest.raises(RuntimeError, match="no more memory"):
        train(make(), [batch(2), batch(3, 1)], callbacks=[Fails(), saver], **options)
    assert torch.load(tmp_path / "kept.ckpt", weights_only=True)["alignment_module"]["meters"] == [{}]


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


def test_meters_take_in_others_of_every_kind():
    pair, end = torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor(2.0)
    pieces = [
        {"mean": Statistic(pair[0], 2.0), "std": Statistic(pair, 2.0, "std"), "least": Statistic(end, kind="min")},
        {
            "mean": Statistic(pair[1], 1.0),
            "std": Statistic(2 * pair, 3.0, "std"),
            "most": Statistic(end, kind="max"),
        },
        {"least": Statistic(-end, kind="min"), "most": Statistic(-end, kind="max")},
    ]
    whole, one, other = Meters(), Meters(), Meters()
    for piece in pieces:
        whole.update(piece)
    one.update(pieces[0])
    for piece in pieces[1:]:
        other.update(piece)
    one.absorb(other)
    assert one.compute(lambda values, how: values) == whole.compute(lambda values, how: values)
