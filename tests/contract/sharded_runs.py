"""Run by test_sharded.py: runs of several steps on one process and on two that share the weights.

Usage: python -m tests.contract.sharded_runs FOLDER DEVICES STRATEGY. FOLDER/judge holds a sequence classifier. What the
first process finds out is saved as FOLDER/NAME.pt.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from alignment_modules import AlignmentModule, EvaluationConfig, PolicyConfig
from alignment_modules.callbacks import FiniteGuard
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.sharded import is_sharded, local, whole
from tests.contract.two_ranks import NoTokenizer, many_threes
from tests.models import Plain, adapted, other_than
from tests.paradigms import ROWS, build
from tests.shapes import LLAMA

TIED = LLAMA | {"tie_word_embeddings": True}


class Rows:
    """Batches of 8 rows, or of each rank's share of them: of other sizes, and in each step others."""

    def __init__(self, make: Callable[[list[int]], dict[str, Any]], steps: int, devices: int) -> None:
        self.batches = []
        for step in range(steps):
            rows = [(step * 3 + row) % 8 for row in range(8)]
            self.batches += [make(rows)] if devices == 1 else [make(rows[:3]), make(rows[3:])]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.batches[number]


def adamw(groups):
    """Has a state for each parameter."""
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def trainer(devices: int, strategy: Any, **options: Any) -> L.Trainer:
    """Without files and bars."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    quiet |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "use_distributed_sampler": False}
    return L.Trainer(devices=devices, strategy=strategy, max_epochs=1, **quiet | options)


class Run:
    """One process's side of all runs."""

    def __init__(self, folder: Path, devices: int, strategy: str) -> None:
        self.folder, self.devices, self.strategy = folder, devices, strategy

    def loader(self, make: Callable[[list[int]], dict[str, Any]], steps: int) -> DataLoader:
        """This rank's batches, in order."""
        rows = Rows(make, steps, self.devices)
        sampler = range(0, len(rows)) if self.devices == 1 else _EveryOther(len(rows), self.devices)
        return DataLoader(rows, batch_size=None, sampler=sampler)

    def fit(
        self, name: str, module: AlignmentModule, make: Any, steps: int = 3, validates: bool = False, **options: Any
    ) -> L.Trainer:
        """Trains, and after each step validates on the same kind of rows; saves the changes and what was logged."""
        before = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
        made = trainer(self.devices, self.strategy, callbacks=[FiniteGuard()], **options)
        made.fit(module, self.loader(make, steps), self.loader(make, 1) if validates else None)
        after = {key: whole(p.detach()) for key, p in module.named_parameters() if key in before}
        metrics = {key: float(value) for key, value in made.callback_metrics.items()}
        self.save(name, made, {"change": {k: after[k] - v for k, v in before.items()}, "metrics": metrics})
        return made

    def save(self, name: str, made: L.Trainer, found: dict[str, Any]) -> None:
        """By the first process."""
        if made.is_global_zero:
            torch.save(found, self.folder / f"{name}.pt")


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


class _EveryOther(torch.utils.data.Sampler):
    """Of batches that lie in the order of the ranks, this rank's."""

    def __init__(self, count: int, devices: int) -> None:
        self.count, self.devices = count, devices

    def __iter__(self):
        return iter(range(torch.distributed.get_rank(), self.count, self.devices))

    def __len__(self) -> int:
        return self.count // self.devices


def shares(module: torch.nn.Module, made: L.Trainer) -> dict[str, float]:
    """The share of all numbers that lies on this process: of the parameters, and of the optimizer's state."""
    held = list(module.parameters())
    states = [v for s in made.optimizers[0].state.values() for v in s.values() if v.dim()]
    return {
        name: sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)
        for name, tensors in (("parameters", held), ("state", states))
    }


def train_and_save(run: Run, policy: torch.nn.Module) -> None:
    """Several steps of this and that, each to be compared with one process."""
    other = other_than(policy)

    def make(name: str, given: torch.nn.Module | None = None, **options: Any) -> AlignmentModule:
        options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.3)} | options
        return build(name, copy.deepcopy(given or policy), other=copy.deepcopy(other), **options)

    def built(config: dict[str, Any], how: Any) -> torch.nn.Module:
        torch.manual_seed(1 + int(not is_first()))  # the others' weights are the first one's
        return build_policy(PolicyConfig(config=config, gradient_checkpointing=how))

    module = make("dpo", optimizer=adamw)
    mark, reference = fingerprint(module.policy), module.reference.fingerprint()
    made = run.fit("clipped", module, ROWS["dpo"].batch, gradient_clip_val=0.1, accumulate_grad_batches=2, steps=4)
    found = {"moved": fingerprint(module.policy) != mark, "reference": module.reference.fingerprint() == reference}
    run.save("held", made, found | shares(module, made) | {"sharded": is_sharded(module.policy)})
    run.fit("clipped by itself", make("kto", micro_batch_size=2, max_grad_norm=0.1), ROWS["kto"].batch)
    run.fit("tied and checkpointed", make("sft", built(TIED, True)), ROWS["sft"].batch)
    run.fit("checkpointed without dropout", make("dpo", built(LLAMA, True)), ROWS["dpo"].batch)
    run.fit("checkpointed selectively", make("dpo", built(LLAMA, "selective")), ROWS["dpo"].batch)
    run.fit("cached", make("dpo", cache_reference=True), seen_by_some)
    run.fit("synced", make("dpo", reference=None, sync_reference={"alpha": 0.6, "every_n_steps": 1}), ROWS["dpo"].batch)
    lora = make("dpo", adapted(policy), reference=None, sync_reference={"alpha": 0.6, "every_n_steps": 1})
    run.fit("synced lora", lora, ROWS["dpo"].batch)
    torch.manual_seed(1)
    run.fit("plain", make("sft", Plain()), ROWS["sft"].batch)
    for name in ("sft", "kto", "ppo"):
        run.fit(f"{name} bf16-mixed", make(name), ROWS[name].batch, precision="bf16-mixed")
    run.fit("ppo of bf16", make("ppo", policy.to(torch.bfloat16), critic=None), ROWS["ppo"].batch)


def seen_by_some(rows: list[int]) -> dict[str, Any]:
    """Pairs of which one rank sees the same in each step, and the other new ones."""
    return ROWS["dpo"].batch([0, 1, 2] if len(rows) == 3 else rows if len(rows) == 5 else [0, 1, 2, *rows[3:]])


def write_and_judge(run: Run, policy: torch.nn.Module) -> None:
    """Completions of other lengths on each rank, in rollouts, evaluation and prediction."""
    from alignment_modules.rewards import SequenceClassifier

    def prompts(rows: list[int]) -> dict[str, Any]:
        batch = ROWS["grpo"].batch(rows)
        return {key: batch[key] for key in ("prompts", "prompt_attention_mask")} | {"index": list(rows)}

    online = {
        "rewards": many_threes,
        "tokenizer": NoTokenizer(),
        "evaluation": EvaluationConfig(max_completion_length=9),
    }
    module = build("grpo", copy.deepcopy(policy), optimizer=adamw, baseline="greedy", micro_batch_size=4, **online)
    run.fit("sampled", module, prompts, validates=True, val_check_interval=1)
    made = trainer(run.devices, run.strategy)
    # the first rank has more batches to predict than the second
    cut = [prompts([row]) for row in range(5)]
    mine = cut if run.devices == 1 else cut[:4] if torch.distributed.get_rank() == 0 else cut[4:]
    written = made.predict(module, DataLoader(Listed(mine), batch_size=None))
    run.save("predicted", made, {"ids": [row["index"] for batch in written for row in batch]})
    judge = SequenceClassifier(str(run.folder.parent / "judge"))
    module = build("grpo", copy.deepcopy(policy), optimizer=adamw, **online | {"rewards": judge})
    made = run.fit("judged", module, prompts, steps=1)
    held = sum(local(p).numel() for p in judge.model.parameters()) / sum(p.numel() for p in judge.model.parameters())
    run.save("judge", made, {"share": held})


class Poison(L.Callback):
    """NaN in what the last process has of one gradient."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_rank == trainer.world_size - 1:
            local(optimizer.param_groups[0]["params"][0].grad).fill_(torch.nan)


def guard(run: Run, policy: torch.nn.Module) -> None:
    """All processes stop where one has a number that is not finite."""
    made = trainer(run.devices, run.strategy, callbacks=[Poison(), FiniteGuard()])
    try:
        made.fit(build("sft", copy.deepcopy(policy)), run.loader(ROWS["sft"].batch, 1))
    except FloatingPointError as error:
        run.save("guarded", made, {"said": str(error)})


def refuse(run: Run, policy: torch.nn.Module) -> None:
    """Lightning's own strategy as it comes, which splits weights over the processes of a node."""
    if run.devices == 1:
        return
    made = trainer(run.devices, ModelParallelStrategy())
    try:
        made.fit(build("sft", policy), run.loader(ROWS["sft"].batch, 1))
    except ValueError as error:
        run.save("refused", made, {"said": str(error)})


class Listed(torch.utils.data.Dataset):
    """A list."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Any:
        return self.entries[number]


def main(folder: Path, devices: int, strategy: str) -> None:
    """All runs."""
    L.seed_everything(0)
    policy = build_policy(PolicyConfig(config=LLAMA))
    run = Run(folder, devices, strategy)
    train_and_save(run, copy.deepcopy(policy))
    write_and_judge(run, policy)
    guard(run, policy)
    refuse(run, policy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
