"""What `align` leaves to be looked at: TensorBoard's tags and pages, early stopping on what completions are worth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from alignment_modules.callbacks import StepBar
from alignment_modules.callbacks.compare_runs import flat
from alignment_modules.callbacks.tensorboard import WORKINGS, tag_of

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
QUIET = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")
TURNS = '''
"""The second validation is the best: the policy gets worse by the judgement, whatever it writes."""
from lightning.pytorch import Callback

turn = -1

class Turns(Callback):
    def on_validation_start(self, trainer, module):
        global turn
        turn += not trainer.sanity_checking

def judge(completions):
    return [float(turn == 1)] * len(completions)
'''


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_a_run_that_stops_early_exports_its_best_weights(align, data, model_folder):
    (align.folder / "turns.py").write_text(TURNS)
    root = align.folder / "early"
    stop = {"monitor": "val/exact_match", "mode": "max", "patience": 2}
    save = {"monitor": "val/exact_match", "mode": "max", "filename": "best-{step}", "dirpath": str(root / "kept")}
    trainer = align(
        "fit", f"--config={RECIPES / 'sft.yaml'}",
        f"--model.policy.path={model_folder}", f"--data.train={data['sft']}", f"--data.validation={data['grpo']}",
        f"--trainer.default_root_dir={root}", *QUIET, "--trainer.val_check_interval=0.34", "--trainer.max_epochs=9",
        "--model.evaluation.verifier=turns.judge", "--model.evaluation.max_completion_length=2",
        "--model.optimizer.lr=0.1", "--trainer.callbacks+=turns.Turns",
        f"--trainer.callbacks+={json.dumps({'class_path': 'EarlyStopping', 'init_args': stop})}",
        f"--trainer.callbacks+={json.dumps({'class_path': 'ModelCheckpoint', 'init_args': save})}",
        "--export.which=best",
    ).trainer  # fmt: skip
    assert trainer.global_step == 4  # the best was the second, and patience is two
    [best] = (root / "kept").glob("*.ckpt")
    saved = torch.load(best, weights_only=True)
    assert saved["global_step"] == 2
    exported = load_file(root / "export" / "model.safetensors")
    for name, value in exported.items():
        torch.testing.assert_close(value, saved["state_dict"][f"policy.{name}"], rtol=0, atol=0)
    last = {name.removeprefix("policy."): value for name, value in trainer.lightning_module.state_dict().items()}
    assert any(not torch.equal(value, last[name]) for name, value in exported.items())


@pytest.fixture(scope="module")
def chain(align, data, model_folder):
    """Two stages and a test of each."""
    policy, folders = model_folder, []
    for paradigm in ("sft", "grpo"):
        root = align.folder / f"chain-{paradigm}"
        common = [f"--config={RECIPES / paradigm}.yaml", f"--model.policy.path={policy}", *QUIET]
        quick = ["--model.max_completion_length=3"] if paradigm == "grpo" else []
        align(
            "fit", *common, *quick, f"--data.train={data[paradigm]}", "--trainer.max_steps=2",
            "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={root}", "--model.optimizer.lr=3e-4",
        )  # fmt: skip
        policy = root / "export"
        folders.append(root)
        align(
            "test", f"--config={RECIPES / paradigm}.yaml", f"--model.policy.path={policy}", *QUIET,
            f"--data.test={data['grpo']}", f"--trainer.default_root_dir={root / 'test'}",
            "--model.evaluation.max_completion_length=3",
        )  # fmt: skip
    return folders


def test_what_matters_comes_first(chain):
    for root in chain:
        tags = sorted(events(root).Tags()["scalars"])
        assert "epoch" not in tags
        assert "hp_metric" not in tags
        assert not [tag for tag in tags if tag.startswith(WORKINGS)] or tags[-1].startswith(WORKINGS)
    shown = [tag for tag in sorted(events(chain[1]).Tags()["scalars"]) if not tag.startswith(WORKINGS)]
    assert {"train/reward", "train/frac_reward_zero_std", "train/completions/mean_length"} <= {*shown}
    assert not [tag for tag in shown if "clip_ratio" in tag or "sampling" in tag]
    assert len(shown) <= 16  # a screen of cards or so, where there were 27


def test_the_stages_of_a_chain_make_one_curve(chain):
    at = [events(root / "test").Scalars("test/exact_match")[0].step for root in chain]
    assert at == [1, 2]
    note = json.loads((chain[1] / "export" / "alignment_modules.json").read_text())
    assert note["stages"] == ["sft", "grpo"]


def test_the_pages_of_tensorboard(chain):
    found = events(chain[1])
    names = [tag for tag in found.Tags()["tensors"] if tag.startswith("custom_scalars")]
    assert names == ["custom_scalars__config__"]
    layout = layout_pb2.Layout.FromString(found.Tensors(names[0])[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts["reward"] == ["^train/reward$", "^val/reward$"]
    assert charts["gradient norm"] == ["^workings/train/grad_norm$"]
    assert "preferred over rejected" not in charts  # of another paradigm

    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["module"].string_value == "GRPOModule"
    assert options["optimizer.lr"].number_value == pytest.approx(3e-4)
    assert options["policy"].string_value.endswith("chain-sft/export")


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("train/loss", "train/loss"),
        ("val/loss/dataloader_idx_0", "val/loss/dataloader_idx_0"),
        ("train/clip_ratio/high_max", "workings/train/clip_ratio/high_max"),
        ("train/completions/mean_length", "train/completions/mean_length"),
        ("train/completions/mean_terminated_length", "workings/train/completions/mean_terminated_length"),
        ("train/rewards/exact_match/mean", "train/rewards/exact_match/mean"),
        ("train/rewards/exact_match/std", "workings/train/rewards/exact_match/std"),
        ("test/frac_not_judged", "workings/test/frac_not_judged"),
        ("test/loss", "workings/test/loss"),
        ("test/exact_match", "test/exact_match"),
        ("test/pass@8", "test/pass@8"),
    ],
)
def test_tags(name, tag):
    assert tag_of(name) == tag


def test_options_that_are_classes_go_by_their_names():
    given = {
        "lr_scheduler": {
            "class_path": "alignment_modules.training.schedules.CosineSchedule",
            "init_args": {"warmup_steps": 7, "floor": 0.0, "last_epoch": -1},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "eps": 1e-8}},
        "rewards": ["ExactMatch", "my.close"],
        "quantization": None,
        "_hidden": 3,
    }
    assert flat(given) == {
        "lr_scheduler": "CosineSchedule",
        "lr_scheduler.warmup_steps": 7,
        "optimizer": "AdamW",
        "optimizer.lr": 0.1,
        "rewards": "ExactMatch, my.close",
    }


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([], StepBar),
        (["--trainer.callbacks+=TQDMProgressBar"], TQDMProgressBar),
        (["--trainer.enable_progress_bar=false"], type(None)),
    ],
)
def test_there_is_one_bar(align, data, model_folder, given, kind):
    common = [f"--config={RECIPES / 'sft.yaml'}", f"--model.policy.path={model_folder}", f"--data.train={data['sft']}"]
    root = [f"--trainer.default_root_dir={align.folder / kind.__name__}", *QUIET[:2]]
    trainer = align("fit", *common, *root, "--trainer.max_steps=1", *given).trainer
    assert type(trainer.progress_bar_callback) is kind


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_judge_what_one_does(align, data, model_folder):
    """Completions of validation prompts are shared between the processes, each judged once."""
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "answer": f"{a + b}"} for a in range(3) for b in range(3)]
    source = align.folder / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (align.folder / "easy.py").write_text(
        "def judge(completions, prompts):\n    return [float('1' in p) for p in prompts]\n"
    )
    found = []
    for devices in (1, 2):
        root = align.folder / f"ranks-{devices}"
        command = [sys.executable, "-m", "alignment_modules", "validate", f"--config={RECIPES / 'sft.yaml'}"]
        options = [f"--model.policy.path={model_folder}", f"--data.validation={source}", "--data.batch_size=2"]
        options += ["--model.evaluation.verifier=easy.judge", "--model.evaluation.max_completion_length=3"]
        options += ["--trainer.strategy=ddp", "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
        subprocess.run(
            [*command, *options, f"--trainer.default_root_dir={root}"], cwd=align.folder, check=True, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        scalars = events(root)
        found.append({tag: scalars.Scalars(tag)[0].value for tag in scalars.Tags()["scalars"] if "val/" in tag})
    assert found[0].keys() == found[1].keys()
    assert found[0]["val/exact_match"] == pytest.approx(5 / 9)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
