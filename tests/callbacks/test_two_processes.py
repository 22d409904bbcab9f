"""The callbacks on two processes: counts are added, files are written once, random numbers differ by rank."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from alignment_modules.callbacks import (
    AtomicCheckpointIO, CompletionWriter, ExactResume, ExportPolicy, FiniteGuard, SampleTable, Throughput,
)

root = Path(sys.argv[1])


class Module(BoringModel):
    last_rollout = {}

    def training_step(self, batch, batch_idx):
        self.last_rollout = {"id": [self.global_rank], "completion": ["x"]}
        with open(root / f"draws.{self.global_rank}", "a") as file:
            print(torch.rand(()).item(), file=file)
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if root.name == "poisoned" and self.global_rank == 1 else loss

    def train_dataloader(self):
        return DataLoader(torch.ones(12, 32), batch_size=2)

    val_dataloader = None

    def count_tokens(self, batch):
        return {"tokens": torch.tensor(3 * (1 + self.global_rank)), "samples": 2, "padding": 3}

    def predict_dataloader(self):
        return DataLoader(torch.arange(7), batch_size=2)

    def predict_step(self, batch, batch_idx):
        return [{"index": int(index), "rank": self.global_rank} for index in batch]

    def export(self, directory, *, lora):
        with open(root / "exports", "a") as file:
            print(self.global_rank, directory, file=file)


def main():
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, default_root_dir=root, logger=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=3, plugins=[AtomicCheckpointIO()],
        callbacks=[
            ExactResume(seed=0), FiniteGuard(), ExportPolicy(), SampleTable(rows=1), Throughput(), CompletionWriter()
        ],
    )
    module = Module()
    trainer.fit(module)
    logged = {name.partition("/")[2]: float(value) for name, value in trainer.callback_metrics.items()}
    ratio = logged["tokens_per_second"] / logged["samples_per_second"]
    (root / "metrics").write_text(json.dumps([logged["padding_share"], ratio]))
    trainer.predict(module)


if __name__ == "__main__":
    main()
"""


def run(tmp_path, name):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / name).mkdir()
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / name)]
    return tmp_path / name, subprocess.run(command, check=False, timeout=240, capture_output=True, text=True)


@pytest.mark.distributed
def test_all_callbacks_on_two_processes(tmp_path):
    root, result = run(tmp_path, "healthy")
    assert result.returncode == 0, result.stderr[-3000:]
    share, ratio = json.loads((root / "metrics").read_text())
    assert share == pytest.approx(6 / 15)  # 3 + 6 tokens, 3 + 3 of padding
    assert ratio == pytest.approx(9 / 4)
    assert (root / "exports").read_text().split("\n")[0] == f"0 {root / 'export'}"
    assert len((root / "exports").read_text().splitlines()) == 1
    samples = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in samples] == [0]
    first, second = ((root / f"draws.{rank}").read_text().splitlines() for rank in (0, 1))
    assert len(first) == len(second) == 3
    assert not set(first) & set(second)
    predicted = [json.loads(line) for line in (root / "predictions.jsonl").read_text().splitlines()]
    assert sorted({row["index"] for row in predicted}) == list(range(7))
    assert [row["index"] for row in predicted] == sorted(row["index"] for row in predicted)
    assert {row["rank"] for row in predicted} == {0, 1}
    assert not list(root.glob("predictions.jsonl.rank*"))


@pytest.mark.distributed
def test_a_gradient_that_one_rank_spoils_stops_all(tmp_path):
    root, result = run(tmp_path, "poisoned")
    assert result.returncode != 0
    assert "gradient of optimizer step 1 is not finite" in result.stderr
    assert not (root / "exports").exists()
