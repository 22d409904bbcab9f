"""`align cache`: what a run keeps on disk is shown and removed, and nothing else."""

import json
import os
import re
import shlex
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from alignment_modules.cli.cache import cache_command
from datamodules import CacheOptions
from datamodules.cache.store import Store

SECTION = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("## On disk, once\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def kept(workplace, align, tmp_path_factory):
    """The cache of two runs on the same rows."""
    folder = tmp_path_factory.mktemp("kept") / "cache"
    cache = ("--data.cache.folder", folder, "--data.cache.least_rows", "5", "--data.cache.num_proc", "1")
    runs = [align("fit", "--config", "sft.yaml", "--trainer.max_steps", "2", *cache) for _ in range(2)]
    assert [done.code for done in runs] == [0, 0], runs[0].text
    config = yaml.safe_load((runs[0].root / "config.yaml").read_text())
    assert config["data"]["init_args"]["cache"] == {"folder": str(folder), "num_proc": 1, "least_rows": 5}
    resumed = ("--ckpt_path", "last", "--trainer.default_root_dir", runs[0].root)
    again = align("fit", "--config", runs[0].root / "config.yaml", "--data.cache", "null", *resumed)
    assert again.code == 0, again.text
    return folder


def test_what_is_there(kept, capsys, workplace):
    assert cache_command(["--folder", str(kept)]) == 0
    *entries, total = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[-2:][0].strip() for line in entries) == ["24 rows", "24 rows"]
    assert all(line.endswith("sft.jsonl") for line in entries)
    assert {" ".join(line.split()[6:8]) for line in entries} == {"table (train)", "lines 24"}
    assert total.startswith(f"{kept}: 2 entries, ")


def test_what_is_removed(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALIGNMENT_MODULES_CACHE", str(folder))
    shelf, about = Store(folder), {"kind": "table", "source": "rows", "rows": 3}
    for name in ("0" * 32, "1" * 32, "2" * 32):
        shelf.obtain(name, about, lambda place: {})
    old = time.time() - 40 * 24 * 3600
    os.utime(folder / ("0" * 32) / "used", (old, old))
    (folder / ("2" * 32) / "entry.json").write_text("{")
    (folder / "unfinished-3").mkdir()
    (folder / "mine").mkdir()
    assert cache_command([]) == 0
    shown = capsys.readouterr().out
    assert "5 entries" not in shown
    assert "4 entries" in shown
    assert all(kind in shown for kind in ("damaged", "unfinished", "table"))
    assert cache_command(["--clear", "30"]) == 0
    assert "removed 1 entry" in capsys.readouterr().out
    with FileLock(folder / "locks" / "3.lock"):
        assert cache_command(["--clear=all"]) == 1
    assert "unfinished-3 is being made by a process, so it was left" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["locks", "mine", "unfinished-3"]
    assert cache_command(["--clear", "all"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["locks", "mine"]


def test_a_cache_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALIGNMENT_MODULES_CACHE", str(tmp_path / "none"))
    assert cache_command([]) == 0
    assert "0 entries, 0 B" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"folder='.*nosuch': there is no such folder"):
        cache_command(["--folder", str(tmp_path / "nosuch")])


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "few", ""])
def test_days_that_are_none(days, capsys):
    with pytest.raises(SystemExit) as stopped:
        cache_command([f"--clear={days}"])
    assert stopped.value.code == 2
    assert f"{days!r} must be a number of days of 0 or more, or all" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_stops_a_run(workplace, align):
    (workplace / "no-folder").write_text("")
    options = ("--data.cache.folder", "no-folder/cache", "--data.cache.least_rows", "5")
    done = align("fit", "--config", "sft.yaml", "--trainer.max_steps", "1", *options)
    assert done.code == 1
    assert "no-folder/cache cannot be written" in done.text
    assert len(done.text.strip().splitlines()) <= 3, json.dumps(done.text)


def test_the_page_shows_every_option_and_commands_that_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ALIGNMENT_MODULES_CACHE", str(tmp_path))
    text = re.search("```yaml\n(.*?)```", SECTION, flags=re.DOTALL).group(1)
    shown = yaml.safe_load(text)["data"]["init_args"]["cache"]
    assert CacheOptions(**shown).path == Path("/scratch/tables")
    assert list(shown) == [option.name for option in fields(CacheOptions)]
    for option in fields(CacheOptions):
        said = re.search(rf"{option.name}: .*default (\w+)", text).group(1)
        assert said == ("none" if option.default is None else str(option.default))
    lines = [line for line in SECTION.splitlines() if line.startswith("align cache")]
    assert lines
    for line in lines:
        _, _, *arguments = shlex.split(line, comments=True)
        assert cache_command(arguments) == 0
