"""`align fit` more than once into one folder, and after runs that ended early."""

import shlex

import pytest
import torch
import yaml
from safetensors.torch import load_file

TENSORBOARD = ["--trainer.logger", "true"]


@pytest.fixture
def fit(align, tmp_path):
    def run(paradigm, *arguments, folder=tmp_path / "run"):
        result = align("fit", "-c", f"{paradigm}.yaml", *arguments, "--trainer.default_root_dir", str(folder))
        result.root = folder
        return result

    return run


def steps(folder):
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in folder.rglob("*.ckpt"))


def rate(folder):
    return yaml.safe_load((folder / "hparams.yaml").read_text())["optimizer"]["init_args"]["lr"]


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


def test_a_second_run_moves_the_first_aside_and_a_resumed_one_does_not(fit, tmp_path, caplog):
    first = fit("sft", *TENSORBOARD, "--trainer.max_steps", "2")
    assert first.code == 0, first.text
    second = fit("sft", *TENSORBOARD, "--trainer.max_steps", "3", "--model.optimizer.lr", "0.02")
    assert second.code == 0, second.text
    assert f"{tmp_path / 'run'} held an earlier run: moved to {tmp_path / 'run.1'}" in caplog.text
    assert "--ckpt_path last" in caplog.text
    caplog.clear()
    for folder, step, lr in ((tmp_path / "run.1", 2, 0.01), (tmp_path / "run", 3, 0.02)):
        assert steps(folder) == [step]
        assert rate(folder) == lr
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == step
        assert len(list(folder.glob("events.*"))) == 1
        assert (folder / "export" / "model.safetensors").exists()

    faster = ("--model.optimizer.lr", "0.03", "--model.override_lr", "true")
    third = fit("sft", *TENSORBOARD, "--trainer.max_steps", "4", *faster, "--ckpt_path", "last")
    assert third.code == 0, third.text
    assert "moved" not in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]
    assert max(steps(tmp_path / "run")) == 4
    assert rate(tmp_path / "run") == 0.03
    assert len(list((tmp_path / "run").glob("events.*"))) == 2

    elsewhere = next((tmp_path / "run.1").rglob("*.ckpt"))  # another run goes on in this folder
    fourth = fit("sft", "--trainer.max_steps", "3", "--ckpt_path", elsewhere)
    assert fourth.code == 0, fourth.text
    assert steps(tmp_path / "run") == [3]
    assert max(steps(tmp_path / "run.2")) == 4


def test_a_resume_with_nothing_left_to_train_keeps_the_metrics_of_the_export(fit, tmp_path):
    card = tmp_path / "run" / "export" / "README.md"
    assert fit("sft", "--trainer.max_steps", "2").code == 0
    before = card.read_text()
    assert "| `train/loss` |" in before
    again = fit("sft", "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert again.code == 0, again.text
    assert card.read_text() == before


def test_evaluations_stay_in_the_folder(fit, align, tmp_path):
    assert fit("sft", "--trainer.max_steps", "1").code == 0
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]
    few = ["--model.evaluation.num_samples", "1", "--model.evaluation.max_completion_length", "2"]
    assert align("predict", "-c", "sft.yaml", "--data.predict", "prompts.jsonl", *few, *root).code == 0
    assert align("validate", "-c", "sft.yaml", "--data.validation", "sft.jsonl", *root).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert fit("sft", "--trainer.max_steps", "1").code == 0
    assert (tmp_path / "run" / "predictions.jsonl").exists()  # no fit wrote it


def test_a_run_that_is_refused_leaves_an_earlier_one_as_it_was(fit, tmp_path):
    assert fit("sft", "--trainer.max_steps", "1").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert fit("sft", "--data.train", "nowhere.jsonl").code == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_fails_in_its_first_batch_leaves_an_earlier_one_where_it_was(fit, tmp_path):
    assert fit("sft", "--trainer.max_steps", "1").code == 0
    before = weights(tmp_path / "run")
    assert fit("grpo", "--model.rewards", "my_rewards.wants_a_column").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("name", ["the user's", "the default"])
def test_the_last_checkpoint_in_a_folder_of_its_own(fit, tmp_path, name):
    path = [
        "--trainer.callbacks",
        f'[{{"class_path": "ModelCheckpoint", "init_args": {{"dirpath": "{tmp_path}/own"}}}}]',
    ]
    path = path if name == "own" else ["--checkpoints.dirpath", str(tmp_path / "own")]
    assert fit("sft", *path, "--trainer.max_steps", "2").code == 0
    result = fit("sft", *path, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert result.code == 0, result.text
    assert 3 in steps(tmp_path / "own")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run.1").exists()


def test_a_damaged_checkpoint_is_passed_over_by_name(fit, tmp_path, caplog):
    assert fit("sft", "--trainer.max_steps", "2").code == 0
    damaged = tmp_path / "run" / "checkpoints" / "later.ckpt"
    damaged.write_bytes(next((tmp_path / "run").rglob("*.ckpt")).read_bytes()[:-200])
    result = fit("sft", "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert result.code == 0, result.text
    assert f"checkpoint '{damaged}' is truncated" in caplog.text


SLOWLY = ["--data.shuffle", "false", "--trainer.max_epochs", "1"]


def test_a_reward_that_raises_leaves_all_work_done(fit, tmp_path):
    """And the command that the message gives ends where the uninterrupted run ends."""
    failed = fit("grpo", *SLOWLY, "--model.rewards", "my_rewards.FailsLater")
    assert failed.code == 1
    assert "ZeroDivisionError: no reward for 2+3" in failed.text
    assert steps(tmp_path / "run") == [2]
    [line] = [line for line in failed.text.splitlines() if "--ckpt_path last" in line]
    assert "after optimizer step 2; checkpoint" in failed.text
    command = shlex.split(line.partition("with: ")[2])
    assert command[:4] == ["align", "fit", "-c", "grpo.yaml"]
    resumed = fit("grpo", *SLOWLY, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.text
    assert steps(tmp_path / "run")[-1] == 3


def test_values_that_are_not_finite(fit, tmp_path, monkeypatch):
    """The weights saved are those before the step; the same command then goes on to the end."""
    whole = fit("sft", "--trainer.max_epochs", "1", folder=tmp_path / "whole")
    assert whole.code == 0, whole.text
    from alignment_modules import Objective, SFTModule

    objective = SFTModule.objective

    def poisoned(module, batch):
        found = objective(module, batch)
        if module.trainer.global_step == 3:
            return Objective.of(found.total * float("nan"), found.weight, found.statistics)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "objective", poisoned)
        result = fit("sft", "--trainer.max_epochs", "1")
    assert result.code == 1
    assert "optimizer step 4 is not finite" in result.text
    assert "ended by FloatingPointError after optimizer step 3; checkpoint" in result.text
    assert steps(tmp_path / "run") == [3]
    resumed = fit("sft", "--trainer.max_epochs", "1", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.text
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_no_checkpoints_where_they_are_switched_off(fit, tmp_path):
    result = fit("grpo", *SLOWLY, "--model.rewards", "my_rewards.FailsLater", "--trainer.enable_checkpointing", "false")
    assert result.code == 1
    assert "checkpoint" not in result.text.replace("enable_checkpointing", "")
    assert steps(tmp_path / "run") == []
