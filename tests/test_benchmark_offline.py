"""The benchmark of the offline paradigms at a tiny size: its commands run; what they reach is no test's business."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.tasks.characters import character_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FEW = ("--trainer.max_epochs", "12", "--trainer.limit_test_batches", "1")
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_policy(folder):
    """Writes an untrained model with the task's tokenizer."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=len(tokenizer), **LLAMA, **ids, bos_token_id=tokenizer.bos_token_id)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One seed whose stages have run, as far as `prepare` can tell, with the samples of four problems."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    import offline as benchmark
    from quickstart import STAGES

    root = tmp_path_factory.mktemp("offline")
    for stage in STAGES:
        tiny_policy(root / stage / "export")
    rows = [
        {"prompt": "743+685=", "completions": ["3390", "3391"], "rewards": [1.0, 0.0]},
        {"prompt": "100+200=", "completions": ["3000", "3000"], "rewards": [1.0, 1.0]},
        {"prompt": "111+222=", "completions": ["0333", "3330"], "rewards": [0.0, 1.0]},
        {"prompt": "400+500=", "completions": ["0000", "9000"], "rewards": [0.0, 1.0]},
    ]
    (root / "sample_pairs").mkdir()
    (root / "sample_pairs" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = benchmark.Offline(root, 0, FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", sys.argv[:1])
        made.prepare()
        yield made


def reward_options():
    """How the benchmark trains reward models."""
    import offline as benchmark

    return benchmark.REWARD


def test_the_chosen_side_is_the_best_of_each_problem_that_has_two(offline):
    rows = [json.loads(line) for line in offline.chosen.read_text().splitlines()]
    assert rows == [
        {"prompt": "743+685=", "completion": "3390"},
        {"prompt": "111+222=", "completion": "3330"},
        {"prompt": "400+500=", "completion": "9000"},
    ]


@pytest.mark.parametrize("name", ["ORPO", "KTO", "distillation from GRPO", "control: SFT on the chosen side"])
def test_a_method_is_trained_and_measured(offline, name):
    found = offline.measure(name)
    assert found.stage == name
    assert 0 <= found.exact_match <= found.pass_at_k <= 1
    assert found.seconds > 0


def test_a_reward_model_is_trained_and_picks(offline, monkeypatch):
    monkeypatch.setattr(offline, "samples", lambda split, size: offline.pairs)
    few = ("--model.lr_scheduler.init_args.warmup_steps", "1")
    found = offline.reward_model(options=(*reward_options(), *few))
    rows = [json.loads(line) for line in (offline.pairs.parent / "pairs.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": "743+685=", "chosen": "3390", "rejected": "3391"}
    assert len(rows) == 3  # a problem without a wrong completion has none
    assert 0 <= found["held-out pair accuracy"] <= 1
    assert found["best of 8 by the verifier"] == 1.0
    assert found["one sample"] == pytest.approx(0.625)
    assert 0.25 <= found["best of 8 by the reward model"] <= 1
