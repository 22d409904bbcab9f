"""Runs of every kind of adapter resume bit for bit: weights, the optimizer's state and what is logged."""

import copy

import pytest
import torch
from lightning import Callback

from alignment_modules import LoraConfig
from alignment_modules.callbacks import ExactResume
from alignment_modules.policies.adapters import START
from alignment_modules.policies.lora import add_lora
from tests.paradigms import ROWS, build

KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter_16": {"init": "pissa_niter_16"},
    "olora": {"init": "olora"},
}


FAST = (("sft", "dora"), ("dpo", "pissa_niter_16"))


class Logged(Callback):
    """Notes what is logged of each step, but for times."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        now = trainer.callback_metrics.items()
        self.rows.append({name: float(value) for name, value in now if "time/" not in name})


@pytest.fixture
def fit(built_llama, train):
    """`fit(name, options, epochs, seed, ckpt)`: a run of two batches an epoch; the module, its Trainer and the log."""

    def run(name, options, epochs, seed, ckpt=None):
        torch.manual_seed(seed)
        dropout = 0.0 if options.get("init") else 0.1
        policy = add_lora(copy.deepcopy(built_llama[0]), LoraConfig(r=2, alpha=4, dropout=dropout, **options))
        held = {"reference": None} if name == "dpo" else {}
        module = build(name, policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01), **held)
        logged, batches = Logged(), [ROWS[name].batch(rows) for rows in ([0, 1, 2], [3, 4, 5, 6])]
        return module, train(module, batches, ckpt, max_epochs=epochs, callbacks=[logged, ExactResume()]), logged.rows

    return run


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
        for name in ("sft", "dpo")
        for kind in KINDS
    ],
)
def test_two_steps_and_two_more_are_four(fit, tmp_path, name, kind):
    """The policy that goes on has drawn other adapters, which those of the checkpoint replace."""
    whole, trainer, logged = fit(name, KINDS[kind], 2, seed=1)
    half, halfway, before = fit(name, KINDS[kind], 1, seed=1)
    halfway.save_checkpoint(tmp_path / "half.ckpt")
    again, resumed, after = fit(name, KINDS[kind], 2, seed=2, ckpt=tmp_path / "half.ckpt")
    assert resumed.global_step == len(logged) == 4
    assert [*before, *after] == logged
    assert len({row["train/loss"] for row in logged}) > 1
    expected, moved = dict(whole.named_parameters()), dict(half.named_parameters())
    assert [key for key, value in again.named_parameters() if not torch.equal(value, expected[key])] == []
    assert any(not torch.equal(value, moved[key]) for key, value in expected.items())
    states = [made.optimizers[0].state_dict()["state"] for made in (trainer, resumed)]
    assert len(states[0]) == sum(p.requires_grad for p in whole.parameters())
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())


def test_the_start_is_in_the_checkpoint(fit, tmp_path):
    """It was drawn, and another seed would draw another."""
    _, trainer, _ = fit("sft", KINDS["pissa_niter_16"], 1, seed=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert any(f".{START}." in key for key in saved)
    assert not any("base_layer" in key for key in saved)
