"""Files of the user's own are found in the working folder and beside a configuration, after what is installed."""

import sys

import pytest
import yaml

from alignment_modules.cli.own_files import find_own_files
from alignment_modules.cli.recipes import recipes
from alignment_modules.policies.config import resolve_folder


def test_folders_come_last_and_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["installed"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for _ in range(2):
        find_own_files(["sub/mine.yaml", str(recipes()["sft"]), "{model: null}"])
    assert sys.path == ["installed", str(tmp_path), str(tmp_path / "sub")]


def test_a_reward_beside_a_configuration_elsewhere(align, workplace, tmp_path):
    (tmp_path / "beside_rewards.py").write_text(
        "def long(completions):\n    return [float(len(c)) for c in completions]\n"
    )
    mine = {"config": str(workplace / "grpo.yaml"), "model": {"init_args": {"rewards": "beside_rewards.long"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    done = align("fit", f"--config={tmp_path / 'mine.yaml'}", "--trainer.max_steps=1")
    assert done.code == 0, done.text


@pytest.mark.parametrize("path", ["runs/sftt", "owner/name"])
def test_a_folder_that_could_have_been_meant_is_told(monkeypatch, tmp_path, caplog, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert resolve_folder(path, "policy.path") == path
    told = "policy.path='runs/sftt': no such folder; runs/ holds ['sft']. It is taken for a hub id."
    assert (told in caplog.text) == (path == "runs/sftt")
