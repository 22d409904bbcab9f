"""The worked table of docs/steps.md: its numbers are those that `align inspect` tells."""

import contextlib
import io
import json
import re
import shlex
from fractions import Fraction

import pytest

from alignment_modules.cli.inspect import inspect_command
from tests.docs.pages import PAGES, cells, names, section
from tests.paradigms import ROWS

TABLE = cells(section(PAGES["docs/steps.md"], "A worked table"))
SLOW = (0, 1, 3, 4)
ROWS_OF = {
    "sft": lambda n: {"prompt": f"{n}=", "completion": f"{n}"},
    "kto": lambda n: {"prompt": f"{n}=", "completion": f"{n}", "label": n % 2 == 0},
}


def told(text, name):
    """A number of an inspection, by its name; 1 where it is not told."""
    found = re.search(rf"^  {name} +([\d,]+)", text, flags=re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 1


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] if n in SLOW else []) for n, row in enumerate(TABLE)]
)
def test_the_numbers_are_those_of_an_inspection(row, model_folder, tmp_path):
    options, of_batch, steps_of_batch, of_epoch, of_step = row
    recipe, arguments = names(options)
    assert recipe in ROWS
    make = ROWS_OF.get(recipe, lambda n: {"prompt": f"{n}=", "answer": f"{n}"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(make(n)) + "\n" for n in range(64)))
    command = ["--config", recipe, "--model.policy.path", str(model_folder), "--data.train", str(rows), "--rows=0"]
    command += ["--trainer.accelerator=cpu", *shlex.split(arguments)]
    command += [] if "--trainer.devices" in arguments else ["--trainer.devices=1"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert inspect_command(command) == 0
    text, accumulated, ranks = out.getvalue(), 1, 1
    if found := re.search(r"accumulate_grad_batches (\d+)", arguments):
        accumulated = int(found[1])
    if found := re.search(r"devices (\d+)", arguments):
        ranks = int(found[1])
    steps = Fraction(told(text, "steps of a batch"), accumulated)
    rows_of_batch = int(re.search(r"batch_size (\d+)", arguments)[1]) * ranks
    assert int(of_batch) == rows_of_batch
    assert told(text, "rows of a (?:step|batch)") == rows_of_batch * accumulated
    assert Fraction(steps_of_batch) == steps
    assert int(of_epoch) == told(text, "steps of an epoch") == 64 / rows_of_batch * steps
    passes = int(found[1]) if (found := re.search(r"num_iterations (\d+)", arguments)) else 1
    minibatches = int(found[1]) if (found := re.search(r"minibatches (\d+)", arguments)) else 1
    assert told(text, "steps of a batch") == passes * minibatches
    of_each = told(text, "completions of them") // rows_of_batch if "of them" in text else 0
    numbers = [int(number) for number in re.findall(r"\d+", of_step)]
    read = rows_of_batch * accumulated // minibatches
    assert numbers == ([read, read * of_each] if of_each else [read])
