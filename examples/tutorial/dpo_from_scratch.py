"""Lesson 3, DPO: learning from pairs of which one completion is the better (arXiv:2305.18290).

Given are prompts x with a chosen completion y_w and a rejected one y_l. Suppose each completion has a reward r(x, y),
and that people choose as Bradley and Terry have it: p(y_w over y_l) = sigmoid(r(x, y_w) - r(x, y_l)).

One would fit r to the pairs, and then find the policy that earns much of it without leaving the reference, the model as
it was: maximise E[r(x, y)] - beta * KL(policy || reference). That optimum is known in closed form,

    policy(y | x) = reference(y | x) * exp(r(x, y) / beta) / Z(x),

and can be read backwards: r(x, y) = beta * log(policy(y | x) / reference(y | x)) + beta * log Z(x). In a pair Z(x)
cancels. So the policy itself can stand for the reward, and fitting r to the pairs trains the policy:

    loss = -log sigmoid(beta * h),  h = log(policy(y_w) / reference(y_w)) - log(policy(y_l) / reference(y_l)).

The tests hold the gradient to that of `DPOModule`. Run `python examples/tutorial/dpo_from_scratch.py`.
"""

import copy

import torch
import torch.nn.functional as F
from optimizer_from_scratch import AdamW
from torch import Tensor, nn
from trainer_from_scratch import VOCABULARY, Row, TinyLanguageModel, Trainer, collate, token_log_probs

BETA = 0.1
Pair = tuple[list[int], list[int], list[int]]  # a prompt, its chosen and its rejected completion


def pairs_of(count: int = 64, seed: int = 0) -> list[Pair]:
    """After a number, counting upwards is preferred to counting downwards; lengths differ."""
    random, pairs = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        start = int(torch.randint(VOCABULARY, (), generator=random))
        up, down = torch.randint(2, 6, (2,), generator=random).tolist()
        chosen = [(start + i) % VOCABULARY for i in range(1, up + 1)]
        pairs.append(([start], chosen, [(start - i) % VOCABULARY for i in range(1, down + 1)]))
    return pairs


def completion_log_probs(model: nn.Module, rows: list[Row]) -> Tensor:
    """The log-probability of each row's completion given its prompt, [rows].

    By the chain rule of probability it is the sum over the completion's tokens. Those of the prompt are given: log 1.
    """
    log_probs, _ = token_log_probs(model, collate(rows))
    return log_probs.sum(dim=1)


def dpo_losses(policy: nn.Module, reference: nn.Module, pairs: list[Pair], beta: float = BETA) -> tuple[Tensor, Tensor]:
    """The loss of each pair, and h: [pairs] both.

    The gradient of a pair's loss is -beta * sigmoid(-beta * h) * (grad log policy(y_w) - grad log policy(y_l)): a pair
    that is in the right order by far, h > 0 and large, hardly counts any more; one in the wrong order counts in full.
    """
    chosen = [(prompt, better) for prompt, better, _ in pairs]
    rejected = [(prompt, worse) for prompt, _, worse in pairs]
    ratios = []
    for rows in (chosen, rejected):
        with torch.no_grad():  # the reference does not learn
            reference_log_probs = completion_log_probs(reference, rows)
        ratios.append(completion_log_probs(policy, rows) - reference_log_probs)
    h = ratios[0] - ratios[1]
    return -F.logsigmoid(beta * h), h


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], length: int) -> list[int]:
    """The likeliest next token, again and again."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def undecided_model(steps: int = 40) -> TinyLanguageModel:
    """What lesson 2 makes of both completions of every pair: a model that counts in either direction, as it happens."""
    torch.manual_seed(0)
    model = TinyLanguageModel()
    rows = [(prompt, completion) for prompt, *completions in pairs_of() for completion in completions]
    for _ in Trainer(model, rows, steps=steps).fit():
        pass
    return model


def main() -> None:
    """Trains, and prints what to watch."""
    policy = undecided_model()
    reference = copy.deepcopy(policy)
    pairs, others = pairs_of(), pairs_of(seed=1)
    optimizer = AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    before = [greedy(policy, [start], 4) for start in (3, 12)]
    # The first loss is log 2, since policy and reference are one model; another number would be a mistake. Later the
    # loss falls, the margin beta * h grows, and more of other pairs are in the right order (h > 0). The chosen
    # completion may become less likely, too: only the difference counts.
    print("step   loss   margin   other pairs in order   log p of chosen, of rejected")
    for step in range(25):
        losses, h = dpo_losses(policy, reference, pairs)
        if step % 6 == 0:
            with torch.no_grad():
                in_order = (dpo_losses(policy, reference, others)[1] > 0).float().mean()
                chosen, rejected = (
                    completion_log_probs(policy, [(pair[0], pair[side]) for pair in others]).mean() for side in (1, 2)
                )
            margin = BETA * h.detach().mean()
            print(f"{step:4}  {losses.mean():5.3f}  {margin:7.2f}  {in_order:20.0%}  {chosen:16.1f}{rejected:13.1f}")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    for start, completion in zip((3, 12), before, strict=True):
        print(f"after {start}: {completion} became {greedy(policy, [start], 4)}")


if __name__ == "__main__":
    main()
