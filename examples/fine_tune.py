"""Fine-tune, measure, ask and export: the basic script, with rows of your own.

    python examples/fine_tune.py
    tensorboard --logdir runs

A fresh small Llama learns to write three digits backward; it takes seconds on a laptop's CPU. With a model of yours it
is `PolicyConfig(path="my-model")`, and the tokenizer `"my-model"`.
"""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from alignment_modules import PolicyConfig, SFTModule
from alignment_modules.callbacks import StepBar
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
ROWS = [{"prompt": f"{number:03d}", "completion": f"{number:03d}"[::-1]} for number in range(1000)]
HELD_OUT = ROWS[::7]


def main(epochs: int = 4, folder: str = "runs/fine_tune") -> float:
    """Returns the share of held-out numbers that are written right.

    Args:
        epochs: Passes over the rows.
        folder: Where curves and the trained policy go.
    """
    L.seed_everything(0)
    data = SFTDataModule(
        train=[row for row in ROWS if row not in HELD_OUT],
        test=[{"prompt": row["prompt"], "answer": row["completion"]} for row in HELD_OUT],
        tokenizer=TOKENIZER,
        batch_size=16,
        eval_batch_size=len(HELD_OUT),
    )
    module = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0),
        evaluation=EvaluationConfig(max_completion_length=5),
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[StepBar()],
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, data)
    (found,) = trainer.test(module, data, verbose=False)
    module.export(f"{folder}/export")  # what transformers, `align chat` and the next stage read
    print(f"held-out numbers right: {found['test/exact_match']:.0%}; 273 backward: {module.generate('273')}")
    return found["test/exact_match"]


if __name__ == "__main__":
    main()
