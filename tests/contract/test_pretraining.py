"""A critic's pretraining that was broken off goes on from its own checkpoint as if it had never been."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file


class Stops(Callback):
    """Sends a signal while the second rollout is learnt from."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.pretrained == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Breaks(Callback):
    """Fails before the third rollout."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.pretraining_rollouts == 2:
            raise RuntimeError("broken off")


@pytest.fixture
def fit(align, workplace, tmp_path):
    def run(name, *more):
        pretraining = ["--model.critic_pretrain_steps=6", "--model.critic_pretrain_save_every=2"]
        options = ["--model.num_iterations=2", "--model.normalize_rewards=true", "--model.kl_target=0.1", *pretraining]
        given = ["--config=ppo.yaml", "--trainer.max_epochs=3", "--data.batch_size=3", *options]
        return align("fit", *given, "--trainer.default_root_dir", tmp_path / name, *more), tmp_path / name

    return run


def weights(root):
    parts = (root / "export", root / "export" / "critic")
    return [load_file(part / "model.safetensors") for part in parts]


def test_goes_on_from_its_checkpoint(fit):
    done, whole = fit("whole")
    assert done.code == 0, done.text
    callbacks = json.dumps([{"class_path": "tests.contract.test_pretraining.Breaks"}])
    failed, broken = fit("broken", f"--trainer.callbacks={callbacks}")
    assert "broken off" in str(failed.error) + failed.text
    [kept] = (broken / "checkpoints").iterdir()
    assert kept.name == "critic-pretrain.ckpt"
    state = torch.load(kept, weights_only=True)
    assert state["global_step"] == 0
    assert state["alignment_module"]["extra"]["pretrained"] == [4, 2]
    done, resumed = fit("resumed", f"--ckpt_path={kept}")
    assert done.code == 0, done.text
    for first, second in zip(weights(whole), weights(resumed), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_goes_on_from_where_a_signal_stopped_it(fit):
    done, whole = fit("whole")
    assert done.code == 0, done.text
    callbacks = json.dumps([{"class_path": "tests.contract.test_pretraining.Stops"}, {"class_path": "Checkpoints"}])
    stopped, root = fit("stopped", f"--trainer.callbacks={callbacks}")
    assert stopped.code == 128 + signal.SIGTERM, stopped.text
    [kept] = (path for path in (root / "checkpoints").iterdir() if path.name != "critic-pretrain.ckpt")
    assert torch.load(kept, weights_only=True)["alignment_module"]["extra"]["pretrained"] == [4, 2]
    done, resumed = fit("resumed", f"--ckpt_path={kept}")
    assert done.code == 0, done.text
    for first, second in zip(weights(whole), weights(resumed), strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items())
