"""Tables say what is there: modules and the keys of their batches, formats of rows, hooks, and what a run logs."""

import inspect
import json
import re
import string

import pytest

import datamodules
from alignment_modules import GRPOModule, get_module_class
from alignment_modules.callbacks.tensorboard import tag_of
from alignment_modules.cli import run_cli
from alignment_modules.cli.commands import COMMANDS
from datamodules.rows import formats
from tests.docs import pages
from tests.docs.conftest import FILES
from tests.docs.pages import cells, names
from tests.docs.running import QUIET, SUBCOMMANDS
from tests.paradigms import ROWS

PARADIGMS = {name: row.source for name, row in ROWS.items()}
FORMATS = cells(pages.FORMATS)


def test_the_table_of_modules(model_folder):
    rows = cells(pages.MODULES)
    assert [names(row[0])[0] for row in rows] == list(PARADIGMS)
    for paradigm, cls, data, keys, options in rows:
        module = get_module_class(names(paradigm)[0])
        assert names(cls) == [module.__name__]
        accepted = {name for base in module.__mro__ if "__init__" in vars(base) for name in parameters(base)}
        assert set(names(options)) <= accepted
        source = FILES[f"{PARADIGMS[names(paradigm)[0]]}.jsonl"]
        made = getattr(datamodules, names(data)[0])(train=source, tokenizer=str(model_folder), batch_size=2)
        made.setup("fit")
        batch = next(iter(made.train_dataloader()))
        listed = set(names(keys))
        if "*_attention_mask" in listed:
            listed |= {name.replace("input_ids", "attention_mask") for name in listed if name.endswith("input_ids")}
        assert set(batch) - {"index", "answer"} <= listed


def parameters(cls):
    return [name for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY]


def test_every_format_is_in_the_table():
    assert {row[0] for row in FORMATS} == set(formats.COLUMNS)


@pytest.mark.parametrize("row", FORMATS, ids=[row[0] for row in FORMATS])
def test_formats(row, model_folder):
    line = json.loads(names(row[1])[0])
    assert formats.recognise(line) == row[0]
    classes = ("PretrainDataModule", "SFTDataModule", "PreferenceDataModule", "UnpairedDataModule", "PromptDataModule")
    for name, says in zip(classes, row[2:], strict=True):
        data = getattr(datamodules, name)(train=[line], tokenizer=str(model_folder), chat_template="plain")
        if says == "yes":
            data.setup("fit")
            assert len(data.train_dataloader()) == 1
        else:
            with pytest.raises(ValueError, match="has the columns"):
                data.setup("fit")


def test_every_command_is_in_the_table():
    rows = cells(pages.COMMANDS)
    assert {names(row[0])[0] for row in rows} == {*SUBCOMMANDS, *COMMANDS, "list"}
    shown = {line.split()[1] for line in pages.commands(pages.PAGES["docs/command_line.md"])}
    assert shown | {"convert"} == {names(row[0])[0] for row in rows}  # that one is shown in docs/coming_from.md


def test_hooks_exist():
    methods = set(re.findall(r"`([a-z_]+)\([\w, ]*\)`", pages.HOOKS))
    known = {"describe", "objective", "extra_metrics", "extra_state", "load_extra_state", "count_tokens"}
    assert known | {"trained", "optimizer_for"} == methods
    assert all(callable(getattr(GRPOModule, name)) for name in methods)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_table_of_metrics_is_what_a_run_logs(enter, paradigm, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    enter("README.md")
    writes = get_module_class(paradigm).generates
    rows = [(names(row[0]), *row[1:4]) for row in cells(pages.METRICS)]
    expected = {
        tag_of(f"{stage}/{name}")
        for listed, *cells in rows
        for stage, cell in zip(("train", "val", "test"), cells, strict=True)
        if (cell == "all" and (writes or stage != "test")) or paradigm in cell.split(", ")
        for name in listed
    }
    common = [
        f"--config=configs/recipes/{paradigm}.yaml",
        "--model.policy.path=my-model",
        f"--trainer.default_root_dir={tmp_path}",
        *QUIET,
    ]
    source = f"{PARADIGMS[paradigm]}.jsonl"
    fit = [f"--data.train={source}", f"--data.validation={source}", "--trainer.max_steps=2"]
    fit += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1"]
    stops = json.dumps(list(string.ascii_letters + string.digits))  # an untrained policy hardly stops by itself
    common += [f"--model.{key}=my-model" for key in ROWS[paradigm].needs]
    common += ROWS[paradigm].recipe.get("metrics", ())
    if ROWS[paradigm].kind == "acting":
        common += [f"--model.stop_strings={stops}"]
    run_cli(["fit", *common, *fit])
    judged = ["--model.evaluation.num_samples=8", f"--model.evaluation.stop_strings={stops}"]
    if writes:
        run_cli(["test", *common, "--data.test=questions.jsonl", *judged])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == expected
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]  # optimizer steps
