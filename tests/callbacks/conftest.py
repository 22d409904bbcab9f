"""A boring LightningModule, automatic or manual, with the hooks that the callbacks use."""

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader


class Boring(L.LightningModule):
    """A line fitted to four-feature rows; `manual` takes that many optimizer steps a batch by hand."""

    def __init__(self, manual: int = 0, noise: float = 0.0):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.manual, self.noise = manual, noise
        self.automatic_optimization = not manual
        self.losses, self.exported, self.poison_at = [], [], None
        self.last_rollout = {}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def loss(self, batch):
        value = self.layer(batch + self.noise * torch.randn_like(batch)).square().mean()
        if self.poison_at is not None and self.global_step == self.poison_at:
            value = value * float("nan")
        return value

    def training_step(self, batch, batch_idx):
        self.last_rollout = {
            "id": [f"{self.global_step}/0/0", f"{self.global_step}/0/1"],
            "prompt": ["1+1=", "1+1="],
            "completion": ["<b>2</b>|\nend", "x" * 50],
            "exact_match": [1.0, float("nan")],
            "reward": torch.tensor([1.0, 0.25]),
            "advantage": [0.5, -0.5],
            "truncated": [False, True],
        }
        if not self.manual:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            return loss
        optimizer = self.optimizers()
        for _ in range(self.manual):
            loss = self.loss(batch)
            self.losses.append(loss.item())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        return None

    def predict_step(self, batch, batch_idx):
        return [{"index": batch_idx * len(batch) + row, "completion": f"é {row}"} for row in range(len(batch))]

    def count_tokens(self, batch):
        return {"tokens": (batch > 0).sum(), "samples": len(batch), "padding": int((batch <= 0).sum())}

    def export(self, directory, *, lora="merge"):
        self.exported.append((directory, lora))


@pytest.fixture
def boring():
    """The class itself, with weights that depend on the seed alone."""

    def build(**kwargs):
        torch.manual_seed(0)
        return Boring(**kwargs)

    return build


@pytest.fixture
def loader():
    rows = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(rows, batch_size=4)


@pytest.fixture
def make_trainer(tmp_path):
    def build(*callbacks, **kwargs):
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            "log_every_n_steps": 2,
        }
        return L.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})

    return build


@pytest.fixture
def read_jsonl():
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def read_events():
    """What a TensorBoard folder holds: {tag: [(step, value)]}."""

    def read(folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray

        events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
        events.Reload()
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:
            found[tag] = [(e.step, make_ndarray(e.tensor_proto)[0].decode()) for e in events.Tensors(tag)]
        return found

    return read
