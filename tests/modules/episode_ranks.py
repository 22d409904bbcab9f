"""Run by test_episode_ranks.py: steps on episodes, one process or two whose episodes have other numbers of turns.

Usage: python -m tests.modules.episode_ranks FOLDER OUTPUT DEVICES STRATEGY...
"""

import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import GRPOModule, PPOModule
from alignment_modules.policies.sharded import whole
from alignment_modules.rollouts.environments import ToolOptions
from tests.rollouts.environments.acting import LettersFormat, Stepwise, batch_of

INDICES = [[2], [4, 9]]
"""Of the prompts of each rank."""

MODULES = {
    "grpo": (GRPOModule, {}),
    "ppo": (PPOModule, {}),
    "grpo, advantages of turns": (GRPOModule, {"advantage_unit": "turn", "scale_rewards": "batch"}),
}
"""Classes with the options in which they differ."""


class Batches:
    """One batch a rank, or all in one; two steps."""

    def __init__(self, devices):
        ranks = INDICES if devices == 2 else [[index for rank in INDICES for index in rank]]
        self.batches = [batch_of(["Add up."] * len(one), goal=[9] * len(one), index=one) for one in ranks] * 2

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


def main(folder, output, devices, strategy):
    found = {}
    for label, (cls, options) in MODULES.items():
        torch.manual_seed(0)
        module = cls(
            policy=folder,
            tokenizer=folder,
            environments=Stepwise,
            tool_options=ToolOptions(format=LettersFormat),
            max_turns=5,
            max_completion_length=100,
            num_generations=3,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
            **options,
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            devices=devices, strategy=strategy, accelerator="cpu", max_epochs=1, use_distributed_sampler=False, **quiet
        )
        turns, run = [], module.episodes.run

        def counting(*arguments, run=run, turns=turns, **keywords):
            completions = run(*arguments, **keywords)
            turns.append(max(episode.turns for episode in completions.episodes))
            return completions

        module.episodes.run = counting
        loader = DataLoader(
            Batches(devices),
            batch_size=None,
            sampler=range(trainer.global_rank, devices * 2, devices) if devices == 2 else None,
        )
        trainer.fit(module, loader)
        weights = {name: whole(p.detach()) for name, p in module.policy.named_parameters()}
        every = [None] * devices
        if devices == 2:
            torch.distributed.all_gather_object(every, turns)
        found[label] = {"weights": weights, "turns": every, "steps": trainer.global_step}
    if trainer.global_rank == 0:
        torch.save(found, Path(output) / f"{strategy}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
