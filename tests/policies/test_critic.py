"""Critics: what they start as, what their values are, and that others read what is exported."""

import copy

import pytest
import torch
from torch import nn

from alignment_modules.policies import LoraConfig, PolicyConfig, Segments, export_policy, read, score
from alignment_modules.policies.critic import build_critic, last_values, read_values, scalar_copy
from alignment_modules.policies.load import build_policy
from tests.batches import rollouts
from tests.models import Plain, adapted


def segments(**options):
    batch = rollouts(range(3))
    names = ("prompts", "prompt_attention_mask", "responses", "response_mask")
    return Segments.from_prompts(*(batch[name] for name in names), **options), batch


def drawn(critic):
    """The same with a head that is not 0."""
    for name, parameter in critic.named_parameters():
        if "score" in name:
            nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    return critic


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_starts_at_zero_and_shares_nothing(tiny_llama, lora):
    policy = adapted(tiny_llama) if lora else tiny_llama
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    critic = build_critic(None, policy)
    asked, _ = segments(reads="targets+last")
    with torch.no_grad():
        reading = read(critic.eval(), asked)
        assert (read_values(reading) == 0).all()
        assert (last_values(reading) == 0).all()
        torch.testing.assert_close(reading.states, read(policy, asked).states, rtol=1e-5, atol=1e-5)
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.parameters()}
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "score" in name for name in trained) == lora
    assert any("score" in name for name in trained)
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())


def test_the_value_of_a_token_is_that_of_the_state_before_it(tiny_llama):
    critic = drawn(build_critic(None, tiny_llama)).eval()
    asked, batch = segments(reads="targets+last")
    with torch.no_grad():
        reading = read(critic, asked)
        values, last = read_values(reading), last_values(reading)
        assert values.shape == batch["responses"].shape
        for row, length in enumerate(batch["response_mask"].sum(dim=1).tolist()):
            prompt = batch["prompts"][row // 4][batch["prompt_attention_mask"][row // 4].bool()]
            ids = torch.cat([prompt, batch["responses"][row, :length]])
            expected = critic.model(input_ids=ids[None]).last_hidden_state[0] @ critic.score.weight[0]
            torch.testing.assert_close(values[row, :length], expected[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(last[row], expected[-1], rtol=1e-4, atol=1e-5)
            assert (values[row, length:] == 0).all()


def test_the_head_is_float32_whatever_the_trunk(tiny_llama):
    policy = tiny_llama.to(torch.bfloat16)
    critic = build_critic(None, policy)
    assert critic.score.weight.dtype == torch.float32
    assert critic.model.embed_tokens.weight.dtype == torch.bfloat16
    asked, _ = segments()
    values = read_values(read(drawn(critic), asked))
    assert values.dtype == torch.float32
    values.sum().backward()
    assert critic.score.weight.grad.dtype == torch.float32


def test_what_is_given(tiny_llama, tmp_path):
    """A folder of a language model, of a reward model, a configuration, and a plain module."""
    tiny_llama.save_pretrained(tmp_path / "policy")
    torch.manual_seed(0)
    reward = build_policy(PolicyConfig(path=str(tmp_path / "policy"), head="scalar"), head="scalar")
    export_policy(reward, tmp_path / "reward")
    fresh = build_critic(str(tmp_path / "policy"), tiny_llama)
    assert (fresh.score.weight == 0).all()
    assert torch.equal(fresh.model.norm.weight, tiny_llama.model.norm.weight)
    assert torch.equal(build_critic(str(tmp_path / "reward"), tiny_llama).score.weight, reward.score.weight)
    config = PolicyConfig(path=str(tmp_path / "policy"), lora=LoraConfig(r=2))
    assert any("lora_" in name for name, _ in build_critic(config, tiny_llama).named_parameters())
    assert build_critic({"path": str(tmp_path / "reward")}, tiny_llama).score.weight.abs().sum() > 0
    module = Plain(1)
    assert build_critic(module, tiny_llama) is module
    assert read_values(read(module, segments()[0])).abs().sum() > 0


def test_exported_it_is_a_critic_and_a_classifier_again(tiny_llama, tmp_path):
    from transformers import AutoModelForSequenceClassification

    critic = drawn(build_critic(None, adapted(tiny_llama))).eval()
    export_policy(critic, tmp_path / "critic")
    asked, batch = segments(reads="targets+last")
    again = build_critic(str(tmp_path / "critic"), tiny_llama).eval()
    with torch.no_grad():
        expected = last_values(read(critic, asked))
        torch.testing.assert_close(last_values(read(again, asked)), expected, rtol=1e-5, atol=1e-5)
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
        ids = torch.cat([batch["prompts"][0][batch["prompt_attention_mask"][0].bool()], batch["responses"][0][:4]])
        torch.testing.assert_close(other(input_ids=ids[None]).logits[0, 0], expected[0], rtol=1e-4, atol=1e-5)


def test_a_shared_trunk_becomes_a_classifier(tiny_llama):
    twin = scalar_copy(tiny_llama)
    assert torch.equal(twin.model.norm.weight, tiny_llama.model.norm.weight)
    assert twin.config.num_labels == 1
    assert twin.model.config is twin.config
    assert score(tiny_llama, segments()[0]).token_logps.isfinite().all()  # the policy still reads


def test_refuses(tiny_llama):
    with pytest.raises(ValueError, match=r"critic=None .* Plain cannot be told .* give a critic"):
        build_critic(None, Plain())
    with pytest.raises(ValueError, match="critic gives 40 numbers for a token"):
        read_values(read(Plain(), segments()[0]))
    with pytest.raises(ValueError, match=r"critic: .*has no language|critic: .*scalar head"):
        build_critic(copy.deepcopy(tiny_llama), tiny_llama)
    with pytest.raises(ValueError, match=r"critic\.path='nowhere'"):
        build_critic("nowhere", tiny_llama)
