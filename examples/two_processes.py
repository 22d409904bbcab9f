"""Supervised fine-tuning of a fresh Llama on two processes: the gradient is the one of the union batch."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from alignment_modules import PolicyConfig, SFTModule

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class Counting(Dataset):
    """Rows that count upwards; the first token is the prompt."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) + index % 20 + 1
        return {"input_ids": ids, "labels": torch.where(torch.arange(8) > 0, ids, -100)}


def main() -> None:
    """Each process takes half of every batch."""
    L.seed_everything(0)
    module = SFTModule(
        policy=PolicyConfig(config=LLAMA), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    )
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=4,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(Counting(), batch_size=8, shuffle=True))
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['train/loss']):.3f}")


if __name__ == "__main__":
    main()
