"""A user's folder for each page, and `align` in it."""

import json
import os
import shutil
import sys

import pytest

from alignment_modules.policies import PolicyConfig, build_policy
from tests.docs.pages import PAGES, ROOT, setting, titled
from tests.models import MIXTRAL
from tests.paradigms import ROWS

SUMS = [(a, b) for a in range(6) for b in range(4)]
FILES = {
    "documents.jsonl": [{"text": f"{a}+{b}={a + b}"} for a, b in SUMS],
    "demonstrations.jsonl": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS],
    "pairs.jsonl": [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in SUMS],
    "labelled.jsonl": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "label": a % 2 == 0} for a, b in SUMS],
    "questions.jsonl": [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in SUMS],
}


@pytest.fixture(scope="session")
def experts_folder(model_folder, tmp_path_factory):
    """A mixture of experts that asks to be balanced, with the tokenizer of the dense model."""
    folder = tmp_path_factory.mktemp("experts") / "my-model-of-experts"
    shutil.copytree(model_folder, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    build_policy(PolicyConfig(config=MIXTRAL | {"vocab_size": vocabulary})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(model_folder, tmp_path_factory):
    """A reward model, as `RewardModule` exports it."""
    from alignment_modules import RewardModule

    folder = tmp_path_factory.mktemp("reward") / "export"
    RewardModule(policy=PolicyConfig(path=str(model_folder), head="scalar"), tokenizer=str(model_folder)).export(folder)
    return folder


@pytest.fixture(scope="session")
def workplaces(model_folder, experts_folder, tmp_path_factory):
    """Makes the folder of a page, once: the shipped `configs/`, models, the data files, and the page's own files."""
    made = {}

    def make(page):
        if page in made:
            return made[page]
        folder = made[page] = tmp_path_factory.mktemp(page.replace("/", "-"))
        for shipped in ("configs", "examples", "benchmarks"):
            (folder / shipped).symlink_to(ROOT / shipped)
        for name, rows in FILES.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = titled(PAGES[page], "python") | titled(PAGES[page], "yaml") | dict(setting(page).files)
        for name, text in own.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "my-model").symlink_to(model_folder)
        (folder / "my-model-of-experts").symlink_to(experts_folder)
        return folder

    return make


@pytest.fixture
def enter(workplaces, monkeypatch):
    """Goes to the folder of a page, for a test; leaves the process as it was."""

    def go(page):
        folder = workplaces(page)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.setattr(sys, "argv", ["align"])
        for name in [*titled(PAGES[page], "python"), *setting(page).files]:
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)  # another page's
        return folder

    environment = dict(os.environ)
    yield go
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def earlier_runs(model_folder, reward_folder):
    """Puts the exports that a command names and no earlier command has made: a page may build on another one's."""

    def put(folder, command):
        for paradigm in ROWS:
            export = folder / "runs" / paradigm / "export"
            if str(export.relative_to(folder)) in command and not export.exists():
                export.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(reward_folder if paradigm == "reward" else model_folder, export)

    return put
