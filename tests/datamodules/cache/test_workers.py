"""Pieces of a task in processes: all are done, the first error counts, and no process outlives its use."""

import multiprocessing
import os
import signal
import time

import pytest

from datamodules.cache.workers import in_processes


class Two(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_all_pieces_are_done():
    found = dict(in_processes(lambda piece: (piece**2, os.getpid()), range(20), 3))
    assert {number: square for number, (square, _) in found.items()} == {i: i**2 for i in range(20)}
    assert os.getpid() not in {process for _, process in found.values()}
    assert dict(in_processes(str, [], 3)) == {}


def test_the_first_error_counts():
    def task(piece):
        if piece == 3:
            time.sleep(0.3)
        if piece >= 3:
            raise ValueError(f"piece {piece}")
        return piece

    done = []
    with pytest.raises(ValueError, match=r"^piece 3$"):
        done.extend(number for number, _ in in_processes(task, range(50), 4))
    assert set(done) == {0, 1, 2}


def test_an_error_that_cannot_be_sent():
    def task(piece):
        raise Two("this", "that")

    with pytest.raises(RuntimeError, match="Two: this and that"):
        list(in_processes(task, [0], 1))


def test_a_process_that_is_killed():
    def task(piece):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"killed by signal 9.*cache.num_proc"):
        list(in_processes(task, [0, 1], 2))
    assert not multiprocessing.active_children()


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_parent(tmp_path, way):
    def task(piece):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    parent = multiprocessing.get_context("fork").Process(target=lambda: list(in_processes(task, [0, 1], 2)))
    parent.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    os.kill(parent.pid, way)
    parent.join()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
