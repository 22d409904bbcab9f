"""Run by test_vllm_training.py: GRPO on two ranks, by the engine in process or by a server.

Usage: python -m tests.rollouts.two_ranks FOLDER OUTPUT [URL]
"""

import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import GRPOModule
from alignment_modules.rollouts.engines import VLLMEngine
from tests.batches import Digits, prompts, threes


class Batches:
    """Two steps, of other prompts on each rank."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        batch = prompts(2 + number)
        return batch | {"index": [10 * number + row for row in batch["index"]]}


def main(folder, output, url=None):
    engine = None if url is None else VLLMEngine(url, str(Path(output).parent / "weights"), timeout=60)
    torch.manual_seed(0)
    module = GRPOModule(
        policy=folder,
        rewards=threes,
        num_generations=4,
        max_completion_length=6,
        tokenizer=Digits(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.02),
        correction="k3_rs",
        engine=engine,
    )
    trainer = L.Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    assert trainer.global_step == 2
    torch.save(module.policy.state_dict(), f"{output}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
