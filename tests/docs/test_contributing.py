"""What CONTRIBUTING adds to the project as an example works."""

import os
import subprocess
import sys
from pathlib import Path

from alignment_modules.cli import run_cli
from tests.docs.pages import CONTRIBUTING, PAGES, ROOT, titled
from tests.docs.running import QUIET


def test_contributing_example(enter, tmp_path, monkeypatch):
    """The paradigm of docs/extending.md passes the test that CONTRIBUTING shows, and trains by its configuration."""
    enter("README.md")
    page = PAGES["docs/extending.md"]
    files = titled(CONTRIBUTING, "python") | titled(page, "python") | titled(page, "yaml")
    assert set(files) == {"unlikelihood.py", "unlikelihood.yaml", "my_module.py", "tests/modules/test_unlikelihood.py"}
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    for path, text in files.items():
        text = text.replace("alignment_modules.paradigms.unlikelihood", "unlikelihood")
        (tmp_path / Path(path).name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_unlikelihood.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    arguments = [
        "fit",
        f"--config={tmp_path / 'unlikelihood.yaml'}",
        "--model.policy.path=my-model",
        "--data.train=pairs.jsonl",
    ]
    arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}", *QUIET, "--trainer.log_every_n_steps=1"]
    metrics = run_cli(arguments).trainer.callback_metrics
    assert {"train/loss", "train/nll_loss", "train/unlikelihood_loss", "train/rewards/accuracies"} <= metrics.keys()
