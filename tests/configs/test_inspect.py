"""`align inspect`: every recipe without weights, figures that a run confirms, and the runs it refuses as `fit` does."""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from tests.paradigms import ROWS

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))}
OVERLAYS = RECIPES["sft"].parents[1] / "strategies"
CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1")
REWARDS = """
def wants_a_column(completions, solution):
    return [0.0] * len(completions)

def breaks(completions):
    return [1 / len(text) for text in completions]

def length(completions, prompts, hint=None):
    return [len(text) for text in completions]
"""


@pytest.fixture(scope="session")
def bare(model_folder, tmp_path_factory):
    """The folder of a model without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


@pytest.fixture
def command(tmp_path):
    """Runs `align` in a folder of its own; returns exit code and both streams."""
    from alignment_modules.cli import main

    (tmp_path / "inspected_rewards.py").write_text(REWARDS)

    def run(*arguments):
        out, err, environment, code = io.StringIO(), io.StringIO(), dict(os.environ), 0
        with (
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "path", list(sys.path))
            sys.modules.pop("inspected_rewards", None)
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
            finally:
                os.environ.clear()
                os.environ.update(environment)
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture
def inspected(command, bare, data):
    """Inspects a recipe on its rows."""

    def run(name, *more, rows=None):
        source = [f"--data.train={rows or data[name]}"]
        models = [f"--model.policy.path={bare}", *(f"--model.{key}={bare}" for key in ROWS[name].needs)]
        return command("inspect", f"--config={RECIPES[name]}", *models, *source, *CPU, *more)

    return run


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figure(text, title, name):
    """What stands behind a name in a section."""
    section = text.split(f"\n{title}", 1)[1].split("\n\n", 1)[0]
    [line] = [line for line in section.splitlines() if line.startswith(f"  {name}  ")]
    return line.removeprefix(f"  {name}").split()[0].replace(",", "")


@pytest.mark.parametrize(
    ("name", "overlay"), [*((name, None) for name in RECIPES), ("dpo", "lora"), ("reward", "lora")]
)
def test_every_recipe_without_weights(inspected, name, overlay, tmp_path, caplog):
    overlays = [f"--config={OVERLAYS / overlay}.yaml"] if overlay else []
    found = inspected(name, *overlays, "--rows=2", f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert found.code == 0, found.err
    assert "the folder has no *.safetensors, which a run needs" in caplog.text
    assert "\n1." in found.out
    assert "\n3." not in found.out
    assert ("[[" in found.out) == (ROWS[name].kind != "acting")
    assert figure(found.out, "Rows of train", "rows") == "24"
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_or_read_of_weights(inspected, model_folder, tmp_path, monkeypatch):
    """With a folder that has weights, too; and an earlier run's files stay where they are."""
    import safetensors.torch

    def refuse(*arguments, **keywords):
        raise AssertionError("weights are read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.load_file", refuse, raising=False)
    root = tmp_path / "runs"
    (root / "checkpoints").mkdir(parents=True)
    (root / "config.yaml").write_text("")
    levels = [logging.getLogger(name).level for name in ("alignment_modules", "lightning.pytorch")]
    found = inspected("dpo", f"--model.policy.path={model_folder}", f"--trainer.default_root_dir={root}", "--rows=0")
    assert (found.code, found.err.replace("Seed set to 0\n", "")) == (0, "")
    assert sorted(path.name for path in root.iterdir()) == ["checkpoints", "config.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inspected_rewards.py", "runs"]
    assert "first rows" not in found.out
    assert [logging.getLogger(name).level for name in ("alignment_modules", "lightning.pytorch")] == levels


def test_rows_are_shown_as_they_are(inspected, tmp_path):
    turns = [
        {"role": "user", "content": "[bold]x[/bold] :smile: \x1b[31m"},
        {"role": "assistant", "content": "[red]a\n"},
    ]
    rows = lines(tmp_path / "markup.jsonl", [{"messages": turns}])
    found = inspected("sft", rows=rows)
    assert found.code == 0, found.err
    assert "<|user|>[bold]x[/bold] :smile: " in found.out
    assert "<|assistant|>\n" not in found.out
    assert "<|assistant|>[[[red]a\\n" in found.out.replace("\n    ", "")
    assert "</s>]]" in found.out
    assert "\x1b" not in found.out


def test_packed_rows_show_their_documents_and_efficiency(inspected, tmp_path):
    """Two rows of 12 places hold documents of 7, 5 and 6 tokens (each with its end): 18 of 24 places."""
    rows = lines(tmp_path / "documents.jsonl", [{"text": "abcdef"}, {"text": "abcd"}, {"text": "abcde"}])
    found = inspected("pretrain", "--data.max_length=12", "--data.shuffle=false", rows=rows)
    assert found.code == 0, found.err
    assert "document 1 of 2\n    a[[bcdef</s>]]" in found.out
    assert "document 2 of 2\n    a[[bcd</s>]]" in found.out
    assert figure(found.out, "An epoch", "packing") == f"{18 / 24:.1%}"
    assert figure(found.out, "An epoch", "padding") == f"{6 / 24:.1%}"  # one batch of 12 and 6 tokens


def test_what_was_lost_is_told(inspected, tmp_path):
    rows = lines(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b" * n} for n in (1, 2, 30)])
    found = inspected("sft", "--data.max_length=16", "--data.overflow=drop", rows=rows)
    assert "dropped too long  1" in found.out
    assert "longer than max_length (overflow=drop)" in found.out


def test_pairs_and_labels(inspected, tmp_path):
    found = inspected("dpo", "--data.shuffle=false", "--rows=1")
    assert "prompt   4 tokens\n    0+0=\n" in found.out
    assert "chosen   2 tokens, 2 of them targets\n    [[0</s>]]\n" in found.out
    assert "rejected   2 tokens, 2 of them targets\n    [[1</s>]]\n" in found.out
    assert figure(found.out, "Memory of a device", "frozen") == figure(found.out, "Memory of a device", "weights")
    assert "label  desirable" in inspected("kto", "--data.shuffle=false", "--rows=1").out


def test_rewards_judge_given_completions(inspected, tmp_path):
    rows = lines(tmp_path / "questions.jsonl", [{"prompt": "1+1=", "completion": "2", "answer": "2"}])
    more = ("--model.rewards+=inspected_rewards.length", "--completion=12345")
    found = inspected("grpo", *more, rows=rows)
    assert found.code == 0, found.err
    judged = {
        line.strip().split("  ")[0]: line.rsplit('"', 1)[1].split() for line in found.out.splitlines() if '"' in line
    }
    expected = {"the row's own completion": (1, 1, 2), "--completion": (0, 5, 5), "an empty completion": (0, 0, 0)}
    for what, numbers in expected.items():
        assert judged[what] == "exact_match {}, length {}, in all {}".format(*numbers).split()
    assert "length       weight 1  asks for completions, prompts, [hint]" in found.out


def test_a_reward_model_is_not_read(inspected, bare, tmp_path):
    config = json.loads(Path(bare, "config.json").read_text())
    folder = tmp_path / "judge"
    shutil.copytree(bare, folder)
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "good"}, "label2id": {"good": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspected("grpo", f"--model.rewards={folder}", "--rows=1")
    assert found.code == 0, found.err
    assert "judge n/a" in found.out
    assert "since its weights are not read" in " ".join(found.out.split())


def test_a_page(inspected, tmp_path):
    rows = lines(tmp_path / "sft.jsonl", [{"prompt": "<script>alert(1)</script>&amp;", "completion": "<b>2</b>\n3"}])
    found = inspected("sft", f"--html={tmp_path / 'page.html'}", rows=rows)
    assert found.code == 0, found.err
    page = (tmp_path / "page.html").read_text()
    texts, tags = [], set()
    parser = HTMLParser()
    parser.handle_data, parser.handle_starttag = texts.append, lambda tag, attributes: tags.add(tag)
    parser.feed(page)
    text = "".join(texts)
    assert tags.isdisjoint({"script", "link", "img"})
    assert "<script>alert(1)</script>&amp;<b>2</b>\\n\n3</s>" in text
    assert "optimizer steps" in text


class Counter(Callback):
    """Keeps how many steps the run will take, and ends it."""

    def on_train_start(self, trainer, pl_module):
        self.steps = pl_module.total_optimizer_steps
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", ("--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=3")),
        ("sft", ("--trainer.max_epochs=3", "--trainer.max_steps=5")),
        ("sft", ("--trainer.max_epochs=-1", "--trainer.max_steps=50", "--data.drop_last=true", "--data.batch_size=5")),
        ("pretrain", ("--trainer.limit_train_batches=0.5", "--data.packing=false", "--data.batch_size=2")),
        ("pretrain", ("--trainer.limit_train_batches=7", "--data.packing=false", "--data.batch_size=2")),
        ("grpo", ("--model.num_iterations=2", "--model.minibatches=2", "--model.max_completion_length=2")),
    ],
    ids=str,
)
def test_steps_are_those_of_the_run(inspected, model_folder, data, name, options):
    found = inspected(name, *options, "--rows=0")
    assert found.code == 0, found.err
    counter = Counter()
    cli = _built(name, model_folder, data[name], options, counter)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert int(figure(found.out, "The run", "optimizer steps")) == counter.steps


def _built(name, folder, source, options, callback):
    """What `align fit` builds, ready to run."""
    from alignment_modules.cli import run_cli

    arguments = [f"--config={RECIPES[name]}", f"--model.policy.path={folder}", f"--data.train={source}", *CPU, *options]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--data.tokenizer", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["align"])
        cli = run_cli([*arguments, *quiet], run=False)
    cli.trainer.callbacks[:] = [callback]
    return cli


def test_processes_share_the_rows(inspected):
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=2")
    found = inspected("sft", *two, "--data.batch_size=4", "--trainer.max_epochs=1", "--rows=0")
    assert found.code == 0, found.err
    assert "of one of 2 processes" in found.out
    assert figure(found.out, "The run", "rows of a step") == "16"
    assert figure(found.out, "The run", "optimizer steps") == "2"  # 3 batches of 4 rows on each
    assert not torch.distributed.is_initialized()


def test_memory_is_that_of_the_model(inspected, model_folder):
    from transformers import AutoModelForCausalLM

    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    text = inspected("sft", "--rows=0").out
    assert int(figure(text, "Memory of a device", "parameters")) == count
    tensors = 4 * 4 * count
    assert float(figure(text, "Memory of a device", "in all")) == pytest.approx(tensors / 2**10, rel=0.01)
    half = inspected("sft", "--trainer.precision=bf16-true", "--rows=0").out
    assert float(figure(half, "Memory of a device", "in all")) == pytest.approx(tensors / 2**11, rel=0.01)
    sgd = inspected("sft", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1", "--rows=0")
    assert sgd.code == 0, sgd.err
    assert figure(sgd.out, "Memory of a device", "optimizer") == "0"


def test_memory_of_a_critic(inspected):
    """A copy is trained beside the policy, with adapters of its own under LoRA; a shared one is a head."""

    def held(*more):
        found = inspected("ppo", *more, "--rows=0")
        assert found.code == 0, found.err
        names = ("weights", "gradients", "optimizer", "frozen")
        return [float(figure(found.out, "Memory of a device", name)) for name in names]

    weights, gradients, optimizer, reference = held()
    assert weights == pytest.approx(optimizer / 2, rel=0.01)
    assert 1.5 * reference < weights < 2 * reference  # the critic has a smaller head
    assert gradients == reference  # of one of them at a time
    assert held("--model.critic=shared") == pytest.approx([reference, reference, 2 * reference, reference], rel=0.01)
    adapters, _, _, bases = held(f"--config={OVERLAYS / 'lora.yaml'}")
    assert adapters > 0
    assert bases == pytest.approx(weights, rel=0.01)  # no reference of its own


def test_memory_of_what_processes_share(inspected):
    """Each holds its part of weights, gradients, optimizer states and a reference."""
    sharded = ("--trainer.devices=2", "--trainer.strategy=fsdp2")
    for name in ("sft", "dpo"):
        whole, shared = inspected(name, "--rows=0").out, inspected(name, *sharded, "--rows=0")
        assert shared.code == 0, shared.err
        assert figure(shared.out, "Memory of a device", "shared by") == "2"
        held = ("weights", "gradients", "optimizer", "in all", *(["frozen"] if name == "dpo" else []))
        for what in held:
            alone = float(figure(whole, "Memory of a device", what))
            assert float(figure(shared.out, "Memory of a device", what)) == pytest.approx(alone / 2, rel=0.02), what
        assert "what is gathered" in shared.out
        assert "what is gathered" not in whole
        parameters = [figure(text, "Memory of a device", "parameters") for text in (whole, shared.out)]
        assert parameters[0] == parameters[1]
    assert "of one of 2 processes" in shared.out


REFUSED = {
    "mistyped option": ("sft", ["--data.max_lenght=5"], "did you mean 'max_length'"),
    "mistyped option of its own": ("sft", ["--rwos=5"], "did you mean 'rows'"),
    "no such file": ("sft", ["--data.train=nothing.jsonl"], "train='nothing.jsonl': no such file"),
    "accumulation": ("grpo", ["--trainer.accumulate_grad_batches=2"], "accumulate_grad_batches=2) is not allowed"),
    "column": ("grpo", ["--model.rewards=inspected_rewards.wants_a_column"], "'wants_a_column' asks for 'solution'"),
    "reward": ("grpo", ["--model.rewards=inspected_rewards.breaks"], "an empty completion: reward 'breaks' raised"),
    "schedule": ("sft", ["--model.lr_scheduler.warmup_steps=500"], "warmup_steps=500 must not be more"),
    "rows": ("sft", ["--rows=-1"], "rows=-1 must be"),
    "completion": ("sft", ["--completion=2"], "completion='2': SFTModule has no rewards"),
    "html": ("sft", ["--html=nowhere/page.html"], "html='nowhere/page.html': there is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fit_would_refuse(inspected, case):
    name, options, message = REFUSED[case]
    found = inspected(name, *options)
    assert found.code == 1
    assert "error: " in found.err
    assert message in found.err


def test_bad_rows_and_another_vocabulary_are_refused_as_by_fit(command, bare, model_folder, write_model, tmp_path):
    small = write_model(tmp_path / "small", vocabulary=10)
    good = lines(tmp_path / "good.jsonl", [{"prompt": "1", "completion": "2"}] * 8)
    bad = lines(tmp_path / "bad.jsonl", [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": 3}])
    for options in (
        [f"--model.policy.path={small}", f"--data.train={good}", f"--data.tokenizer={model_folder}"],
        [f"--model.policy.path={model_folder}", f"--data.train={bad}"],
        [f"--model.policy.path={model_folder}", f"--data.train={good}", f"--data.validation={bad}"],
    ):
        arguments = [f"--config={RECIPES['sft']}", *options, *CPU, "--trainer.enable_progress_bar=false"]
        refused = [command(name, *arguments) for name in ("inspect", "fit")]
        assert [found.code for found in refused] == [1, 1]
        said = [next(line for line in found.err.splitlines() if "error: " in line) for found in refused]
        assert said[0] == said[1]


def test_help_and_a_mistyped_command(command):
    for word in ("-h", "--help"):
        found = command("inspect", word)
        assert found.code == 0
        assert "--completion TEXT" in found.out
    assert "inspect" in command("--help").out
    found = command("inspct")
    assert found.code == 2
    assert "did you mean 'inspect'" in found.err
