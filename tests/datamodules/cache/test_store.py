"""What is kept on disk is whole or not there: kills, damage, full disks, other versions, several builders."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from datamodules import CacheOptions, SFTDataModule
from datamodules.cache import building, kept, store
from datamodules.cache.arrays import open_array, write_array
from datamodules.cache.options import cache_folder
from datamodules.cache.store import CacheError, Store, digest_of

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(330)]
ABOUT = {"kind": "table", "source": "rows", "rows": 3}


def started(tokenizer, options, path):
    data = SFTDataModule(train=path, tokenizer=tokenizer, cache=options)
    data.setup("fit")
    return data._tables["train"][0]


def entries(folder, name=""):
    found = []
    for place in folder.iterdir():
        meta = place / "entry.json"
        if meta.exists() and json.loads(meta.read_text())["about"]["kind"].startswith(name):
            found.append(place)
    return found


@pytest.fixture
def folder(options):
    return options.path


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def change(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def another_version(path):
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format": 99}))


def another_report(path):
    meta = json.loads(path.read_text())
    meta["facts"]["report"]["kept"] = 12
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("file", "harm", "told"),
    [
        ("tokens_values.npy", cut, "tokens_values.npy has .* bytes, not"),
        ("tokens_values.npy", change, "tokens_values.npy was changed"),
        ("tokens_offsets.npy", lambda path: path.unlink(), "tokens_offsets.npy is missing"),
        ("entry.json", cut, "entry.json cannot be read"),
        ("entry.json", lambda path: path.unlink(), "entry.json cannot be read"),
        ("entry.json", lambda path: path.write_text("[]"), "entry.json cannot be read"),
        ("entry.json", another_version, "is of version 99, not 1"),
        ("entry.json", another_report, "entry.json was changed"),
    ],
)
def test_a_damaged_table_is_made_again_with_one_warning(file, harm, told, write, tokenizer, options, folder, caplog):
    path = write(ROWS)
    whole = started(tokenizer, options, path)
    last = whole.row(329)["input_ids"].tolist()
    (table,) = entries(folder, "table")
    harm(table / file)
    again = started(tokenizer, options, path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert re.search(f"{told}.*; it is made again", warnings[0])
    assert again.fingerprint == whole.fingerprint
    assert again.row(329)["input_ids"].tolist() == last
    caplog.clear()
    started(tokenizer, options, path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_damaged_places_of_lines_are_found_again(write, tokenizer, options, folder, caplog):
    path = write(ROWS)
    started(tokenizer, options, path)
    (lines,) = entries(folder, "lines")
    change(lines / "offsets.npy")
    assert len(started(tokenizer, options, path)) == 330
    assert "offsets.npy was changed" in caplog.text


def test_a_copied_cache_is_taken_over(write, tokenizer, options, folder, caplog, tmp_path):
    path = write(ROWS)
    started(tokenizer, options, path)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    moved = CacheOptions(folder=str(tmp_path / "copy"), least_rows=10)
    before = {entry: (entry / "entry.json").stat().st_mtime_ns for entry in entries(moved.path)}
    started(tokenizer, moved, path)
    assert {entry: (entry / "entry.json").stat().st_mtime_ns for entry in entries(moved.path)} == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_state_of_this_library_makes_its_own(write, tokenizer, options, folder, monkeypatch):
    path = write(ROWS)
    started(tokenizer, options, path)
    monkeypatch.setattr("datamodules.cache.keys._code", lambda: "another")
    started(tokenizer, options, path)
    assert len(entries(folder, "table")) == 2


def test_a_source_that_changes_is_made_anew(write, tokenizer, options, folder):
    started(tokenizer, options, write(ROWS))
    time.sleep(0.01)
    assert len(started(tokenizer, options, write(ROWS[:200]))) == 200
    assert len(entries(folder, "table")) == 2


def test_a_killed_build_leaves_nothing_but_whole_parts(write, tokenizer, two, folder, monkeypatch):
    path, made = write(ROWS), folder.parent / "made"
    made.mkdir()
    build = SFTDataModule.build

    def slow(self, reader):
        if reader.start >= 200 and not (made / "killed").exists():
            time.sleep(60)
        (made / str(reader.start)).touch()
        return build(self, reader)

    monkeypatch.setattr(SFTDataModule, "build", slow)
    monkeypatch.setattr("datamodules.cache.keys._maker", lambda data: "sft")
    builder = multiprocessing.get_context("fork").Process(target=started, args=(tokenizer, two, path))
    builder.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("unfinished-*/parts/??????000???"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert entries(folder, "table") == []
    done = list(folder.glob("unfinished-*/parts/*"))
    assert len([part for part in done if not part.suffix]) == 4
    change(next(part for part in done if part.name.endswith("150")) / "tokens_values.npy")
    for mark in made.iterdir():
        mark.unlink()
    (made / "killed").touch()
    table = started(tokenizer, two, path)
    assert {mark.name for mark in made.iterdir()} == {"killed", "150", "200", "250", "300"}
    assert table.fingerprint == started(tokenizer, None, path).fingerprint
    assert not list(folder.glob("unfinished-*"))


def test_a_build_killed_while_it_joins(write, tokenizer, options, folder, monkeypatch):
    path = write(ROWS)
    finish = store._finish

    def killed(unfinished, target, meta):
        if "table" in meta["about"]["kind"]:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(unfinished, target, meta)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_finish", killed)
        builder = multiprocessing.get_context("fork").Process(target=started, args=(tokenizer, options, path))
        builder.start()
        builder.join()
    assert builder.exitcode == -signal.SIGKILL
    assert entries(folder, "table") == []
    assert started(tokenizer, options, path).fingerprint == started(tokenizer, None, path).fingerprint


def test_a_full_disk_is_told_and_what_was_done_is_kept(write, tokenizer, options, folder, monkeypatch):
    path, real = write(ROWS), building.write_array

    def full(target, pieces, dtype, length):
        if "000000000200" in str(target):
            target.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(target, pieces, dtype, length)

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_array", full)
        with pytest.raises(CacheError, match=r"No space left on device \(\d+ MB are free\); free space .align cache"):
            started(tokenizer, options, path)
    assert len([part for part in folder.glob("unfinished-*/parts/*") if not part.suffix]) >= 4
    assert len(started(tokenizer, options, path)) == 330


def test_a_folder_that_cannot_be_written(write, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    options = CacheOptions(folder=str(tmp_path / "file" / "cache"), least_rows=10)
    with pytest.raises(CacheError, match=r"file/cache cannot be written: Not a directory.*cache.folder.*cache=null"):
        started(tokenizer, options, write(ROWS))


def test_one_of_several_builders_builds(tmp_path):
    shelf = Store(tmp_path / "cache")

    def make(folder):
        with (tmp_path / "made").open("a") as file:
            file.write("once\n")
        time.sleep(0.5)
        write_array(folder / "a.npy", [np.arange(3)], np.int64, 3)
        return {"three": 3}

    def build():
        entry = shelf.obtain("some", ABOUT, make)
        assert entry.facts == {"three": 3}
        assert entry.array("a").tolist() == [0, 1, 2]

    builders = [multiprocessing.get_context("fork").Process(target=build) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0] * 4
    assert (tmp_path / "made").read_text() == "once\n"


def test_a_builder_that_dies_lets_the_next_one_build(tmp_path):
    shelf = Store(tmp_path / "cache")
    begun = tmp_path / "begun"

    def hang(folder):
        begun.touch()
        time.sleep(60)

    builder = multiprocessing.get_context("fork").Process(target=lambda: shelf.obtain("some", ABOUT, hang))
    builder.start()
    while not begun.exists():
        time.sleep(0.02)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert shelf.obtain("some", ABOUT, lambda folder: {"done": True}).facts == {"done": True}


def test_what_nobody_finished_is_removed_after_a_week(tmp_path):
    shelf = Store(tmp_path)

    def fail(folder):
        (folder / "some").write_text("of it")
        raise ValueError("no")

    for name in ("old", "new"):
        with pytest.raises(ValueError, match="no"):
            shelf.obtain(name, ABOUT, fail)
    for path in (tmp_path / "unfinished-old" / "some", tmp_path / "unfinished-old"):
        os.utime(path, (0, 0))
    shelf.obtain("third", ABOUT, lambda folder: {})
    assert not (tmp_path / "unfinished-old").exists()
    assert (tmp_path / "unfinished-new").exists()


def test_a_source_that_changes_while_it_is_read(write, tokenizer, options, monkeypatch):
    path, find = write(ROWS), kept.Kept.lines

    def late(self, source, kind, look):
        def changed():
            found = look()
            os.utime(source, (0, 0))
            return found

        return find(self, source, kind, changed)

    monkeypatch.setattr(kept.Kept, "lines", late)
    with pytest.raises(ValueError, match="was changed while it was being read"):
        started(tokenizer, options, path)


def test_arrays(tmp_path):
    for array in (np.arange(7), np.zeros(0, np.float32), np.asarray([True, False])):
        write_array(tmp_path / "a.npy", [array[:1], array[1:]], array.dtype, len(array))
        found = open_array(tmp_path / "a.npy")
        assert found.dtype == array.dtype
        assert found.tolist() == array.tolist() == np.load(tmp_path / "a.npy").tolist()
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="magic string"):
        open_array(tmp_path / "a.npy")


def test_digests():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ALIGNMENT_MODULES_CACHE", raising=False)
    assert CacheOptions().path == tmp_path / "xdg" / "alignment_modules"
    monkeypatch.setenv("ALIGNMENT_MODULES_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    assert CacheOptions(folder=str(tmp_path / "given")).path == tmp_path / "given"
    monkeypatch.delenv("ALIGNMENT_MODULES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "alignment_modules"
