"""Run by test_compiled.py: paradigms take two optimizer steps on compiled layers or on eager ones; changes are saved.

Usage: python -m tests.contract.compiled_ranks FOLDER DEVICES compiled|eager. One device gets the union of the rows.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import AlignmentModule
from alignment_modules.policies import LoraConfig, PolicyConfig, build_policy
from tests.contract.two_ranks import Batches
from tests.paradigms import ROWS, build
from tests.shapes import LLAMA

MODEL = LLAMA | {"num_hidden_layers": 3}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # paradigm, of the policy, of the module
    "sft": ("sft", {}, {}),
    "sft bf16": ("sft", {}, {}),
    "dpo": ("dpo", {"gradient_checkpointing": True}, {"reference": None}),
    "grpo lora": ("grpo", {"lora": LoraConfig(r=2)}, {"reference": None, "micro_batch_size": 4}),
    "ppo": ("ppo", {"gradient_checkpointing": 2}, {"reference": None, "critic": None, "micro_batch_size": 4}),
}


def modules(compiled: bool) -> Iterator[tuple[str, AlignmentModule]]:
    """A module a case, of the same weights each time."""
    for label, (name, of_policy, options) in CASES.items():
        torch.manual_seed(0)
        policy = build_policy(PolicyConfig(config=MODEL, compile=compiled, **of_policy))
        yield label, build(name, policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)


def main(folder: Path, devices: int, compiled: bool) -> None:
    """Fits each case twice on one batch and saves the changes on rank 0."""
    for label, module in modules(compiled):
        before = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision="bf16-mixed" if "bf16" in label else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, DataLoader(Batches(ROWS[CASES[label][0]].batch, devices), batch_size=None))
        if trainer.is_global_zero:
            change = {key: p.detach() - before[key] for key, p in module.named_parameters() if p.requires_grad}
            loss = float(trainer.callback_metrics["train/loss"])
            torch.save({"change": change, "loss": loss}, folder / f"{label}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "compiled")
