"""The gradient of an optimizer step does not depend on how its rows are cut, padded or ordered, nor on empty ones."""

import pytest
import torch

from tests.models import adapted
from tests.paradigms import ROWS, cells, headed, plain

CELLS = pytest.mark.parametrize(("name", "row", "options"), cells())
EVERY = pytest.mark.parametrize("name", ROWS)
ADAPTED = ("sft", "dpo", "grpo")
ADAPTERS = ({"use_rslora": True}, {"use_dora": True}, {"init": "pissa"})
ALL = tuple(range(8))


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def whole(known, make, update, request, name, row, options):
    """The update by all rows of a cell in one piece, which is made once."""
    cell = request.node.callspec.id
    if cell not in known:
        known[cell] = update(make(name, **options), [row.batch(ALL)])
    return known[cell]


@CELLS
def test_split(whole, cut_update, assert_same, name, row, options):
    for sizes in row.cuts():
        assert_same(whole, cut_update(name, row.batch, sizes, **options))


@CELLS
def test_padding(whole, make, update, assert_same, name, row, options):
    for extra, side in ((8, "right"), (0, "left"), (3, "left")):
        assert_same(whole, update(make(name, **options), [row.batch(ALL, extra, side)]))


@CELLS
def test_order(whole, make, update, assert_same, name, row, options):
    for order in row.orders:
        assert_same(whole, update(make(name, **options), [row.batch(order)]))


@CELLS
def test_a_row_that_holds_nothing_adds_nothing(make, update, assert_same, name, row, options):
    without = update(make(name, **options), [row.batch(ALL[:7])])
    for change in row.nothing.values():
        batch = row.batch(ALL)
        change(batch, 7)
        assert_same(without, update(make(name, **options), [batch]))


@EVERY
def test_micro_batches_that_hold_nothing_add_nothing(make, update, cut_update, assert_same, name):
    row = ROWS[name]
    whole = update(make(name), [row.batch(ALL[:6])])
    for change in row.nothing.values():

        def mostly_nothing(rows, change=change):
            batch = row.batch(rows)
            for number, kept in enumerate(rows):
                if kept >= 6:
                    change(batch, number)
            return batch

        assert_same(whole, cut_update(name, mostly_nothing, (2, 4, 2)))
        assert_same(whole, cut_update(name, lambda rows: mostly_nothing([(r + 6) % 8 for r in rows]), (2, 4, 2)))


@EVERY
def test_recomputed_activations_change_nothing(make, update, assert_same, name):
    row = ROWS[name]

    def checkpointed(**more):
        module = make(name)(**more)
        module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    assert_same(update(make(name), [row.batch(ALL)]), update(checkpointed, [row.batch(ALL)]))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, {}) for name in ROWS), *((name, kind) for name in ADAPTED for kind in ADAPTERS)]
)
def test_adapters(make, update, cut_update, assert_same, tiny_llama, name, kind):
    """LoRA: the adapters alone learn, the reference is the policy as it was, and no split changes that."""
    row = ROWS[name]
    policy = adapted(headed(name, tiny_llama), **kind)
    options = {"policy": policy} | ({"reference": None} if "reference" in row.options(policy) else {})
    whole = update(make(name, **options), [row.batch(ALL)])
    assert all("lora_" in key or "score" in key for key in whole if key.startswith("policy."))
    assert_same(whole, cut_update(name, row.batch, row.sizes[1], **options))
    module = make(name, **options)()
    held = {key: value.clone() for key, value in module.policy.state_dict().items() if "lora_" not in key}
    update(lambda **more: module, [row.batch(ALL)])
    now = module.policy.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in held.items() if "score" not in key)


@EVERY
def test_a_policy_that_is_no_model_of_transformers(make, update, cut_update, assert_same, name):
    row = ROWS[name]
    policy = plain(row)
    whole = update(make(name, policy), [row.batch(ALL)])
    own = {key for key in whole if key.startswith("policy.")}
    assert own == {f"policy.{key}" for key, _ in policy.named_parameters()}
    for sizes in row.sizes[:3]:
        assert_same(whole, cut_update(name, row.batch, sizes, policy=policy))
    assert_same(whole, update(make(name, policy), [row.batch(ALL, 3)]))
