"""The table of TRL's options: TRL has its left side, our classes have its right, and the page shows all of it."""

import dataclasses
import inspect
import re
from pathlib import Path

import lightning as L
import pytest
import torch

import alignment_modules
import datamodules
from alignment_modules.callbacks import Checkpoints, ExportPolicy
from alignment_modules.cli.converting.convert import defaults, rows, trl_options
from alignment_modules.cli.converting.table import CLASSES, FIXED, TABLE
from alignment_modules.functional.policy_losses import LOSSES
from alignment_modules.paradigms import PARADIGMS
from alignment_modules.training.reference_sync import SyncReference
from alignment_modules.training.schedules import LinearSchedule

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
HEADINGS = ("### Other trainers", "## LLaMA-Factory", "## axolotl")
COMMAND = pytest.mark.parametrize("command", CLASSES)


def accepted(cls):
    """Names that a class takes."""
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)]
    return {name for base in bases for name in inspect.signature(base.__init__).parameters}


def places(command):
    """What has the options under each prefix of a dotted name."""
    module, data = CLASSES[command]
    return {
        "model": getattr(alignment_modules, module),
        "model.policy": alignment_modules.PolicyConfig,
        "model.policy.lora": alignment_modules.LoraConfig,
        "model.optimizer": torch.optim.AdamW,
        "model.lr_scheduler": LinearSchedule,
        "model.sync_reference": SyncReference,
        "data": getattr(datamodules, data),
        "data.cache": datamodules.CacheOptions,
        "trainer": L.Trainer,
        "export": ExportPolicy,
        "checkpoints": Checkpoints,
    }


@COMMAND
def test_every_option_of_ours_is_there(command):
    known = {prefix: accepted(cls) for prefix, cls in places(command).items()}
    known["model.loss_options"] = {name for loss in LOSSES.values() for name in loss.numbers}
    known[""] = {"seed_everything"}
    for name in [name for row in rows(command) for name in row.ours.split()] + [*FIXED.get(command, ())]:
        prefix, _, last = name.rpartition(".")
        assert last in known[prefix], name


def test_every_row_is_of_an_option_of_trl():
    for section in TABLE:
        for row in section.rows:
            assert any(row.name in defaults(command) for command in section.commands), row.name


@COMMAND
def test_an_option_has_one_row(command):
    names = [row.name for row in rows(command)]
    assert len(names) == len(set(names))


def test_the_commands_of_the_table_are_trls():
    assert set(trl_options()) == {"version", "all", "others", *CLASSES}


def shown(row):
    """A row as the page shows it."""
    ours = ", ".join(f"`{name}`" for name in row.ours.split())
    return f"| `{row.name}` | {ours} | {'; '.join(filter(None, (row.differs, row.note)))} |"


@pytest.mark.parametrize("section", TABLE, ids=[section.title for section in TABLE])
def test_the_page_shows_the_table(section):
    found = PAGE.split(f"\n### {section.title}\n")[1].split("\n#")[0]
    lines = [line for line in found.splitlines() if line.startswith("| `")]
    assert lines == [shown(row) for row in section.rows]


def test_the_page_names_the_version():
    assert f"TRL {trl_options()['version']}" in PAGE
    options = PAGE.split("\n## TRL: options\n")[1].split("\n## ")[0]
    headings = re.findall(r"^### (.+)$", options, flags=re.MULTILINE)
    assert headings == [*(section.title for section in TABLE), "Other trainers"]


def by_hand():
    """Cells of the tables of options that no code follows."""
    parts = [PAGE.split(f"\n{heading}\n")[1].split("\n#")[0] for heading in HEADINGS]
    lines = [line for part in parts for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_options_of_the_tables_by_hand_are_there():
    known = {prefix: set() for prefix in [*places("sft"), "data.stream"]}
    for command in CLASSES:
        for prefix, cls in places(command).items():
            known[prefix] |= accepted(cls)
    for paradigm in PARADIGMS:
        known["model"] |= accepted(paradigm)
    known["data"] |= accepted(datamodules.MixtureDataModule)
    known["data.stream"] = accepted(datamodules.StreamOptions)
    known[""] = {"model"}
    cells = by_hand()
    assert len(cells) > 60
    for _, ours, _ in cells:
        for name in re.findall(r"`([^`]+)`", ours):
            prefix, _, last = name.rpartition(".")
            assert last in known[prefix], name


def test_options_of_trls_other_trainers_are_there():
    named = [cells[0].strip("`").split(".") for cells in by_hand() if "Config." in cells[0]]
    assert {config for config, _ in named} == set(trl_options()["others"])
    for config, name in named:
        assert name in trl_options()["others"][config], (config, name)
