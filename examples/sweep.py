"""Three learning rates in one process, and which is best: a table at the end, and TensorBoard's page HPARAMS.

    python examples/sweep.py
    tensorboard --logdir runs/sweep

Each run has a folder, a seed and a policy of its own, so that nothing but the rate is different.
"""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from alignment_modules import PolicyConfig, SFTModule
from alignment_modules.callbacks import CompareRuns, StepBar
from alignment_modules.evaluation import EvaluationConfig
from datamodules import SFTDataModule
from datamodules.tasks import character_tokenizer

TOKENIZER = character_tokenizer("0123456789")
LLAMA = {
    "model_type": "llama",
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.06,
}
ROWS = [{"prompt": f"{number:03d}", "completion": f"{number:03d}"[::-1]} for number in range(1000)]  # written backward
RATES = (3e-4, 3e-3, 3e-2)


def run(rate: float, steps: int, folder: str) -> dict[str, float]:
    """Trains with one learning rate.

    Args:
        rate: Peak learning rate.
        steps: Optimizer steps.
        folder: Of all runs.

    Returns:
        The last metrics of training and validation.
    """
    L.seed_everything(0)
    held_out = ROWS[::7]
    data = SFTDataModule(
        train=[row for row in ROWS if row not in held_out],
        validation=[{**row, "answer": row["completion"]} for row in held_out],
        validation_prompts=len(held_out),
        tokenizer=TOKENIZER,
        batch_size=16,
        eval_batch_size=len(held_out),
    )
    module = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        evaluation=EvaluationConfig(max_completion_length=5),
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(folder, name=f"lr_{rate:g}", version=""),
        callbacks=[CompareRuns(), StepBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def main(rates: tuple[float, ...] = RATES, steps: int = 150, folder: str = "runs/sweep") -> dict[float, float]:
    """Prints the table; returns the exact match of each rate.

    Args:
        rates: Learning rates.
        steps: Optimizer steps of each run.
        folder: Where the runs write.
    """
    found = {rate: run(rate, steps, folder) for rate in rates}
    print(f"{'rate':>8} {'val/loss':>9} {'exact match':>12}")
    for rate, metrics in found.items():
        print(f"{rate:8g} {metrics['val/loss']:9.3f} {metrics['val/exact_match']:12.1%}")
    exact = {rate: metrics["val/exact_match"] for rate, metrics in found.items()}
    print(f"best: {max(exact, key=exact.__getitem__):g}")
    return exact


if __name__ == "__main__":
    main()
