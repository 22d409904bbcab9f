"""Two processes (gloo) give the gradients of one process on the union batch, for every paradigm, whole or in shards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.two_ranks import ADAPTERS, BESIDE, COUPLED, QUANTIZED, SOURCED, SOURCES, VARIANTS, WHOLE
from tests.episodes import OPTIONS
from tests.paradigms import ROWS

ROOT = Path(__file__).parents[2]
FURTHER = [f"{name} {label}" for name, row in ROWS.items() for label in row.batches]
FURTHER += ["ppo scaled", "ppo shared with nll", "ppo bootstrap", "ppo turns"]
FURTHER += ["aot", "aot_unpaired", "experts", "experts weighted", "batch", "unjudged", "dynamic", "controllers"]
FURTHER += ["orpo tokens", "teachers", "on policy", "on policy lora"]
FURTHER += [f"{name} lora" for name in ROWS]
FURTHER += [f"grpo {label}" for label in COUPLED]
FURTHER += [f"{name} sources" for name in SOURCED]
FURTHER += ["teacher", "muon", "sft part", "dpo part"]
FURTHER += [*(f"dpo {kind}" for kind in ADAPTERS), *BESIDE]
FURTHER += ["ppo eva", "sft eva"]
FURTHER += [f"{name} {kind}" for name, kind in QUANTIZED]
FURTHER += [*(f"{name} episodes" for name in OPTIONS), "grpo episodes of one rank"]
FURTHER += ["distillation episodes", "distillation episodes of one rank"]


def run(folder, *more, timeout):
    """Runs the script; a hang is a failure."""
    command = [sys.executable, "-m", "tests.contract.two_ranks", str(folder), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`one`, `ddp` and `fsdp2`, a folder each."""
    return run(tmp_path_factory.mktemp("ranks"), timeout=600)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    return run(tmp_path_factory.mktemp("variants"), "variants", timeout=2400)


def sources_of(metrics):
    return {name: value for name, value in metrics.items() if name.split("/")[1] in SOURCES}


def assert_same_update(folder, strategy, name):
    one, two = (torch.load(folder / ranks / f"{name}.pt", weights_only=True) for ranks in ("one", strategy))
    assert one["change"].keys() == two["change"].keys()
    assert max(float(value.abs().max()) for value in one["change"].values()) > 1e-3
    for key, value in one["change"].items():
        torch.testing.assert_close(two["change"][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert two["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], abs=1e-5)
    assert two["metrics"]["train/num_tokens"] == one["metrics"]["train/num_tokens"]
    for key in ("train/router_loss", "train/rewards/calibration_error", "train/rewards/min", "train/rewards/max"):
        assert two["metrics"].get(key) == pytest.approx(one["metrics"].get(key), abs=1e-5)
    assert sources_of(two["metrics"]) == pytest.approx(sources_of(one["metrics"]), rel=1e-5, abs=1e-5)
    for name, state in one["extra"].get("coefficients", {}).items():
        assert two["extra"]["coefficients"][name] == pytest.approx(state, rel=1e-5), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*ROWS, *FURTHER])
def test_same_update_as_one_process(results, name):
    assert_same_update(results, "ddp", name)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in (*ROWS, *FURTHER) if name not in WHOLE])
def test_same_update_in_shards(results, name):
    assert_same_update(results, "fsdp2", name)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SOURCED)
def test_a_source_that_one_rank_lacks_is_logged_of_all(results, name):
    found = sources_of(torch.load(results / "ddp" / f"{name} sources.pt", weights_only=True)["metrics"])
    assert {f"train/{source}/loss" for source in SOURCES} <= found.keys()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("adapters", ["", " lora"])
@pytest.mark.parametrize(("name", "label"), VARIANTS)
def test_same_update_in_shards_of_every_loss_and_baseline(variants, name, label, adapters):
    assert_same_update(variants, "fsdp2", f"{name} {label}{adapters}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("adapters", ["", " lora"])
@pytest.mark.parametrize(("name", "label"), VARIANTS)
def test_same_update_of_every_loss_and_baseline(variants, name, label, adapters):
    assert_same_update(variants, "ddp", f"{name} {label}{adapters}")


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sampling_ranks_of_unequal_lengths_finish(results, strategy):
    """Ranks sample completions of different lengths and form different numbers of micro-batches."""
    assert torch.load(results / strategy / "sampled.pt", weights_only=True)["metrics"]["train/reward"] >= 0
