"""The section on streams in docs/data.md, and the overlay that it names: its command and its code run."""

import re
from pathlib import Path

import pytest

from datamodules import StreamOptions
from tests.workplace import align, workplace  # noqa: F401

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "data.md").read_text().split("\n## Streams\n")[1].split("\n## ")[0]
[COMMAND] = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)
QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")


def test_the_command_runs(align, workplace, capfd):  # noqa: F811
    arguments = (
        COMMAND.replace("\\\n", " ").replace("my-model", "policy").replace("documents.jsonl", "text.jsonl").split()
    )
    arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments[1:]]
    done = align(*arguments, *QUIET, "--trainer.enable_model_summary=false")
    assert done.code == 0, done.error
    assert (done.root / "export" / "model.safetensors").exists()
    assert "| train | `text.jsonl` |" in (done.root / "export" / "README.md").read_text()


def test_the_overlay_is_explained():
    overlay = (ROOT / "configs" / "data" / "stream.yaml").read_text()
    for line in overlay.splitlines():
        assert "#" in line or line.endswith(":") or not line
    for option, default in (
        ("buffer_size", StreamOptions().buffer_size),
        ("max_epochs", -1),
    ):
        assert re.search(rf"{option}: {default} #", overlay)


def test_a_run_tells_of_a_stream(align, workplace):  # noqa: F811
    done = align("fit", "--config", "sft.yaml", "--data.stream.buffer_size=5", "--trainer.max_epochs=3")
    assert done.code != 0
    assert "trainer.max_steps=-1: the training rows are a stream" in f"{done.error} {done.text}"
    assert "Traceback" not in done.text


def test_the_code_runs(workplace):  # noqa: F811
    [code] = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    names = {}
    exec(code.replace("my-model", str(workplace / "policy")), names)
    data = names["data"]
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 8


@pytest.mark.parametrize("paradigm", ["dpo", "kto", "grpo"])
def test_other_paradigms_train_on_streams(paradigm, align):  # noqa: F811
    options = ("--data.stream.buffer_size=5", "--trainer.max_epochs=-1", "--trainer.max_steps=2")
    done = align("fit", "--config", f"{paradigm}.yaml", *options)
    assert done.code == 0, (done.error, done.text)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "bufer_size=3",
            "--data.stream.bufer_size=3: StreamOptions has no option 'bufer_size'; did you mean 'buffer_size'?",
        ),
        ("buffer_size=x", "--data.stream.buffer_size=x: must be an integer from 1 to 2147483647"),
    ],
)
def test_a_mistake_is_named(option, message, align):  # noqa: F811
    done = align("fit", "--config", "sft.yaml", f"--data.stream.{option}")
    assert done.code != 0
    assert message in f"{done.error} {done.text}"
