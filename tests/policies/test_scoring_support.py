"""Scores over the kept sets of truncated sampling, against one row at a time with the other logits at -inf."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from alignment_modules.functional.support import Support
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from tests.policies.naive import (
    GRADIENT,
    LOGPS,
    VOCABULARY,
    Plain,
    assert_same_gradients,
    build,
    gradients,
    logits_of,
    naive_prompts,
    prompts_batch,
)

ASK = ("entropy", "accuracy", "collision", "full_logps")


def kept(batch, seed=4):
    """A set for every place, its target in it; some are the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = batch["completion_ids"]
    mask = torch.rand(*ids.shape, VOCABULARY, generator=generator) < torch.rand(*ids.shape, 1, generator=generator)
    mask.scatter_(2, ids[..., None], True)
    mask[:, 1] = True
    return mask, Support.from_mask(mask.flatten(0, 1)).take(torch.arange(ids.numel()).view(ids.shape))


def naive(policy, batch, mask, temperature):
    """token_logps, entropy, correct, collision [rows, time], row by row and token by token."""
    ids, exists = batch["completion_ids"], batch["completion_mask"]
    samples, dtype = len(ids) // len(batch["prompt_ids"]), next(policy.parameters()).dtype
    found = [torch.zeros(ids.shape, dtype=dtype) for _ in range(4)]
    for n in range(len(ids)):
        prompt = batch["prompt_ids"][n // samples][batch["prompt_mask"][n // samples]]
        places = exists[n].nonzero()[:, 0].tolist()
        tokens = torch.cat((prompt, ids[n, places]))
        if not len(tokens):
            continue
        logits = logits_of(policy, tokens[None])[0] / temperature
        for number, place in enumerate(places):
            if not len(prompt) + number:
                continue
            row = logits[len(prompt) + number - 1].masked_fill(~mask[n, place], -torch.inf)
            log_p = row.log_softmax(-1)[mask[n, place]]
            own = row.log_softmax(-1)[ids[n, place]]
            values = (own, -(log_p.exp() * log_p).sum(), row.argmax() == ids[n, place], (2 * log_p).logsumexp(0))
            for output, value in zip(found, values, strict=True):
                output[n, place] = value
    return found


def adapted(targets):
    torch.manual_seed(1)
    policy = get_peft_model(build("llama", tie_word_embeddings=False), LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy.eval()


POLICIES = {
    **{name: lambda name=name: build(name) for name in ("llama", "gpt2", "gemma2", "mistral_window", "cohere")},
    "plain": lambda: Plain().double(),
    "lora": lambda: adapted("all-linear"),
    "lora on the head": lambda: adapted(["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("name", POLICIES)
def test_numbers_and_gradients_are_those_of_the_kept_set(name):
    policy, batch = POLICIES[name](), prompts_batch()
    mask, support = kept(batch)
    expected = naive(policy, batch, mask, 0.7)
    full = naive_prompts(policy, batch, 0.7)[0]
    assert prepare(policy).hidden_states == (name not in ("plain", "lora on the head"))
    scores = score(policy, Segments.from_prompts(**batch), temperature=0.7, support=support, ask=ASK)
    found = (scores.token_logps, scores.entropy, scores.correct.double(), scores.collision, scores.full_logps)
    for ours, theirs in zip(found, (*expected, full), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGPS.get(name, 1e-11))
    weights = 0.1 * torch.randn(3, *full.shape, dtype=full.dtype, generator=torch.Generator().manual_seed(3))
    sums = [
        sum((weight * part).sum() for weight, part in zip(weights, parts, strict=True))
        for parts in ((found[0], found[1], found[4]), (expected[0], expected[1], full))
    ]
    assert_same_gradients(*(gradients(policy, total) for total in sums), GRADIENT)
    assert (scores.token_logps >= scores.full_logps - 1e-11).all()
    assert (scores.token_logps - scores.full_logps).max() > 0.1


def test_sets_follow_their_tokens():
    """Whichever rows and targets are asked for, and whether or not a prompt is shared."""
    policy, batch = build("llama"), prompts_batch(prompts=2, samples=3, empty=False)
    _, support = kept(batch)
    whole = score(policy, Segments.from_prompts(**batch), support=support).token_logps
    wanted = batch["completion_mask"] & (torch.arange(6) % 2 == 0)
    some = score(policy, Segments.from_prompts(**batch, target_mask=wanted), support=support)
    torch.testing.assert_close(some.token_logps, whole.masked_fill(~wanted, 0), rtol=0, atol=1e-12)
    segments = Segments.from_prompts(**batch)
    rows = torch.tensor([True, False, False, True, True, False])
    torch.testing.assert_close(
        score(policy, segments.of_rows(rows), support=support).token_logps,
        whole.masked_fill(~rows[:, None], 0),
        rtol=0,
        atol=1e-12,
    )
    order = torch.tensor([4, 0, 5])
    alone = {
        "prompt_ids": batch["prompt_ids"][order // 3],
        "prompt_mask": batch["prompt_mask"][order // 3],
        "completion_ids": batch["completion_ids"][order],
        "completion_mask": batch["completion_mask"][order],
    }
    found = score(policy, Segments.from_prompts(**alone), support=support[order]).token_logps
    torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_without_targets_it_hangs_on_the_parameters(name):
    policy, batch = POLICIES[name](), prompts_batch()
    _, support = kept(batch)
    nothing = Segments.from_prompts(**batch, target_mask=torch.zeros_like(batch["completion_mask"]))
    scores = score(policy, nothing, support=support, ask=ASK)
    assert (scores.token_logps == 0).all()
    (scores.token_logps.sum() + scores.full_logps.sum()).backward()


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_full_log_probabilities_without_a_support_are_the_only_ones(name):
    scores = score(POLICIES[name](), Segments.from_prompts(**prompts_batch()), ask=("full_logps",))
    assert torch.equal(scores.full_logps, scores.token_logps)


def test_refuses():
    policy, batch = build("llama"), prompts_batch()
    segments = Segments.from_prompts(**batch)
    with pytest.raises(ValueError, match=r"support must be \[6, 6\], one set a token, got shape \(6, 5\)"):
        score(policy, segments, support=Support.whole((6, 5)))
    for name in ("normalizer", "mean_logp"):
        with pytest.raises(ValueError, match=f"ask='{name}' is of the whole vocabulary"):
            score(policy, segments, support=Support.whole((6, 6)), ask=("entropy", name))
