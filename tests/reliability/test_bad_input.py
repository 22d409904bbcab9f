"""Bad input, through the command line: the tables of `bad_options`, `bad_cases`, `bad_environments`, and the rest."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from alignment_modules.callbacks import CheckpointError
from alignment_modules.cli.failures import is_message
from alignment_modules.rewards import RewardError
from tests.reliability.bad_cases import CASES, FRESH, PARSING, TRAINING, Case
from tests.reliability.bad_environments import ENVIRONMENTS, MODULE
from tests.reliability.bad_options import OPTIONS
from tests.rollouts.environments.acting import SPECIAL, TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for folder in ("quickstart", "recipes") for path in (ROOT / "configs" / folder).glob("*.yaml"))

MASKED = '''
from datamodules import SFTDataModule

class Masked(SFTDataModule):
    """Nothing is supervised."""

    def __init__(self, tokenizer: str):
        super().__init__(train="sft.jsonl", tokenizer=tokenizer, batch_size=4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["labels"].fill_(-100)
        return batch
'''


@pytest.fixture(scope="module", autouse=True)
def bad(workplace, write_model):
    """The files that the tables name."""
    folder = workplace / "bad"
    (folder / "empty").mkdir(parents=True)
    row = json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n"
    files = {
        "option.yaml": "model: {init_args: {betta: 0.3}}\n",
        "trainer.yaml": "trainer: {max_epoch: 3}\n",
        "twice.yaml": "model:\n  init_args:\n    optimizer: {class_path: SGD, init_args: {\n      lr: 1.0,\n"
        "      momentum: 0.5,\n      lr: 2.0}}\n",
        "policy.yaml": "path: policy\ndtype: float32\npath: start\n",
        "names.yaml": "model: {init_args: {policy: bad/policy.yaml}}\n",
        "environments.yaml": "model:\n  init_args:\n    environments:\n      easy: my_environments.Asks\n"
        "      hard: my_environments.Silent\n      easy: my_environments.Several\n",
        "named.jsonl": '{"prompt": "1+1=", "goal": 2, "environment": "midle"}\n' * 8,
        "broken.yaml": "trainer: {max_epochs: [\n",
        "line.jsonl": row * 2 + '{"prompt": "1+1=", "comp\n' + row,
        "number.jsonl": row + "12\n",
        "column.jsonl": row + '{"prompt": "1+1="}\n',
        "empty.jsonl": "",
        "no_target.jsonl": '{"text": ""}\n' * 2,
        "optimiser.yaml": "model: {init_args: {optimiser: {class_path: torch.optim.SGD}}}\n",
        "nothing_of_models.yaml": "trainer: {max_epochs: 1}\n",
        "plateau.yaml": "model: {init_args: {lr_scheduler: {class_path: ReduceLROnPlateau}}}\n",
        "nothing.yaml": "# nothing\n",
        "list.yaml": "- 1\n",
        "fresh.yaml": FRESH,
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (workplace / "my_data.py").write_text(MASKED)
    (workplace / "my_environments.py").write_text(MODULE)
    write_model(workplace / "acting", [*map(chr, range(32, 127)), "\n"], special=SPECIAL, template=TEMPLATE)
    checkpoint = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "alignment_module": {"paradigm": "dpo"}}
    torch.save(checkpoint, folder / "other.ckpt")
    torch.save(checkpoint | {"callbacks": {"mine": Case("", [], [])}}, folder / "pickle.ckpt")
    torch.save({"state_dict": {}}, folder / "weights.ckpt")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "short.ckpt").write_bytes((folder / "other.ckpt").read_bytes()[:300])


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in (OPTIONS | CASES | ENVIRONMENTS).items()]
)
def test_bad_input(align, case):
    result = align("fit", "-c", f"{case.paradigm}.yaml", "--trainer.max_epochs", "1", *case.arguments)
    message = result.text if result.error is None else f"{result.text}\n{result.error}"
    assert result.code == (2 if case.when == PARSING else 1), message
    missing = [part for part in case.parts if part not in message]
    assert not missing, message
    assert (result.root / "trained").exists() == (case.when == TRAINING)
    if case.when == PARSING:
        assert message.endswith("help: align fit --help\n")
        assert len(message.splitlines()) <= 6, message
    else:
        assert not list(result.root.rglob("*.safetensors"))  # nothing is exported
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fut"], ["'fut' is not a subcommand", "did you mean 'fit'?", "validate"]),
        (["fti"], ["did you mean 'fit'?", "inspect, list\n"]),
        (["lst"], ["did you mean 'list'?"]),
        ([], ["subcommand", "fit", "align --help"]),
        (["fit"], ["--config NAME_OR_FILE is missing", "--data and --model: required", "align list recipes"]),
        (["fit", "-c", "bad/nothing_of_models.yaml"], ["error: --data and --model: required", "align list recipes"]),
        (["test", "--data", "SFTDataModule"], ["NAME_OR_FILE is missing, or in its place --model: required"]),
        (["fit", "--data.train", "x.jsonl"], ["--data.train=x.jsonl: name the data module", "--data SFTDataModule"]),
        (["fit", "--model", "DPOModule", "--data", "PreferenceDataModule"], ["--model.policy: required by DPOModule"]),
    ],
)
def test_incomplete_commands(align, arguments, parts):
    result = align(*arguments)
    assert result.code == 2
    assert [part for part in parts if part not in result.text] == [], result.text
    assert len(result.text.splitlines()) <= 4


def test_what_the_search_does_not_find_is_told_in_the_parsers_words(align, monkeypatch):
    result = align("fit", "-c", "sft.yaml", "--trainer.logger", '{"class_path": "nosuch"}')
    assert (result.code, result.error) == (2, None)
    assert "trainer.logger" in result.text
    assert "nosuch" in result.text
    monkeypatch.setattr("alignment_modules.cli.errors.mistakes", lambda *given: int("x"))
    result = align("fit", "-c", "dpo.yaml", "--model.betta", "3")
    assert "Option 'betta' is not accepted" in result.text


def test_the_whole_traceback_on_demand(align, monkeypatch):
    monkeypatch.setenv("ALIGN_TRACEBACK", "1")
    result = align("fit", "-c", "grpo.yaml", "--model.num_generations", "1")
    assert isinstance(result.error, ValueError)
    assert result.error.__traceback__ is not None


def test_an_error_that_nobody_foresaw_keeps_its_traceback(align, monkeypatch):
    monkeypatch.setattr("alignment_modules.paradigms.sft.SFTModule.objective", lambda module, batch: int("x"))
    result = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "1")
    assert isinstance(result.error, ValueError)
    assert "invalid literal for int()" in str(result.error)


@pytest.mark.parametrize("split", ["validation", "test", "predict"])
def test_evaluation_without_rows(align, split):
    result = align(split.replace("validation", "validate"), "-c", "sft.yaml")
    assert result.code == 1
    assert f"--data.{split}" in result.text
    assert result.error is None


def test_a_checkpoint_that_does_not_fit(align):
    """Weights of a whole model into one with adapters: torch's list of keys, without the calls that led there."""
    root = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "1").root
    adapters = ["--model.policy.path", "policy", "--model.policy.lora.r", "4", "--trainer.default_root_dir", str(root)]
    result = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "2", *adapters, "--ckpt_path", "last")
    assert (result.code, result.error) == (1, None)
    assert "lora" in result.text


def test_a_checkpoint_of_more_epochs_than_asked_for(align):
    root = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "3").root
    again = ["--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
    result = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "1", *again)
    assert (result.code, result.error) == (1, None)
    assert "max_epochs=1" in result.text


def test_a_root_folder_that_is_a_file(align, tmp_path):
    (tmp_path / "file").touch()
    result = align("fit", "-c", "sft.yaml", "--trainer.default_root_dir", str(tmp_path / "file"))
    assert (result.code, result.error) == (1, None)
    assert str(tmp_path / "file") in result.text


USERS = """
import torch
from alignment_modules import SFTModule

class Refuses(SFTModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=-1.0)

class Breaks(SFTModule):
    def configure_optimizers(self):
        return self.no_such_thing
"""


def test_errors_in_code_of_the_users(align, workplace, monkeypatch):
    """In the set-up, what libraries raise on purpose is told with the way to its traceback; all else keeps its own."""
    (workplace / "my_modules.py").write_text(USERS)
    refused = align("fit", "-c", "sft.yaml", "--model", "my_modules.Refuses")
    assert (refused.code, refused.error) == (1, None)
    assert "Invalid learning rate: -1.0\n  (set ALIGN_TRACEBACK=1 to see where" in refused.text
    assert isinstance(align("fit", "-c", "sft.yaml", "--model", "my_modules.Breaks").error, AttributeError)
    monkeypatch.setattr(
        "alignment_modules.paradigms.sft.SFTModule.objective", lambda module, batch: torch.optim.SGD([], lr=-1.0)
    )
    in_a_step = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "1")
    assert isinstance(in_a_step.error, ValueError)  # torch's own, but a batch is worked on


def test_what_is_told_in_one_message():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    told = (ValueError("x"), OSError("x"), ImportError("x"), RuntimeError("x"))
    always = (RewardError("x"), CheckpointError("x"), MisconfigurationException("x"), FloatingPointError("x"))
    never = (KeyError("x"), AttributeError("x"), IndexError("x"), ZeroDivisionError("x"), AssertionError("x"))
    for loop in (trainer.fit_loop.epoch_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        for within in (False, True):
            loop.batch_progress.current.ready += within
            assert [is_message(error, trainer) for error in told] == [not within] * len(told)
            assert all(is_message(error, trainer) for error in always)
            assert not any(is_message(error, trainer) for error in never)
        loop.batch_progress.current.completed += 1
    assert is_message(ValueError("x"))


class TestNothingLost:
    def test_predictions_before_a_failure_are_there(self, align):
        evaluation = ["--model.evaluation.num_samples", "1", "--model.evaluation.verifier", "my_rewards.FailsLater"]
        evaluation += ["--model.evaluation.max_completion_length", "4"]
        result = align("predict", "-c", "sft.yaml", "--data.predict", "prompts.jsonl", *evaluation)
        assert result.code == 1
        assert "reward 'FailsLater' raised in row 3" in result.text
        assert "ZeroDivisionError: no reward for 2+3" in result.text
        rows = [json.loads(line) for line in (result.root / "predictions.jsonl").read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(8))  # two batches of four; the third failed

    def test_checkpoints_before_a_failure_resume(self, align):
        every = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
        common = ["--data.shuffle", "false", "--trainer.max_epochs", "1"]
        rewards = ["--model.rewards", "my_rewards.FailsLater", "--trainer.callbacks", json.dumps([every])]
        failed = align("fit", "-c", "grpo.yaml", *common, *rewards)
        assert failed.code == 1
        assert "ZeroDivisionError: no reward for 2+3" in failed.text
        paths = sorted(failed.root.rglob("*.ckpt"))
        assert [torch.load(path, weights_only=True)["global_step"] for path in paths] == [1, 2]
        resumed = align("fit", "-c", "grpo.yaml", *common, "--ckpt_path", paths[-1])
        assert resumed.code == 0, resumed.text
        (last,) = resumed.root.rglob("*.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_typo_beside_a_shipped_configuration_is_named(align, path):
    result = align("fit", "--config", path, "--model.no_such_option", "1")
    assert result.code == 2
    assert "error: --model.no_such_option=1: " in result.text
    assert "has no option 'no_such_option'" in result.text
