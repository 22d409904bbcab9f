"""Runs in shards on two processes resume bit for bit, from folders and files, and on other numbers of processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from alignment_modules.callbacks import AtomicCheckpointIO
from tests.training.sharded_resumes import fit, make

ROOT = Path(__file__).parents[2]
FAST = ("sft:folder", "sft:file", "dpo lora:folder", "ppo:file", "sft momentum:folder")
SLOW = ("dpo:folder", "dpo:file", "grpo:folder", "grpo:file", "ppo:folder", "dpo lora:file", "sft lora:folder")
SLOW += ("ppo shared:folder", "kto:file", "dpo dora:folder", "dpo pissa:file", "sft olora:folder")


def start(folder, wanted):
    command = [sys.executable, "-m", "tests.training.sharded_resumes", str(folder), *wanted]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)  # a hang is a failure
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    root = tmp_path_factory.mktemp("fast")
    fit(root / "alone" / "sft momentum", "sft momentum", SingleDeviceStrategy("cpu"), 1)
    return start(root, FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return start(tmp_path_factory.mktemp("slow"), SLOW)


def read(folder, one, part, step=4):
    name, _, form = one.partition(":")
    path = folder / name / form / part / f"step={step}.ckpt"
    assert path.is_dir() == (form == "folder")
    return AtomicCheckpointIO().load_checkpoint(path)


def tensors(value, prefix=""):
    """All tensors of a nest of dictionaries and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for name, part in entries for key, tensor in tensors(part, f"{prefix}/{name}").items()}


def assert_bit_equal(one, other):
    left, right = ({k: v for k, v in tensors(found).items() if "meters" not in k} for found in (one, other))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def check_resume(folder, one):
    before, whole, resumed = read(folder, one, "whole", 2), read(folder, one, "whole"), read(folder, one, "resumed")
    assert whole["global_step"] == resumed["global_step"] == 4
    assert whole["optimizer_states"][0]["state"], "an optimizer's state is in the checkpoint"
    assert_bit_equal(whole, resumed)
    changed = [
        name for name, value in whole["state_dict"].items() if not torch.equal(value, before["state_dict"][name])
    ]
    assert changed, "two steps move something"


@pytest.mark.distributed
@pytest.mark.parametrize("one", FAST)
def test_resumes_bit_for_bit(fast, one):
    check_resume(fast, one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("one", SLOW)
def test_resumes_bit_for_bit_in_every_form(slow, one):
    check_resume(slow, one)


@pytest.mark.distributed
def test_folder_and_file_hold_the_same(fast):
    folder, file = read(fast, "sft:folder", "whole"), read(fast, "sft:file", "whole")
    assert folder.keys() == file.keys()
    assert_bit_equal(folder, file)
    state = file["state_dict"]
    assert state["policy.lm_head.weight"].data_ptr() == state["policy.model.embed_tokens.weight"].data_ptr()


@pytest.mark.distributed
def test_adapters_are_saved_whole_and_alone(fast):
    state = read(fast, "dpo lora:folder", "whole")["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    expected = {f"policy.{n}": p.shape for n, p in make("dpo lora").policy.named_parameters() if p.requires_grad}
    assert {name: value.shape for name, value in state.items()} == expected


@pytest.mark.distributed
@pytest.mark.parametrize("one", ["sft:folder", "sft:file", "dpo lora:folder", "ppo:file"])
def test_one_process_reads_what_two_wrote(fast, one, tmp_path):
    """Weights and exports are the same, and a run goes on from there."""
    name, _, form = one.partition(":")
    where = fast / name / form / "whole"
    found = read(fast, one, "whole")["state_dict"]
    fit(tmp_path, name, SingleDeviceStrategy("cpu"), 1, where / "step=4.ckpt")
    exported, again = (load_file(path / "export" / "model.safetensors") for path in (where, tmp_path))
    assert exported.keys() == again.keys()
    assert [key for key in exported if not torch.equal(exported[key], again[key])] == []
    if name != "dpo lora":
        plain = {f"policy.{key}": value for key, value in exported.items()}
        assert all(torch.equal(value, found[key]) for key, value in plain.items())
    if name == "ppo":
        critics = [load_file(path / "export" / "critic" / "model.safetensors") for path in (where, tmp_path)]
        assert all(torch.equal(value, critics[1][key]) for key, value in critics[0].items())


@pytest.mark.distributed
def test_another_number_of_processes_goes_on_alike(fast, tmp_path):
    """One where two began, and two where one did, as either would by itself."""
    where = fast / "sft momentum" / "folder" / "whole"
    fit(tmp_path, "sft momentum", SingleDeviceStrategy("cpu"), 1, where / "step=2.ckpt")
    expected = read(fast, "sft momentum:folder", "whole")
    one, two = tmp_path / "step=4.ckpt", fast / "sft momentum" / "folder" / "taken up" / "step=4.ckpt"
    for found in (AtomicCheckpointIO().load_checkpoint(path) for path in (one, two)):
        for key, value in tensors({key: expected[key] for key in ("state_dict", "optimizer_states")}).items():
            torch.testing.assert_close(
                tensors(found)[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
