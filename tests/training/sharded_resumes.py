"""Run by test_sharded_checkpoints.py: runs in shards that save, and others that go on from there.

Usage: python -m tests.training.sharded_resumes FOLDER NAME:FORM ... with FORM "folder" or "file". Each run leaves
FOLDER/NAME/FORM/{whole,resumed}: checkpoints after two and four optimizer steps, and an export.
"""

import copy
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from alignment_modules import AlignmentModule, PolicyConfig
from alignment_modules.callbacks import AtomicCheckpointIO
from alignment_modules.policies import LoraConfig
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.weights import on_first_process
from alignment_modules.training.strategies import FSDP2Strategy
from tests.contract.two_ranks import ADAPTERS, Batches
from tests.models import other_than
from tests.paradigms import ROWS, build
from tests.shapes import LLAMA

TIED = LLAMA | {"tie_word_embeddings": True}


def adamw(groups):
    """Has a state for each parameter."""
    return torch.optim.AdamW(groups, lr=1e-2)


def momentum(groups):
    """Has one, too, and does not blow rounding up."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def make(name: str) -> AlignmentModule:
    """A module, whose weights the first process alone draws."""
    name, _, label = name.partition(" ")
    torch.manual_seed(1)
    with on_first_process():
        kinds = ADAPTERS | {"lora": {}}
        lora = LoraConfig(r=2, alpha=4, **kinds[label]) if label in kinds else None
        policy = build_policy(PolicyConfig(config=TIED if name == "sft" else LLAMA, lora=lora))
        options = {"optimizer": momentum if label == "momentum" else adamw}
        if lora is not None:
            options |= {"reference": None} if "reference" in ROWS[name].options(policy) else {}
        if label == "shared":
            options |= ROWS["ppo"].variants["shared"]
        return build(name, policy, other=other_than(copy.deepcopy(policy)), **options)


def trainer(folder: Path, strategy: L.pytorch.strategies.Strategy | str, devices: int) -> L.Trainer:
    """Four steps, a checkpoint after two and after four."""
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_epochs=2, save_top_k=-1)
    return L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[AtomicCheckpointIO()],
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def fit(folder: Path, name: str, strategy, devices: int, ckpt_path: Path | None = None) -> AlignmentModule:
    """Trains, from a checkpoint or from the start, and exports."""
    module = make(name)
    made = trainer(folder, strategy, devices)
    made.fit(
        module, DataLoader(Batches(ROWS[name.partition(" ")[0]].batch, devices), batch_size=None), ckpt_path=ckpt_path
    )
    module.export(folder / "export")
    made.strategy.barrier()
    return module


def main(root: Path, *wanted: str) -> None:
    """All runs."""
    for one in wanted:
        name, _, form = one.partition(":")
        folder = root / name / form
        parts = {"whole": None, "resumed": folder / "whole" / "step=2.ckpt"}
        alone = root / "alone" / name / "step=2.ckpt"
        if alone.exists():  # of one process
            parts["taken up"] = alone
        for part, start in parts.items():
            fit(folder / part, name, FSDP2Strategy(form == "folder"), 2, start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
