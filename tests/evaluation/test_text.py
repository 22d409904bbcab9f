"""`module.generate("text")` answers in text, with nothing but a policy and its tokenizer."""

import pytest
import torch

from alignment_modules import EvaluationConfig, SFTModule
from alignment_modules.rollouts import SamplingParameters


class Letters:
    """One token a letter."""

    eos_token_id, pad_token_id = 1, 0
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 95 for letter in text]}

    def batch_decode(self, rows, skip_special_tokens=False):
        return ["".join(chr(token + 95) for token in row if token > 1) for row in rows]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(message["content"] for message in messages) + "a" * add_generation_prompt


@pytest.fixture
def module(tiny_llama):
    return SFTModule(policy=tiny_llama, tokenizer=Letters(), evaluation=EvaluationConfig(max_completion_length=6))


def greedy(policy, text):
    ids = [ord(letter) - 95 for letter in text]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 6 and (len(ids) == start or ids[-1] != 1):
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
    return Letters().batch_decode([ids[start:]])[0]


def test_text_in_text_out(module):
    expected = [greedy(module.policy, text) for text in ("abc", "hello")]
    assert module.generate("abc") == expected[0]
    assert module.generate(["abc", "hello"]) == expected
    assert not module.policy.training


def test_samples_and_parameters(module):
    found = module.generate(["abc", "hello"], num_samples=3, seed=1)
    assert [len(samples) for samples in found] == [3, 3]
    assert found == module.generate(["abc", "hello"], num_samples=3, seed=1)
    assert len(module.generate("abc", SamplingParameters(max_completion_length=1, greedy=True))) <= 1


def test_messages(module):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="chat template"):
        module.generate(messages)
    module.tokenizer.chat_template = "yes"
    assert module.generate(messages) == greedy(module.policy, "helloa")
    assert module.generate([messages, messages]) == [greedy(module.policy, "helloa")] * 2


@pytest.mark.parametrize(("prompts", "named"), [("", "without a token"), ([], "holds no prompt")])
def test_refusals(module, prompts, named):
    with pytest.raises(ValueError, match=named):
        module.generate(prompts)
    module.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer=None"):
        module.generate("abc")
