"""Adapters in shards, by the command line: the best checkpoint tested and exported alone, and trained further."""

import csv
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment_modules.policies.load import build_policy
from alignment_modules.training.sharded_checkpoints import open_checkpoint
from tests.policies.carrying import logits
from tests.reliability.test_sharded_runs import ALONE, SHARDS, finish, run, saver, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
BEST = {"monitor": "val/loss", "mode": "max", "filename": "{step}", "save_top_k": -1}
LORA = ("--model.policy", '{"path": "policy", "lora": {"r": 2, "init": "olora"}}')


@pytest.fixture(scope="module")
def trained(workplace, tmp_path_factory):
    """A run of OLoRA that holds the largest loss for the best, and exports the adapter of that."""
    rows = [{"prompt": f"{a}+{b}=", "completion": "7", "answer": "7"} for a in range(3) for b in range(3)]
    (workplace / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = tmp_path_factory.mktemp("trained")
    callback = {"class_path": "ModelCheckpoint", "init_args": BEST | {"dirpath": f"{root}/checkpoints"}}
    options = ("--data.validation", "others.jsonl", "--trainer.callbacks", json.dumps([callback]))
    return run(workplace, root, *SHARDS, *LORA, *options, "--export.which", "best", "--export.lora", "adapter")


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def differing(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def test_the_adapter_alone_is_that_of_one_process(trained, align, tmp_path):
    """Of the same weights, in every file but the model card, which tells what was logged."""
    for which in ("best", "last"):
        done = align("export", trained, tmp_path / which, "--which", which, "--lora", "adapter")
        assert done.code == 0, done.text
    best, last, own = tmp_path / "best", tmp_path / "last", trained / "export"
    assert not differing(adapter(best), adapter(own))
    assert differing(adapter(last), adapter(own))
    assert {path.name for path in best.iterdir()} == {path.name for path in own.iterdir()}
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "alignment_modules.json"):
        assert (best / name).read_text() == (own / name).read_text()
    assert "those of the best val/loss" in (own / "README.md").read_text()


def test_plain_peft_reads_what_was_trained(trained, align, tmp_path):
    base = json.loads((trained / "export" / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    found = logits(peft.PeftModel.from_pretrained(plain, trained / "export"))
    done = align("export", trained, tmp_path / "merged", "--which", "best")
    assert done.code == 0, done.text
    torch.testing.assert_close(found, logits(build_policy(str(tmp_path / "merged"))), atol=2e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 0.01


def metrics(folder):
    (file,) = folder.rglob("metrics.csv")
    (row,) = csv.DictReader(file.open())
    return {name: float(value) for name, value in row.items() if value}


@pytest.mark.parametrize("processes", [ALONE, SHARDS])
@pytest.mark.parametrize("which", ["best", "last", "folder"])
def test_a_checkpoint_in_a_folder_is_validated(trained, align, workplace, tmp_path, which, processes):
    """By as many processes as one likes; `folder` is the best by its path."""
    states = open_checkpoint(trained / "checkpoints" / "step=18.ckpt")[0]["callbacks"].values()
    (state,) = [state for state in states if "best_model_score" in state]
    best, score = Path(state["best_model_path"]), float(state["best_model_score"])
    log = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    options = ("-c", "sft.yaml", *LORA, *processes, "--data.validation", "others.jsonl")
    options += ("--trainer.default_root_dir", str(trained), "--trainer.logger", json.dumps(log))
    options += ("--ckpt_path", str(best) if which == "folder" else which)
    if processes is ALONE:
        done = align("validate", *options)
        assert done.code == 0, done.text
    else:
        finish(start(workplace, "validate", *options))
    assert (metrics(tmp_path)["val/loss"] == pytest.approx(score, rel=1e-5)) == (which != "last")


@pytest.mark.parametrize("processes", [ALONE, SHARDS])
def test_a_checkpoint_in_a_folder_is_tested(trained, align, workplace, tmp_path, processes):
    options = ("-c", "sft.yaml", *LORA, *processes, "--data.test", "others.jsonl", "--ckpt_path", "best")
    options += ("--trainer.default_root_dir", str(trained), "--predictions.test_path", str(tmp_path / "test.jsonl"))
    if processes is ALONE:
        done = align("test", *options)
        assert done.code == 0, done.text
    else:
        finish(start(workplace, "test", *options))
    assert len((tmp_path / "test.jsonl").read_text().splitlines()) == 9


@pytest.fixture(scope="module")
def further(workplace, trained, tmp_path_factory):
    """Preference learning of that adapter against the one that it was; all processes but the first build shapes."""
    root = tmp_path_factory.mktemp("further")
    return run(workplace, root, *SHARDS, *saver(root), *on_one_base(trained), config="dpo.yaml")


def on_one_base(trained):
    """Options of one epoch, by an optimizer that blows no rounding up."""
    saved = json.dumps({"path": str(trained / "export"), "merge_adapter": False})
    descent = json.dumps({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}})
    models = ("--model.policy", saved, "--model.reference", saved, "--model.optimizer", descent)
    return (*models, "--export.lora", "adapter", "--trainer.max_epochs", "1")


def test_an_adapter_is_trained_further_as_by_one_process(align, trained, further):
    done = align("fit", "-c", "dpo.yaml", *ALONE, *on_one_base(trained))
    assert done.code == 0, done.text
    one, two = adapter(done.root / "export"), adapter(further / "export")
    assert max(float((value - adapter(trained / "export")[key]).abs().max()) for key, value in one.items()) > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_it_resumes_bit_for_bit(workplace, trained, further, tmp_path):
    half = ("--ckpt_path", str(further / "checkpoints" / "step=4.ckpt"))
    run(workplace, tmp_path, *SHARDS, *saver(tmp_path), *on_one_base(trained), *half, config="dpo.yaml")
    assert not differing(adapter(tmp_path / "export"), adapter(further / "export"))
