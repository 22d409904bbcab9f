"""A Lightning project: a model, a data module and a callback of your own, and the library's step between them.

    python examples/lightning_project.py

The model is any `nn.Module` from token ids to logits, the batch a dictionary of tensors, and the Trainer your own:
no tokenizer, no transformers and no configuration file. The task: write four letters a second time.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alignment_modules import SFTModule
from alignment_modules.rollouts import SamplingParameters

LETTERS, LENGTH = 26, 4
END, AGAIN = LETTERS, LETTERS + 1  # tokens; the smaller ones are the letters


class Transformer(nn.Module):
    """Two layers of torch's own; what the library asks for is the signature of `forward` alone."""

    def __init__(self, vocabulary: int = LETTERS + 2, width: int = 64, longest: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, time, vocabulary]` of token ids `[batch, time]`, padded on the right."""
        time = input_ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(time)
        hidden = self.tokens(input_ids) + self.places(torch.arange(time))
        return self.head(self.layers(hidden, mask=causal, is_causal=True))


class Words(L.LightningDataModule):
    """Rows such as `n o d e AGAIN n o d e END`; what stands behind AGAIN is learnt."""

    def __init__(self, size: int = 4096, batch_size: int = 32) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def setup(self, stage: str) -> None:
        """Draws the words; those of validation are no training words."""
        random = torch.Generator().manual_seed(0)
        words = torch.randint(LETTERS, (self.size + 256, LENGTH), generator=random).unique(dim=0)
        self.validation, self.train = words[torch.randperm(len(words), generator=random)].tensor_split([128])

    def collate(self, words: list[Tensor]) -> dict[str, Tensor]:
        """A batch as `SFTModule` reads it: `input_ids` and `labels` `[batch, time]`, -100 where nothing is learnt."""
        rows = torch.stack(words)
        again, end = torch.full((len(rows), 1), AGAIN), torch.full((len(rows), 1), END)
        ids = torch.cat([rows, again, rows, end], dim=1)
        learnt = torch.arange(ids.shape[1]) > LENGTH
        return {"input_ids": ids, "labels": torch.where(learnt, ids, -100)}

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.validation, self.batch_size, collate_fn=self.collate)


class WrittenRight(L.Callback):
    """After each validation the policy writes, and the share of words that come back right is logged."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs `val/written_right`."""
        words = trainer.datamodule.validation
        prompts = torch.cat([words, torch.full((len(words), 1), AGAIN)], dim=1)
        batch = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
        found = pl_module.generate(batch, SamplingParameters(LENGTH + 1, greedy=True, stop_token_ids=(END,)))
        right = (found.ids[:, :LENGTH] == words).all(1) if found.ids.shape[1] > LENGTH else torch.zeros(len(words))
        pl_module.log("val/written_right", right.float().mean(), prog_bar=True)


def main(steps: int = 300) -> float:
    """Returns the share of held-out words that are written right.

    Args:
        steps: Optimizer steps.
    """
    L.seed_everything(0)
    module = SFTModule(policy=Transformer(), optimizer=lambda weights: torch.optim.AdamW(weights, lr=3e-3))
    trainer = L.Trainer(
        max_steps=steps,
        val_check_interval=100,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[WrittenRight()],
    )
    trainer.fit(module, datamodule=Words())
    right = float(trainer.callback_metrics["val/written_right"])
    print(f"words written right: {right:.0%}, loss {float(trainer.callback_metrics['val/loss']):.3f}")
    return right


if __name__ == "__main__":
    main()
