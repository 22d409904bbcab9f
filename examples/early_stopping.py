"""Stop when the written answers get no better, and export the best policy instead of the last.

    python examples/early_stopping.py

The loss goes on falling where the answers no longer improve, so the run is judged by what it is for: every 25 steps the
policy writes answers to held-out questions, and `val/exact_match` is the share that is right.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

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
ROWS = [{"prompt": f"{number:03d}", "completion": f"{number:03d}"[::-1]} for number in range(1000)]  # written backward
HELD_OUT = [{**row, "answer": row["completion"]} for row in ROWS[::7]]  # completion: for the loss; answer: to judge by


def main(epochs: int = 20, folder: str = "runs/early_stopping") -> tuple[int, float]:
    """Returns the step at which training stopped, and the exact match of what was exported.

    Args:
        epochs: Passes over the rows, if nothing stops before.
        folder: Where checkpoint and export go.
    """
    L.seed_everything(0)
    data = SFTDataModule(
        train=[row for number, row in enumerate(ROWS) if number % 7],
        validation=HELD_OUT,
        validation_prompts=len(HELD_OUT),  # how many of the rows are answered; the loss is that of all
        tokenizer=TOKENIZER,
        batch_size=16,
        eval_batch_size=len(HELD_OUT),
    )
    module = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0),
        evaluation=EvaluationConfig(max_completion_length=5),
    )
    best = ModelCheckpoint(folder, monitor="val/exact_match", mode="max", save_weights_only=True)
    stop = EarlyStopping(monitor="val/exact_match", mode="max", patience=4, stopping_threshold=0.99)
    trainer = L.Trainer(
        max_epochs=epochs,
        val_check_interval=25,
        check_val_every_n_epoch=None,  # counted over all epochs
        num_sanity_val_steps=0,  # an untrained policy's answers are no measure
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[best, stop, StepBar()],
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.validate(module, data, ckpt_path="best", verbose=False)  # reads the best weights back
    exact = float(trainer.callback_metrics["val/exact_match"])
    module.export(f"{folder}/export")
    print(f"stopped at step {trainer.global_step}: {exact:.1%} right at its best")
    return trainer.global_step, exact


if __name__ == "__main__":
    main()
