"""Run by test_two_ranks.py: every module takes one optimizer step on two ranks, and the weights' changes are saved.

Usage: two_ranks.py FOLDER DEVICES. With DEVICES=1 the single rank gets the union of both ranks' rows.
"""

import copy
import sys
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from alignment_modules import DPOModule, GRPOModule, KTOModule, PolicyConfig, PretrainModule, RewardModule, SFTModule
from alignment_modules.policies.load import build_policy

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
ROWS = 8


class Batches:
    """One batch a rank: the rows `rank::devices` of a fixed set, unequal in length."""

    def __init__(self, kind: str, devices: int):
        self.kind, self.devices = kind, devices

    def __len__(self):
        return self.devices

    def __getitem__(self, rank: int):
        # A split into 3 and 5 rows: the ranks' means would have different weights.
        rows = list(range(ROWS)) if self.devices == 1 else [list(range(3)), list(range(3, ROWS))][rank]
        return getattr(self, self.kind)(rows)

    @staticmethod
    def tokens(row: int, length: int, salt: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * row + salt)
        return torch.randint(1, 40, (length,), generator=generator)

    def padded(self, rows, lengths, salt, width):
        ids = torch.stack([F.pad(self.tokens(r, n, salt), (0, width - n)) for r, n in zip(rows, lengths, strict=True)])
        mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        return ids, mask.long()

    def sft(self, rows):
        ids, mask = self.padded(rows, [3 + r for r in rows], 0, 12)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}

    pretrain = sft

    def dpo(self, rows):
        batch = {}
        for salt, name in enumerate(("prompt", "chosen", "rejected")):
            ids, mask = self.padded(rows, [2 + (r + 3 * salt) % 7 for r in rows], salt, 9)
            batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = ids, mask
        return batch

    def reward(self, rows):
        return self.dpo(rows) | {"margin": torch.tensor([0.1 * row for row in rows])}

    aot = aot_unpaired = dpo

    def kto(self, rows):
        """Two rows of one prompt stand on different ranks, one completion is empty."""
        ids, mask = self.padded([row - (row == 3) for row in rows], [2 + (row - (row == 3)) % 3 for row in rows], 0, 4)
        answers, answer_mask = self.padded(rows, [0 if row == 5 else 1 + (5 * row) % 8 for row in rows], 1, 8)
        names = ("prompt_input_ids", "prompt_attention_mask", "completion_input_ids", "completion_attention_mask")
        label = torch.tensor([row % 3 > 0 for row in rows])
        return dict(zip(names, (ids, mask, answers, answer_mask), strict=True)) | {"label": label, "index": rows}

    def grpo(self, rows):
        ids, mask = self.padded(rows, [2 + r % 3 for r in rows], 0, 4)
        completions = [(r, g) for r in rows for g in range(3)]
        responses, response_mask = self.padded(
            [10 + 3 * r + g for r, g in completions], [1 + (5 * r + g) % 8 for r, g in completions], 1, 8
        )
        rewards = torch.tensor([float((r + g) % 3) + 0.1 * g for r, g in completions])
        return {
            "prompts": ids,
            "prompt_attention_mask": mask,
            "responses": responses,
            "response_mask": response_mask,
            "rewards": rewards,
        }

    def unjudged(self, rows):
        """Groups with none, one and two rewards of three; the first rank has none at all."""
        batch = self.grpo(rows)
        judged = torch.tensor([row >= 3 and g < row - 3 for row in rows for g in range(3)])
        return batch | {"rewards": batch["rewards"].masked_fill(~judged, torch.nan)}

    def sampled(self, rows):
        ids, mask = self.padded(rows, [2 + r % 3 for r in rows], 0, 4)
        return {"prompts": ids, "prompt_attention_mask": mask, "index": rows}


class NoTokenizer:
    """Decodes ids to text; enough for rewards."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self):
        return 40

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]


def many_threes(completions):
    """A reward that differs between samples."""
    return [float(text.count("3")) for text in completions]


def modules(policy):
    """One factory a case: name, module, extra Trainer options."""
    sgd = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0)}
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    online = {"rewards": many_threes, "max_grad_norm": None, "max_completion_length": 8, "tokenizer": NoTokenizer()}
    yield "pretrain", lambda: PretrainModule(policy=copy.deepcopy(policy), **sgd)
    yield "sft", lambda: SFTModule(policy=copy.deepcopy(policy), **sgd)
    torch.manual_seed(1)
    scalar = build_policy(PolicyConfig(config=LLAMA, head="scalar"))
    yield "reward", lambda: RewardModule(policy=copy.deepcopy(scalar), center_coef=0.1, **sgd)
    yield "dpo", lambda: DPOModule(policy=copy.deepcopy(policy), reference=copy.deepcopy(other), beta=0.5, **sgd)
    held = {"micro_batch_size": 2, "max_grad_norm": None, "beta": 0.5}
    for name in ("aot", "aot_unpaired"):
        yield (
            name,
            lambda name=name: DPOModule(
                policy=copy.deepcopy(policy), reference=copy.deepcopy(other), loss=name, **held, **sgd
            ),
        )
    yield "kto", lambda: KTOModule(policy=copy.deepcopy(policy), reference=copy.deepcopy(other), **held, **sgd)
    for name in ("grpo", "unjudged"):
        yield (
            name,
            lambda: GRPOModule(
                policy=copy.deepcopy(policy),
                reference=copy.deepcopy(other),
                beta=0.1,
                scale_rewards="batch",
                micro_batch_size=4,
                num_generations=3,
                **online,
                **sgd,
            ),
        )
    yield (
        "sampled",
        lambda: GRPOModule(
            policy=copy.deepcopy(policy),
            num_generations=4,
            micro_batch_size=4,
            minibatches=2,
            num_iterations=2,
            **online,
            **sgd,
        ),
    )


def main(folder: Path, devices: int) -> None:
    """Fits each case for one batch and saves the changes on rank 0."""
    L.seed_everything(0)
    policy = build_policy(PolicyConfig(config=LLAMA))
    for name, make in modules(policy):
        module = make()
        before = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
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
        trainer.fit(module, DataLoader(Batches(name, devices), batch_size=None))
        if trainer.is_global_zero:
            change = {key: p.detach() - before[key] for key, p in module.named_parameters() if p.requires_grad}
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            torch.save({"change": change, "metrics": metrics}, folder / f"{name}_{devices}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
