"""A checkpoint holds what is trained, loads without running code, and fits its own module alone."""

import copy

import pytest
import torch

from tests.models import adapted
from tests.paradigms import ROWS, build, headed

EVERY = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def written(tiny_llama, train, tmp_path):
    """`written(name, change=...)`: a module after one step, and what its checkpoint holds."""

    def write(name, change=copy.deepcopy, **options):
        module = build(
            name,
            change(headed(name, tiny_llama)),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01),
            **options,
        )
        train(module, [ROWS[name].batch(range(8))]).save_checkpoint(tmp_path / "one.ckpt")
        return module, torch.load(tmp_path / "one.ckpt", weights_only=True)

    return write


@EVERY
def test_holds_all_that_is_trained_and_no_frozen_companion(written, name):
    module, checkpoint = written(name)
    assert checkpoint["alignment_module"]["paradigm"] == name
    assert checkpoint["alignment_module"]["num_tokens"] > 0
    kept = checkpoint["state_dict"]
    held = {name: child for name, child in module.named_children() if name in ("policy", "critic")}
    expected = {f"{name}.{key}": value for name, child in held.items() for key, value in child.state_dict().items()}
    assert kept.keys() == expected.keys()
    assert all(torch.equal(value, kept[key]) for key, value in expected.items())


@EVERY
def test_is_strict_in_every_other_key(written, tiny_llama, name):
    module, checkpoint = written(name)
    fresh = build(name, copy.deepcopy(tiny_llama), other=copy.deepcopy(tiny_llama))
    start = {key: value.clone() for key, value in fresh.state_dict().items()}
    key = next(key for key in checkpoint["state_dict"] if key.endswith("q_proj.weight"))
    lacking = {k: value for k, value in checkpoint["state_dict"].items() if k != key}
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        fresh.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*policy.another"):
        fresh.load_state_dict(checkpoint["state_dict"] | {"policy.another": torch.zeros(1)})
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in start.items())
    fresh.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, {}) for name in ROWS), ("dpo", {"use_dora": True}), ("dpo", {"init": "pissa"})]
)
def test_of_adapters_holds_no_frozen_base(written, name, kind):
    own = {"reference": None} if "reference" in ROWS[name].options(torch.nn.Linear(1, 1)) else {}
    module, checkpoint = written(name, lambda policy: adapted(policy, **kind), **own)
    trained = {key for key, p in module.named_parameters() if p.requires_grad}
    start = {key for key, _ in module.policy.named_parameters(prefix="policy") if ".start." in key}
    assert any(key.startswith("policy.") for key in trained)
    assert bool(start) == ("init" in kind)
    assert checkpoint["state_dict"].keys() == trained | start
