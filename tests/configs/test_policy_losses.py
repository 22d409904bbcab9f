"""Losses and corrections of policy gradients as a configuration names them."""

import pytest
import yaml

from tests.configs.test_configs import printed

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
