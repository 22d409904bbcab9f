"""A task of reasoning-gym from nothing: a small Llama copies a few answers (SFT), and GRPO makes it right.

Needs `pip install 'alignment-modules[reasoning-gym]'`. A minute or two on a laptop's CPU.
"""

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
LENGTH = 8  # tokens of an answer
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


def trainer(steps: int) -> L.Trainer:
    """A Trainer of so many optimizer steps that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, log_every_n_steps=10, **quiet)


def run(seed: int, sft_steps: int, grpo_steps: int, lr: float = 5e-4) -> tuple[float, float]:
    """Mean scores of the likeliest answers to held-out problems, after SFT and after GRPO."""
    L.seed_everything(seed)
    score, evaluation = (
        ReasoningGymScore(),
        EvaluationConfig(max_completion_length=LENGTH, verifier=ReasoningGymScore()),
    )
    problems = ReasoningGymPrompts(split="train", size=3000, seed=seed, **TASK)
    held_out = ReasoningGymPrompts(split="test", size=200, seed=seed, **TASK)
    sft = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0),
        evaluation=evaluation,
    )
    rows = SFTDataModule(
        train=problems,
        test=held_out,
        columns={"answer": "completion"},
        tokenizer=TOKENIZER,
        batch_size=64,
        max_length=96,
    )
    fitting = trainer(sft_steps)
    fitting.fit(sft, rows)
    prompts = PromptDataModule(train=problems, test=held_out, tokenizer=TOKENIZER, batch_size=32, max_length=96)
    grpo = GRPOModule(
        policy=sft.policy,
        rewards=score,
        num_generations=8,
        max_completion_length=LENGTH,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
        evaluation=evaluation,
    )
    aligning = trainer(grpo_steps)
    before = aligning.test(grpo, prompts)[0]
    aligning.fit(grpo, prompts)
    after = aligning.test(grpo, prompts)[0]
    print(before, after)
    return before, after


if __name__ == "__main__":
    import sys
    import time

    run(*map(int, sys.argv[1:4]), float(sys.argv[4]))
    print(time.process_time())
