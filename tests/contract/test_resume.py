"""A run killed in the middle of an epoch and resumed ends where the uninterrupted run ends, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.contract.killed_runs import CURRICULA
from tests.paradigms import ROWS, expensive

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def killed_runs(workplace, tmp_path_factory):
    """`killed_runs(results, paradigm)`: asks one process, which lives as long as the tests, for a paradigm's runs."""
    errors = tmp_path_factory.mktemp("killed_runs") / "stderr.txt"
    command = [sys.executable, "-m", "tests.contract.killed_runs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        open(errors, "w") as file,
        subprocess.Popen(command, cwd=workplace, env=ENVIRONMENT, stderr=file, **pipes) as asked,
    ):

        def ask(results, paradigm):
            asked.stdin.write(f"{paradigm} {results}\n")
            asked.stdin.flush()
            assert asked.stdout.readline() == "over\n", errors.read_text()[-4000:]

        yield ask


@pytest.fixture(scope="module")
def all_runs(killed_runs, tmp_path_factory):
    """`all_runs(paradigm)(name)`: the folder of one of a paradigm's runs; its runs are made once."""
    made = {}

    def make(paradigm):
        results = tmp_path_factory.mktemp(paradigm)
        killed_runs(results, paradigm)
        codes = json.loads((results / "codes.json").read_text())
        logs = {path.parent.name: path.read_text()[-2000:] for path in results.glob("*/log.txt")}

        def find(name, code=0):
            assert codes[name] == code, logs[name]
            return results / name

        return find

    def runs(paradigm):
        if paradigm not in made:
            made[paradigm] = make(paradigm)
        return made[paradigm]

    return runs


@pytest.fixture
def runs(all_runs, request):
    """Those of the test's own paradigm; else of `sft`."""
    return all_runs((getattr(request.node, "callspec", None) and request.node.callspec.params.get("paradigm")) or "sft")


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def weights(folder):
    found, critic = load_file(folder / "export" / "model.safetensors"), folder / "export" / "critic"
    beside = load_file(critic / "model.safetensors") if critic.exists() else {}
    return found | {f"critic {key}": value for key, value in beside.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def num_tokens(folder, step):
    checkpoint = torch.load(folder / "checkpoints" / f"step={step}.ckpt", weights_only=True)
    return checkpoint["alignment_module"]["num_tokens"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("paradigm", expensive())
class TestAfterSIGKILL:
    def test_same_weights(self, runs, workplace, paradigm, workers):
        runs(f"killed_{workers}", code=-signal.SIGKILL)
        whole, resumed = weights(runs("whole")), weights(runs(f"resumed_{workers}"))
        start = load_file(workplace / "policy" / "model.safetensors")
        trunk = whole.keys() & start.keys()  # a reward model has a head of its own
        assert len(trunk) >= len(start) - 1
        assert not any(torch.equal(whole[key], start[key]) for key in trunk)
        assert equal(whole, resumed)

    def test_same_rows_in_the_same_order(self, runs, paradigm, workers):
        whole, resumed = rows(runs("whole")), rows(runs(f"resumed_{workers}"))
        killed = rows(runs(f"killed_{workers}", code=-signal.SIGKILL))
        position = next(i for i, batch in enumerate(whole) if batch["step"] == ROWS[paradigm].resume.start)
        assert whole[position]["epoch"] == 1
        assert whole[position - 1]["epoch"] == 1  # the middle of an epoch
        assert killed == whole[: len(killed)]
        assert len(killed) > position + 1  # work after the checkpoint was lost, and is done again
        assert resumed == whole[position:]

    def test_tokens_are_counted_on(self, runs, paradigm, workers):
        whole, resumed = runs("whole"), runs(f"resumed_{workers}")
        later = ROWS[paradigm].resume.start + 2 * ROWS[paradigm].resume.every
        assert num_tokens(whole, later) > num_tokens(whole, ROWS[paradigm].resume.start) > 0
        assert num_tokens(resumed, later) == num_tokens(whole, later)

    def test_nothing_half_written(self, runs, paradigm, workers):
        folder = runs(f"killed_{workers}", code=-signal.SIGKILL) / "checkpoints"
        assert not list(folder.glob("*.tmp"))
        for path in folder.iterdir():
            assert torch.load(path, weights_only=True)["alignment_module"]["paradigm"] == paradigm


@pytest.mark.parametrize("paradigm", ["sft", "grpo"])
def test_a_curriculum_after_sigkill(all_runs, paradigm):
    """Two workers draw ahead; the rows by length within a budget of tokens, or by success, and the weights are those of
    the uninterrupted run."""
    find, given = all_runs(paradigm), CURRICULA[paradigm]
    whole, resumed = find("curriculum"), find("curriculum_resumed")
    killed = rows(find("curriculum_killed", code=-signal.SIGKILL))
    position = next(i for i, batch in enumerate(rows(whole)) if batch["step"] == given.start)
    assert killed == rows(whole)[: len(killed)]
    assert len(killed) > position + 1
    assert rows(resumed) == rows(whole)[position:]
    assert equal(weights(whole), weights(resumed))
    epochs = {batch["epoch"]: [] for batch in rows(whole)}
    for batch in rows(whole):
        epochs[batch["epoch"]] += [str(row) for row in batch["rows"]]
    assert any(len(set(epoch)) < len(epoch) for epoch in epochs.values())  # some rows took the place of others


def test_random_numbers_matter(runs):
    """With another seed after the checkpoint the policy's dropout differs, and so do the weights."""
    assert not equal(weights(runs("whole")), weights(runs("other_seed")))
    assert rows(runs("other_seed")) == rows(runs("resumed_0"))


@pytest.mark.parametrize("batch", ["first", "second"])
def test_the_checkpoint_that_sigterm_leaves_resumes_exactly(runs, batch):
    """Also where it falls between the two batches of an optimizer step: the first of them is read again."""
    stopped, continued = runs(f"stopped_{batch}", code=143), runs(f"continued_{batch}")
    assert equal(weights(runs("whole")), weights(continued))
    whole, again = rows(runs("whole")), int(batch == "first")
    assert rows(stopped) == whole[: len(rows(stopped))]
    assert rows(continued) == whole[len(rows(stopped)) - again :]
    assert num_tokens(continued, 8) == num_tokens(runs("whole"), 8)


def test_muon_and_an_average_after_sigkill(runs):
    """The average, and the weights that it is one of, are those of the uninterrupted run."""
    whole, resumed = runs("averaged"), runs("averaged_resumed")
    assert not list((runs("averaged_killed", code=-signal.SIGKILL)).glob("export"))
    last, own = (load_file(whole / "export" / part / "model.safetensors") for part in ("unaveraged", ""))
    assert not any(torch.equal(value, own[name]) for name, value in last.items())
    assert equal(own, weights(resumed))
    assert equal(last, load_file(resumed / "export" / "unaveraged" / "model.safetensors"))


def test_sigterm_ends_the_command_with_143(workplace, tmp_path):
    """The scheduler's signal, to the command as a user runs it."""
    noted = tmp_path / "rows.jsonl"
    callbacks = json.dumps([{"class_path": "my_callbacks.Rows", "init_args": {"path": str(noted)}}])
    command = [
        sys.executable,
        "-m",
        "alignment_modules",
        "fit",
        "--config",
        "sft.yaml",
        "--trainer.max_steps",
        "100000",
    ]
    command += ["--trainer.max_epochs", "-1", "--trainer.callbacks", callbacks]
    command += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.enable_checkpointing", "false"]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=workplace, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        limit = time.monotonic() + 120
        while not (noted.exists() and noted.stat().st_size) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 143, (tmp_path / "log.txt").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "run" / "export").exists()
