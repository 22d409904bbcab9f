"""The measured processes of the benchmark run and report; their speed is not a test's business."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datamodules.tasks.problems import SPLITS, split_of

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all cases: the workload is written once."""
    return tmp_path_factory.mktemp("workload")


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder as its neighbours do, by its bare name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    "options",
    [
        ["sft"],
        pytest.param(["sft", "--lora", "--variant", "checkpointing"], marks=pytest.mark.slow),
        pytest.param(["kto"], marks=pytest.mark.slow),
        pytest.param(["orpo", "--variant", "checkpointing"], marks=pytest.mark.slow),
        pytest.param(["reward", "--lora"], marks=pytest.mark.slow),
        pytest.param(["grpo", "--bare"], marks=pytest.mark.slow),
        pytest.param(["dpo", "--variant", "cached"], marks=pytest.mark.slow),
        ["grpo", "--check"],
        pytest.param(["grpo", "--beta", "0.04", "--profile", "3"], marks=pytest.mark.slow),
        pytest.param(["rloo", "--beta", "0.05"], marks=pytest.mark.slow),
        pytest.param(["online_dpo", "--check"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_measured_run_reports_every_step(options, folder):
    command = [sys.executable, str(BENCHMARKS / "run_ours.py"), *options, "--folder", str(folder), "--threads", "1"]
    done = subprocess.run([*command, "--steps", "1", "--warmup", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert [math.isfinite(loss) for loss in result["losses"]] == [True, True]
    assert result["tokens_per_second"] > 0
    assert result["peak_mb"] > result["baseline_mb"]
    assert bool(result["profile"]) == ("--profile" in options)


def test_rollouts_are_timed(folder):
    command = [sys.executable, str(BENCHMARKS / "generation.py"), "ours", "--folder", str(folder), "--threads", "1"]
    command += ["--group", "3", "--prompt-tokens", "20", "--prompts", "2", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.removeprefix("RESULT "))
    assert len(result["seconds"]) == len(result["tokens"]) == 2
    assert all(6 <= tokens <= 6 * 128 for tokens in result["tokens"])
    assert result["peak_mb"] > 0


def test_prompts_have_the_length_asked_for(script):
    prompts = script("workload").make_prompts("7m", 300, 40)
    assert sum(map(len, prompts)) / 40 == pytest.approx(300, rel=0.15)
    assert max(map(len, prompts)) <= 600
    assert min(min(row) for row in prompts) > 2  # words, no special token


def test_an_option_of_one_mode_is_refused_in_the_other():
    command = [sys.executable, str(BENCHMARKS / "sampling.py"), "--at-scale", "--top-p", "0.9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "--top-p has no effect with --at-scale" in done.stderr


def test_an_unknown_variant_is_refused():
    command = [sys.executable, str(BENCHMARKS / "run_ours.py"), "sft", "--variant", "cached"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "--variant cached: sft has default, checkpointing" in done.stderr


def meta_model(script, size, lora, **config):
    """A model of the benchmark's without weights, on which operations can be counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignment_modules.policies import LoraConfig
    from alignment_modules.policies.lora import add_lora

    workload = script("workload")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**workload.SIZES[size].model, **config, attn_implementation="eager"))
        return add_lora(model, LoraConfig(**workload.LORA)) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("size", ["7m", "135m"])
def test_the_floor_counts_the_products_of_the_size_given(script, size, lora):
    """Against torch's own count, of a row whose attention computes the whole square."""
    floor, tokens = script("floor"), 60
    model = meta_model(script, size, lora)
    counted = {}
    for train in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            logits = model(torch.zeros((1, tokens), dtype=torch.int64, device="meta")).logits
            if train:
                logits.sum().backward()
        counted[train] = counter.get_total_flops()
    work = floor.work(script("workload").SIZES[size].model, tokens, tokens**2, tokens)
    # Positions are multiplied with frequencies, too; with LoRA the inputs of the first layer need no gradient.
    assert counted[False] == pytest.approx(work.forward(lora=lora), rel=1e-3)
    assert counted[True] == pytest.approx(work.train(lora=lora), rel=3e-2 if lora else 1e-3)


def test_the_floor_of_a_step_shares_prompts_and_averages_steps(script):
    floor, sizes = script("floor"), script("workload").SIZES
    rows = [{"prompt": "a " * 9, "completion": " b" * 4, "label": True}, {"prompt": "a", "completion": " b b"}] * 8
    model = sizes["7m"].model

    def scored(prompt, *completions):
        return floor.work(model, *floor.tree(prompt, completions), sum(completions))

    alone = [scored(9, 5).train() + scored(1, 3).train() for _ in range(4)]
    assert floor.step_operations("sft", rows, "7m") == pytest.approx(sum(alone))
    # the policy scores the other row's completion behind a prompt whose states it has
    behind = scored(9, 5, 3).forward() - scored(9, 5).forward() + scored(1, 3, 5).forward() - scored(1, 3).forward()
    reference = scored(9, 5, 3).forward() + scored(1, 3, 5).forward()
    assert floor.step_operations("kto", rows, "7m") == pytest.approx(sum(alone) + 4 * (behind + reference))
    pairs = [{"prompt": "a " * 9, "chosen": " b" * 4, "rejected": " c"}]
    both, batch = scored(9, 5, 2), sizes["135m"].batch
    assert floor.step_operations("dpo", pairs, "7m") == pytest.approx(4 * (both.train() + both.forward()))
    assert floor.step_operations("dpo", pairs, "7m", cached=True) == pytest.approx(4 * both.train())
    sampled = scored(9, 3, 3)
    online = floor.step_operations("online_dpo", [{"prompt": "a " * 9}], "7m", beta=0.1, sampled=3.0)
    assert online == pytest.approx(4 * (sampled.train() + 2 * sampled.forward()))
    lengths = {size: floor.step_operations("reward", pairs, size) for size in sizes}
    assert lengths["135m"] / lengths["7m"] > 8 * batch["reward"] / sizes["7m"].batch["reward"]


def test_memory_is_compared_at_the_same_checkpointing_setting(script):
    compare = script("compare_trl")
    run = {"tokens_per_second": 2.0, "peak_mb": 3.0}
    entries = [compare.Entry("ours", "dpo", name) for name in ("default", "checkpointing", "cached")]
    entries += [compare.Entry("trl", "dpo", name) for name in ("default", "no_checkpointing", "precomputed")]
    lines = compare.ratio_table({entry: [run] for entry in entries}).splitlines()[2:]
    assert [tuple(line.split(" | ")[1:3]) for line in lines] == [
        ("default", "default"),
        ("default", "no_checkpointing"),
        ("checkpointing", "default"),
        ("cached", "precomputed"),
    ]


def test_both_libraries_get_the_same_fresh_weights(script):
    """Whatever was drawn before: adapters' first factors and a scalar head, nothing else."""
    from alignment_modules.policies import LoraConfig, PolicyConfig, build_policy

    workload = script("workload")
    config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_policy(PolicyConfig(config=config, head="scalar", lora=LoraConfig(**workload.LORA)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        workload.draw_fresh(model)
        after = model.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed == {name for name in after if "lora_A" in name or "score.modules_to_save" in name}
        drawn.append({name: after[name] for name in changed})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.parametrize("kind", ["forward", pytest.param("jsd", marks=pytest.mark.slow)])
def test_the_memory_of_a_divergence_is_measured_both_ways(kind):
    sizes = ["--tokens", "64", "--hidden", "8", "--vocabulary", "3000", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "divergence_memory.py"), *sizes, "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| chunked |" in done.stdout
    assert "| plain |" in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-4


def test_the_curriculum_is_measured_on_a_few_hard_problems_among_easy_ones(script):
    curriculum = script("curriculum")
    rows = curriculum.problems(7)
    read = [[int(number[::-1]) for number in (*row["prompt"][0]["content"].split("+"), row["answer"])] for row in rows]
    first, second, answers = np.array(read).T
    assert (answers == first + second).all()
    assert {len(row["prompt"][0]["content"]) for row in rows} == {9}
    assert {len(row["answer"]) for row in rows} == {5}
    assert (split_of(first, second) == SPLITS.index("train")).all()
    assert len({(min(pair), max(pair)) for pair in zip(first, second, strict=True)}) == len(rows) == 512
    small = np.maximum(first, second) < 100
    carried = (first % 10 + second % 10 > 9) | (first // 10 % 10 + second // 10 % 10 > 9)
    assert small[:448].all()
    assert not carried[:448].any()
    assert small[448:].sum() <= 1
    assert carried[448:].mean() > 0.5
    assert rows != curriculum.problems(8)
