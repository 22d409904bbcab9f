"""Run by test_vllm_training.py: two ranks that sample by the engine in process or by a server.

Usage: python -m tests.rollouts.two_ranks PARADIGM FOLDER OUTPUT [URL], with PARADIGM "grpo" or "distillation"
"""

import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import DistillationModule, GRPOModule
from alignment_modules.policies import build_policy
from alignment_modules.rollouts.engines import VLLMEngine
from tests.batches import Digits, prompts, supervised, threes
from tests.models import other_than


class Batches:
    """Two steps, of other rows on each rank."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 4

    def __getitem__(self, number):
        batch = self.make(2 + number)
        return batch | {"index": [10 * number + row for row in range(2 + number)]}


def grpo(**common):
    return GRPOModule(
        rewards=threes, num_generations=4, max_completion_length=6, tokenizer=Digits(), correction="k3_rs", **common
    )


def distillation(policy, **common):
    teacher = other_than(build_policy(policy))
    # Of the first step's rows the first rank writes none, and the second one some.
    own = {"on_policy_share": 0.5, "max_completion_length": 6, "seed": 8}
    return DistillationModule(policy=policy, teacher=teacher, tokenizer=Digits(), **own, **common)


MADE = {"grpo": (grpo, prompts), "distillation": (distillation, lambda count: supervised(range(count), 2))}


def main(paradigm, folder, output, url=None):
    engine = None if url is None else VLLMEngine(url, str(Path(output).parent / "weights"), timeout=60)
    make, rows = MADE[paradigm]
    torch.manual_seed(0)
    module = make(policy=folder, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.02), engine=engine)
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
    trainer.fit(module, DataLoader(Batches(rows), batch_size=None))
    assert trainer.global_step == 2
    torch.save(module.policy.state_dict(), f"{output}.{trainer.global_rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
