"""A reward model from pairs, then GRPO for what it likes: and what comes of it is compared with what was meant.

    python examples/reward_model.py

The pairs come from a hidden taste, the share of letters that are the prompt's. The reward model sees pairs alone, and
GRPO sees the reward model alone. Both the model's number and the taste are printed, and the words that the policy ends
with: the number rises far more than the taste, for of words such as nobody writes the model says anything.
"""

import random

import lightning as L
import torch

from alignment_modules import GRPOModule, PolicyConfig, RewardModule
from alignment_modules.rewards import SequenceClassifier
from alignment_modules.rollouts import SamplingParameters
from datamodules import PreferenceDataModule, PromptDataModule
from datamodules.tasks import character_tokenizer

LETTERS, LONGEST = "abcd", 6
TOKENIZER = character_tokenizer(LETTERS)
LLAMA = {
    "model_type": "llama",
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}


def taste(prompt: str, completion: str) -> float:
    """What the pairs were judged by, and what nobody tells the models."""
    return completion.count(prompt) / max(len(completion), 1)


def pairs(count: int) -> list[dict[str, str]]:
    """Two random words to a letter, the better one `chosen`."""
    draw, rows = random.Random(0), []
    while len(rows) < count:
        prompt = draw.choice(LETTERS)
        words = ["".join(draw.choices(LETTERS, k=draw.randint(1, LONGEST))) for _ in range(2)]
        rejected, chosen = sorted(words, key=lambda word: taste(prompt, word))
        if taste(prompt, chosen) > taste(prompt, rejected):
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def trainer(steps: int) -> L.Trainer:
    """A Trainer that writes nothing."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, **quiet)


def adamw(parameters: list[dict]) -> torch.optim.Optimizer:
    """For both stages."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)


def written(module: GRPOModule, judge: SequenceClassifier) -> tuple[float, float]:
    """Of 16 samples to each letter the mean of the reward model's numbers, and of the taste."""
    parameters = SamplingParameters(LONGEST, stop_token_ids=(TOKENIZER.eos_token_id,))
    samples = module.generate(list(LETTERS), parameters, num_samples=16)
    texts = [(letter, text) for letter, found in zip(LETTERS, samples, strict=True) for text in found]
    numbers = judge(completions=[text for _, text in texts], prompts=[letter for letter, _ in texts])
    tastes = [taste(letter, text) for letter, text in texts]
    return sum(numbers) / len(numbers), sum(tastes) / len(tastes)


def main(
    reward_steps: int = 200, grpo_steps: int = 150, folder: str = "runs/reward_model"
) -> list[tuple[float, float]]:
    """Prints and returns both means, before and after GRPO.

    Args:
        reward_steps: Optimizer steps of the reward model.
        grpo_steps: Optimizer steps of the policy.
        folder: Where the reward model is exported to.
    """
    L.seed_everything(0)
    found = RewardModule(policy=PolicyConfig(config=LLAMA, head="scalar"), optimizer=adamw, center_coef=0.01)
    teaching = trainer(reward_steps)
    teaching.fit(found, PreferenceDataModule(train=pairs(2048), tokenizer=TOKENIZER, batch_size=32))
    print(f"reward model: {float(teaching.callback_metrics['train/rewards/accuracies']):.0%} of the pairs told apart")
    found.export(folder)
    judge = SequenceClassifier(folder)
    module = GRPOModule(
        policy=PolicyConfig(config=LLAMA), rewards=judge, max_completion_length=LONGEST, optimizer=adamw
    )
    prompts = PromptDataModule(train=[{"prompt": letter} for letter in LETTERS], tokenizer=TOKENIZER, batch_size=4)
    aligning = trainer(grpo_steps)
    module.tokenizer = TOKENIZER
    before = written(module, judge)
    aligning.fit(module, prompts)
    after = written(module, judge)
    for when, (number, meant) in (("before", before), ("after", after)):
        print(f"{when} GRPO: reward {number:.2f}, taste {meant:.2f}")
    greedy = SamplingParameters(LONGEST, greedy=True, stop_token_ids=(TOKENIZER.eos_token_id,))
    print("its likeliest words:", dict(zip(LETTERS, module.generate(list(LETTERS), greedy), strict=True)))
    return [before, after]


if __name__ == "__main__":
    main()
