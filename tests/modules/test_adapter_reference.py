"""A reference that is another adapter on the policy's base: the run is the one with a model of its own."""

import copy

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from alignment_modules import LoraConfig, PolicyConfig
from alignment_modules.paradigms import get_module_class
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import build_policy
from tests.models import other_than
from tests.paradigms import ROWS

NAMES = pytest.mark.parametrize("name", ["dpo", "grpo"])


@pytest.fixture
def folders(tiny_llama, tmp_path):
    """The tiny Llama, and two trained adapters on it."""
    tiny_llama.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        policy = build_policy(PolicyConfig(path=str(tmp_path / "base"), lora=LoraConfig(r=2)))
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        export_policy(policy, tmp_path / name, lora="adapter")
    return tmp_path


def module_of(name, folders, reference, policy=None, **options):
    torch.manual_seed(5)
    policy = policy or PolicyConfig(path=str(folders / "base"), lora=LoraConfig(r=3))
    given = ROWS[name].options(torch.nn.Linear(1, 1)) | {"reference": reference} | options
    return get_module_class(name)(
        policy=policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3), **given
    )


def beside(folders, name="first"):
    return PolicyConfig(path=str(folders / name), merge_adapter=False)


def fit(module, name, steps=4, ckpt_path=None):
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    batches = [ROWS[name].batch(range(8))] * 4
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@NAMES
def test_the_run_is_that_with_a_model_of_its_own(folders, name):
    shared, apart = module_of(name, folders, beside(folders)), module_of(name, folders, str(folders / "first"))
    logged = [fit(module, name).callback_metrics for module in (shared, apart)]
    for metric in (metric for metric in logged[0] if "/time/" not in metric):
        assert float(logged[0][metric]) == pytest.approx(float(logged[1][metric]), abs=2e-5, rel=1e-4), metric
    first, second = trained(shared), trained(apart)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-4, rtol=0)
    other = module_of(name, folders, None)
    fit(other, name)
    assert any(float((first[key] - value).abs().max()) > 1e-3 for key, value in trained(other).items())
    held = {id(p) for p in apart.reference.parameters()}
    assert len(held) == len(list(other.policy.get_base_model().parameters())) - len(first)
    assert not list(shared.reference.parameters())
    assert shared.describe()["reference"].startswith("another adapter on the policy's base")


@NAMES
def test_it_is_frozen_in_no_checkpoint_and_resumed_bit_for_bit(folders, name, tmp_path):
    whole = module_of(name, folders, beside(folders))
    start = {key: p.clone() for key, p in whole.named_parameters() if not p.requires_grad}
    fit(whole, name)
    now = dict(whole.named_parameters())
    assert any(".reference." in key for key in start)
    assert all(torch.equal(value, now[key]) for key, value in start.items())
    half = module_of(name, folders, beside(folders))
    fit(half, name, steps=2).save_checkpoint(tmp_path / "half.ckpt")
    held = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert held["state_dict"].keys() == trained(half).keys()
    again = module_of(name, folders, beside(folders))
    fit(again, name, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(value, trained(again)[key]) for key, value in trained(whole).items())
    with pytest.raises(ValueError, match="was trained against a reference with fingerprint"):
        fit(module_of(name, folders, beside(folders, "second")), name, ckpt_path=tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="was trained against a reference with fingerprint"):
        fit(module_of(name, folders, None), name, ckpt_path=tmp_path / "half.ckpt")


@NAMES
def test_the_exports_are_of_the_policy(folders, name, tmp_path):
    module = module_of(name, folders, beside(folders))
    fit(module, name)
    module.export(tmp_path / "adapter", lora="adapter")
    module.export(tmp_path / "whole")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert len(keys) == len(trained(module))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = module.policy.eval()(ids).logits
        for folder in ("adapter", "whole"):
            found = build_policy(str(tmp_path / folder)).eval()(ids).logits
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@NAMES
def test_training_goes_on_from_an_adapter_held_to_it(folders, name):
    """An adapter is trained further, against the adapter that it was: as with two models."""
    own = beside(folders)
    shared = module_of(name, folders, beside(folders), policy=own)
    apart = module_of(name, folders, str(folders / "first"), policy=own)
    metrics = fit(shared, name, steps=1).callback_metrics
    fit(apart, name, steps=1)
    if name == "dpo":
        assert float(metrics["train/rewards/margins"]) == 0.0
        assert float(metrics["train/loss"]) == pytest.approx(0.693147, abs=1e-6)
    for key, value in trained(shared).items():
        torch.testing.assert_close(value, trained(apart)[key], atol=1e-4, rtol=0)


def test_a_base_that_starts_to_train_later_is_no_reference(folders):
    for reference in (None, beside(folders)):
        module = module_of("dpo", folders, reference)
        module.policy.base_model.model.model.norm.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"reference is .*norm.weight' of the policy's base is trained"):
            fit(module, "dpo")


@pytest.mark.parametrize("kind", [{"modules_to_save": ["norm"]}, {"init": "pissa"}, {"use_dora": True}])
def test_what_trains_beside_is_switched_off_with_the_adapters(folders, kind):
    module = module_of("dpo", folders, None, PolicyConfig(path=str(folders / "base"), lora=LoraConfig(r=2, **kind)))
    assert module.reference.module is None
    ids = torch.arange(8)[None]
    with module.reference.reading() as model:
        before = model(ids).logits
    assert torch.equal(before, build_policy(str(folders / "base")).eval()(ids).logits)
    fit(module, "dpo")
    with module.reference.reading() as model:
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(module.policy.eval()(ids).logits, before)


def test_a_base_that_trains_makes_the_reference_a_copy_that_says_so(tiny_llama, folders):
    policy = build_policy(PolicyConfig(path=str(folders / "base"), lora=LoraConfig(r=2)))
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    module = module_of("dpo", folders, None, policy)
    assert module.reference.module is not None
    assert (
        "a copy since 'base_model.model.model.norm.weight' of its base is trained, too"
        in (module.describe()["reference"])
    )


def test_a_reference_that_moves_is_a_model_of_its_own(folders):
    with pytest.raises(ValueError, match=r"reference.merge_adapter=False shares the policy's base"):
        module_of("dpo", folders, beside(folders), sync_reference={"every_n_steps": 1})


@pytest.mark.parametrize("name", ["kto", "online_dpo", "ppo", "distillation"])
def test_every_companion_may_be_one(folders, tiny_llama, name):
    key = "teacher" if name == "distillation" else "reference"
    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(path=str(folders / "base"), lora=LoraConfig(r=2)))
    given = ROWS[name].options(other_than(copy.deepcopy(tiny_llama))) | {key: beside(folders)}
    module = get_module_class(name)(policy=policy, **given)
    fit(module, name, steps=1)
    assert getattr(module, key).adapter == key
