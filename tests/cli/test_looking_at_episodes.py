"""docs/environments.md, Looking at episodes: its commands run, and its tables name what there is."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from alignment_modules.cli.commands import run_command
from alignment_modules.cli.inspect import inspect_command
from alignment_modules.rollouts.environments import STOP_REASONS, Episode, episode_statistics
from alignment_modules.rollouts.environments.showing import episode_row

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "environments.md").read_text().split("## Looking at episodes\n")[1].split("\n## ")[0]
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", SECTION, flags=re.M | re.S) for line in block.splitlines()
]
TOOLS = '''
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One number.
        b: Another.
    """
    return a + b
'''
RUN = """
model:
  class_path: GRPOModule
  init_args:
    environments: datamodules.tasks.HiddenNumber
    tool_options: {format: datamodules.tasks.read_questions}
    max_turns: 12
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from datamodules.tasks import HiddenNumberPrompts, character_tokenizer, question_tokenizer
    from datamodules.text.encoding import read_chat_template

    folder = tmp_path_factory.mktemp("place")
    plain = character_tokenizer([*map(chr, range(32, 127))])
    plain.chat_template = read_chat_template("plain", plain)
    for name, tokenizer in (("sft", plain), ("grpo", question_tokenizer())):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **sizes, num_key_value_heads=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "runs" / name / "export")
        tokenizer.save_pretrained(folder / "runs" / name / "export")
    (folder / "runs" / "grpo" / "config.yaml").write_text(RUN)
    (folder / "my_tools.py").write_text(TOOLS)
    rows = [dict(row) for row in HiddenNumberPrompts(split="train", size=4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_every_command_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    assert [shlex.split(command)[1] for command in COMMANDS] == ["inspect", "chat", "chat"]
    with contextlib.chdir(place):
        for command in COMMANDS:
            _, name, *given = shlex.split(command)
            if name == "inspect":
                assert inspect_command(given) == 0
                told = " ".join(capsys.readouterr().out.split())
                assert "ask of HiddenNumber (number: integer)" in told
                assert "calls as datamodules.tasks.read_questions" in told
                continue
            monkeypatch.setattr(sys, "stdin", io.StringIO("17-48\n"))
            assert run_command("chat", [*given, "--max-completion-length", "8"]) == 0
            told = " ".join(capsys.readouterr().out.split())
            assert ("tools add;" if "my_tools" in command else "tools ask of HiddenNumber;") in told


def test_the_tables_name_what_there_is():
    cells = [re.findall(r"`([^`]*)`", line.split("|")[1]) for line in SECTION.splitlines() if line.startswith("| `")]
    names = [name for row in cells for name in row]
    made = Episode(None, [], [], 1, [], "answer", reward=1.0, turn_rewards=[1.0], errors=["x"])
    logged = episode_statistics([made], solved=torch.tensor([True]))
    for name in (*logged, *episode_row(made, [])):
        assert name.removeprefix("episode/stop/") in names or name in names, name
    assert set(STOP_REASONS) <= {name.removeprefix("episode/stop/") for name in names}
