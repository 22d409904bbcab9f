"""Generation metrics of `test` and `predict`, and the table of paradigms."""

import copy

import lightning as L
import pytest
import torch

from alignment_modules import DPOModule, EvaluationConfig, SFTModule, create_module, get_module_class
from alignment_modules.rewards import reward_set


class Ids:
    """A tokenizer of ids: enough to decode."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self):
        return 40

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]


def prompts(count, **columns):
    ids = torch.randint(1, 40, (count, 3), generator=torch.Generator().manual_seed(count))
    return {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(count)), **columns}


def test(module, batches):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    return trainer.test(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)[0]


test.__test__ = False


def module_with(policy, **options):
    evaluation = EvaluationConfig(**{"max_completion_length": 4, **options})
    return SFTModule(policy=copy.deepcopy(policy), tokenizer=Ids(), evaluation=evaluation)


def test_rows_that_the_verifier_does_not_apply_to_are_not_counted(tiny_llama):
    def judged(completions, kind):
        return [{"right": 1.0, "wrong": 0.0, "unknown": None}[name] for name in kind]

    def known(completions, kind):
        return [0.0 if name != "right" else 1.0 for name in kind]

    batches = [prompts(4, kind=["right", "wrong", "right", "wrong"])]
    found = test(module_with(tiny_llama, verifier=judged, num_samples=3), batches)
    assert found["test/exact_match"] == found["test/sample_accuracy"] == found["test/pass@3"] == 0.5
    assert test(module_with(tiny_llama, verifier=known), batches)["test/exact_match"] == 0.5


def test_the_verifier_is_built_once_and_at_once(tiny_llama, monkeypatch):
    built = []
    original = reward_set._resolve
    monkeypatch.setattr(reward_set, "_resolve", lambda *a: (built.append(a), original(*a))[1])
    test(module_with(tiny_llama), [prompts(2, answer=["1", "2"])] * 3)
    assert len(built) == 1
    with pytest.raises(ValueError, match="no_such_module"):
        module_with(tiny_llama, verifier="no_such_module.verifier")


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_samples", -1), ("max_completion_length", 0), ("temperature", 0.0), ("top_p", 0.0), ("min_p", 2.0)],
)
def test_options_are_checked_when_given(option, value):
    with pytest.raises(ValueError, match=option):
        EvaluationConfig(**{option: value})


def test_modules_by_name(tiny_llama):
    module = create_module("dpo", policy=tiny_llama, beta=0.3)
    assert type(module) is DPOModule is get_module_class("dpo")
    assert module.beta == 0.3
    with pytest.raises(ValueError, match=r"'kto'.*pretrain, sft, dpo, grpo"):
        create_module("kto", policy=tiny_llama)
