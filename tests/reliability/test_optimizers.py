"""Optimizers, averages and trained parts as the command line gives them: they run, resume, and are refused by name."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

MUON = ("--model.optimizer", "MuonWithAdamW", "--model.optimizer.lr", "0.01")
EIGHT = ("--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "0.01")
PART = ("--model.policy.path", "policy", "--model.policy.trainable+=model.layers.1.*")
SHARDED = ("--trainer.strategy", "fsdp2", "--trainer.devices", "1")


@pytest.fixture(autouse=True)
def no_processes():
    """A strategy of several processes begins a group, of which a later run must not take itself for a part."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def fit(align):
    def run(*arguments, paradigm="sft", steps=2):
        result = align("fit", "-c", f"{paradigm}.yaml", "--trainer.max_steps", steps, *arguments)
        found = sorted(result.root.rglob("*.ckpt"))
        return result, torch.load(found[-1], weights_only=True) if found else {}, found[-1] if found else None

    return run


def rates(checkpoint):
    return {group["name"]: group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]}


def test_muon_resumes_and_takes_another_rate(fit):
    result, first, path = fit(*MUON, "--model.optimizer.adamw_lr_ratio", "0.5")
    assert result.code == 0, result.text
    assert rates(first) == {"muon": 0.01, "decay": 0.005, "no_decay": 0.005}
    again = (*MUON[:-1], "0.02", "--model.optimizer.adamw_lr_ratio", "0.5", "--ckpt_path", path)
    refused, *_ = fit(*again, steps=4)
    assert refused.code == 1
    assert "optimizer.lr=0.02" in refused.text
    result, second, _ = fit(*again, "--model.override_lr", "true", steps=4)
    assert result.code == 0, result.text
    assert rates(second) == pytest.approx({"muon": 0.02, "decay": 0.01, "no_decay": 0.01})


def test_torchs_own_muon_is_answered_with_ours(fit):
    result, *_ = fit("--model.optimizer", "torch.optim.Muon")
    assert result.code == 1
    assert "optimizer=torch.optim.Muon takes matrices alone; use MuonWithAdamW" in result.text


def test_eight_bits_resume(fit):
    result, first, path = fit(*EIGHT)
    assert result.code == 0, result.text
    result, second, _ = fit(*EIGHT, "--ckpt_path", path, steps=4)
    assert result.code == 0, result.text
    assert [group["lr"] for part in (first, second) for group in part["optimizer_states"][0]["param_groups"]] == [
        0.01
    ] * 4


def test_without_bitsandbytes_it_is_said_how_to_get_it(fit, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(), *sys.meta_path])
    result, *_ = fit(*EIGHT)
    assert result.code == 2
    assert (
        "optimizer=bitsandbytes.optim.AdamW8bit: No module named 'bitsandbytes'; pip install bitsandbytes"
        in result.text
    )


class _Absent:
    """A finder that knows that a package is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_average_and_both_exports(fit, align, tmp_path):
    average = ("--trainer.callbacks+=PolicyAverage", "--trainer.callbacks.decay", "0.5")
    result, held, path = fit(*average, "--export.unaveraged", "true")
    assert result.code == 0, result.text
    own, last = (load_file(result.root / "export" / part / "model.safetensors") for part in ("", "unaveraged"))
    assert all(torch.equal(value, held["state_dict"][f"policy.{name}"]) for name, value in own.items())
    assert all(torch.equal(value, held["weight_average"]["training"][f"policy.{name}"]) for name, value in last.items())
    assert align("export", result.root, tmp_path / "again").code in (0, None)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in own.items())
    refused, *_ = fit("--ckpt_path", path, steps=4)
    assert refused.code == 1
    assert "holds averaged weights" in refused.text
    assert "unaveraged=True has no effect" in fit("--export.unaveraged", "true")[0].text


def test_a_part_is_trained_and_resumed(fit, workplace):
    result, held, path = fit(*PART)
    assert result.code == 0, result.text
    assert all(name.startswith("policy.model.layers.1.") for name in held["state_dict"])
    start, own = (
        load_file(workplace / "policy" / "model.safetensors"),
        load_file(result.root / "export/model.safetensors"),
    )
    moved = {name for name, value in own.items() if not torch.equal(value, start[name])}
    assert own.keys() == start.keys()
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
    assert fit(*PART, "--ckpt_path", path, steps=4)[0].code == 0
    other = ("--model.policy.path", "policy", "--model.policy.frozen", json.dumps(["model.layers.0.*"]))
    refused, *_ = fit(*other, "--ckpt_path", path, steps=4)
    assert refused.code == 1
    assert "policy.trainable=None, but" in refused.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (MUON, "MuonWithAdamW is not allowed with sharded weights"),
        (EIGHT, "AdamW8bit of bitsandbytes is not allowed with sharded weights"),
        (("--trainer.callbacks+=PolicyAverage",), "PolicyAverage is not allowed with strategy FSDP2Strategy"),
    ],
    ids=["muon", "eight", "average"],
)
def test_what_sharding_refuses(fit, arguments, says):
    result, *_ = fit(*SHARDED, *arguments)
    assert result.code == 1
    assert says in result.text
