"""Help fits a screen or two, says what there is, and shows every option of a class with its range."""

import contextlib
import importlib.metadata
import io
import re

import pytest
import torch

from alignment_modules.cli.errors import AlignArgumentParser
from alignment_modules.cli.help import help_for


@pytest.fixture(scope="module")
def helped():
    from alignment_modules.cli import main

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        return stopped.value.code, out.getvalue() + err.getvalue()

    return run


def test_overview(helped):
    code, text = helped("--help")
    assert code == 0
    assert len(text.splitlines()) <= 40
    for part in ("pretrain", "SFTModule", "DPOModule", "GRPOModule", "--config sft", "fit", "predict", "align list"):
        assert part in text
    assert text.index("pretrain") < text.index("sft") < text.index("dpo") < text.index("grpo")


def test_version(helped):
    code, text = helped("--version")
    assert code == 0
    assert text.startswith(f"align {importlib.metadata.version('alignment-modules')} (torch {torch.__version__}, ")


def test_losses(helped):
    code, text = helped("list", "losses")
    assert code == 0
    assert "SFTModule: nll, dft\n" in text
    assert "\nDPOModule: sigmoid," in text


def test_a_subcommand(helped):
    code, text = helped("fit", "--help")
    assert code == 0
    assert len(text.splitlines()) <= 130
    for option in ("--config", "--ckpt_path", "--trainer.max_epochs", "--model.rewards.help", "--export.lora"):
        assert option in text


@pytest.mark.parametrize("name", ["PretrainModule", "SFTModule", "DPOModule", "GRPOModule"])
def test_options_of_a_module(helped, name):
    import inspect

    import alignment_modules

    code, text = helped("fit", "--model.help", name)
    assert code == 0
    options = re.findall(r"^  \w+ ", text, flags=re.MULTILINE)
    assert len(text.splitlines()) <= 2.3 * len(options) + 10  # of some options what a preset or a loss makes of it
    assert max(map(len, text.splitlines())) <= 120
    assert "torch.nn" not in text
    for level in getattr(alignment_modules, name).__mro__:
        if "__init__" in vars(level) and level.__module__.startswith("alignment_modules"):
            for option, parameter in inspect.signature(level.__init__).parameters.items():
                assert parameter.kind is not parameter.KEYWORD_ONLY or f"\n  {option} " in text, option
    if name == "GRPOModule":
        assert "[number of 0 or more, default 0.0]" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "listed", "absent"),
    [
        (["fit", "--model.help"], ["PretrainModule", "GRPOModule"], ["ActingModule", "AlignmentModule "]),
        (["fit", "--data.help"], ["SFTDataModule", "PromptDataModule"], ["AlignmentDataModule"]),
        (["fit", "--model.rewards.help"], ["ExactMatch", "SoftOverlong"], ["RewardSet", "RewardError"]),
        (["fit", "--model.lr_scheduler.help"], ["CosineSchedule", "StepLR"], ["  Schedule ", "_Floored"]),
        (["fit", "--trainer.callbacks.help"], ["SampleTable", "ModelCheckpoint"], ["FitConfigCallback"]),
        (["list", "--help"], ["usage: align list KIND", "modules | data"], []),
        (["list", "rewards"], ["ExactMatch"], []),
        (["list", "callbacks"], ["Throughput"], []),
        (["list", "schedules"], ["LinearSchedule"], []),
        (["list", "losses"], ["sppo_hard", "cispo"], []),
        (["list", "presets"], ["dapo", "arXiv:2503.14476", "epsilon_high 0.28"], []),
        (["list", "recipes"], ["  sft  ", "  lora  ", "  quickstart/sft ", "Supervised fine-tuning of"], ["..."]),
        (["list", "tasks"], ["AdditionCorpus"], []),
    ],
)
def test_what_there_is(helped, arguments, listed, absent):
    code, text = helped(*arguments)
    assert code == 0
    assert len(text.splitlines()) <= 40
    assert all(name in text for name in listed), text
    assert not any(name in text for name in absent), text


def test_mistakes(helped):
    code, text = helped("fit", "--model.help", "GRPModule")
    assert code == 2
    assert "--model.help GRPModule: there is no such class" in text
    assert "GRPOModule" in text
    code, text = helped("list", "models")
    assert code == 2
    assert "align list models: must be one of modules, data" in text
    code, text = helped("list")
    assert code == 2
    assert "align list: must be one of" in text


def test_other_classes_keep_the_usual_help():
    assert help_for(AlignArgumentParser(), ["fit", "--trainer.logger.help", "TensorBoardLogger"]) is None
    assert help_for(AlignArgumentParser(), ["fit", "--model", "SFTModule"]) is None
