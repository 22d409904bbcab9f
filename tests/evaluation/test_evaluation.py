"""Generation metrics of `test` and `predict`, and the table of paradigms."""

import copy
import json

import lightning as L
import pytest
import torch

from alignment_modules import DPOModule, EvaluationConfig, SFTModule, create_module, get_module_class
from alignment_modules.callbacks import CompletionWriter
from alignment_modules.rewards import reward_set
from tests.batches import Digits


def prompts(count, **columns):
    ids = torch.randint(1, 40, (count, 3), generator=torch.Generator().manual_seed(count))
    return {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(count)), **columns}


def test(module, batches):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    return trainer.test(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)[0]


test.__test__ = False


def module_with(policy, **options):
    evaluation = EvaluationConfig(**{"max_completion_length": 4, **options})
    return SFTModule(policy=copy.deepcopy(policy), tokenizer=Digits(), evaluation=evaluation)


def test_rows_that_the_verifier_does_not_apply_to_are_not_counted(tiny_llama):
    def judged(completions, kind):
        return [{"right": 1.0, "wrong": 0.0, "unknown": None}[name] for name in kind]

    def known(completions, kind):
        return [0.0 if name != "right" else 1.0 for name in kind]

    batches = [prompts(4, kind=["right", "wrong", "right", "wrong"])]
    found = test(module_with(tiny_llama, verifier=judged, num_samples=3), batches)
    assert found["test/exact_match"] == found["test/sample_accuracy"] == found["test/pass@3"] == 0.5
    assert test(module_with(tiny_llama, verifier=known), batches)["test/exact_match"] == 0.5


def test_rows_without_an_answer_are_counted_as_not_judged(tiny_llama):
    missing = [None, "1", float("nan"), "2"]
    found = test(module_with(tiny_llama), [prompts(4, answer=missing)])
    assert (found["test/exact_match"], found["test/frac_not_judged"]) == (0.0, 0.5)
    nothing = test(module_with(tiny_llama, num_samples=2), [prompts(2, answer=[None, None])])
    assert nothing["test/frac_not_judged"] == 1
    assert not nothing.keys() & {"test/exact_match", "test/pass@2", "test/sample_accuracy"}


def test_samples_that_could_not_be_judged_are_null_in_predictions(tiny_llama, tmp_path):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[CompletionWriter(str(tmp_path / "predictions.jsonl"))],
    )
    loader = torch.utils.data.DataLoader([prompts(2, answer=["1", None])], batch_size=None)
    rows = trainer.predict(module_with(tiny_llama, num_samples=2), loader)[0]
    assert [row["rewards"] for row in rows] == [[0.0, 0.0], [None, None]]
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["rewards"] for row in written] == [[0.0, 0.0], [None, None]]


def test_columns_of_the_verifier_are_looked_for_before_generation(tiny_llama, monkeypatch, caplog):
    def gold_match(completions, gold):
        return [1.0] * len(completions)

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    for options, name, missing in (({}, "exact_match", "answer"), ({"verifier": gold_match}, "gold_match", "gold")):
        module = module_with(tiny_llama, num_samples=2, **options)
        runs = [lambda m: test(m, [prompts(2, other=["1", "2"])])]
        if options:
            loader = torch.utils.data.DataLoader([prompts(2, answer=["1", "2"])], batch_size=None)
            runs.append(lambda m, loader=loader: trainer.predict(m, loader))
        monkeypatch.setattr(module.engine, "generate", lambda *_, **__: pytest.fail("something was generated"))
        for run in runs:
            with pytest.raises(ValueError, match=f"reward '{name}' asks for '{missing}', which is not there; found: "):
                run(module)
    with caplog.at_level("INFO"):
        loader = torch.utils.data.DataLoader([prompts(2), prompts(3)], batch_size=None)
        rows = trainer.predict(module_with(tiny_llama, num_samples=2), loader)[0]
    assert "rewards" not in rows[0]
    assert caplog.text.count("completions are not judged: reward 'exact_match' asks for 'answer'") == 1


def test_the_verifier_is_built_once_and_at_once(tiny_llama, monkeypatch):
    built = []
    original = reward_set._resolve
    monkeypatch.setattr(reward_set, "_resolve", lambda *a: (built.append(a), original(*a))[1])
    test(module_with(tiny_llama), [prompts(2, answer=["1", "2"])] * 3)
    assert len(built) == 1
    with pytest.raises(ValueError, match="no_such_module"):
        module_with(tiny_llama, verifier="no_such_module.verifier")


def test_validation_measures_what_the_policy_writes_on_batches_of_prompts(tiny_llama):
    module, batch = module_with(tiny_llama, num_samples=2), prompts(4, answer=["1", "2", "3", None])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    ids = torch.randint(1, 40, (2, 5))
    batches = [batch, {"input_ids": ids, "labels": ids}]
    loaders = [torch.utils.data.DataLoader([one], batch_size=None) for one in batches]
    found, tested = trainer.validate(module, loaders, verbose=False)[0], test(module, [batch])
    assert {"test/pass@2", "test/exact_match"} < tested.keys()
    for name, value in tested.items():
        assert found[name.replace("test/", "val/")] == value
    assert "val/loss" in found  # a name that one loader alone has needs no number
    with pytest.raises(ValueError, match="a batch for SFTModule must hold input_ids, labels"):
        L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False).fit(module, loaders[0])


class Silent(SFTModule):
    """Scores and never writes."""

    generates = False


def test_a_module_that_writes_nothing_has_no_evaluator(tiny_llama):
    module = Silent(policy=tiny_llama, tokenizer=Digits())
    assert module.evaluator is None
    for ask in (lambda: module.generate(prompts(1)), lambda: module.predict_step(prompts(1), 0)):
        with pytest.raises(ValueError, match="Silent writes nothing"):
            ask()
    with pytest.raises(ValueError, match=r"evaluation=EvaluationConfig\(.*\) is not allowed: Silent writes nothing"):
        Silent(policy=tiny_llama, evaluation=EvaluationConfig())


def test_a_tokenizer_that_comes_later_serves_all(tiny_llama):
    module = SFTModule(policy=copy.deepcopy(tiny_llama), evaluation=EvaluationConfig(max_completion_length=4))
    with pytest.raises(ValueError, match="tokenizer=None"):
        module.generate("1 2")
    assert module.codec.stop_token_ids == (2,)
    module.tokenizer = Digits()
    assert module.codec.stop_token_ids == (2, 7)
    assert module.evaluator.decode(module.generate(prompts(2)))


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
    names = "pretrain, sft, reward, dpo, orpo, cpo, kto, distillation, online_dpo, grpo, ppo"
    with pytest.raises(ValueError, match=f"'a2c'.*{names}"):
        create_module("a2c", policy=tiny_llama)
