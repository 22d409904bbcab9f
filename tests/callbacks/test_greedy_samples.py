"""Samples of modules without rollouts: greedy completions of validation prompts, which change nothing."""

import random

import lightning as L
import numpy as np
import pytest
import torch

from alignment_modules import DPOModule, PretrainModule, RewardModule, SFTModule
from alignment_modules.callbacks import SampleTable
from alignment_modules.callbacks.samples import read_rows
from datamodules import PreferenceDataModule, PretrainDataModule, SFTDataModule

CHAT = [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "7"}]
DATA = {
    "sft": (SFTDataModule, [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(6)]),
    "dpo": (PreferenceDataModule, [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": "x"} for n in range(6)]),
    "pretrain": (PretrainDataModule, [{"text": f"{n}+1={n + 1}"} for n in range(6)]),
}
MODULES = {"sft": SFTModule, "dpo": DPOModule, "pretrain": PretrainModule}


@pytest.fixture
def fit(model_folder, tmp_path):
    def run(kind, *callbacks, validation=None, dropout=0.0, **options):
        L.seed_everything(3, verbose=False)
        source, rows = DATA[kind]
        data = source(
            train=rows,
            validation=rows[:4] if validation is None else validation,
            tokenizer=model_folder,
            batch_size=2,
            max_length=32,
        )
        policy = {"path": model_folder}
        module = MODULES[kind](
            policy=policy, evaluation={"max_completion_length": 5}, optimizer=lambda groups: torch.optim.AdamW(groups)
        )
        for child in module.policy.modules():
            if hasattr(child, "attention_dropout"):
                child.attention_dropout = dropout
        trainer = L.Trainer(
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            max_epochs=2,
            log_every_n_steps=1,
            **options,
        )
        trainer.fit(module, data)
        return module

    return run


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_first_validation_prompts_are_completed(fit, tmp_path, kind):
    fit(kind, SampleTable(every_n_steps=3, rows=2))
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["id"] for row in rows] == ["1/0/0", "1/1/0", "3/0/0", "3/1/0", "6/0/0", "6/1/0"]
    assert [row["prompt"] for row in rows[:2]] == ["0+1=", "1+1="]
    for row in rows:
        assert "".join(row["tokens"]).removesuffix("</s>") == row["completion"]
        assert len(row["tokens"]) == len(row["sampled_logps"]) <= 5
        assert all(logp <= 0 for logp in row["sampled_logps"])
    assert (tmp_path / "samples.html").exists()


def test_what_was_expected_and_the_turns_are_shown(fit, tmp_path):
    fit("sft", SampleTable(every_n_steps=100), validation=[{"messages": CHAT}])
    (row,) = read_rows(tmp_path / "samples.jsonl")
    assert row["messages"] == CHAT[:1]
    assert row["expected"] == "7"
    assert row["prompt"] == "<|user|>3+4=<|assistant|>"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_is_the_same_bit_for_bit(fit, kind):
    def state():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    plain = fit(kind, dropout=0.2)
    before = state()
    looked = fit(kind, SampleTable(every_n_steps=1), dropout=0.2)
    after = state()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert plain.policy.training == looked.policy.training
    assert [child.training for child in plain.modules()] == [child.training for child in looked.modules()]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, looked.state_dict()[name]), name


def test_text_without_prompts_is_said_and_own_prompts_are_completed(fit, tmp_path):
    with pytest.warns(UserWarning, match="no validation rows with a prompt; give it `prompts`"):
        fit("pretrain", SampleTable())
    assert not (tmp_path / "samples.jsonl").exists()
    fit("pretrain", SampleTable(every_n_steps=100, prompts=["1+1=", "2"]))
    assert [row["prompt"] for row in read_rows(tmp_path / "samples.jsonl")] == ["1+1=", "2"]


def test_mistakes(model_folder, boring, make_trainer, loader):
    with pytest.raises(ValueError, match=r"prompts=\['a', ''\] must be a list of texts, none of them empty"):
        SampleTable(prompts=["a", ""])
    with pytest.raises(ValueError, match=r"prompts=\[\] must be"):
        SampleTable(prompts=[])
    with pytest.raises(ValueError, match=r"prompts=\['a'\] is not allowed with Boring"):
        make_trainer(SampleTable(prompts=["a"])).fit(boring(), loader)
    reward = RewardModule(policy={"path": model_folder, "head": "scalar"})
    with pytest.raises(TypeError, match=r"SampleTable needs RewardModule.last_rollout, or a policy that generates"):
        SampleTable().setup(make_trainer(), reward, "fit")
