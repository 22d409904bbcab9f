"""AtomicCheckpointIO: whole files or none, and nothing that runs code."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from alignment_modules.callbacks import AtomicCheckpointIO, CheckpointError
from alignment_modules.training import checkpoint_io

CHECKPOINT = {"state_dict": {"weight": torch.arange(6.0)}, "epoch": 3, "pytorch-lightning_version": "2.6.6"}


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def same(found, expected=CHECKPOINT):
    return found["epoch"] == expected["epoch"] and torch.equal(
        found["state_dict"]["weight"], expected["state_dict"]["weight"]
    )


def test_round_trip_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert same(AtomicCheckpointIO().load_checkpoint(str(path)))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    AtomicCheckpointIO().save_checkpoint({**CHECKPOINT, "epoch": 4}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 4
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


WRITER = """
import sys, torch
from alignment_modules.callbacks import AtomicCheckpointIO
for step in range(20):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "pytorch-lightning_version": "2"}, sys.argv[1])
"""


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each process has a temporary file of its own."""
    path = tmp_path / "last.ckpt"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as other:
        while other.poll() is None:
            AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
        assert other.returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    host = socket.gethostname().replace(".", "-")
    left = tmp_path / f"a.ckpt.{host}.{gone.pid}.tmp"
    old, young = tmp_path / "a.ckpt.elsewhere.1.tmp", tmp_path / "b.ckpt.elsewhere.1.tmp"
    running, foreign = tmp_path / f"a.ckpt.{host}.{os.getppid()}.tmp", tmp_path / "notes.tmp"
    for file in (left, old, young, running, foreign):
        file.touch()
    os.utime(old, (0, 0))
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.ckpt", young, running, foreign])


def full_after(count):
    """A stand-in for torch.save on a disk that fills up after `count` bytes."""

    def save(_, file):
        file.write(b"x" * count)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return save


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(CHECKPOINT, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "write":
        monkeypatch.setattr(torch, "save", full_after(100))
    else:
        monkeypatch.setattr(checkpoint_io.os, stage, fail)
    with pytest.raises(
        OSError, match=r"cannot write checkpoint '.*last.ckpt': No space left.*previous file.*untouched"
    ):
        writer.save_checkpoint({**CHECKPOINT, "epoch": 4}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert same(writer.load_checkpoint(path))


def test_an_interruption_cleans_up_and_passes_through(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_first_write_that_fails_says_that_nothing_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", full_after(1))
    with pytest.raises(OSError, match="nothing was left there"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, boring, loader, make_trainer):
    module = boring()
    module.register_buffer("ballast", torch.zeros(40_000))  # 160 kB: one checkpoint fits, two do not
    saver = ModelCheckpoint(dirpath=small_disk, save_last=True, save_top_k=0, every_n_train_steps=3)
    trainer = make_trainer(saver, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
    with pytest.raises(OSError, match=r"cannot write checkpoint .*last.*No space left on device.*untouched"):
        trainer.fit(module, loader)
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(small_disk / "last.ckpt")["global_step"] == 3


def test_inside_a_trainer_resume_goes_on(tmp_path, boring, loader, make_trainer):
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    make_trainer(saver, enable_checkpointing=True, plugins=[AtomicCheckpointIO()]).fit(boring(), loader)
    last = tmp_path / "saved" / "last.ckpt"
    assert not list(last.parent.glob("*.tmp"))
    trainer = make_trainer(plugins=[AtomicCheckpointIO()], max_epochs=2)
    trainer.fit(boring(), loader, ckpt_path=last)
    assert trainer.global_step == 12


def write(path, content):
    path.write_bytes(content)
    return path


def saved(tmp_path, content=None, name="good.ckpt", **kwargs):
    torch.save(CHECKPOINT if content is None else content, tmp_path / name, **kwargs)
    return tmp_path / name


def without_end(tmp_path, keep):
    whole = saved(tmp_path).read_bytes()
    return write(tmp_path / "bad.ckpt", whole[: int(len(whole) * keep)])


def with_pickle(tmp_path, **kwargs):
    return saved(tmp_path, {**CHECKPOINT, "callbacks": Evil(tmp_path / "pwned")}, "evil.ckpt", **kwargs)


def folder(tmp_path):
    (tmp_path / "sharded.ckpt").mkdir()
    return tmp_path / "sharded.ckpt"


def foreign_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    return tmp_path / "other.zip"


UNREADABLE = {
    "truncated near the end": (
        lambda t: without_end(t, 0.9),
        r"is truncated at [\d,]+ bytes: its write was interrupted",
    ),
    "truncated near the start": (lambda t: without_end(t, 0.1), r"is truncated at [\d,]+ bytes"),
    "empty": (lambda t: write(t / "e.ckpt", b""), r"is empty \(0 bytes\)"),
    "text": (lambda t: write(t / "t.ckpt", b"hello world"), r"is not a checkpoint: 11 bytes that start with b'hell'"),
    "foreign zip": (foreign_zip, r"is damaged or no checkpoint"),
    "pickle inside": (with_pickle, r"holds Python objects \((posix|os|nt).system\).*: refused"),
    "legacy pickle inside": (
        lambda t: with_pickle(t, _use_new_zipfile_serialization=False),
        r"holds Python objects \((posix|os|nt).system\)",
    ),
    "plain pickle": (
        lambda t: write(t / "p.ckpt", pickle.dumps(Evil(t / "pwned"))),
        r"holds Python objects|not a checkpoint",
    ),
    "path in hparams": (
        lambda t: saved(t, {**CHECKPOINT, "hyper_parameters": {"p": Path("x")}}),
        r"holds Python objects",
    ),
    "bare weights": (lambda t: saved(t, {"weight": torch.ones(1)}), r"lacks 'state_dict': .* holds keys \['weight'\]"),
    "a tensor": (lambda t: saved(t, torch.ones(1)), r"lacks 'state_dict': no Trainer wrote it; it holds .*Tensor"),
    "a folder": (folder, r"is a folder, and none that a strategy with shards wrote"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named_and_never_run(tmp_path, name):
    make, message = UNREADABLE[name]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_every_truncation_is_noticed(tmp_path):
    whole = saved(tmp_path).read_bytes()
    for size in range(0, len(whole), 97):
        with pytest.raises(CheckpointError):
            AtomicCheckpointIO().load_checkpoint(write(tmp_path / "bad.ckpt", whole[:size]))


def test_missing_file_and_unsafe_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="weights_only=False must be True or None"):
        AtomicCheckpointIO().load_checkpoint(saved(tmp_path), weights_only=False)
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "x.ckpt", storage_options={"a": 1})


def test_through_the_trainer_a_bad_file_is_named(tmp_path, boring, loader, make_trainer):
    trainer = make_trainer(plugins=[AtomicCheckpointIO()])
    with pytest.raises(CheckpointError, match=r"bad.ckpt' is truncated"):
        trainer.fit(boring(), loader, ckpt_path=without_end(tmp_path, 0.5))


def test_what_could_not_be_read_back_is_reported_once_when_written(tmp_path):
    writer = AtomicCheckpointIO()
    with pytest.warns(UserWarning, match=r"a.ckpt' holds Python objects \(pathlib.*resuming from it will be refused"):
        writer.save_checkpoint({**CHECKPOINT, "hyper_parameters": {"p": Path("x")}}, tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.save_checkpoint({**CHECKPOINT, "hyper_parameters": {"p": Path("x")}}, tmp_path / "b.ckpt")
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "c.ckpt")
    assert (tmp_path / "a.ckpt").exists()
    assert (tmp_path / "b.ckpt").exists()


def test_remote_paths_are_left_to_lightning():
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, "memory://run/last.ckpt")
    assert same(AtomicCheckpointIO().load_checkpoint("memory://run/last.ckpt"))
