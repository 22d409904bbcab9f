"""The adapters' learning rate: a ratio to that of the optimizer, and a warning where it is one for all weights."""

import copy
import warnings

import pytest
import torch
import yaml

from alignment_modules import LoraConfig, SFTModule
from alignment_modules.policies.lora import add_lora
from alignment_modules.training.adapter_rates import full_rate
from alignment_modules.training.schedules import LinearSchedule
from tests.models import adapted
from tests.paradigms import ROWS, build, headed
from tests.workplace import RECIPES

IDS = torch.tensor([[1, 2, 3, 4]])
BATCHES = [{"input_ids": IDS, "labels": IDS}] * 2


def module_of(model, rate=1e-3, maker=torch.optim.AdamW, ratio=1.0, schedule=None, **lora):
    policy = add_lora(copy.deepcopy(model), LoraConfig(r=2, lr_ratio=ratio, **lora))
    return SFTModule(policy=policy, optimizer=lambda groups: maker(groups, lr=rate), lr_scheduler=schedule)


def rates(module):
    """The learning rate of each trained parameter."""
    optimizer = module.configure_optimizers()
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def said(caught):
    return [str(w.message) for w in caught if "learning rate of the adapters" in str(w.message)]


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["norm", "k_proj"]}])
def test_the_adapters_rate_is_the_ratio_to_the_optimizers(tiny_llama, lora):
    if "modules_to_save" in lora:
        lora = {**lora, "target_modules": ["q_proj"]}
    found, plain = (rates(module_of(tiny_llama, ratio=ratio, **lora)) for ratio in (10.0, 1.0))
    assert found.keys() == plain.keys()
    assert set(plain.values()) == {1e-3}
    for name, rate in found.items():
        assert rate == pytest.approx(1e-2 if ".lora_" in name else 1e-3), name
    assert bool([name for name in found if ".lora_" not in name]) == ("modules_to_save" in lora)


def test_a_step_of_sgd_is_so_many_times_as_long(tiny_llama, train):
    moved = []
    for ratio in (1.0, 8.0):
        torch.manual_seed(0)
        module = module_of(tiny_llama, rate=0.25, maker=torch.optim.SGD, ratio=ratio, modules_to_save=["norm"])
        before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        train(module, BATCHES[:1])
        moved.append({name: p.detach() - before[name] for name, p in module.named_parameters() if p.requires_grad})
    for name, change in moved[0].items():
        torch.testing.assert_close(moved[1][name], change * (8 if ".lora_" in name else 1), atol=1e-6, rtol=1e-4)
    assert any(float(change.abs().max()) > 1e-3 for change in moved[0].values())


def test_decay_stays_with_the_group(tiny_llama):
    module = module_of(tiny_llama, ratio=4.0, modules_to_save=["norm"], use_dora=True)
    groups = {group["name"]: group for group in module.configure_optimizers().param_groups}
    assert sorted(groups) == ["decay", "no_decay", "no_decay_adapters"]
    assert [groups[name]["weight_decay"] for name in sorted(groups)] == [0.01, 0.0, 0.0]
    assert [groups[name]["lr"] for name in sorted(groups)] == [4e-3, 1e-3, 4e-3]


def test_a_critic_like_the_policy_has_the_ratio(tiny_llama):
    policy = add_lora(copy.deepcopy(tiny_llama), LoraConfig(r=2, lr_ratio=10.0))
    module = build("ppo", policy, critic=None, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    made = module.configure_optimizers()
    names = {id(p): name for name, p in module.critic.named_parameters()}
    found = {names[id(p)]: g["lr"] for o in made for g in o.param_groups for p in g["params"] if id(p) in names}
    assert {rate for name, rate in found.items() if ".lora_" in name} == {10.0}
    assert {rate for name, rate in found.items() if ".lora_" not in name} == {1.0}  # its head, on an SGD of rate 1


def test_an_optimizer_that_sets_its_own_rate_has_no_ratio(tiny_llama):
    with pytest.raises(ValueError, match=r"lora.lr_ratio=10.0 multiplies a learning rate, but Adafactor sets its own"):
        module_of(tiny_llama, rate=None, maker=Adafactor, ratio=10.0).configure_optimizers()


class Adafactor(torch.optim.Optimizer):
    """Sets its own rate."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})


@pytest.mark.parametrize("name", ROWS)
def test_the_recipes_rate_is_the_usual_one_and_small_for_adapters(tiny_llama, name):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] == full_rate(name)
    policy = adapted(headed(name, tiny_llama))
    for rate, times in ((full_rate(name), 1), (10 * full_rate(name), 0), (0.0, 0)):
        module = build(name, copy.deepcopy(policy), optimizer=lambda g, rate=rate: torch.optim.AdamW(g, lr=rate))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.configure_optimizers()
        assert len(said(caught)) == times, rate
        assert all(f"lr of the optimizer to {10 * rate:g}" in line for line in said(caught))


@pytest.mark.parametrize(
    ("rate", "times", "options"),
    [
        (2e-5, 1, {}),
        (2e-5, 0, {"ratio": 10.0}),
        (2e-4, 0, {"schedule": lambda optimizer: LinearSchedule(optimizer, warmup_steps=8)}),
        (2e-5, 1, {"schedule": lambda optimizer: LinearSchedule(optimizer, warmup_steps=8)}),
        (1e-6, 0, {"maker": torch.optim.SGD}),
    ],
)
def test_said_once_and_not_of_a_warm_up(tiny_llama, train, rate, times, options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module_of(tiny_llama, rate=rate, **options), BATCHES * 4)
    assert len(said(caught)) == times


def test_all_weights_at_that_rate_are_nothing_to_say(tiny_llama, train):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(SFTModule(policy=tiny_llama, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-5)), BATCHES)
    assert not said(caught)


def test_a_run_resumes_with_its_ratio_alone(llama, train, tmp_path):
    def module(ratio):
        return SFTModule(policy={"path": llama, "lora": {"r": 2, "lr_ratio": ratio}})

    train(module(10.0), BATCHES, max_epochs=-1, max_steps=1).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"policy.lora.lr_ratio=3.0, but checkpoint .* with 10.0"):
        resume(module(3.0), tmp_path / "one.ckpt")
    again = module(10.0)
    resume(again, tmp_path / "one.ckpt")
    assert {group["lr"] for group in again.optimizers().param_groups} == {1e-2}


def resume(module, path):
    import lightning as L

    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=path)


@pytest.fixture
def llama(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")
