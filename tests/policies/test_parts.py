"""Training a part of a model by patterns of names: what is trained, kept, written and refused."""

import copy
import functools
import logging

import pytest
import torch
from safetensors.torch import load_file

from alignment_modules import DPOModule, PolicyConfig, SFTModule
from alignment_modules.policies.load import LoraConfig, build_policy
from alignment_modules.policies.parts import train_part
from tests.batches import pairs, supervised

TOKENS = torch.arange(1, 13).reshape(2, 6)
LAST = "model.layers.1.*"


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_of(model, *starts):
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({"trainable": [LAST]}, ["model.layers.1."]),
        ({"trainable": [LAST, "model.norm.weight"]}, ["model.layers.1.", "model.norm"]),
        ({"frozen": ["model.embed_tokens.*", "model.layers.0.*"]}, ["model.layers.1.", "model.norm"]),
        ({"trainable": [LAST], "frozen": ["*.mlp.*", "*norm*"]}, ["model.layers.1.self_attn."]),
    ],
)
def test_patterns_choose(tiny_llama_config, options, starts):
    model = build_policy(PolicyConfig(config=tiny_llama_config, **options))
    assert trained(model) == names_of(model, *starts)
    assert trained(model)


def test_nothing_else_of_the_policy_changes(tiny_llama_config):
    torch.manual_seed(0)
    part = build_policy(PolicyConfig(config=tiny_llama_config, trainable=[LAST]))
    torch.manual_seed(0)
    whole = build_policy(PolicyConfig(config=tiny_llama_config))
    assert torch.equal(part(TOKENS).logits, whole(TOKENS).logits)


@pytest.mark.parametrize(
    ("option", "patterns", "alone"),
    [("frozen", ["lm_head.weight"], "frozen"), ("trainable", ["lm_head.weight"], "trained")],
)
def test_a_tied_weight_is_one(tiny_llama_config, caplog, option, patterns, alone):
    with caplog.at_level(logging.WARNING):
        model = build_policy(PolicyConfig(config=tiny_llama_config, **{option: patterns}))
    assert model.get_input_embeddings().weight.requires_grad == (option == "trainable")
    assert f"'lm_head.weight', which is one weight with 'model.embed_tokens.weight': they are {alone}" in caplog.text


def test_a_tied_weight_of_which_both_names_are_given_needs_no_word(tiny_llama_config, caplog):
    build_policy(PolicyConfig(config=tiny_llama_config, frozen=["lm_head.*", "*embed_tokens*"]))
    assert "one weight" not in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trainable": ["model.layer.1.*"]}, ["policy.trainable names 'model.layer.1.*'", "'model.layers.1.*'"]),
        ({"frozen": ["model.layers.0"]}, ["policy.frozen names 'model.layers.0'", "Did you mean 'model.layers.0.*'?"]),
        ({"frozen": ["qqqqqq"]}, ["'qqqqqq'", "Names are such as 'model.embed_tokens.weight'"]),
        ({"frozen": ["embed_tokens.weight"]}, ["Did you mean", "'model.embed_tokens.weight'"]),
        ({"trainable": ["*"]}, ["policy.trainable=['*'] names every parameter", "leave it out"]),
        ({"frozen": ["*"]}, ["policy.frozen=['*']", "leave nothing of LlamaForCausalLM to train"]),
        (
            {"trainable": [LAST], "frozen": ["model.layers.*"]},
            [f"policy.trainable=['{LAST}'] and policy.frozen=['model.layers.*'] leave nothing"],
        ),
        (
            {"trainable": [LAST], "frozen": ["model.layers.0.*"]},
            ["policy.frozen names 'model.layers.0.*', of which policy.trainable chooses nothing"],
        ),
        ({"trainable": []}, ["policy.trainable=[] is empty"]),
        ({"trainable": [LAST], "lora": LoraConfig()}, [f"policy.trainable=['{LAST}'] contradicts policy.lora"]),
        ({"frozen": [LAST], "lora": LoraConfig()}, ["policy.frozen", "lora.exclude_modules"]),
    ],
)
def test_what_is_refused(tiny_llama_config, options, says):
    with pytest.raises(ValueError, match=r".") as caught:
        build_policy(PolicyConfig(config=tiny_llama_config, **options))
    for part in says:
        assert part in str(caught.value)


def test_a_reference_is_never_trained(tiny_llama, tiny_llama_config):
    with pytest.raises(ValueError, match=r"reference.trainable=\['\*norm\*'\] has no effect"):
        DPOModule(policy=tiny_llama, reference=PolicyConfig(config=tiny_llama_config, trainable=["*norm*"]))


def test_rows_of_new_tokens_must_be_trained(llama_folder):
    options = {"path": str(llama_folder), "added_tokens": ["<new>"]}
    with pytest.raises(ValueError, match=r"policy.added_tokens=\['<new>'\] makes new rows in 'model.embed_tokens'"):
        build_policy(PolicyConfig(**options, trainable=[LAST]))
    assert trained(build_policy(PolicyConfig(**options, frozen=["model.layers.0.*"])))
    # a token that was there needs no training
    assert trained(build_policy(PolicyConfig(path=str(llama_folder), added_tokens=["<turn>"], trainable=[LAST])))


def test_any_module_can_be_trained_in_part():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    train_part(model, ["1.*"], None)
    assert trained(model) == {"1.weight", "1.bias"}


@pytest.fixture
def module(tiny_llama_config):
    def make(kind=SFTModule, **options):
        torch.manual_seed(0)
        options = {"trainable": [LAST]} | options
        policy = PolicyConfig(config=tiny_llama_config, **options)
        return kind(policy=policy, optimizer=functools.partial(torch.optim.AdamW, lr=0.01))

    return make


def test_only_the_part_moves_and_the_rest_is_in_no_optimizer(module, train):
    made = module()
    before = copy.deepcopy(made.policy.state_dict())
    trainer = train(made, [supervised(range(4))] * 2)
    held = sum(parameter.numel() for group in trainer.optimizers[0].param_groups for parameter in group["params"])
    assert held == sum(p.numel() for p in made.policy.parameters() if p.requires_grad) > 0
    moved = {name for name, value in made.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names_of(made.policy, "model.layers.1.")
    assert f"{held:,} of them trained" in made.describe()["policy"]


def test_gradient_checkpointing_gives_the_same(module, train):
    plain, recomputed = module(), module(gradient_checkpointing=True)
    for made in (plain, recomputed):
        train(made, [supervised(range(4))] * 2)
    for (name, one), other in zip(plain.policy.named_parameters(), recomputed.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_reference_that_is_not_given_is_a_copy(module, train):
    made = module(DPOModule)
    copied = made.reference.module
    before = copy.deepcopy(copied.state_dict())
    assert copied is not made.policy
    train(made, [pairs(range(4))] * 2)
    assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())
    assert not torch.equal(made.policy.model.layers[1].mlp.up_proj.weight, copied.model.layers[1].mlp.up_proj.weight)


def test_a_run_that_resumes_is_the_same_and_another_part_is_refused(llama_folder, train, tmp_path):
    def fit(part, epochs, start=None):
        made = SFTModule(
            policy=PolicyConfig(path=str(llama_folder), trainable=part),
            optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        )
        import lightning as L

        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **options, default_root_dir=tmp_path
        )
        batches = [supervised([row, row + 1]) for row in range(2)]
        trainer.fit(made, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=start)
        return made, trainer

    whole, _ = fit([LAST], 2)
    _, trainer = fit([LAST], 1)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    kept = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("policy.") for name in kept} == names_of(whole.policy, "model.layers.1.")
    resumed, _ = fit([LAST], 2, tmp_path / "two.ckpt")
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"policy.trainable=\['model.layers.0.\*'\], but .*trained with"):
        fit(["model.layers.0.*"], 2, tmp_path / "two.ckpt")
    resumed.export(tmp_path / "export")
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert written.keys() == load_file(llama_folder / "model.safetensors").keys()
    assert all(torch.equal(value, whole.policy.state_dict()[name]) for name, value in written.items())
