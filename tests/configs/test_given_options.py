"""The tree of what a command was given, from which its mistakes are told."""

import pytest

from alignment_modules.cli.given import given_options


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["--model", "DPOModul", "--model.beta", "0.3"], {"class_path": "DPOModul", "init_args": {"beta": "0.3"}}),
        (
            ["-c", "a.yaml", "--model.beta=3"],
            {"class_path": "DPOModule", "init_args": {"policy": "x", "beta": "3"}},
        ),
        (["-c", "a.yaml", "--model", "my.Own"], {"class_path": "my.Own", "init_args": {"policy": "x", "beta": 1}}),
        (
            ["--config=a.yaml", "--model.policy.path", "y", "--model.policy.lora.r=4"],
            {"class_path": "DPOModule", "init_args": {"policy": {"path": "y", "lora": {"r": "4"}}, "beta": 1}},
        ),
        (
            ["-c", "a.yaml", "--model.lr_scheduler", "StepLR", "--model.lr_scheduler.gamma", "2"],
            {
                "class_path": "DPOModule",
                "init_args": {
                    "policy": "x",
                    "beta": 1,
                    "lr_scheduler": {"class_path": "StepLR", "init_args": {"gamma": "2"}},
                },
            },
        ),
    ],
)
def test_later_ones_stand(arguments, model, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {class_path: DPOModule, init_args: {policy: x, beta: 1}}")
    assert given_options(["fit", *arguments], tmp_path)["model"] == model


def test_lists_grow(tmp_path):
    arguments = ["--trainer.callbacks+=A", "--trainer.callbacks+=B", "--trainer.callbacks.size", "3", "stray"]
    callbacks = ["A", {"class_path": "B", "init_args": {"size": "3"}}]
    assert given_options(["fit", *arguments], tmp_path) == {"trainer": {"callbacks": callbacks}, "": "stray"}
