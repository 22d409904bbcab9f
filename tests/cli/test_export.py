"""`align export`: a run's last or best checkpoint as the folder that the run itself would have exported."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

BEST = """
trainer:
  max_epochs: 6
  log_every_n_steps: 1
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {monitor: val/loss, filename: "best-{step}"}}
    - {class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 2}}
"""


@pytest.fixture(scope="module")
def run(workplace, align):
    """A run that learns the demonstrations by heart, gets worse on others, and exports the best."""
    (workplace / "best.yaml").write_text(BEST)
    rows = [{"prompt": f"{a}+{b}=", "completion": "7"} for a in range(3) for b in range(3)]
    (workplace / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data.validation", "others.jsonl", "--model.optimizer.init_args.lr", "0.02")
    done = align("fit", "--config", "sft.yaml", "--config", "best.yaml", *options, "--export.which", "best")
    assert done.code == 0, done.text
    return done


def weights(folder):
    return load_file(folder / "model.safetensors")


def policy_of(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("policy."): value for name, value in state.items()}


def assert_equal(found, wanted):
    assert found.keys() <= wanted.keys()
    assert found
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_a_run_exports_the_best_weights(run):
    (checkpoint,) = run.root.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    ended = yaml.safe_load((run.root / "config.yaml").read_text())["trainer"]["max_epochs"]
    assert saved["epoch"] < ended - 1  # the best is not the last
    assert_equal(weights(run.root / "export"), policy_of(checkpoint))
    assert "best val/loss" in (run.root / "export" / "README.md").read_text()


@pytest.mark.parametrize("which", ["last", "best"])
def test_export_of_a_run_is_that_of_its_checkpoint(run, align, tmp_path, which):
    (checkpoint,) = run.root.rglob("*.ckpt")
    done = align("export", run.root, tmp_path / "out", "--which", which)
    assert done.code == 0, done.text
    names = {file.name for file in (run.root / "export").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert_equal(weights(tmp_path / "out"), policy_of(checkpoint))
    for name in names - {"README.md", "model.safetensors", "alignment_modules.json"}:
        assert (tmp_path / "out" / name).read_text() == (run.root / "export" / name).read_text(), name
    folders = (tmp_path / "out", run.root / "export")
    note, of_run = (json.loads((folder / "alignment_modules.json").read_text()) for folder in folders)
    assert of_run.pop("metrics")  # which a checkpoint does not know
    assert note == of_run
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("best val/loss" in card) == (which == "best")
    assert "sft.jsonl" in card
    assert "SFTModule" in card


def test_the_module_has_its_own_weights_after_the_best_were_exported(run, workplace, tmp_path, monkeypatch):
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    from alignment_modules import SFTModule
    from alignment_modules.callbacks import ExportPolicy
    from datamodules import SFTDataModule

    monkeypatch.chdir(workplace)
    kept = {}

    class Keep(L.Callback):
        def on_train_end(self, trainer, module):
            kept.update({name: value.clone() for name, value in module.state_dict().items()})

    module = SFTModule(policy="policy", optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.02))
    data = SFTDataModule(train="sft.jsonl", validation="others.jsonl", tokenizer="policy", batch_size=4)
    callbacks = [Keep(), ExportPolicy(which="best"), ModelCheckpoint(monitor="val/loss", mode="max")]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, datamodule=data)
    assert_equal(dict(module.state_dict()), kept)
    best = policy_of(trainer.checkpoint_callback.best_model_path)
    assert any(not torch.equal(value, kept[f"policy.{name}"]) for name, value in best.items())
    assert_equal(weights(tmp_path / "export"), best)


def test_adapters_alone_or_merged(align, tmp_path):
    lora = ("--model.policy", '{"path": "policy", "lora": {"r": 2}}', "--trainer.max_epochs", "1")
    done = align("fit", "--config", "sft.yaml", *lora)
    assert done.code == 0, done.text
    for kind, file in (("merge", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        again = align("export", done.root, tmp_path / kind, "--lora", kind)
        assert again.code == 0, again.text
        assert (tmp_path / kind / file).is_file()
    assert_equal(weights(tmp_path / "merge"), weights(done.root / "export"))
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_best_checkpoint_by_name(run, align, caplog):
    (checkpoint,) = run.root.rglob("*.ckpt")
    options = ("--config", "sft.yaml", "--data.validation", "others.jsonl", "--trainer.default_root_dir", run.root)
    done = align("validate", *options, "--ckpt_path", "best")
    assert done.code == 0, done.text
    assert f"Loaded model weights from the checkpoint at {checkpoint}" in caplog.text


def test_no_checkpoint_is_the_best_where_nothing_was_monitored(align):
    done = align("fit", "--config", "sft.yaml", "--trainer.max_epochs", "1", "--trainer.max_steps", "1")
    assert done.code == 0, done.text
    again = align("validate", "--config", "sft.yaml", "--ckpt_path", "best", "--trainer.default_root_dir", done.root)
    assert again.code == 1
    assert "ckpt_path='best': " in again.text
    assert "its run had no ModelCheckpoint(monitor=...)" in again.text


def test_push_uploads_only_when_asked(run, align, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repo, exist_ok):
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert align("export", run.root, tmp_path / "out").code == 0
    assert calls == []
    assert align("export", run.root, tmp_path / "out", "--push", "me/sums", "--license", "apache-2.0").code == 0
    ((repository, files),) = calls
    assert repository == "me/sums"
    assert "README.md" in files
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    refused = align("export", run.root, tmp_path / "out", "--push", "sums")
    assert refused.code == 1
    assert "push='sums' must be OWNER/NAME" in refused.text


def test_mistakes(run, align, tmp_path, workplace):
    def message(*arguments):
        done = align("export", *arguments)
        assert done.error is None
        return done.code, done.text

    code, text = message("nowhere.ckpt", "out")
    assert code == 1
    assert text.startswith("align: error: checkpoint='nowhere.ckpt': there is no such file or folder\n")
    (checkpoint,) = run.root.rglob("*.ckpt")
    alone = tmp_path / "a" / "b" / "c" / "d" / "alone.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(checkpoint.read_bytes())
    assert "name it with --config FILE" in message(alone, tmp_path / "out")[1]
    assert "holds no checkpoint" in message(workplace / "policy", tmp_path / "out")[1]
    assert "is no configuration of a run" in message(alone, tmp_path / "out", "--config", workplace / "best.yaml")[1]
    code, text = message(run.root, tmp_path / "out", "--wich", "best")
    assert code == 2
    assert "did you mean --which?" in text
    code, text = message(run.root, tmp_path / "out", "--lora", "adapter")
    assert code == 1
    assert "has no adapters" in text


def test_best_needs_a_monitor_before_anything_is_trained(align):
    done = align("fit", "--config", "sft.yaml", "--export.which", "best")
    assert done.code == 1
    assert "ModelCheckpoint(monitor=...)" in done.text
    assert not (done.root / "trained").exists()
