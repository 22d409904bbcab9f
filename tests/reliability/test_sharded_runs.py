"""Runs of the command line in shards: stopped, resumed in the middle of an epoch, exported and taken up by others."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

SHARDS = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--data.batch_size", "2")
ALONE = ("--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "4")


def saver(root):
    options = {"dirpath": f"{root}/checkpoints", "filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}
    return ("--trainer.callbacks", json.dumps([{"class_path": "ModelCheckpoint", "init_args": options}]))


def start(workplace, command, *options):
    line = [sys.executable, "-m", "alignment_modules", command, *options]
    return subprocess.Popen(line, cwd=workplace, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def begin(workplace, root, *options, config="sft.yaml"):
    more = ("--trainer.max_epochs", "3", "--trainer.default_root_dir", str(root))
    return start(workplace, "fit", "-c", config, *more, *options)


def finish(process):
    _, text = process.communicate(timeout=300)  # a hang is a failure
    assert process.returncode == 0, text[-4000:]


def run(workplace, root, *options, config="sft.yaml"):
    finish(begin(workplace, root, *options, config=config))
    return root


@pytest.fixture(scope="module")
def whole(workplace, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return run(workplace, root, *SHARDS, *saver(root))


def weights(root):
    return load_file(root / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
@pytest.mark.distributed
def test_resumes_in_the_middle_of_an_epoch(workplace, whole, tmp_path):
    """With dropout and a schedule, from the shapes alone in the second process."""
    run(workplace, tmp_path, *SHARDS, *saver(tmp_path), "--ckpt_path", str(whole / "checkpoints" / "step=4.ckpt"))
    assert_equal(weights(tmp_path / "export"), weights(whole / "export"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_saves_in_all_processes(workplace, tmp_path):
    process = begin(
        workplace, tmp_path, *SHARDS, "--trainer.max_epochs", "2000", "--trainer.callbacks", "my_callbacks.Marks"
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "trained").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, text[-4000:]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert (saved / "meta.pt").is_file()
    assert f"checkpoint {saved}" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_exports_and_goes_on(align, whole, tmp_path):
    last = whole / "checkpoints" / "step=16.ckpt"
    result = align("export", str(last), str(tmp_path / "out"), "--config", str(whole / "config.yaml"))
    assert result.code == 0, result.text
    meta = torch.load(last / "meta.pt", weights_only=True)
    assert meta["global_step"] == 16
    result = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "3", *ALONE, "--ckpt_path", str(last))
    assert result.code == 0, result.text
    assert weights(result.root / "export").keys() == weights(tmp_path / "out").keys()


@pytest.mark.slow
@pytest.mark.distributed
def test_other_batches_of_another_number_of_processes_are_refused(align, whole):
    last, options = whole / "checkpoints" / "step=4.ckpt", (*ALONE[:-1], "2")
    result = align("fit", "-c", "sft.yaml", "--trainer.max_epochs", "3", *options, "--ckpt_path", str(last))
    assert result.code == 1
    assert "world_size was 2 when the checkpoint was saved and is 1 now" in f"{result.error}{result.text}"
