"""Worker processes of a loader and the signals that they get."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, sys
from datamodules import PretrainDataModule
from datamodules.tasks.characters import character_tokenizer

if __name__ == "__main__":
    rows = [{"text": "1+2=3"}] * 64
    data = PretrainDataModule(train=rows, tokenizer=character_tokenizer(), batch_size=2, packing=False, num_workers=2)
    batches = iter(data.train_dataloader())
    next(batches)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.readline()
        next(batches)
"""


def start(how):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_program_that_leaves_a_loader_half_read_ends():
    program = start("end")
    assert program.wait(timeout=120) == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal cannot be told here")
def test_workers_leave_a_stranger_s_signal_alone():
    program = start("wait")
    workers = [int(word) for word in program.stdout.readline().split()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    for worker in workers:
        os.kill(worker, 0)  # it is there
    program.communicate("on\n", timeout=120)
    assert program.returncode == 0
