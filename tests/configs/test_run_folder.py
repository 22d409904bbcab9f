"""A run's folder: the last checkpoint in it, an earlier run's files, and two runs at a time."""

import os
import subprocess
import sys

import pytest
import torch

from alignment_modules.cli.run_folder import earlier_run, last_checkpoint, locked, set_aside
from alignment_modules.policies.weights import is_first_process


def save(path, step, age=0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"state_dict": {}, "optimizer_states": [], "global_step": step, "pytorch-lightning_version": "2.6.6"}
    torch.save(whole | more, path)
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


class TestLast:
    def test_steps_count_not_names_or_times(self, tmp_path):
        save(tmp_path / "checkpoints/step=9.ckpt", 3, age=0)
        found = save(tmp_path / "checkpoints/a.ckpt", 12, age=50)
        save(tmp_path / "checkpoints/last.ckpt", 10, age=10)
        assert last_checkpoint(tmp_path) == found

    def test_names_with_a_slash(self, tmp_path):
        save(tmp_path / "checkpoints/epoch=0-val/loss=1.2.ckpt", 3, age=0)
        found = save(tmp_path / "checkpoints/epoch=1-val/loss=0.9.ckpt", 6, age=5)
        assert last_checkpoint(tmp_path) == found

    def test_versions_of_another_logger(self, tmp_path):
        """The newest run, although an older one came further, and lies there with a newer time."""
        save(tmp_path / "lightning_logs/version_9/checkpoints/a.ckpt", 100, age=0)
        found = save(tmp_path / "lightning_logs/version_10/checkpoints/a.ckpt", 5, age=50)
        assert last_checkpoint(tmp_path) == found

    def test_folders_of_other_runs(self, tmp_path):
        save(tmp_path / "project/one/checkpoints/a.ckpt", 100, age=9)
        found = save(tmp_path / "project/two/checkpoints/a.ckpt", 5, age=0)
        assert last_checkpoint(tmp_path) == found

    def test_a_folder_of_its_own(self, tmp_path):
        found = save(tmp_path / "elsewhere/a.ckpt", 5)
        save(tmp_path / "run/checkpoints/b.ckpt", 3, age=9)
        assert last_checkpoint(tmp_path / "run", [tmp_path / "elsewhere"]) == found

    def test_a_damaged_one_is_named_and_the_one_before_taken(self, tmp_path, caplog):
        before = save(tmp_path / "checkpoints/a.ckpt", 3)
        damaged = save(tmp_path / "checkpoints/b.ckpt", 6)
        damaged.write_bytes(damaged.read_bytes()[:-100])
        assert last_checkpoint(tmp_path) == before
        assert f"checkpoint '{damaged}' is truncated" in caplog.text
        assert f"taking {before} instead" in caplog.text

    def test_weights_alone_are_no_checkpoint_to_resume_from(self, tmp_path, caplog):
        found = save(tmp_path / "checkpoints/a.ckpt", 3)
        torch.save({"state_dict": {}, "global_step": 9}, tmp_path / "checkpoints/light.ckpt")
        assert last_checkpoint(tmp_path) == found
        assert "light.ckpt' lacks 'pytorch-lightning_version': no Trainer wrote it" in caplog.text

    def test_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"ckpt_path='last': .*run holds no checkpoint"):
            last_checkpoint(tmp_path / "run")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/a.ckpt").touch()
        (tmp_path / "checkpoints/gone.ckpt").symlink_to("nowhere.ckpt")
        with pytest.raises(ValueError, match=r"no checkpoint of .* can be used; checkpoint .*a.ckpt' is empty"):
            last_checkpoint(tmp_path)


class TestEarlierRun:
    @pytest.fixture
    def run(self, tmp_path):
        folder = tmp_path / "sft"
        save(folder / "checkpoints/a.ckpt", 3)
        (folder / "export").mkdir()
        for name in ("config.yaml", "hparams.yaml", "samples.jsonl", "events.out.tfevents.1", "export/model", "mine"):
            (folder / name).write_text(name)
        (folder / "test").mkdir()
        return folder

    def test_is_moved_to_the_next_number_and_the_users_own_files_stay(self, run):
        assert set_aside(run, earlier_run(run)).name == "sft.1"
        assert sorted(path.name for path in run.iterdir()) == ["mine", "test"]
        moved = run.with_name("sft.1")
        assert (moved / "export/model").read_text() == "export/model"
        assert (moved / "checkpoints/a.ckpt").exists()
        assert earlier_run(run) == []
        save(run / "checkpoints/a.ckpt", 3)
        assert set_aside(run, earlier_run(run)).name == "sft.2"

    def test_what_the_new_run_has_written_stays(self, run):
        before = earlier_run(run)
        (run / "events.out.tfevents.2").touch()
        set_aside(run, before)
        assert sorted(path.name for path in run.iterdir()) == ["events.out.tfevents.2", "mine", "test"]

    def test_a_run_that_ended_before_it_began_leaves_nothing(self, tmp_path):
        folder = tmp_path / "sft"
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.1"):
            (folder / name).touch()
        assert set_aside(folder, earlier_run(folder)) is None
        assert list(tmp_path.iterdir()) == [folder]
        assert list(folder.iterdir()) == []

    def test_an_evaluation_is_no_run(self, tmp_path):
        for name in ("predictions.jsonl", "events.out.tfevents.1"):
            (tmp_path / name).touch()
        assert earlier_run(tmp_path) == []

    def test_a_requeued_job_goes_on(self, run):
        save(run / "hpc_ckpt_1.ckpt", 3)
        assert earlier_run(run) == []


def test_two_runs_at_a_time(tmp_path):
    code = (
        "import sys, pathlib; from alignment_modules.cli.run_folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        holder = rf"{tmp_path}.*another run writes into it now \(process {other.pid} on"
        with pytest.raises(ValueError, match=holder), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_only_the_first_process_claims_a_folder(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert is_first_process()
    monkeypatch.setenv(name, "1")
    assert not is_first_process()
