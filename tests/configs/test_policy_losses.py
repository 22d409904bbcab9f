"""Losses and corrections of policy gradients as a configuration names them."""

import pytest
import yaml

from alignment_modules.cli.hints import instead
from alignment_modules.functional import Correction
from alignment_modules.functional.policy_losses import LOSSES
from tests.configs.test_configs import QUIET, RECIPES, printed

ARGUMENTS = ["--model=GRPOModule", "--model.policy=x", "--model.rewards=ExactMatch", "--data=PromptDataModule"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--model.correction", "tis"], {"correction": "tis"}),
        (
            ["--model.correction={level: sequence, metric: k2, action: mask, high: 0.1}"],
            {"correction": {"level": "sequence", "metric": "k2", "action": "mask", "high": 0.1}},
        ),
        (
            ["--model.loss=sapo", "--model.loss_options={temperature_neg: 2.0}"],
            {"loss_options": {"temperature_neg": 2.0}},
        ),
        (["--model.loss=sapo", "--model.loss_options.temperature_neg=2.0"], {"loss_options": {"temperature_neg": 2.0}}),
        (["--model.importance_level=sequence_token"], {"importance_level": "sequence_token", "epsilon": None}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_on_the_command_line(align, arguments, found):
    config = yaml.safe_load(printed(align, "fit", *ARGUMENTS, "--data.train=x.jsonl", *arguments))
    given = config["model"]["init_args"]
    for name, value in found.items():
        if isinstance(value, dict):
            assert value.items() <= given[name].items()
        else:
            assert given[name] == value


@pytest.mark.parametrize("option", ["sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_neg"])
def test_another_programs_name_of_a_losss_number_leads_to_one_that_exists(option):
    loss, _, number = option.partition("_")
    assert instead(f"model.{option}") == f"model.loss_options.{number}"
    assert number in LOSSES[loss].numbers


def test_a_run_with_a_correction_of_its_own_and_a_losss_numbers(align, model_folder, data):
    """Options that are values of their own reach the module, and what it saved builds it again."""
    options = ["--model.correction={level: sequence, metric: k2, action: mask, high: 0.1}", "--model.loss=sapo"]
    options += ["--model.loss_options={temperature_neg: 2.0}", "--model.max_completion_length=4"]
    places = [f"--config={RECIPES['grpo']}", f"--model.policy.path={model_folder}", f"--data.train={data['grpo']}"]
    cli = align("fit", *places, *QUIET, *options, "--trainer.max_steps=1")
    assert cli.model.correction == Correction("sequence", "k2", "mask", high=0.1)
    assert cli.model.surrogate.numbers == {"temperature_pos": 1.0, "temperature_neg": 2.0}
    assert cli.model.hparams["loss_options"] == {"temperature_neg": 2.0}
