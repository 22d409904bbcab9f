"""Whole runs on mixtures: what is logged of each source, and that a run that resumes logs and learns the same."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from alignment_modules import DPOModule, EvaluationConfig, GRPOModule, SFTModule
from alignment_modules.callbacks import ExactResume
from datamodules import MixtureDataModule, MixtureSource, PreferenceDataModule, PromptDataModule, SFTDataModule

SUMS = [{"prompt": f"{i}+1=", "completion": str(i + 1), "answer": str(i + 1)} for i in range(10)]
WORDS = [{"prompt": f"say {word}:", "completion": word, "answer": word} for word in ("ab", "cd", "efg", "h", "ij")]
KINDS = {
    SFTModule: (SFTDataModule, {}, {}),
    DPOModule: (PreferenceDataModule, {}, {}),
    GRPOModule: (
        PromptDataModule,
        {"rewards": ["short"], "max_completion_length": 3},
        {"num_generations": 3, "max_completion_length": 6, "minibatches": 1},
    ),
}


def short(completions):
    return [-float(len(text)) for text in completions]


def present(completions, answer):
    return [float(own in text) for text, own in zip(completions, answer, strict=True)]


class Kept(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, {}).update(metrics)


def fit(kind, policy, *callbacks, steps=4, ckpt=None):
    data, words, options = KINDS[kind]
    if data is PreferenceDataModule:
        rows = [[{**row, "chosen": row["completion"], "rejected": "?"} for row in own] for own in (SUMS, WORDS)]
    else:
        rows = [SUMS, WORDS]
    if kind is GRPOModule:
        options = options | {"rewards": [short, present]}
    rows = [{"train": own[:-2], "validation": own[-2:]} for own in rows]
    mixture = MixtureDataModule(
        sources={
            "sums": MixtureSource(data(**rows[0]), weight=2.0, loss_weight=0.5),
            "words": MixtureSource(data(**rows[1]), weight=1.0, **words),
        },
        batch_size=3,
        tokenizer=policy,
    )
    L.seed_everything(0)
    module = kind(
        policy=policy,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        evaluation=EvaluationConfig(max_completion_length=4),
        **options,
    )
    logger = Kept()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        callbacks=[ExactResume(), *callbacks],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=3,
        num_sanity_val_steps=1,
        val_check_interval=4 if kind is GRPOModule else 1.0,
        check_val_every_n_epoch=None if kind is GRPOModule else 1,
    )
    trainer.fit(module, mixture, ckpt_path=ckpt)
    return module, logger.steps, trainer


@pytest.mark.parametrize("kind", [SFTModule, GRPOModule, pytest.param(DPOModule, marks=pytest.mark.slow)])
def test_a_run_that_resumes_logs_and_learns_the_same(model_folder, tmp_path, kind):
    whole, logged, _ = fit(kind, model_folder, ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1))
    kept = next(path for path in tmp_path.glob("*.ckpt") if "step=2" in path.name)
    again, resumed, _ = fit(kind, model_folder, ckpt=str(kept))
    for (name, one), (_, two) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    at = {name: value for name, value in logged[3].items() if "time/" not in name}
    assert {name: value for name, value in resumed[3].items() if "time/" not in name} == at
    assert {"train/sums/loss", "train/words/loss"} <= at.keys()


def test_each_source_is_measured_as_it_says(model_folder):
    _, logged, trainer = fit(GRPOModule, model_folder)
    trained = {name for step in logged.values() for name in step}
    assert {"train/sums/reward", "train/words/reward", "train/sums/rewards/present/mean"} <= trained
    assert "train/words/rewards/present/mean" not in trained  # it is judged by its length
    assert max(step.get("train/words/completions/mean_length", 0.0) for step in logged.values()) <= 3.0
    validated = trainer.callback_metrics
    assert {"val/sums/reward", "val/words/reward", "val/sums/exact_match", "val/words/exact_match"} <= validated.keys()
    assert not any("dataloader_idx" in name for name in validated)
    halves = [float(validated[f"val/{source}/exact_match"]) for source in ("sums", "words")]
    assert float(validated["val/exact_match"]) == pytest.approx(sum(halves) / 2)  # two rows of each


def test_supervised_sources_are_validated_by_loss_and_by_completions(model_folder):
    validated = fit(SFTModule, model_folder, steps=5)[2].callback_metrics
    wanted = {f"val/{source}/{name}" for source in ("sums", "words") for name in ("loss", "mean_token_accuracy")}
    assert wanted <= validated.keys()
    assert not any("dataloader_idx" in name for name in validated)
