"""Class paths of 0.1, in configurations and in checkpoints, are answered with those of now."""

import pytest
import torch

from alignment_modules import SFTModule
from alignment_modules.cli.classes import import_path
from alignment_modules.training.moved import MOVED, new_paths, tell_moved
from tests.workplace import align, workplace  # noqa: F401

SCHEDULE = "alignment_modules.optimization.CosineSchedule"
NOW = "alignment_modules.training.schedules.CosineSchedule"
CLASSES = {
    "pretrain": "PretrainModule",
    "sft": "SFTModule",
    "dpo": "DPOModule",
    "grpo": "GRPOModule",
    "base": "AlignmentModule",
    "optimization": "CosineSchedule",
    "atomic_checkpoint": "AtomicCheckpointIO",
}


@pytest.mark.parametrize("module", MOVED)
def test_the_new_path_holds_the_class(module):
    name = CLASSES[module.rpartition(".")[2]]
    old = f"{module}.{name}"
    assert import_path(new_paths(old)[old]).__name__ == name


def test_other_paths_have_not_moved():
    assert tell_moved({"a": ["alignment_modules.training.module.AlignmentModule", 3], "b": None}) == ""


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [
        ("--model.lr_scheduler", SCHEDULE, NOW),
        ("--model", "alignment_modules.sft.SFTModule", "alignment_modules.paradigms.sft.SFTModule"),
    ],
)
def test_the_command_line_names_the_new_path(align, option, old, new):  # noqa: F811
    refused = align("fit", "-c", "sft.yaml", option, old)
    assert refused.code == 2
    assert f"{option}={old}: has moved; use {new}, or its name alone: {new.rpartition('.')[2]}" in refused.text


def test_a_checkpoint_names_the_new_path(tmp_path, tiny_llama):
    entry = {"paradigm": "sft", "num_tokens": 0.0, "extra": {}}
    given = {"lr_scheduler": {"class_path": SCHEDULE}}
    checkpoint = {"alignment_module": entry, "hyper_parameters": given, "state_dict": {}}
    with pytest.raises(ValueError, match=f"earlier version.*{SCHEDULE} has moved: it is {NOW} now"):
        SFTModule(policy=tiny_llama).on_load_checkpoint(checkpoint)
    path = tmp_path / "last.ckpt"
    given |= {
        "_class_path": "alignment_modules.sft.SFTModule",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    torch.save(checkpoint | {"pytorch-lightning_version": "2.6.0"}, path)
    with pytest.raises(ValueError, match=r"alignment_modules.sft.SFTModule has moved: it is"):
        SFTModule.load_from_checkpoint(path)
