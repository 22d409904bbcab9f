"""GRPO with groups that wait, on two ranks that find different numbers of them; run as a script.

Usage: python -m tests.training.waiting_groups FOLDER [CHECKPOINT]. Saves `whole.pt` with a checkpoint after each batch,
or `again.pt` where it resumes.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from alignment_modules import GRPOModule, PolicyConfig
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder
from tests.batches import rollouts
from tests.contract.two_ranks import NoTokenizer
from tests.shapes import LLAMA

KEYS = ("prompts", "prompt_attention_mask")
PROMPTS = [{**{key: rollouts([n, n + 1])[key] for key in KEYS}, "index": [n, n + 1]} for n in range(0, 20, 2)]


def first_is_2(completions):
    """A reward that few groups differ in."""
    return [float(text.startswith("2")) for text in completions]


class PairsOfPrompts(L.LightningDataModule):
    """Batches of two prompts, other ones on each rank."""

    def train_dataloader(self):
        order = UniformOrder(len(PROMPTS), batch_size=1, num_replicas=self.trainer.world_size)
        return ResumableLoader(PROMPTS, order, rank=self.trainer.global_rank, collate_fn=lambda rows: rows[0])


class SaveEach(Callback):
    """A checkpoint after each batch, named by how many there were."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def main(folder, resume=None):
    """One run on two ranks."""
    L.seed_everything(0)
    module = GRPOModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        rewards=first_is_2,
        tokenizer=NoTokenizer(),
        num_generations=4,
        max_completion_length=8,
        num_iterations=2,
        micro_batch_size=3,
        dynamic_sampling=4,
        seed=3,
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[] if resume else [SaveEach(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, PairsOfPrompts(), ckpt_path=resume)
    if trainer.is_global_zero:
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if "time/" not in name}
        torch.save(
            {"weights": module.state_dict(), "metrics": metrics}, folder / ("again.pt" if resume else "whole.pt")
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
