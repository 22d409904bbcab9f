"""Environments and tools from configuration files and flags, in every command that runs a policy."""

import pytest
import yaml

from tests.rollouts.environments.conftest import acting_folder  # noqa: F401
from tests.workplace import write_lines

SUM = "tests.rollouts.environments.acting.Sum"


@pytest.fixture
def config(acting_folder, tmp_path):  # noqa: F811
    rows = [{"prompt": [{"role": "user", "content": f"Add up, {n}."}], "goal": 6 + n} for n in range(8)]
    data = {"train": write_lines(tmp_path / "prompts.jsonl", rows), "batch_size": 4, "max_length": 64}
    model = {
        "policy": acting_folder,
        "environments": {"class_path": SUM},
        "tool_options": {"format": "tests.rollouts.environments.acting.LettersFormat", "time_limit": 3},
        "max_turns": 3,
        "num_generations": 2,
        "max_completion_length": 60,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_steps": 2}
    folder = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}}
    trainer["callbacks"] = [folder]
    whole = {
        "trainer": trainer,
        "model": {"class_path": "GRPOModule", "init_args": model},
        "data": {"class_path": "PromptDataModule", "init_args": data},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_run_acts_and_goes_on_and_its_policy_is_tested(align, config, tmp_path):
    done = align("fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}")
    assert done.code == 0, done.text
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())["model"]["init_args"]
    assert saved["environments"] in ({"class_path": SUM}, SUM)
    more = align("fit", f"--config={config}", "--trainer.max_steps=3", f"--ckpt_path={checkpoint}")
    assert more.code == 0, more.text
    data = f"--data.init_args.test={tmp_path / 'prompts.jsonl'}"
    tested = align("test", f"--config={config}", data, f"--ckpt_path={checkpoint}")
    assert tested.code == 0, tested.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.environments=no.such.Thing"], ["environments", "no.such.Thing"]),
        (["--model.environments=null"], ["max_turns=3", "no effect"]),
        (["--model.tools=[json.dumps]"], ["tools[0]", "json.dumps"]),
        (["--model.tool_options.time_limit=0"], ["time_limit", "0"]),
        (["--model.tool_options.time_limt=1"], ["tool_options.time_limt=1", "did you mean 'time_limit'"]),
        (["--model.max_turn=3"], ["max_turn=3", "did you mean 'max_turns'"]),
        (["--model.max_tool_calls=0"], ["max_tool_calls=0"]),
        (["--data.columns={goal: other}"], ["Sum", "'goal'"]),
    ],
)
def test_what_is_wrong_is_said_by_name(align, config, flags, words):
    found = align("fit", f"--config={config}", *flags)
    text = found.text + str(found.error or "")
    assert found.code != 0
    assert all(word in text for word in words), text


@pytest.mark.parametrize("given", [SUM, f"{{sum: {SUM}}}", f"{{sum: {{class_path: {SUM}}}}}"])
def test_flags_name_environments_and_tools(align, config, given):
    flags = [f"--model.environments={given}", "--model.tools=[tests.rollouts.environments.things.double]"]
    done = align("fit", f"--config={config}", *flags, "--trainer.max_steps=1")
    assert done.code == 0, done.text
