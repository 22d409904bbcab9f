"""Budgets of tokens and curricula in training: the gradient of a step, and scores that reach the data module."""

import copy
import itertools

import lightning as L
import numpy as np
import pytest
import torch

from alignment_modules import GRPOModule, KTOModule, OnlineDPOModule, PPOModule, SFTModule
from datamodules import ByColumn, ByLength, BySuccess, PromptDataModule, SFTDataModule, UnpairedDataModule
from tests.batches import Digits

ROWS = [{"prompt": "a" * (n % 6 + 1), "completion": "b" * (n * n % 11 + 1), "level": n % 4} for n in range(24)]


def fit(module, data, **options):
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**(settings | options), enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def policy(model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.mark.parametrize("curriculum", [None, ByLength()], ids=["buckets", "sorted"])
@pytest.mark.parametrize("accumulate", [2, 100])
def test_the_gradient_of_a_step_is_that_of_its_rows_one_by_one(policy, tokenizer, accumulate, curriculum):
    """All targets weigh the same, whatever the rows of their batches and the padding are."""
    data = SFTDataModule(train=ROWS, tokenizer=tokenizer, max_tokens=40, seed=3, curriculum=curriculum)
    start, batches = copy.deepcopy(policy), []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches.append({key: batch[key] for key in ("input_ids", "labels", "attention_mask")})

    module = SFTModule(policy=policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    trainer = fit(module, data, callbacks=[Keep()], accumulate_grad_batches=accumulate, max_steps=1)
    assert trainer.global_step == 1
    assert len({batch["labels"].shape for batch in batches}) > 1
    assert all(batch["input_ids"].numel() <= 40 for batch in batches)
    total, targets = torch.zeros(()), 0
    for batch in batches:
        for ids, labels, mask in zip(*batch.values(), strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            logits = start(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
            targets += int((labels[1:] != -100).sum())
    (total / targets).backward()
    for before, after in zip(start.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(before - before.grad, after, rtol=1e-5, atol=1e-6)


class Told(BySuccess):
    """Keeps what was recorded."""

    def order(self, *arguments):
        order = super().order(*arguments)
        self.records, record = [], order.record

        def keep(rows, scores, epoch, batch):
            self.records.append((list(rows), list(scores), epoch, batch))
            return record(rows, scores, epoch, batch)

        order.record = keep
        return order


def sums_of(completions):
    """A reward of several values."""
    return [sum(map(ord, text)) % 3 / 2 for text in completions]


ACTING = {
    "grpo": (GRPOModule, {"num_generations": 3}, 3),
    "grpo, two updates a batch": (GRPOModule, {"num_generations": 3, "num_iterations": 2}, 3),
    "dynamic sampling": (GRPOModule, {"num_generations": 3, "dynamic_sampling": 2}, 3),
    "ppo": (PPOModule, {"num_generations": 2}, 2),
    "online_dpo": (OnlineDPOModule, {"num_generations": 2}, 2),
}


@pytest.mark.parametrize("name", ACTING)
def test_mean_rewards_reach_the_data_module(policy, tokenizer, name):
    kind, options, group = ACTING[name]
    curriculum = Told(low=0.2, high=0.8, decay=0.0)
    data = PromptDataModule(train=ROWS, tokenizer=tokenizer, batch_size=4, curriculum=curriculum)
    settings = {"max_completion_length": 4, "optimizer": lambda groups: torch.optim.SGD(groups, lr=1e-3)}
    module = kind(policy=policy, rewards=sums_of, **settings, **options)
    seen = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(batch["index"])

    trainer = fit(module, data, max_epochs=2, callbacks=[Keep()], log_every_n_steps=1)
    assert [(epoch, batch) for _, _, epoch, batch in curriculum.records] == list(itertools.product(range(2), range(6)))
    assert [rows for rows, *_ in curriculum.records] == seen
    means = np.concatenate([scores for _, scores, *_ in curriculum.records])
    assert np.allclose(means * group * 2, np.round(means * group * 2))
    assert 0 <= means.min() < means.max() <= 1
    metrics = trainer.callback_metrics
    assert 0 < float(metrics["train/curriculum/set_aside"]) < 1
    assert 0 < float(metrics["train/curriculum/mean_score"]) < 1


def test_a_share_that_grows_is_logged_and_counts_optimizer_steps(policy, tokenizer):
    curriculum = ByColumn(column="level", mode="admission", start=0.25, steps=24)
    data = PromptDataModule(train=ROWS, tokenizer=tokenizer, batch_size=4, curriculum=curriculum)
    options = {"num_generations": 2, "max_completion_length": 3, "num_iterations": 3}
    shares, levels = [], []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            shares.append(float(trainer.callback_metrics["train/curriculum/admitted"]))
            levels.append(max(batch["level"]))

    fit(GRPOModule(policy=policy, rewards=sums_of, **options), data, callbacks=[Keep()], log_every_n_steps=1)
    assert shares == pytest.approx([np.ceil(24 * (0.25 + 0.75 * 3 * batch / 24)) / 24 for batch in range(6)])
    assert levels[0] == 0
    assert all(level * 0.25 < share for level, share in zip(levels, shares, strict=True))


@pytest.mark.parametrize("kind", [SFTModule, KTOModule])
def test_modules_that_judge_nothing_log_the_share_too(policy, tokenizer, kind):
    """In steps of two batches by the Trainer, or in as many micro-batches as a module cuts."""
    datamodule, label = {SFTModule: (SFTDataModule, {}), KTOModule: (UnpairedDataModule, {"label": True})}[kind]
    rows = [{"prompt": f"{n}=", "completion": str(n), "level": n, **label} for n in range(24)]
    curriculum = ByColumn(column="level", mode="admission", start=0.25, steps=6)
    data = datamodule(train=rows, tokenizer=tokenizer, batch_size=4, curriculum=curriculum)
    shares = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            shares[trainer.global_step] = float(trainer.callback_metrics.get("train/curriculum/admitted", 0))

    accumulated = {SFTModule: {"accumulate_grad_batches": 2}, KTOModule: {}}[kind]
    fit(kind(policy=policy), data, callbacks=[Keep()], log_every_n_steps=1, **accumulated)
    steps = 3 if accumulated else 6
    found = [shares[step] for step in range(1, steps + 1)]
    assert found == pytest.approx([np.ceil(24 * (0.25 + 0.75 * step / 6)) / 24 for step in range(steps)])


def test_a_module_that_judges_nothing_is_refused(policy, tokenizer):
    data = PromptDataModule(train=ROWS, tokenizer=tokenizer, curriculum=BySuccess())

    class Plain(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match=r"BySuccess.* needs to be told rewards, and Plain judges nothing"):
        fit(Plain(), data)
    module = GRPOModule(policy=policy, rewards=sums_of, num_generations=2)
    with pytest.raises(ValueError, match=r"reload_dataloaders_every_n_epochs=1"):
        fit(module, data, reload_dataloaders_every_n_epochs=1)


def test_prompts_without_an_index_are_told_of_nothing(tiny_llama, train):
    module = GRPOModule(policy=tiny_llama, rewards=sums_of, tokenizer=Digits(), num_generations=2)
    ids = torch.ones(2, 3, dtype=torch.long)
    train(module, [{"prompts": ids, "prompt_attention_mask": ids}])
    assert not [name for name in module.actor.statistics if name.startswith("curriculum")]
