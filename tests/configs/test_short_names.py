"""A class of this project is named by its name alone, in a file and on the command line."""

import lightning.pytorch.cli
import pytest
import yaml

from alignment_modules import GRPOModule, SFTModule, callbacks, rewards
from alignment_modules.cli.classes import import_path
from alignment_modules.training import schedules
from alignment_modules.training.muon import MuonWithAdamW
from datamodules import PromptDataModule, SFTDataModule, tasks
from tests.configs.test_configs import printed

FILE = """
model:
  class_path: GRPOModule
  init_args:
    policy: {class_path: PolicyConfig, init_args: {path: x, lora: {class_path: LoraConfig}}}
    rewards: [{class_path: ExactMatch}, {class_path: PatientReward, init_args: {reward: ExactMatch}}]
    lr_scheduler: {class_path: LinearSchedule, init_args: {warmup_steps: 3}}
    evaluation: {verifier: {class_path: NumericAnswer}}
data:
  class_path: PromptDataModule
  init_args: {train: {class_path: AdditionPrompts, init_args: {split: train, size: 2}}}
trainer:
  callbacks: [SampleTable, {class_path: Throughput}]
"""
MODEL = ["--model=SFTModule", "--model.policy=x"]
DATA = ["--data=SFTDataModule", "--data.train=x.jsonl"]


def classes(tree):
    """The classes that a resolved configuration names, from the outside in."""
    if isinstance(tree, dict):
        named = [import_path(tree["class_path"])] if "class_path" in tree else []
        return named + [found for branch in tree.values() for found in classes(branch)]
    return [found for branch in tree for found in classes(branch)] if isinstance(tree, list) else []


def test_in_a_file(align, tmp_path):
    (tmp_path / "short.yaml").write_text(FILE)
    config = yaml.safe_load(printed(align, "fit", f"--config={tmp_path / 'short.yaml'}"))
    found = [GRPOModule, rewards.ExactMatch, rewards.PatientReward]
    found += [schedules.LinearSchedule, rewards.NumericAnswer]
    assert set(found) <= set(classes(config["model"]))
    assert config["model"]["init_args"]["policy"]["path"] == "x"
    assert classes(config["data"]) == [PromptDataModule, tasks.AdditionPrompts]
    assert classes(config["trainer"]["callbacks"]) == [callbacks.SampleTable, callbacks.Throughput]


@pytest.mark.parametrize(
    ("arguments", "part", "found"),
    [
        (["--model.lr_scheduler", "CosineSchedule"], "model", schedules.CosineSchedule),
        (['--model.lr_scheduler={"class_path": "CosineSchedule"}'], "model", schedules.CosineSchedule),
        (
            ["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=loss"],
            "model",
            lightning.pytorch.cli.ReduceLROnPlateau,
        ),
        (["--model.optimizer=MuonWithAdamW", "--model.optimizer.lr=1e-4"], "model", MuonWithAdamW),
        (["--trainer.callbacks", "SampleTable"], "trainer", callbacks.SampleTable),
        (
            ["--trainer.callbacks+=PolicyAverage", "--trainer.callbacks.decay=0.9"],
            "trainer",
            callbacks.PolicyAverage,
        ),
        (["--trainer.callbacks+=SampleTable", "--trainer.callbacks.rows=3"], "trainer", callbacks.SampleTable),
        (['--data.train={"class_path": "AdditionInstructions"}'], "data", tasks.AdditionInstructions),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_on_the_command_line(align, arguments, part, found):
    config = yaml.safe_load(printed(align, "fit", *MODEL, *DATA, *arguments))
    assert {SFTModule, SFTDataModule, found} <= set(classes(config))
    assert found in classes(config[part])
