"""Rows for every paradigm, and `align` inside the test's process and folder."""

import json
import os
import sys

import pytest

from tests.paradigms import ROWS, SOURCES


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """One JSONL file a paradigm: `data["sft"]` and so on."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in SOURCES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{row.source}.jsonl") for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    """Runs `align` in this process, in a folder of its own (`align.folder`), and leaves the process as it was."""
    import torch

    from alignment_modules.cli import run_cli

    folder = tmp_path_factory.mktemp("run")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", ["align"])
            environment = dict(os.environ)
            try:
                return run_cli([str(argument) for argument in arguments])
            finally:
                if torch.distributed.is_initialized():  # a later run must not take itself for one of many
                    torch.distributed.destroy_process_group()
                os.environ.clear()
                os.environ.update(environment)

    run.folder = folder
    return run
