"""Lesson 2, the trainer: the loop around the optimizer, and all that a run needs to be exact.

A language model gives each next token a probability. Training makes the tokens of good texts likely: the loss is
-log p(token | tokens before it), averaged over the tokens that are to be learnt. Here prompts are two numbers, and
completions count on with the same stride: 3 5 -> 7 9 11.

The tests hold this trainer to `SFTModule` under Lightning's Trainer, bit for bit, also after it was killed.

Run `python examples/tutorial/trainer_from_scratch.py`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from optimizer_from_scratch import AdamW, clip, schedule
from torch import Tensor, nn

VOCABULARY = 24
IGNORED = -100  # the label of a token that is not learnt
Row = tuple[list[int], list[int]]  # a prompt and its completion


class TinyLanguageModel(nn.Module):
    """Token ids [batch, time] to logits [batch, time, outputs]; what stands at t depends on the tokens up to t."""

    def __init__(self, outputs: int = VOCABULARY, width: int = 48, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the logits."""
        return self.head(self.recurrence(self.dropout(self.embedding(input_ids)))[0])


def counting_rows(count: int = 192, seed: int = 0) -> list[Row]:
    """Rows of different lengths, which is where averages go wrong."""
    random, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        start, stride, length = (int(torch.randint(high, (), generator=random)) for high in (VOCABULARY, 3, 7))
        numbers = [(start + (stride + 1) * place) % VOCABULARY for place in range(length + 4)]
        rows.append((numbers[:2], numbers[2:]))
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Rows as one rectangle, [batch, time], padded on the right, where a causal model cannot see it.

    Labels are the ids, but IGNORED on prompts (nobody asks the model to write them) and on padding.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    filled = [prompt + completion + [0] * (width - len(prompt + completion)) for prompt, completion in rows]
    ids, place = torch.tensor(filled), torch.arange(width)
    first = torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    end = first + torch.tensor([len(completion) for _, completion in rows])[:, None]
    labels = torch.where((place >= first) & (place < end), ids, IGNORED)
    return {"input_ids": ids, "labels": labels, "attention_mask": (place < end).long()}


def token_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The log p of each token given those before it, 0 where none is to be learnt, and where one is: [batch, time - 1].

    The logits at t are about the token at t + 1, hence the shift. log p is the token's logit less the log of the sum of
    all exp(logit); it is taken in float32, also where the model computes in bfloat16 and its 8 bits of precision.
    """
    logits, labels = model(batch["input_ids"][:, :-1]).float(), batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape), labels != IGNORED


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay. Biases do not: there is nothing to be gained by a bias near 0."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    return [{"params": matrices}, {"params": [w for w in model.parameters() if w.ndim < 2], "weight_decay": 0.0}]


class Trainer:
    """Trains a model on rows.

    An optimizer step is of `accumulate` micro-batches of `micro_batch` rows: as many as memory holds at once. `lr` is
    the highest rate of the schedule over `steps`, and `seed` that of the order of the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: list[Row],
        steps: int = 60,
        make_optimizer: Callable[..., Any] = AdamW,
        lr: float = 1e-2,
        micro_batch: int = 8,
        accumulate: int = 4,
        max_norm: float = 1.0,
        bf16: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.rows, self.steps, self.lr = model, rows, steps, lr
        self.optimizer = make_optimizer(parameter_groups(model), lr=lr)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.micro_batch, self.accumulate, self.max_norm = micro_batch, accumulate, max_norm
        self.bf16, self.seed, self.step = bf16, seed, 0

    def micro_batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Those of an optimizer step.

        The order is a function of seed and epoch, and the place in it one of the step: a run that resumes needs to know
        nothing but its step to see each row as often as if it had never stopped.
        """
        size = self.micro_batch * self.accumulate
        epoch, place = divmod(step, len(self.rows) // size)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for start in range(place * size, (place + 1) * size, self.micro_batch):
            yield collate([self.rows[number] for number in order[start : start + self.micro_batch]])

    def fit(self, until: int | None = None) -> Iterator[float]:
        """Takes optimizer steps up to `until`; yields the loss of each.

        The gradient is to be that of the mean over all tokens of the step, sum(losses) / number of tokens. The mean of
        each micro-batch's mean is another number: a token among few others would count more than one among many. So
        sums are differentiated, gradients of sums add up (autograd does it, in `.grad`), and are divided once.
        """
        self.model.train()
        while self.step < (self.steps if until is None else until):
            self.optimizer.zero_grad()
            total = tokens = torch.tensor(0.0)
            for batch in self.micro_batches(self.step):
                # Mixed precision: weights, gradients and the optimizer stay float32, since a step of 1e-4 of a weight
                # is less than bfloat16 can tell apart; only the products in the model are computed in it. Without a
                # cache each use of a weight has its own copy in bfloat16, and gradients are added up in float32.
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                    log_probs, learnt = token_log_probs(self.model, batch)
                loss = -log_probs.sum()
                loss.backward()
                total, tokens = total + loss.detach(), tokens + learnt.sum()
            for weight in self.weights:
                weight.grad *= 1 / tokens
            clip(self.weights, self.max_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * schedule(self.step, self.steps, warmup=5)
            self.optimizer.step()
            self.step += 1
            yield float(total / tokens)

    def save(self, path: Path) -> None:
        """Writes all that the rest of the run depends on: weights, moments, the step, and the state of dropout.

        A run that is killed while it writes would leave half a file in place of its last good one; so the file is
        written beside it and then renamed, which happens whole or not at all.
        """
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "random": torch.get_rng_state()}, part := path.with_suffix(".part"))
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Takes up what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


def main() -> None:
    """Trains; trains again, stops, and goes on in another trainer; compares."""

    def fresh() -> Trainer:
        torch.manual_seed(0)
        return Trainer(TinyLanguageModel(dropout=0.1), counting_rows())

    whole, first, second = fresh(), fresh(), fresh()
    torch.manual_seed(1)
    for step, loss in enumerate(whole.fit()):
        if step % 10 == 0 or step == 59:
            print(f"step {step:2}  loss {loss:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        list(first.fit(until=25))
        first.save(Path(folder) / "last.ckpt")
        second.load(Path(folder) / "last.ckpt")
    list(second.fit())
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    print(
        f"stopped at 25 and resumed: {'the same bits' if all(torch.equal(*pair) for pair in pairs) else 'other bits'}"
    )


if __name__ == "__main__":
    main()
