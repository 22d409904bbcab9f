"""Checkpoints in folders: whole or absent, no code when they are read, and the same as a file."""

import pickle
import re
import shutil

import lightning as L
import pytest
import torch

from alignment_modules.cli.run_folder import last_checkpoint
from alignment_modules.training import sharded_io
from alignment_modules.training.checkpoint_files import CheckpointError
from alignment_modules.training.checkpoint_io import AtomicCheckpointIO
from alignment_modules.training.sharded_io import ShardedFolder, is_checkpoint_folder, split, write_sharded


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoint():
    """As Lightning dumps it, of a tied weight and an optimizer that took a step."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    state = dict(module.state_dict())
    state["tied"] = state["0.weight"]
    return {
        "state_dict": state,
        "optimizer_states": [optimizer.state_dict()],
        "global_step": 1,
        "pytorch-lightning_version": L.__version__,
        "callbacks": {"mine": {"path": "x", "values": [1, None, 2.5]}},
    }


def write(checkpoint, path):
    write_sharded(*split(checkpoint), path)
    return path


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        elif isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key
        elif key == "optimizer_states":
            for one, other in zip(found[key], value, strict=True):
                assert_equal(one, other)
        else:
            assert found[key] == value, key


def test_a_folder_is_read_as_the_file_that_it_could_have_been(checkpoint, tmp_path):
    path = write(checkpoint, tmp_path / "one.ckpt")
    assert is_checkpoint_folder(path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert_equal(found, checkpoint)
    assert found["state_dict"]["tied"] is found["state_dict"]["0.weight"]
    assert AtomicCheckpointIO().read_step(path) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one.ckpt"]


def test_parts_are_read_into_tensors_that_are_there(checkpoint, tmp_path):
    folder = ShardedFolder(write(checkpoint, tmp_path / "one.ckpt"))
    assert folder.tensors["state_dict.0.weight"] == (torch.Size([3, 3]), torch.float32)
    target = torch.zeros(3, 3)
    folder.read_into({"state_dict.0.weight": target}, together=False)
    assert torch.equal(target, checkpoint["state_dict"]["0.weight"])
    with pytest.raises(CheckpointError, match=r"one\.ckpt.*cannot be read: Size mismatch"):
        folder.read_into({"state_dict.0.weight": torch.zeros(2, 3)}, together=False)
    with pytest.raises(CheckpointError, match="Missing key"):
        folder.read_into({"state_dict.other": torch.zeros(2, 3)}, together=False)


def test_a_new_one_takes_the_place_of_another(checkpoint, tmp_path):
    path = write(checkpoint, tmp_path / "last.ckpt")
    write({**checkpoint, "global_step": 2}, path)
    assert AtomicCheckpointIO().read_step(path) == 2
    torch.save({"a": 1}, tmp_path / "file.ckpt")
    write(checkpoint, tmp_path / "file.ckpt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.ckpt", "last.ckpt"]


class Full:
    """A disk on which nothing more fits."""

    def __init__(self, *args, **kwargs):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["tensors", "rest"])
def test_a_failed_write_leaves_the_former_one(checkpoint, tmp_path, monkeypatch, where):
    path = write(checkpoint, tmp_path / "last.ckpt")
    if where == "tensors":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", Full)
    else:
        monkeypatch.setattr(torch, "save", Full)
    message = r"cannot write checkpoint .*last\.ckpt'.*No space left on device; the previous file there is untouched"
    with pytest.raises(OSError, match=message):
        write({**checkpoint, "global_step": 2}, path)
    monkeypatch.undo()
    assert_equal(AtomicCheckpointIO().load_checkpoint(path), checkpoint)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


class KilledError(BaseException):
    """Ends the process, as far as the code can tell."""


@pytest.mark.parametrize("stage", ["tensors", "moved aside"])
def test_a_killed_write_leaves_one_to_resume_from(checkpoint, tmp_path, monkeypatch, stage):
    path = write(checkpoint, tmp_path / "last.ckpt")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # it cleans nothing up

    def killed(*args):
        raise KilledError

    if stage == "tensors":
        monkeypatch.setattr(sharded_io, "_finish", killed)
    else:
        rename = type(path).rename
        monkeypatch.setattr(type(path), "rename", lambda a, b: killed() if b == path else rename(a, b))
    with pytest.raises(KilledError):
        write({**checkpoint, "global_step": 2}, path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    found = last_checkpoint(tmp_path)
    assert found.name == ("last.ckpt" if stage == "tensors" else "last.former.ckpt")
    assert_equal(AtomicCheckpointIO().load_checkpoint(found), checkpoint)
    write({**checkpoint, "global_step": 3}, path)
    assert AtomicCheckpointIO().read_step(last_checkpoint(tmp_path)) == 3


def test_leftovers_of_processes_that_are_gone_are_removed(checkpoint, tmp_path):
    mine = sharded_io.temporary_name(tmp_path / "last.ckpt")
    left = mine.with_name(re.sub(r"\d+\.tmp$", "999999999.tmp", mine.name))
    for folder in (mine, left):
        folder.mkdir()
        (folder / "__0_0.distcp").touch()
    write(checkpoint, tmp_path / "other.ckpt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [mine.name, "other.ckpt"]


@pytest.mark.parametrize("lost", ["meta.pt", ".metadata"])
def test_half_a_folder_is_refused_and_passed_over(checkpoint, tmp_path, lost, caplog):
    write(checkpoint, tmp_path / "one.ckpt")
    (write({**checkpoint, "global_step": 2}, tmp_path / "two.ckpt") / lost).unlink()
    with pytest.raises(CheckpointError, match=rf"two\.ckpt' lacks {lost}.*interrupted; use an earlier one"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "two.ckpt")
    assert last_checkpoint(tmp_path).name == "one.ckpt"
    assert f"lacks {lost}" in caplog.text


def test_a_damaged_folder_is_named(checkpoint, tmp_path):
    path = write(checkpoint, tmp_path / "one.ckpt")
    (path / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"one\.ckpt' cannot be read"):
        AtomicCheckpointIO().load_checkpoint(path)
    (path / ".metadata").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"one\.ckpt': \.metadata is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)
    (path / "meta.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one\.ckpt': meta\.pt is empty"):
        AtomicCheckpointIO().load_checkpoint(path)
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.ckpt' is a folder, and none that"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "empty.ckpt")


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", [".metadata", "meta.pt"])
def test_no_code_runs_when_it_is_read(checkpoint, tmp_path, file):
    path, mark = write(checkpoint, tmp_path / "one.ckpt"), tmp_path / "executed"
    if file == "meta.pt":
        torch.save({"pytorch-lightning_version": "2", "x": Intruder(mark)}, path / file)
    else:
        (path / file).write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(CheckpointError, match=r"Python objects.*\(posix\.mkdir\).*which can run code when read"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists()
