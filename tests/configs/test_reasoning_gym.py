"""The overlay of reasoning-gym on recipes that sample, with what stands for the package."""

from pathlib import Path

import pytest

from tests import puzzles

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("recipe", ["grpo", "online_dpo"])
def test_the_overlay_runs(align, model_folder, monkeypatch, recipe):
    puzzles.install(monkeypatch)
    configs = [f"--config={CONFIGS / path}" for path in (f"recipes/{recipe}.yaml", "data/reasoning_gym.yaml")]
    few = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--data.train.init_args.size=16"]
    short = ["--model.max_completion_length=4", "--data.max_length=64", "--trainer.enable_progress_bar=false"]
    cli = align("fit", *configs, f"--model.policy.path={model_folder}", *few, *short)
    assert cli.trainer.global_step == 1
    assert float(cli.trainer.callback_metrics["train/rewards/reasoning_gym/mean"]) == 0  # no tags, no answer
    row = cli.datamodule.sources["train"][0]
    assert row["task"] == "('chain_sum', {'max_terms': 3})"
