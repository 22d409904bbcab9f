"""What a run does not train stays out of its checkpoints, and another base is refused."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from alignment_modules import SFTModule
from alignment_modules.policies import LoraConfig
from alignment_modules.policies.lora import add_lora

IDS = torch.tensor([[1, 2, 3, 4]])
BATCHES = [{"input_ids": IDS, "labels": IDS}] * 4


def adapted(model):
    torch.manual_seed(1)
    return add_lora(model, LoraConfig(r=2, alpha=4, modules_to_save=["norm"]))


def partly_frozen(model):
    model.model.embed_tokens.requires_grad_(False)  # the head is tied to it
    return model


def module_of(policy, rate=0.05):
    return SFTModule(policy=policy, optimizer=lambda p: torch.optim.AdamW(p, lr=rate))


def fit(policy, *callbacks, steps=4, resume=None, path=None, rate=0.05):
    module = module_of(policy, rate)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return module


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.mark.parametrize("build", [adapted, partly_frozen])
def test_only_what_trains_is_saved_and_the_rest_is_put_back(tiny_llama, tmp_path, build):
    base, path = copy.deepcopy(tiny_llama), tmp_path / "two.ckpt"
    whole = fit(build(copy.deepcopy(base)))
    half = fit(build(copy.deepcopy(base)), steps=2, path=path)
    held = torch.load(path, weights_only=True)["state_dict"]
    trained = {f"policy.{name}" for name, p in half.policy.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert trained <= held.keys()
    assert not any("embed_tokens" in key or "base_layer.weight" in key for key in held)
    assert equal(fit(build(copy.deepcopy(base)), resume=path), whole)
    loaded = SFTModule.load_from_checkpoint(path, policy=build(copy.deepcopy(base)), weights_only=True)
    assert equal(loaded, half)
    tester = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    fresh = module_of(build(copy.deepcopy(base)))
    tester.validate(fresh, DataLoader(BATCHES, batch_size=None), ckpt_path=path, verbose=False)
    assert equal(fresh, half)


def test_everything_is_saved_where_everything_trains(tiny_llama, tmp_path):
    module = fit(tiny_llama, steps=1, path=tmp_path / "one.ckpt")
    held = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert held["state_dict"].keys() == module.state_dict().keys()
    assert held["alignment_module"]["left_out"] == {}


@pytest.mark.parametrize("change", ["values", "dtype", "names"])
def test_another_base_is_refused_by_name(tiny_llama, tmp_path, change):
    path, other = tmp_path / "two.ckpt", copy.deepcopy(tiny_llama)
    fit(adapted(tiny_llama), steps=2, path=path)
    if change == "values":
        other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-6
    elif change == "dtype":
        other.model.layers[1].mlp.down_proj.to(torch.bfloat16)
    else:
        other.model.layers[1].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"two.ckpt.* frozen tensors; this model has others in the place of 1 .*layers.1"
    ):
        fit(adapted(other), resume=path)


class Thaw(Callback):
    """Trains the embedding for one step, and freezes it again."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        weight = module.policy.model.embed_tokens.weight
        if trainer.global_step == 1:
            trainer.optimizers[0].add_param_group({"params": [weight], "name": "late"})
        weight.requires_grad_(trainer.global_step == 1)
        weight.grad = None


def test_what_was_trained_for_a_while_is_saved(tiny_llama, tmp_path):
    start = tiny_llama.model.embed_tokens.weight.clone()
    module = fit(partly_frozen(tiny_llama), Thaw(), steps=3, path=tmp_path / "three.ckpt")
    held = torch.load(tmp_path / "three.ckpt", weights_only=True)["state_dict"]
    weight = module.policy.model.embed_tokens.weight
    assert not weight.requires_grad
    assert not torch.equal(weight, start)
    assert torch.equal(held["policy.model.embed_tokens.weight"], weight)
