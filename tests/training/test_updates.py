"""Optimizer steps of a module's own: several optimizers, several units, and what a Trainer must leave to them."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from alignment_modules import SFTModule
from alignment_modules.functional.statistics import Statistic
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.schedules import LinearSchedule
from alignment_modules.training.updates import UpdateModule
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder

SCRIPT = Path(__file__).with_name("two_optimizers.py")
spec = importlib.util.spec_from_file_location("two_optimizers", SCRIPT)
toy = importlib.util.module_from_spec(spec)
sys.modules["two_optimizers"] = toy
spec.loader.exec_module(toy)


def changes(module, train, batches, **options):
    before = copy.deepcopy(module.state_dict())
    trainer = train(module, batches, **options)
    return {name: value - before[name] for name, value in module.state_dict().items()}, trainer


@pytest.mark.parametrize("size", [None, 1, 3])
def test_policy_and_critic_both_take_the_step_of_the_plain_formula(train, assert_same, size):
    batch = toy.rows(range(7))
    mask = batch["attention_mask"].bool()
    module = toy.make(micro_batch_size=size, max_grad_norm=None)
    plain = copy.deepcopy(module)
    logps = plain.policy(batch["input_ids"]).log_softmax(-1)
    nll = -logps.gather(-1, batch["input_ids"][..., None])[..., 0] * mask
    (nll.sum() / mask.sum() + 0.01 * nll.sum(dim=1).square().mean()).backward()
    expected = {f"policy.{name}": -0.1 * p.grad for name, p in plain.policy.named_parameters()}
    critic = torch.optim.SGD(plain.critic.parameters(), lr=0.1)
    before = copy.deepcopy(plain.critic.state_dict())
    counts = (nn.functional.one_hot(batch["input_ids"], 11).float() * mask[..., None]).sum(dim=1)
    for _ in range(toy.CRITIC_STEPS):
        critic.zero_grad()
        (plain.critic(counts)[:, 0] - mask.sum(dim=1)).square().mean().backward()
        critic.step()
    expected |= {f"critic.{name}": value - before[name] for name, value in plain.critic.state_dict().items()}
    found, trainer = changes(module, train, [batch])
    assert_same(found, expected)
    assert trainer.global_step == 1
    metrics = trainer.callback_metrics
    loss = nll.sum() / mask.sum() + 0.01 * nll.sum(dim=1).square().mean()
    assert float(metrics["train/loss"]) == pytest.approx(loss.item())
    assert metrics["train/critic/grad_norm"] > 0
    assert metrics["train/grad_norm"] > 0
    assert metrics["train/num_tokens"] == mask.sum()


def test_only_the_policys_steps_count(train):
    seen = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append([config.scheduler.last_epoch for config in trainer.lr_scheduler_configs])

    module = toy.make(lr_scheduler=LinearSchedule)
    trainer = train(module, [toy.rows([n, n + 1]) for n in range(9)], max_steps=3, max_epochs=-1, callbacks=[Rates()])
    assert trainer.global_step == 3
    assert seen == [[1, 2], [2, 4], [3, 6]]  # each schedule counts its own optimizer's steps
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == 3


ROWS = [{key: value[0] for key, value in toy.rows([n]).items()} for n in range(12)]


def test_a_resumed_run_of_two_optimizers_is_the_same_to_the_bit(tmp_path):
    def fit(resume=None, **options):
        module = toy.make(torch.optim.AdamW, micro_batch_size=2, lr_scheduler=LinearSchedule)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            **({"max_epochs": 2, "accelerator": "cpu", "logger": False, "callbacks": [saver]} | options),
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = ResumableLoader(ROWS, UniformOrder(len(ROWS), batch_size=3))
        trainer.fit(module, loader, ckpt_path=resume)
        states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        rates = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        return trainer.global_step, module.state_dict(), states, rates, float(module.window.num_tokens)

    whole = fit()
    assert whole[0] == 8
    paths = [tmp_path / f"step={step}.ckpt" for step in (1, 4, 6)]
    for path in paths:
        resumed = fit(path, callbacks=[], enable_checkpointing=False)
        assert resumed[0] == 8
        assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())
        for one, other in zip(whole[2], resumed[2], strict=True):
            assert all(torch.equal(one[row][key], other[row][key]) for row in one for key in one[row])
        assert whole[3:] == resumed[3:]


@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path):
    for devices in (1, 2):
        command = [sys.executable, str(SCRIPT), str(tmp_path), str(devices)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    one, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert all(float(value.abs().max()) > 1e-3 for value in one["change"].values())
    for rank in ranks:
        torch.testing.assert_close(rank["change"], one["change"], rtol=1e-5, atol=1e-6)
        assert rank["steps"] == one["steps"] == 2
        assert set(rank["seen"]) == set(one["seen"]) == {8.0}  # rows of the step, on both ranks
    for name in ("train/loss", "train/num_tokens", "train/critic/grad_norm", "train/grad_norm", "train/value_loss"):
        assert ranks[0]["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5)


def test_a_step_without_a_row_moves_neither(train):
    batches = [toy.rows([1, 2]), {key: value[:0] for key, value in toy.rows([1]).items()}, toy.rows([3])]
    states = []

    class Snapshots(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            states.append(copy.deepcopy(module.state_dict()))

    with pytest.warns(UserWarning, match="is skipped: not one target"):
        train(toy.make(torch.optim.AdamW), batches, callbacks=[Snapshots()])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(torch.equal(states[1][key], states[2][key]) for key in states[0])


def test_wrong_units_are_found(train):
    class Wrong(toy.WithCritic):
        def units(self, piece):
            return super().units(piece) | {"rows": torch.tensor(1)}

    module = Wrong(policy=toy.Policy())
    with pytest.raises(ValueError, match=r"units\(\) counted other weights.*rows: 1 and then 3"):
        train(module, [toy.rows([1, 2, 3])])


def test_several_terms_without_units_are_refused(train):
    class Uncounted(toy.WithCritic):
        def units(self, piece):
            return None

    with pytest.raises(ValueError, match=r"terms nll, rows, each with a unit of its own"):
        train(Uncounted(policy=toy.Policy()), [toy.rows([1, 2])])


class TwoTerms(SFTModule):
    def objective(self, batch):
        found = super().objective(batch)
        return Objective(found.terms | {"more": Term(found.total, found.weight)}, found.statistics)


class TwoEntries(SFTModule):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.critic = nn.Linear(2, 1)

    def trained(self):
        return {"policy": self.policy, "critic": self.critic}


def sft_batch():
    ids = torch.tensor([[1, 2, 3]])
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (TwoTerms, "terms loss, more, each with a unit.*UpdateModule that defines"),
        (
            TwoEntries,
            r"TwoEntries.trained\(\) gives policy, critic, an optimizer each.*derive the module from UpdateModule",
        ),
    ],
)
def test_automatic_optimization_has_one_term_and_one_optimizer(train, tiny_llama, module, message):
    with pytest.raises(ValueError, match=message):
        train(module(policy=tiny_llama), [sft_batch()])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (lambda m: {"critic": m}, "gives critic; it must have an entry 'policy'"),
        (lambda m: {"policy": m.policy}, "leaves out 'critic.weight' and 1 more trainable parameters"),
        (lambda m: {"policy": m, "critic": m.critic}, "'weight' of 'critic' belongs to 'policy' too"),
    ],
)
def test_entries_hold_every_trainable_parameter_once(train, monkeypatch, entries, message):
    monkeypatch.setattr(toy.WithCritic, "trained", entries)
    with pytest.raises(ValueError, match=message):
        train(toy.make(), [toy.rows([1])])


def test_an_optimizer_of_each_entrys_own(train):
    class Own(toy.WithCritic):
        def optimizer_for(self, name):
            return (
                (lambda groups: torch.optim.Adam(groups, lr=0.5)) if name == "critic" else super().optimizer_for(name)
            )

    trainer = train(Own(policy=toy.Policy()), [toy.rows([1])])
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["AdamW", "Adam"]


class Both(UpdateModule):
    """Takes its own steps only where it is told to."""

    paradigm = "both"
    batch_keys = ("input_ids",)

    def __init__(self, *, own, **keywords):
        super().__init__(**keywords)
        self.automatic_optimization = not own

    def segments(self, batch):
        return batch["input_ids"] + 1

    def objective(self, batch):
        assert "segments" not in batch or torch.equal(batch["segments"], batch["input_ids"] + 1)
        losses = -self(batch["input_ids"]).log_softmax(-1)[..., 3]
        weight = torch.tensor(losses.numel())
        more = {"with_segments": Statistic(torch.tensor(float("segments" in batch)))}
        return Objective.of(losses.sum(), weight, {"loss": Statistic(losses.sum(), weight), **more})


def test_a_class_can_be_both(train, assert_same):
    def make(own, **options):
        torch.manual_seed(0)
        return Both(own=own, policy=toy.Policy(), optimizer=lambda g: torch.optim.SGD(g, lr=1.0), **options)

    batch = {"input_ids": toy.rows(range(5))["input_ids"]}
    automatic, trainer = changes(make(False), train, [batch])
    assert trainer.callback_metrics["train/with_segments"] == 1
    for size in (None, 2, 9):  # each piece with segments of its own
        own, trainer = changes(make(True, micro_batch_size=size, max_grad_norm=None), train, [batch])
        assert_same(automatic, own)
        assert trainer.callback_metrics["train/with_segments"] == 1
    for option, named in (
        ({"micro_batch_size": 2}, "micro_batch_size=2"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5"),
    ):
        with pytest.raises(ValueError, match=f"{named} is not allowed with this Both, whose steps the Trainer takes"):
            train(make(False, **option), [batch])
    train(make(False), [batch] * 2, accumulate_grad_batches=2, gradient_clip_val=0.1)
    for option in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            train(make(True), [batch], **option)


def test_a_foreign_batch_gets_its_message_before_its_segments(train):
    module = Both(own=False, policy=toy.Policy())
    with pytest.raises(ValueError, match="a batch for Both must hold input_ids; this one lacks input_ids"):
        train(module, [{"labels": torch.zeros(1, 1)}])
    loader = DataLoader([{"labels": torch.zeros(1, 1)}], batch_size=None)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="a batch for Both must hold input_ids"):
        trainer.validate(module, loader, verbose=False)


class Edited(Both):
    """A user's module, which learns other tokens than the batch brings."""

    def objective(self, batch):
        return super().objective({**batch, "input_ids": batch["input_ids"] + 1})


class EditedOnTheDevice(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"input_ids": toy.rows(range(5))["input_ids"]}], batch_size=None)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "input_ids": (batch["input_ids"] + 1) % 11}


@pytest.mark.parametrize("size", [None, 2])
def test_segments_are_not_carried_past_who_may_change_the_batch(train, size):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, log_every_n_steps=1, **quiet)
    trainer.fit(Both(own=True, policy=toy.Policy(), micro_batch_size=size), EditedOnTheDevice())
    assert trainer.callback_metrics["train/with_segments"] == 0
    batch = {"input_ids": toy.rows(range(5))["input_ids"] % 10}
    trainer = train(Edited(own=True, policy=toy.Policy(), micro_batch_size=size), [batch])
    assert trainer.callback_metrics["train/with_segments"] == 0
