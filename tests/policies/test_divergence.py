"""Divergence of two policies at the targets: equal to all logits of padded rows, each with its own head."""

import pytest
import torch

from alignment_modules.functional import distribution_divergence
from alignment_modules.policies import Segments, divergence, frozen_companion, read
from alignment_modules.policies.lora import LoraConfig, add_lora
from tests.policies.naive import Plain, build, gradients, labels_batch, logits_of, prompts_batch

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3)]


def naive(policy, teacher, batch, **options):
    """[rows, time], from all logits of each row by itself."""
    rows, time = batch["completion_ids"].shape
    samples = rows // len(batch["prompt_ids"])
    found = torch.zeros(rows, time, dtype=torch.float64)
    for n in range(rows):
        prompt = batch["prompt_ids"][n // samples][batch["prompt_mask"][n // samples]]
        places = batch["completion_mask"][n].nonzero()[:, 0]
        places = places if len(prompt) else places[1:]
        if not len(places):
            continue
        tokens = torch.cat((prompt, batch["completion_ids"][n][batch["completion_mask"][n]]))[None]
        ours, theirs = (logits_of(model, tokens)[0, :-1][-len(places) :] for model in (policy, teacher))
        found[n, places] = distribution_divergence(ours, theirs.detach(), **options)
    return found


def teacher(name="qwen2"):
    model = build(name, hidden_size=24, intermediate_size=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
@pytest.mark.parametrize("names", [("llama", "qwen2"), ("granite", "cohere"), ("qwen3", "gemma2")], ids="-".join)
def test_each_model_has_its_own_head_and_prompts_are_shared(kind, jsd_beta, names):
    policy, other, batch = build(names[0]), teacher(names[1]), prompts_batch()
    options = {"kind": kind, "jsd_beta": jsd_beta, "temperature": 0.7}
    expected = naive(policy, other, batch, **options)
    wanted = gradients(policy, expected)
    segments = Segments.from_prompts(**batch)
    assert max(segments.parents) >= 0
    with torch.no_grad():
        theirs = read(other, segments)
    found = divergence(read(policy, segments), theirs, **options)
    atol = 5e-6 if "gemma2" in names else 1e-11
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    for name, gradient in gradients(policy, found).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=max(atol, 3e-6))
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("pair", ["plain student", "plain teacher", "both"])
def test_models_without_a_head_of_their_own(pair):
    policy = build("llama") if pair == "plain teacher" else Plain().double()
    other = teacher() if pair == "plain student" else Plain("output").double()
    batch = prompts_batch()
    segments = Segments.from_prompts(**batch)
    found = divergence(read(policy, segments), read(other, segments), kind="jsd")
    torch.testing.assert_close(found, naive(policy, other, batch, kind="jsd"), rtol=0, atol=1e-11)


def test_a_teacher_that_reads_some_of_the_rows():
    policy, other = build("llama"), teacher()
    ids, labels, mask = labels_batch(rows=6, side="left")
    whole = Segments.from_labels(ids, labels, mask)
    reading = read(policy, whole)
    expected = divergence(reading, read(other, whole))
    total = torch.zeros_like(expected)
    for chosen in ([4, 1], [0], [], [5, 2, 3]):
        others = [row for row in range(6) if row not in chosen]
        some = labels.clone()
        some[others] = -100
        found = divergence(reading, read(other, Segments.from_labels(ids, some, mask)))
        assert not found[others].any()
        total = total + found
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-11)
    wanted = gradients(policy, divergence(read(policy, whole), read(other, whole)))
    for one, same in zip(gradients(policy, total).values(), wanted.values(), strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=1e-10)


def test_a_lora_policy_and_a_frozen_teacher():
    policy = add_lora(build("llama"), LoraConfig(r=2))
    companion = frozen_companion(teacher(), policy, name="teacher")
    segments = Segments.from_prompts(**prompts_batch())
    with companion.reading() as model:
        theirs = read(model, segments)
    found = divergence(read(policy, segments), theirs)
    torch.testing.assert_close(found, naive(policy, companion.module, prompts_batch()), rtol=0, atol=1e-11)
    found.sum().backward()
    assert any(p.grad is not None for n, p in policy.named_parameters() if "lora_" in n)


def test_heads_padded_to_two_sizes():
    policy, other = build("llama"), build("qwen2", vocab_size=48)
    batch = prompts_batch()
    segments = Segments.from_prompts(**batch)
    readings = read(policy, segments), read(other, segments)
    with pytest.raises(ValueError, match="the policy's vocabulary has 40 tokens and the teacher's 48"):
        divergence(*readings)

    class Cut(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids).logits[..., :37]

    found = divergence(*readings, vocabulary=37)
    torch.testing.assert_close(found, naive(Cut(policy), Cut(other), batch), rtol=0, atol=1e-11)


def test_no_target_at_all_still_hangs_on_the_parameters():
    policy = build("llama")
    ids, labels, mask = labels_batch()
    segments = Segments.from_labels(ids, torch.full_like(labels, -100), mask)
    found = divergence(read(policy, segments), read(teacher(), segments))
    assert not found.any()
    assert all(not gradient.any() for gradient in gradients(policy, found).values())
