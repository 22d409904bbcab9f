"""Training on two processes: the gradient is the one of the union of their batches, and so is the loss.

    python examples/two_processes.py
    python examples/two_processes.py --processes 1

Both print the same losses, but for rounding, which later steps carry on: rows, order and steps do not depend on the
number of processes. On GPUs it is `accelerator="gpu"`; for a model that does not fit `strategy="fsdp2"`; for several
machines `num_nodes`, and a start by `torchrun` or SLURM.
"""

import argparse

import lightning as L
import torch

from alignment_modules import PolicyConfig, SFTModule
from datamodules import SFTDataModule
from datamodules.tasks import character_tokenizer

TOKENIZER = character_tokenizer("0123456789")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "vocab_size": len(TOKENIZER), "num_key_value_heads": 4, **SIZES}
ROWS = [{"prompt": f"{number:03d}", "completion": f"{number:03d}"[::-1]} for number in range(960)]  # written backward
BATCH = 16  # rows of a step, of all processes together


class FirstLosses(L.Callback):
    """Shows that the number of processes changes nothing."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Prints the loss of the first five steps, of all processes together."""
        if trainer.global_step <= 5 and trainer.is_global_zero:
            print(f"step {trainer.global_step}: {float(trainer.callback_metrics['train/loss']):.5f}")


def main() -> None:
    """Each process takes its share of every batch; the first one alone reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    processes = parser.parse_args().processes
    L.seed_everything(0)  # the same weights everywhere
    module = SFTModule(policy=PolicyConfig(config=LLAMA), optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[FirstLosses()],
    )
    trainer.fit(module, SFTDataModule(train=ROWS, tokenizer=TOKENIZER, batch_size=BATCH // processes))
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['train/loss']):.3f}")


if __name__ == "__main__":
    main()
