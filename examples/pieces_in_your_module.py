"""The pure functions inside your own LightningModule: the loss of `SFTModule`, written by hand."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alignment_modules.functional import aggregate, token_log_probs


class YourModule(L.LightningModule):
    """Any LightningModule of yours: log-probabilities and reductions come from the library, the rest is yours."""

    def __init__(self, vocabulary: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mixer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Loss over the tokens of the second half of each row."""
        (ids,) = batch
        logits = self.head(self.mixer(self.embedding(ids[:, :-1]))[0])
        token_logps = token_log_probs(logits, ids[:, 1:])
        supervised = torch.arange(ids.shape[1] - 1, device=ids.device).expand_as(token_logps) >= ids.shape[1] // 2
        total, weight = aggregate(-token_logps, supervised, reduction="token_mean")  # the sum, and the number of tokens
        loss = total / weight
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Learns to count upwards."""
    L.seed_everything(0)
    rows = torch.arange(12)[None] + torch.randint(0, 20, (512, 1))
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=8)
    trainer.fit(YourModule(), DataLoader(TensorDataset(rows), batch_size=32, shuffle=True))
    print(f"loss {float(trainer.callback_metrics['train/loss']):.3f}")


if __name__ == "__main__":
    main()
