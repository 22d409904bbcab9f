"""DPO on your own `nn.Module` and your own DataLoader, in a plain Lightning script: no transformers, no tokenizer."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from alignment_modules import DPOModule


class TinyLanguageModel(nn.Module):
    """Any module that maps token ids [batch, time] to logits [batch, time, vocabulary] will do."""

    def __init__(self, vocabulary: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the logits."""
        return self.head(self.recurrence(self.embedding(input_ids))[0])


class AscendingPairs(Dataset):
    """Prefers completions that count upwards to those that count downwards."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = 8 + index % 16
        row = {
            "prompt_input_ids": torch.tensor([1, start]),
            "chosen_input_ids": torch.arange(start + 1, start + 5),
            "rejected_input_ids": torch.arange(start - 1, start - 5, -1),
        }
        masks = {key.replace("input_ids", "attention_mask"): torch.ones_like(ids) for key, ids in row.items()}
        return row | masks


def main() -> None:
    """Trains for four epochs and prints how often the chosen completion is preferred."""
    L.seed_everything(0)
    module = DPOModule(
        policy=TinyLanguageModel(),  # the reference is a frozen copy of it
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        beta=0.1,
    )
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=8)
    trainer.fit(module, DataLoader(AscendingPairs(), batch_size=16, shuffle=True))
    accuracy, margin = (float(trainer.callback_metrics[f"train/rewards/{name}"]) for name in ("accuracies", "margins"))
    print(f"chosen preferred in {accuracy:.0%} of the pairs, margin {margin:.2f}")


if __name__ == "__main__":
    main()
