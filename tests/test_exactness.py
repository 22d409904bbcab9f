"""What is exact beside the contract of every paradigm: packing, short last windows, and the plain computation."""

import pytest
import torch
import torch.nn.functional as F

from alignment_modules.functional import preference_loss
from alignment_modules.policies.scoring import score
from tests.batches import LENGTHS, tokens
from tests.models import other_than
from tests.paradigms import ROWS, build

ALL = tuple(range(8))


@pytest.fixture
def make(tiny_llama):
    """`make(name, **options)`: builds that paradigm's module, each time on a fresh copy of the policy."""
    import copy

    other = other_than(tiny_llama)

    def factory(name, **options):
        return lambda **more: build(name, copy.deepcopy(tiny_llama), other=copy.deepcopy(other), **(options | more))

    return factory


@pytest.mark.parametrize("name", ["sft", "pretrain", "dpo"])
def test_short_last_window(update, assert_same, make, name):
    row = ROWS[name]
    whole = update(make(name), [row.batch(ALL)])
    halves = [row.batch(ALL[:5]), row.batch(ALL[5:])]
    assert_same(whole, update(make(name), halves, accumulate_grad_batches=4))


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_packing(update, assert_same, make, name):
    batch = ROWS[name].batch(ALL)
    kept = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept][None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }
    assert_same(update(make(name), [batch]), update(make(name), [packed]))


def test_equals_plain_cross_entropy(update, assert_same, make, tiny_llama):
    batch = ROWS["sft"].batch(ALL)
    logits = tiny_llama(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    expected = {f"policy.{name}": -p.grad for name, p in tiny_llama.named_parameters()}
    assert_same(expected, update(make("sft"), [batch]))


def test_shared_prompt_equals_separate_rows(update, assert_same, make, tiny_llama):
    """The naive computation: chosen and rejected as two rows, log-softmax over every position."""
    batch = ROWS["dpo"].batch(ALL)
    reference = other_than(tiny_llama)

    def logps(model, side):
        total = []
        for i in range(8):
            prompt = batch["prompt_input_ids"][i][batch["prompt_attention_mask"][i].bool()]
            completion = batch[f"{side}_input_ids"][i][batch[f"{side}_attention_mask"][i].bool()]
            logits = model(torch.cat([prompt, completion])[None]).logits[0]
            steps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])
            total.append(steps.sum())
        return torch.stack(total)

    margin = logps(tiny_llama, "chosen") - logps(tiny_llama, "rejected")
    with torch.no_grad():
        reference_margin = logps(reference, "chosen") - logps(reference, "rejected")
    (-F.logsigmoid(0.5 * (margin - reference_margin))).mean().backward()
    expected = {f"policy.{name}": -p.grad for name, p in tiny_llama.named_parameters()}
    assert_same(expected, update(make("dpo"), [batch]))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_losses_that_sort_see_the_whole_step(update, assert_same, make, loss):
    """Any micro-batches give the gradient of the loss over all pairs; a pair without a completion is not sorted in."""
    batch, options = ROWS["dpo"].batch(ALL), {"loss": loss, "label_smoothing": 0.1}
    module = make("dpo", **options)(optimizer=torch.optim.SGD)
    logps, reference = (
        score(model, module.segments(batch)).token_logps.sum(dim=1).view(-1, 2)
        for model in (module.policy, module.reference.module)
    )
    losses = preference_loss(*logps.unbind(1), *reference.detach().unbind(1), beta=0.5, **options)
    losses.mean().backward()
    expected = {f"policy.{name}": -p.grad for name, p in module.policy.named_parameters()}
    empty = {name: torch.cat([value[:2], value[4:5], value[2:]]) for name, value in batch.items()}
    empty["rejected_attention_mask"][2] = 0
    for size in (None, 1, 3, 8, 20):
        stepped = make("dpo", micro_batch_size=size, max_grad_norm=None, **options)
        assert_same(expected, update(stepped, [batch]))
        assert_same(expected, update(stepped, [empty]))


def test_groups_without_signal_change_only_the_normaliser(update, assert_same, make):
    batch, more = ROWS["grpo"].batch((0, 1)), ROWS["grpo"].batch((0, 1, 2, 3))
    more["rewards"][8:] = 0.3
    options = {"loss": "dapo", "beta": 0.0, "reference": None}
    small, large = update(make("grpo", **options), [batch]), update(make("grpo", **options), [more])
    share = float(batch["response_mask"].sum() / more["response_mask"].sum())
    assert_same({name: value * share for name, value in small.items()}, large)


def test_long_prompts_with_recomputed_activations(update, assert_same, make):
    """The last layer would otherwise leave tokens out that are read by nobody."""
    batch = ROWS["grpo"].batch(ALL)
    batch["prompts"] = torch.stack([tokens(row, 9, 12) for row in ALL])
    batch["prompt_attention_mask"] = torch.ones_like(batch["prompts"])

    def checkpointed(**more):
        module = make("grpo")(**more)
        module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    assert_same(update(make("grpo"), [batch]), update(checkpointed, [batch]))
