"""What Linux has and other systems lack is left out where it is missing; those systems themselves were not run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment_modules.callbacks import run_report
from alignment_modules.policies import export
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.processes import Processes
from alignment_modules.rollouts.environments.results import Failure
from alignment_modules.training import checkpoint_files
from datamodules.cache import arrays

ROOT = Path(__file__).parents[1]

# `align` where modules and functions of Unix are missing, folders cannot be opened, and what may only be read cannot be
# flushed. Libraries of others come first: what they do on other systems is theirs to know.
ELSEWHERE = """
import fcntl, os, signal, sys
import lightning.pytorch.cli, peft, tensorboard, torch.utils.data, transformers

sys.modules |= dict.fromkeys(("fcntl", "resource", "readline"))
for module, names in ((os, ("killpg", "sched_getaffinity")), (signal, ("SIGHUP",))):
    for name in names:
        delattr(module, name)
open_here, flush_here = os.open, os.fsync

def open_file(path, *more, **keywords):
    if os.path.isdir(path) and "dir_fd" not in keywords:  # else it is shutil, which goes another way there
        raise PermissionError(13, "Permission denied", str(path))
    return open_here(path, *more, **keywords)

def flush_file(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    flush_here(descriptor)

os.open, os.fsync = open_file, flush_file
from alignment_modules.cli import main
sys.platform, arguments = "win32", sys.argv[1:]
for steps in ("--trainer.max_steps=1", "--trainer.max_steps=2 --ckpt_path=last"):
    sys.argv = ["align", *arguments, *steps.split()]
    main()
"""


@pytest.mark.slow
def test_a_run_without_what_is_unix_own(tmp_path):
    """It keeps a table on disk, saves a checkpoint, exports, reports, and resumes."""
    fit = [sys.executable, "-c", ELSEWHERE, "fit", "--config=quickstart/pretrain", "--model.lr_scheduler=null"]
    fit += ["--data.train.init_args.size=200", "--data.cache.least_rows=1", f"--data.cache.folder={tmp_path / 'cache'}"]
    fit += ["--data.cache.num_proc=1", "--model.policy.config.num_hidden_layers=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(fit, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("not known on this system") == 2
    assert (tmp_path / "runs/quickstart/pretrain/export/model.safetensors").exists()
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("flush", [export._flush, arrays.flush], ids=["export", "cache"])
def test_only_a_folder_may_stay_unflushed(flush, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    flush(file)
    flush(tmp_path)

    def refuse(path, *more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    flush(tmp_path)
    with pytest.raises(PermissionError):
        flush(file)


def test_no_process_is_signalled_where_a_signal_ends_it(monkeypatch):
    assert checkpoint_files._is_running(os.getpid())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill ends the process on Windows"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert checkpoint_files._is_running(1)


def test_the_peak_memory_is_not_told_where_nothing_tells_it(monkeypatch):
    class Module:
        class device:
            type = "cpu"

    assert run_report._peak_memory(Module())[-1] == "B"
    monkeypatch.setattr(run_report, "resource", None)
    assert run_report._peak_memory(Module()) == "not known on this system"


def test_a_late_tool_is_ended_without_its_group(monkeypatch):
    monkeypatch.delattr(os, "killpg")
    tools = Processes(ToolOptions(time_limit=0.2))
    with pytest.raises(Failure, match="no answer within"):
        tools.call("signal.pause", {})
    tools.close()
