"""Every paradigm on a quantized base: the adapters alone learn, exactly; what was trained is resumed and exported."""

import copy
import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.quantization import PACKAGES, quantized_layers
from tests.contract.two_ranks import NoTokenizer, many_threes, sampled
from tests.models import other_than, quantized
from tests.paradigms import ROWS, build

pytestmark = pytest.mark.skipif(  # development dependencies on Linux
    not all(map(importlib.util.find_spec, ("bitsandbytes", "torchao"))), reason="bitsandbytes and torchao are missing"
)
TOKENS = torch.arange(1, 13).reshape(2, 6)
ALL = tuple(range(8))
# Activations are rounded, too, in eval mode, so that numbers are exact to that rounding alone.
EXACT = ("4bit", "int8_weight_only")
OF_A_KIND = [
    pytest.param(name, kind) for name in ROWS for kind in EXACT if kind == "4bit" or name in ("sft", "kto", "grpo")
]


@pytest.fixture(scope="session")
def folder(built_llama, tmp_path_factory):
    """The tiny Llama as transformers writes it."""
    path = tmp_path_factory.mktemp("quantized") / "base"
    built_llama[0].save_pretrained(path)
    return path


@pytest.fixture
def make(folder, tiny_llama):
    """`make(name, kind, **options)`: builds a paradigm's module on a fresh quantized policy with adapters."""

    def factory(name, kind, **options):
        row = ROWS[name]
        other = other_than(tiny_llama)

        def module(**more):
            policy = quantized(None, kind, folder, "scalar" if row.outputs else "lm")
            given = {"reference": None} if "reference" in row.options(other) else {}
            return build(name, policy, other=copy.deepcopy(other), **(given | options | more))

        return module

    return factory


def mostly_slow(*fast):
    """Every kind for SFT, DPO and GRPO; all but some are slow."""
    cases = [(name, kind) for name in ("sft", "dpo", "grpo") for kind in PACKAGES]
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


def logits(model, *, train=False):
    with torch.no_grad():
        return model.train(train)(TOKENS).logits


@pytest.mark.parametrize(("name", "kind"), OF_A_KIND)
def test_the_adapters_alone_learn_whatever_the_split(make, update, assert_same, name, kind):
    row = ROWS[name]
    module = make(name, kind)()
    assert quantized_layers(module.policy)
    held = {
        key: value for key, value in module.policy.state_dict().items() if "lora_" not in key and "score" not in key
    }
    held = copy.deepcopy(held)
    whole = update(lambda **more: make(name, kind, **more)(), [row.batch(ALL)])
    assert all("lora_" in key or "score" in key for key in whole if key.startswith("policy."))
    if module.automatic_optimization:
        parts = [row.batch(range(2)), row.batch(range(2, 8))]
        assert_same(whole, update(lambda **more: make(name, kind, **more)(), parts))
    else:
        cut = update(lambda **more: make(name, kind, micro_batch_size=3, **more)(), [row.batch(ALL)])
        assert_same(whole, cut)
    update(lambda **more: module, [row.batch(ALL)])
    now = module.policy.state_dict()
    for key, value in held.items():
        assert fingerprint_of(now[key]) == fingerprint_of(value), key


def fingerprint_of(value):
    holder = torch.nn.Module()
    holder.register_buffer("value", value)
    return fingerprint(holder)


def online(name):
    """What makes an acting paradigm sample."""
    return {"rewards": many_threes, "tokenizer": NoTokenizer(), "num_generations": 3} if name == "grpo" else {}


@pytest.mark.parametrize(("name", "kind"), mostly_slow(("sft", "8bit"), ("dpo", "int8_weight_only"), ("grpo", "4bit")))
def test_trained_resumed_and_exported(make, train, folder, tmp_path, name, kind):
    """A run, one that is stopped and goes on, and the folder that plain transformers reads."""
    rate = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=0.05)}
    batches = [(sampled if name == "grpo" else ROWS[name].batch)(rows) for rows in (range(4), range(4, 8))]
    module = make(name, kind, **online(name), **rate)
    whole, first = module(), module()
    start = {key: value.clone() for key, value in whole.named_parameters() if value.requires_grad}
    train(whole, batches, max_epochs=2)
    train(first, batches).save_checkpoint(tmp_path / "one.ckpt")

    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(start)
    resumed = module()
    train(resumed, batches, max_epochs=2, ckpt=tmp_path / "one.ckpt")
    end = dict(whole.named_parameters())
    for key, value in resumed.named_parameters():
        assert key not in start or (torch.equal(value, end[key]) and not torch.equal(value, start[key])), key

    other = make(name, "8bit" if kind != "8bit" else "4bit", **online(name), **rate)()
    with pytest.raises(ValueError, match=r"others in the place|pass the same `reference`"):
        train(other, batches, max_epochs=2, ckpt=tmp_path / "one.ckpt")

    whole.tokenizer = None  # one that cannot be written
    exported = AutoModelForCausalLM.from_pretrained(whole.export(tmp_path / "export"))
    assert not quantized_layers(exported)
    torch.testing.assert_close(logits(exported), logits(whole.policy, train=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PACKAGES)
def test_frozen_companions_of_a_plain_policy(tiny_llama, train, folder, tmp_path, kind):
    """A quantized teacher and reference: read alike before and after a resume, and in no checkpoint."""
    from alignment_modules import DistillationModule, DPOModule, PolicyConfig

    def made(base, **options):
        return base(policy=copy.deepcopy(tiny_llama), **options)

    small = PolicyConfig(path=str(folder), quantization=kind)
    for base, name, row in ((DPOModule, "reference", "dpo"), (DistillationModule, "teacher", "distillation")):
        batches = [ROWS[row].batch(rows) for rows in (range(4), range(4, 8))]
        whole, first, resumed = (made(base, **{name: small}) for _ in range(3))
        train(whole, batches, max_epochs=2)
        train(first, batches).save_checkpoint(tmp_path / f"{name}.ckpt")
        assert set(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]) == set(first.state_dict())
        train(resumed, batches, max_epochs=2, ckpt=tmp_path / f"{name}.ckpt")
        assert fingerprint(resumed.policy) == fingerprint(whole.policy) != fingerprint(first.policy)
        with pytest.raises(ValueError, match=f"pass the same `{name}`"):
            train(made(base, **{name: str(folder)}), batches, max_epochs=2, ckpt=tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "4bit" else pytest.mark.slow) for k in PACKAGES])
def test_the_command_line(align, workplace, tmp_path, kind):
    """A run with its export, the adapters alone from its checkpoint, and the memory that is estimated for it."""
    policy = json.dumps({"path": "policy", "quantization": kind, "lora": {"r": 2}})
    given = ("--config", "sft.yaml", "--model.policy", policy, "--trainer.max_steps", "2")
    done = align("fit", *given)
    assert done.code == 0, done.text
    exported = AutoModelForCausalLM.from_pretrained(done.root / "export")
    assert not quantized_layers(exported)
    assert AutoTokenizer.from_pretrained(done.root / "export")("1+1=").input_ids
    written = align("export", done.root, tmp_path / "adapter", "--lora", "adapter")
    assert written.code == 0, written.text
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
