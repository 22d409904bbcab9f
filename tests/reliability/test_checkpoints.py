"""What a checkpoint holds, and which ones are refused, through the command line."""

import json
import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from tests.paradigms import ROWS

PARADIGMS = tuple(ROWS)


def fit(align, paradigm, *arguments):
    extra = ("--model.beta", "0.1") if paradigm in ("dpo", "grpo") else ()  # both hold a reference
    return align("fit", "-c", f"{paradigm}.yaml", "--trainer.max_steps", "2", *extra, *arguments)


@pytest.fixture(scope="module")
def written(align):
    """One checkpoint of every module, of two optimizer steps."""
    found = {}
    for paradigm in PARADIGMS:
        result = fit(align, paradigm)
        assert result.code == 0, result.text
        (found[paradigm],) = result.root.rglob("*.ckpt")
    return found


@pytest.fixture
def changed(written, tmp_path):
    """Writes the SFT checkpoint with a change; returns its path."""

    def write(change):
        checkpoint = torch.load(written["sft"], weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


@pytest.mark.parametrize("paradigm", PARADIGMS)
class TestWritten:
    def test_reads_without_running_code(self, written, paradigm):
        entry = torch.load(written[paradigm], weights_only=True)["alignment_module"]
        assert entry["paradigm"] == paradigm
        assert entry["num_tokens"] > 0

    def test_holds_the_policy_and_no_reference(self, written, paradigm):
        checkpoint = torch.load(written[paradigm], weights_only=True)
        trained = {"policy", "critic"} if paradigm == "ppo" else {"policy"}
        assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == trained
        companions = checkpoint["alignment_module"]["companions"]
        held = {name: {"reference"} for name in ("dpo", "kto", "online_dpo", "grpo", "ppo")} | {
            "distillation": {"teacher"}
        }
        assert set(companions) == held.get(paradigm, set())

    def test_resumes(self, align, written, paradigm):
        result = fit(align, paradigm, "--trainer.max_steps", "3", "--ckpt_path", written[paradigm])
        assert result.code == 0, result.text
        (resumed,) = result.root.rglob("*.ckpt")
        assert torch.load(resumed, weights_only=True)["global_step"] > 2


def test_last_is_the_newest_file_of_the_run_folder(align, written, tmp_path):
    root = tmp_path / "run"
    (root / "checkpoints").mkdir(parents=True)
    shutil.copy(written["sft"], root / "checkpoints")
    step = torch.load(written["sft"], weights_only=True)["global_step"]
    more = ("--trainer.max_steps", str(step + 1), "--trainer.default_root_dir", str(root))
    result = fit(align, "sft", "--ckpt_path", "last", *more)
    assert result.code == 0, result.text
    newest = max(root.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["global_step"] == step + 1


def test_last_without_a_checkpoint_is_refused(align):
    result = fit(align, "sft", "--ckpt_path", "last")
    assert result.code == 1
    assert "ckpt_path='last'" in result.text
    assert "holds no checkpoint" in result.text


@pytest.mark.parametrize(("paradigm", "other"), [("sft", "pretrain"), ("dpo", "sft"), ("grpo", "dpo"), ("sft", "grpo")])
def test_of_another_paradigm(align, written, paradigm, other):
    result = fit(align, paradigm, "--ckpt_path", written[other])
    assert result.code == 1
    for part in (str(written[other]), f"written by paradigm {other!r}", f"resumes only paradigm {paradigm!r}"):
        assert part in result.text
    assert "give the exported folder as `policy`" in result.text


def test_of_no_module_of_ours(align, changed):
    result = fit(align, "sft", "--ckpt_path", changed(lambda checkpoint: checkpoint.pop("alignment_module")))
    assert result.code == 1
    assert "was written by no module of this library" in result.text


def test_of_an_earlier_version(align, changed):
    path = changed(lambda checkpoint: checkpoint["alignment_module"].pop("companions"))
    result = fit(align, "sft", "--ckpt_path", path)
    assert result.code == 1
    assert "was written by paradigm 'sft', in an earlier version" in result.text


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated(align, written, tmp_path, share):
    path, content = tmp_path / "short.ckpt", written["sft"].read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    result = fit(align, "sft", "--ckpt_path", path)
    assert result.code == 1
    assert str(path) in result.text
    assert ("truncated at" if share else "is empty (0 bytes)") in result.text
    assert "use an earlier checkpoint" in result.text


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["hyper_parameters", "callbacks"])
def test_with_a_pickle_inside(align, changed, tmp_path, where):
    mark = tmp_path / "executed"
    path = changed(lambda checkpoint: checkpoint.setdefault(where, {}).update(extra=Intruder(mark)))
    result = fit(align, "sft", "--ckpt_path", path)
    assert result.code == 1
    assert str(path) in result.text
    assert "Python objects (posix.mkdir)" in result.text
    assert "can run code when read: refused" in result.text
    assert not mark.exists()


def rename(checkpoint):
    state = checkpoint["state_dict"]
    for key in [key for key in state if "layers.0" in key]:
        state[key.replace("layers.0", "layer.0")] = state.pop(key)


def test_with_renamed_policy_keys(align, changed):
    path = changed(rename)
    result = fit(align, "sft", "--ckpt_path", path)
    message = str(result.error or result.text)
    for part in (str(path), "Missing key(s)", "policy.model.layers.0.", "Unexpected key(s)", "policy.model.layer.0."):
        assert part in message


@pytest.mark.parametrize("key", ["policy.more", "reference.more", "other.weight"])
def test_with_an_unknown_key(align, changed, key):
    result = fit(
        align, "sft", "--ckpt_path", changed(lambda checkpoint: checkpoint["state_dict"].update({key: torch.ones(1)}))
    )
    assert f"Unexpected key(s) in state_dict: 1 ({key})" in str(result.error or result.text)


@pytest.mark.parametrize("paradigm", ["dpo", "grpo"])
def test_against_another_reference(align, written, paradigm):
    result = fit(align, paradigm, "--model.reference", "other", "--ckpt_path", written[paradigm])
    assert result.code == 1
    trained = torch.load(written[paradigm], weights_only=True)["alignment_module"]["companions"]["reference"]
    for part in (str(written[paradigm]), trained[:12], "pass the same `reference`"):
        assert part in result.text


def test_without_the_reference_it_was_trained_against(align, written):
    result = fit(align, "grpo", "--model.beta", "0", "--ckpt_path", written["grpo"])
    assert result.code == 1
    assert "this run has no reference" in result.text


def test_that_is_not_there(align, written):
    path = written["sft"].with_name("epoch=9.ckpt")
    result = fit(align, "sft", "--ckpt_path", path)
    assert result.code == 1
    assert f"ckpt_path={str(path)!r}: there is no such file" in result.text
    assert written["sft"].name in result.text  # what there is


def test_never_overrides_what_was_typed(align, written):
    typed = ("--model.beta", "0.9", "--model.optimizer.lr", "0.25", "--trainer.max_steps", "4")
    resumed = (*typed, "--model.override_lr", "true", "--ckpt_path", written["dpo"])
    result = fit(align, "dpo", *resumed)
    assert result.code == 0, result.text
    config = yaml.safe_load((result.root / "config.yaml").read_text())
    assert config["model"]["init_args"]["beta"] == 0.9
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.25
    (resumed,) = result.root.rglob("*.ckpt")
    assert torch.load(written["dpo"], weights_only=True)["hyper_parameters"]["beta"] == 0.1
    after = torch.load(resumed, weights_only=True)
    assert after["hyper_parameters"]["beta"] == 0.9
    assert [group["lr"] for group in after["optimizer_states"][0]["param_groups"]] == [0.25, 0.25]


SCHEDULES = ["alignment_modules.training.schedules.LinearSchedule", "torch.optim.lr_scheduler.LinearLR"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_typed_learning_rate_reaches_a_running_schedule(align, schedule):
    every = json.dumps([{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}])
    common = ("--model.lr_scheduler", schedule, "--trainer.max_steps", "8", "--trainer.callbacks", every)

    def groups(*arguments):
        result = fit(align, "sft", *common, *arguments)
        assert result.code == 0, result.text
        path = next(result.root.rglob("*step=4.ckpt"))
        return path, torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]

    path, first = groups("--model.optimizer.weight_decay", "0.5")
    assert 0 < first[0]["lr"] < 0.01
    start = path.with_name(path.name.replace("step=4", "step=2"))
    for rate in (0.01, 0.02):
        typed = ("--model.optimizer.lr", rate, "--model.override_lr", "true", "--model.optimizer.weight_decay", "0.5")
        _, resumed = groups(*typed, "--ckpt_path", start)
        assert [group["lr"] for group in resumed] == pytest.approx([first[0]["lr"] * rate / 0.01] * 2)
        assert [group["weight_decay"] for group in resumed] == [0.5, 0.0]


@pytest.mark.parametrize(("option", "value", "then"), [("lr", "0.25", "0.01"), ("weight_decay", "0.3", "0.01")])
def test_an_option_that_the_saved_optimizer_would_not_take(align, written, option, value, then):
    result = fit(align, "sft", f"--model.optimizer.{option}", value, "--ckpt_path", written["sft"])
    assert result.code == 1
    for part in (f"optimizer.{option}={value}", str(written["sft"]), f"with {then}", "start a new run"):
        assert part in result.text
    assert ("set override_lr=true" in result.text) == (option == "lr")


def test_the_critics_optimizer_is_one_of_its_own(align):
    """Its options are compared with its own, and a new rate of the policy's leaves it alone."""
    own = ("--model.critic_optimizer", "torch.optim.AdamW", "--model.lr_scheduler", SCHEDULES[1])
    result = fit(align, "ppo", *own, "--model.critic_optimizer.lr", "0.05", "--trainer.max_steps", "2")
    assert result.code == 0, result.text
    path = next(result.root.rglob("*.ckpt"))
    resumed = (*own, "--trainer.max_steps", "3", "--ckpt_path", path, "--model.critic_optimizer.lr")
    refused = fit(align, "ppo", *resumed, "0.5")
    assert refused.code == 1
    assert "critic_optimizer.lr=0.5" in refused.text
    assert "with 0.05" in refused.text
    without = fit(align, "ppo", "--trainer.max_steps", "3", "--ckpt_path", path)
    assert without.code == 1
    assert "was written with critic_optimizer" in without.text

    def rates(*more):
        done = fit(align, "ppo", *resumed, "0.05", *more)
        assert done.code == 0, done.text
        states = torch.load(next(done.root.rglob("*.ckpt")), weights_only=True)["optimizer_states"]
        return [state["param_groups"][0]["lr"] for state in states]

    policy, critic = rates()
    assert rates("--model.optimizer.lr", "0.02", "--model.override_lr", "true") == pytest.approx([2 * policy, critic])


def test_another_optimizer(align, written):
    result = fit(align, "sft", "--model.optimizer", "torch.optim.SGD", "--ckpt_path", written["sft"])
    assert result.code == 1
    for part in (str(written["sft"]), "torch.optim.AdamW", "optimizer=torch.optim.SGD"):
        assert part in result.text


def test_loads_in_python_without_the_command_line(written, workplace, monkeypatch):
    from alignment_modules import SFTModule

    monkeypatch.chdir(workplace)
    module = SFTModule.load_from_checkpoint(written["sft"], map_location="cpu", weights_only=True)
    held = torch.load(written["sft"], weights_only=True)["state_dict"]
    assert isinstance(module, L.LightningModule)
    assert all(torch.equal(value, held[key]) for key, value in module.state_dict().items())
    assert Path(written["sft"]).exists()
