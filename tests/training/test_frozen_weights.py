"""What a run does not train stays out of its checkpoints, and another base is refused."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from alignment_modules import SFTModule
from alignment_modules.policies import LoraConfig, PolicyConfig, frozen_companion
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


class WithHelpers(SFTModule):
    """A user's module: two children that are not trained, under names of the user's own."""

    def __init__(self, seed=0, **options):
        super().__init__(**options)
        torch.manual_seed(seed)
        self.helper = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).requires_grad_(False)
        self.teacher = frozen_companion(None, self.policy, name="teacher")
        self.modes = []

    def objective(self, batch):
        self.modes.append([child.training for child in (self.policy, *self.helper, *self.teacher.modules())])
        self.helper(torch.ones(3, 2))
        return super().objective(batch)


@pytest.mark.parametrize("fresh", [False, True])
def test_frozen_children_are_in_eval_mode_and_in_no_checkpoint(tiny_llama, tiny_llama_config, tmp_path, fresh):
    policy = PolicyConfig(config=tiny_llama_config) if fresh else tiny_llama
    module = WithHelpers(policy=policy)
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    loader = DataLoader(BATCHES, batch_size=None)
    trainer.fit(module, loader, loader)
    assert module.modes[-1] == [True] + [False] * (len(module.modes[-1]) - 1)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    held = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert all(key.startswith("policy.") for key in held["state_dict"])
    assert set(held["alignment_module"]["companions"]) == {"teacher"}
    other = WithHelpers.load_from_checkpoint(tmp_path / "two.ckpt", policy=copy.deepcopy(module.policy))
    assert equal(other, module)
    with pytest.raises(ValueError, match=r"this model has others in the place of . of them \(helper"):
        WithHelpers.load_from_checkpoint(tmp_path / "two.ckpt", policy=copy.deepcopy(module.policy), seed=1)
    again = WithHelpers(policy=tiny_llama)
    again.teacher.module.lm_head.weight.data += 1.0
    with pytest.raises(ValueError, match=r"trained against a teacher with fingerprint .* pass the same `teacher`"):
        trainer.fit(again, loader, ckpt_path=tmp_path / "two.ckpt")


class Averages(SFTModule):
    """Keeps an average of the policy, as TR-DPO does with its reference."""

    def __init__(self, **options):
        super().__init__(**options)
        self.average = frozen_companion(None, self.policy, saved=True)

    def on_train_batch_end(self, *_):
        self.average.refresh(0.5)


def test_a_companion_that_moves_is_saved_and_goes_on(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SFTModule", Averages)
    whole = fit(copy.deepcopy(tiny_llama))
    half = fit(copy.deepcopy(tiny_llama), steps=2, path=tmp_path / "two.ckpt")
    resumed = fit(copy.deepcopy(tiny_llama), resume=tmp_path / "two.ckpt")
    assert equal(resumed, whole)
    assert not equal(half.average.module, half.policy)
    assert {key.split(".")[0] for key in whole.state_dict()} == {"policy", "average"}


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
