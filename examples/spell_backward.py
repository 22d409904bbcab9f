"""A task of reasoning-gym from nothing: SFT shows a small Llama words spelt backward, GRPO goes on by their scores.

Needs `pip install 'alignment-modules[reasoning-gym]'`, and a few minutes of a laptop's CPU.
"""

import argparse
import string

import lightning as L
import torch

from alignment_modules import GRPOModule, PolicyConfig, SFTModule
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.rewards import ReasoningGymScore
from datamodules import PromptDataModule, SFTDataModule
from datamodules.tasks import ReasoningGymPrompts, character_tokenizer

TASK = {"task": "spell_backward", "parameters": {"min_word_len": 3, "max_word_len": 4}}
TOKENIZER = character_tokenizer(string.ascii_letters + string.digits + string.punctuation + " \n")
LLAMA = {
    "model_type": "llama",
    "vocab_size": len(TOKENIZER),
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.04,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
SIZES = {"train": 3000, "test": 200}


def trainer(steps: int) -> L.Trainer:
    """A Trainer of so many optimizer steps that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, log_every_n_steps=10, **quiet)


def run(seed: int, sft_steps: int, grpo_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """What the likeliest answers to 200 held-out problems are worth, after SFT and after GRPO."""
    L.seed_everything(seed)
    score = ReasoningGymScore()
    rows = {split: ReasoningGymPrompts(split=split, size=size, seed=seed, **TASK) for split, size in SIZES.items()}
    options = {"tokenizer": TOKENIZER, "max_length": 96, **rows}
    evaluation = EvaluationConfig(max_completion_length=8, verifier=score)
    sft = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0),
        evaluation=evaluation,
    )
    trainer(sft_steps).fit(sft, SFTDataModule(columns={"answer": "completion"}, batch_size=64, **options))
    grpo = GRPOModule(
        policy=sft.policy,
        rewards=score,
        max_completion_length=8,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0),
        evaluation=evaluation,
    )
    aligning, prompts = trainer(grpo_steps), PromptDataModule(batch_size=32, **options)
    before = aligning.test(grpo, prompts, verbose=False)[0]
    aligning.fit(grpo, prompts)
    return before, aligning.test(grpo, prompts, verbose=False)[0]


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--grpo-steps", type=int, default=100)
    given = parser.parse_args()
    for stage, found in zip(("SFT", "GRPO"), run(given.seed, given.sft_steps, given.grpo_steps), strict=True):
        print(f"after {stage}: {found['test/exact_match']:.1%} right, mean score {found['test/reward']:.3f}")


if __name__ == "__main__":
    main()
