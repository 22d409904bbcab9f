"""ExportPolicy: when it exports, where to, and when not."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from alignment_modules.callbacks import ExportPolicy
from alignment_modules.policies.export import export_policy


def test_exports_once_at_the_end_into_the_root_folder(tmp_path, boring, make_trainer, loader):
    module = boring()
    make_trainer(ExportPolicy(), max_epochs=2).fit(module, loader)
    assert module.exported == [(tmp_path / "export", "merge")]


def test_directory_and_adapter(boring, make_trainer, loader):
    module = boring(manual=2)
    make_trainer(ExportPolicy(directory="some/where", lora="adapter")).fit(module, loader)
    assert module.exported == [(Path("some/where"), "adapter")]


def test_nothing_after_a_failure_a_rehearsal_or_when_off(boring, make_trainer, loader):
    broken = boring()
    broken.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_trainer(ExportPolicy()).fit(broken, loader)
    rehearsal, off, validated = boring(), boring(), boring()
    make_trainer(ExportPolicy(), fast_dev_run=True).fit(rehearsal, loader)
    make_trainer(ExportPolicy(enabled=False)).fit(off, loader)
    make_trainer(ExportPolicy()).validate(validated, loader, verbose=False)
    assert broken.exported == rehearsal.exported == off.exported == validated.exported == []


def test_refuses_before_training_what_it_could_not_write_after(tmp_path, boring, make_trainer, loader):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for options, message in (
        ({"lora": "adapter"}, "has no adapters"),
        ({"directory": str(tmp_path / "full")}, "not an export"),
    ):
        module = boring()
        module.policy = module.layer
        with pytest.raises(ValueError, match=message):
            make_trainer(ExportPolicy(**options)).fit(module, loader)
        assert module.losses == []
        make_trainer(ExportPolicy(**options), fast_dev_run=True).fit(module, loader)
        make_trainer(ExportPolicy(**options, enabled=False)).fit(module, loader)
        assert module.exported == []


def test_metrics_stay_where_nothing_was_left_to_train(tmp_path, boring, make_trainer, loader):
    def fit(module, **options):
        module.export = lambda directory, *, lora: export_policy(module.layer, directory, lora=lora)
        make_trainer(ExportPolicy(), **options).fit(module, loader)
        return (tmp_path / "export" / "README.md").read_text()

    module = boring()
    module.on_train_batch_end = lambda *_: module.log_dict({"train/loss": 1.5, "train/kl": math.nan})
    first = fit(module)
    assert "| `train/loss` | 1.5 |" in first
    assert "| `train/kl` | nan |" in first
    for _ in range(2):  # what is kept is kept again
        same = fit(module, max_epochs=0)
        assert same.partition("## Metrics")[2] == first.partition("## Metrics")[2] != ""
    with torch.no_grad():
        module.layer.bias += 1
    assert "## Metrics" not in fit(module, max_epochs=0)


def test_mistakes(make_trainer, loader):
    with pytest.raises(ValueError, match="lora='both' must be 'merge' or 'adapter'"):
        ExportPolicy(lora="both")
    with pytest.raises(TypeError, match=r"ExportPolicy needs BoringModel.export\(directory, lora=...\)"):
        make_trainer(ExportPolicy()).fit(BoringModel(), loader)
