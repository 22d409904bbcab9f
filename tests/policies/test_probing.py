"""What is found out of a model before it is scored packed, and that finding out changes nothing."""

import copy
import logging

import pytest
import torch

from alignment_modules.policies.attention import ATTENTION_NAME
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from tests.policies.naive import VOCABULARY, build, naive_prompts, prompts_batch


def test_a_scored_policy_is_used_as_before(tmp_path, caplog):
    policy = build("llama", torch.float32)
    untouched = copy.deepcopy(policy)
    with caplog.at_level(logging.INFO, logger="alignment_modules"):
        for _ in range(2):
            score(policy, Segments.from_prompts(**prompts_batch()))
    assert [record.message.count("packed rows") for record in caplog.records] == [1]  # said once
    ids, mask = torch.randint(VOCABULARY, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    mask[0, :3] = 0
    assert torch.equal(policy(ids, attention_mask=mask).logits, untouched(ids, attention_mask=mask).logits)
    packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    assert torch.equal(policy(**packed).logits, untouched(**packed).logits)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(policy.generate(ids, **options), untouched.generate(ids, **options))
    policy.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    clone = copy.deepcopy(policy)
    assert prepare(clone).packed


@pytest.mark.parametrize("training", [False, True])
def test_the_probe_leaves_modes_and_random_numbers_alone(training):
    policy = build("gpt2", resid_pdrop=0.1)
    policy.train(training)
    policy.transformer.h[0].eval()
    modes = [module.training for module in policy.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prepare(policy)
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_another_attention_implementation_is_kept():
    policy, batch = build("llama"), prompts_batch()
    policy.set_attn_implementation("eager")
    expected = naive_prompts(policy, batch)[0]
    found = score(policy, Segments.from_prompts(**batch)).token_logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert policy.config._attn_implementation == "eager"
    assert "eager is kept" in prepare(policy).reason
    policy.set_attn_implementation("sdpa")
    assert prepare(policy).packed
    policy.set_attn_implementation("eager")
    assert not prepare(policy).packed


def test_contexts_longer_than_the_window_are_padded():
    policy = build("mistral_window")
    assert prepare(policy).window == 6
    short = {**prompts_batch(empty=False)}
    short["prompt_mask"][:, 2:] = False
    short["completion_mask"][:, 4:] = False
    segments = Segments.from_prompts(**short)
    assert segments.longest <= 6
    torch.testing.assert_close(score(policy, segments).token_logps, naive_prompts(policy, short)[0], rtol=0, atol=1e-11)
    long = {**prompts_batch(empty=False)}
    assert Segments.from_prompts(**long).longest > 6
    found = score(policy, Segments.from_prompts(**long)).token_logps
    torch.testing.assert_close(found, naive_prompts(policy, long)[0], rtol=0, atol=1e-11)


def test_a_model_whose_numbers_differ_when_packed_is_padded(monkeypatch):
    policy, batch = build("llama"), prompts_batch()
    original = policy.model.forward

    def mixes_neighbours(*args, **kwargs):  # such as a convolution over the row
        output = original(*args, **kwargs)
        states = output.last_hidden_state
        output.last_hidden_state = states + torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), 1)
        return output

    monkeypatch.setattr(policy.model, "forward", mixes_neighbours)
    found = score(policy, Segments.from_prompts(**batch)).token_logps
    assert "packed and padded rows differ" in prepare(policy).reason
    assert policy.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, naive_prompts(policy, batch)[0], rtol=0, atol=1e-11)
