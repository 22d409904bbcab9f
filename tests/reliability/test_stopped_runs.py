"""`align fit`, stopped by signals and failures as schedulers, terminals and machines bring them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FOREVER = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "1000000"]


@pytest.fixture
def start(workplace, tmp_path):
    """Starts `align fit` in a group of its own; waits until `mark` is there."""
    processes = []

    def run(*arguments, mark="trained"):
        command = [sys.executable, "-m", "alignment_modules", "fit", "--config", "sft.yaml", *arguments]
        with open(tmp_path / "log.txt", "a") as log:
            process = subprocess.Popen(
                [*command, "--trainer.default_root_dir", str(tmp_path / "run")],
                cwd=workplace, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, preexec_fn=hear,
            )  # fmt: skip
        processes.append(process)
        limit = time.monotonic() + 180
        while not (tmp_path / "run" / mark).exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        return process

    yield run
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def hear():
    """Signals that these tests were started to ignore: a shell's background job has SIGINT so, `nohup` SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def log(tmp_path):
    return (tmp_path / "log.txt").read_text()


def only_checkpoint(tmp_path):
    [path] = (tmp_path / "run").rglob("*.ckpt")
    return path, torch.load(path, weights_only=True)


def steps(tmp_path):
    return [torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "run").rglob("*.ckpt")]


def alone(process):
    """Whether the whole group has ended, within a few seconds."""
    for _ in range(80):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


@pytest.mark.distributed
@pytest.mark.parametrize("whole_group", [True, False])
def test_sigterm_to_two_processes(start, tmp_path, whole_group):
    """To the group, loader workers too, as a scheduler does it; or to the first process alone."""
    process = start(*FOREVER, *DDP, "--data.num_workers", "1" if whole_group else "0")
    time.sleep(1)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143, log(tmp_path)[-3000:]
    assert alone(process)
    path, checkpoint = only_checkpoint(tmp_path)
    assert "Traceback" not in log(tmp_path)
    assert f"stopped by SIGTERM after optimizer step {checkpoint['global_step']}; checkpoint {path}" in log(tmp_path)
    assert "--ckpt_path last" in log(tmp_path)


@pytest.mark.distributed
def test_a_failure_of_the_second_process_alone(start, tmp_path, workplace):
    (workplace / "one_fails.py").write_text(
        "from lightning.pytorch import Callback\n\n"
        "class OneFails(Callback):\n"
        "    def on_before_backward(self, trainer, module, loss):\n"
        "        if trainer.global_step == 4 and trainer.global_rank == 1:\n"
        "            raise RuntimeError('no more memory')\n"
    )
    process = start(*FOREVER, *DDP, "--trainer.callbacks+=one_fails.OneFails")
    assert process.wait(timeout=120) != 0
    assert alone(process)
    assert "no more memory" in log(tmp_path)
    assert max(steps(tmp_path)) == 4, log(tmp_path)


def test_signals_to_a_group_with_workers(start, tmp_path):
    """SIGHUP, as of a closed terminal; then the same command goes on, and Ctrl-C stops it."""
    number = 0
    for sent, code in ((signal.SIGHUP, 129), (signal.SIGINT, 130)):
        process = start(*FOREVER, "--data.num_workers", "2", *(["--ckpt_path", "last"] if number else []))
        os.killpg(process.pid, sent)
        assert process.wait(timeout=60) == code, log(tmp_path)[-3000:]
        assert alone(process)
        assert max(steps(tmp_path)) > number
        number = max(steps(tmp_path))
        (tmp_path / "run" / "trained").unlink()
    assert "Traceback" not in log(tmp_path)
