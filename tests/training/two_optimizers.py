"""A policy and a critic, each with an optimizer; run as a script, one update of each on one rank or two.

Usage: two_optimizers.py FOLDER DEVICES. With DEVICES=1 the single rank gets the union of both ranks' rows.
"""

import copy
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from alignment_modules.functional.statistics import Statistic
from alignment_modules.training.objective import Objective, Term
from alignment_modules.training.pieces import cut, empty_like
from alignment_modules.training.schedules import LinearSchedule
from alignment_modules.training.updates import UpdateModule

CRITIC_STEPS = 2


class Policy(nn.Module):
    """Logits of the next token from the token before."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


class WithCritic(UpdateModule):
    """The policy learns its tokens and a sum over rows, two units; the critic the number of tokens, twice a batch."""

    paradigm = "with_critic"
    batch_keys = ("input_ids", "attention_mask")

    def __init__(self, **keywords):
        super().__init__(**keywords)
        torch.manual_seed(1)
        self.critic = nn.Linear(11, 1)
        self.seen = []

    def trained(self):
        return {"policy": self.policy, "critic": self.critic}

    def before_updates(self, pieces):
        assert not torch.is_grad_enabled()
        rows = sum(len(piece["input_ids"]) for piece in pieces)
        rows = self.reduce(torch.tensor(float(rows), device=self.device), "sum")
        return [{**piece, "rows": rows} for piece in pieces]

    def units(self, piece):
        return {"nll": piece["attention_mask"].sum(), "rows": torch.tensor(len(piece["input_ids"]))}

    def objective(self, batch):
        mask = batch["attention_mask"].bool()
        logps = self.policy(batch["input_ids"]).log_softmax(-1)
        nll = -logps.gather(-1, batch["input_ids"][..., None])[..., 0] * mask
        rows = nll.sum(dim=1).square()
        self.seen.append(float(batch["rows"]))
        terms = {
            "nll": Term(nll.sum(), mask.sum()),
            "rows": Term(rows.sum(), torch.tensor(len(rows), device=rows.device), coefficient=0.01),
        }
        return Objective(terms, {"nll": Statistic(nll.sum(), mask.sum())})

    def value_objective(self, batch):
        mask = batch["attention_mask"].bool()
        counts = nn.functional.one_hot(batch["input_ids"], 11).float() * mask[..., None]
        errors = (self.critic(counts.sum(dim=1))[:, 0] - mask.sum(dim=1)).square()
        weight = torch.tensor(len(errors), device=errors.device)
        return Objective.of(errors.sum(), weight, {"value_loss": Statistic(errors.sum(), weight)})

    def training_step(self, batch, batch_idx):
        for _ in range(CRITIC_STEPS):
            pieces = cut(batch, self.micro_batch_size)
            self.update(pieces, empty_like(batch), objective=self.value_objective, of="critic")
        super().training_step(batch, batch_idx)


def rows(numbers):
    """Rows of unequal length, each made of its own number."""
    lengths = torch.tensor([2 + number % 5 for number in numbers])
    ids = torch.stack([torch.arange(6) * 3 + number for number in numbers]) % 11
    return {"input_ids": ids, "attention_mask": (torch.arange(6)[None] < lengths[:, None]).long()}


def make(optimizer=torch.optim.SGD, rate=0.1, **options):
    torch.manual_seed(0)
    return WithCritic(policy=Policy(), optimizer=lambda groups: optimizer(groups, lr=rate), **options)


def main(folder: Path, devices: int) -> None:
    """Two batches, of 3 and 5 rows on the two ranks."""
    shares = {
        1: [list(range(8)), list(range(8, 16))],
        2: [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15]],
    }
    module = make(micro_batch_size=2, lr_scheduler=LinearSchedule)
    before = copy.deepcopy(module.state_dict())
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader([rows(share) for share in shares[devices]], batch_size=None))
    change = {name: value - before[name] for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {"change": change, "metrics": metrics, "steps": trainer.global_step, "seen": module.seen}
    torch.save(found, folder / f"{devices}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
