"""A loop of your own with `L.Fabric`: the library gives the loss, everything else stands here.

    python examples/fabric_loop.py

`training_step` gives the mean loss of the batch, whose gradient is the mean's. Schedule, clipping, validation and
checkpoints are yours to write. Several processes and accumulation then average means of batches, and not tokens: exact
they are under Lightning's Trainer. Paradigms that take their own steps, such as GRPO, need the Trainer, too.
"""

from pathlib import Path

import lightning as L
import torch

from alignment_modules import PolicyConfig, SFTModule
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
RATE, WARMUP = 3e-3, 10


def main(epochs: int = 4, folder: str = "runs/fabric") -> float:
    """Returns the share of held-out numbers that are written right.

    Args:
        epochs: Passes over the rows.
        folder: Where the state is saved.
    """
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    held_out = ROWS[::7]
    data = SFTDataModule(train=[row for row in ROWS if row not in held_out], tokenizer=TOKENIZER, batch_size=16)
    data.setup("fit")
    loader = fabric.setup_dataloaders(data.train_dataloader())
    own = SFTModule(
        policy=PolicyConfig(config=LLAMA),
        tokenizer=TOKENIZER,  # a Trainer would have handed on the data module's
        evaluation=EvaluationConfig(max_completion_length=5),
    )
    module, optimizer = fabric.setup(own, torch.optim.AdamW(own.parameters(), lr=RATE, weight_decay=0.0))
    step = 0
    for epoch in range(epochs):
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
            loss = module.training_step(batch, step)
            fabric.backward(loss)
            fabric.clip_gradients(module, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        fabric.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
        fabric.save(Path(folder, "state.ckpt"), {"module": module, "optimizer": optimizer, "step": step})
    state = {"module": module, "optimizer": optimizer, "step": 0}
    fabric.load(Path(folder, "state.ckpt"), state)  # how a run that was stopped would go on
    written = own.generate([row["prompt"] for row in held_out])
    right = sum(text == row["completion"] for text, row in zip(written, held_out, strict=True)) / len(held_out)
    fabric.print(f"{state['step']} steps, held-out numbers right: {right:.0%}")
    return right


if __name__ == "__main__":
    main()
