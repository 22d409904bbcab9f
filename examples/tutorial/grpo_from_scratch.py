"""Lesson 4, GRPO: learning from one's own samples, compared with each other (arXiv:2402.03300).

There is no text to imitate, only a reward R(x, y) that says how good a completion is. What is to grow is the expected
reward J = E[R(x, y)] of completions y that the policy samples itself. Sampling cannot be differentiated, but

    grad J = sum_y R(x, y) grad p(y | x) = E[R(x, y) * grad log p(y | x)],

since grad p = p * grad log p: make what earned much more likely. A number b that does not depend on y may be taken from
R at no cost, for E[b * grad log p] = b * grad sum_y p(y) = b * grad 1 = 0; it only takes noise away. GRPO takes the
mean of a group of completions of the same prompt: better than its siblings is good, worse is bad. (The mean holds the
completion's own reward, too. That scales the gradient by 1 - 1 / group, and turns it nowhere.)

The task: after a number n, write n + 1, n + 2, n + 3, and stop. The model starts from nothing and is never told.

The tests hold the gradient to that of `GRPOModule`. Run `python examples/tutorial/grpo_from_scratch.py`.
"""

import copy

import torch
from optimizer_from_scratch import AdamW, clip
from torch import Tensor, nn
from trainer_from_scratch import VOCABULARY, Row, TinyLanguageModel, collate, token_log_probs

STOP, LIMIT = 0, 6  # the token that ends a completion, and where one is cut off without it
GROUP = 16
EPSILON = 0.2
BETA = 0.04


@torch.no_grad()
def sample(model: nn.Module, prompts: list[list[int]]) -> list[Row]:
    """A completion of each prompt, token by token; all prompts have one length. The whole row is read each time."""
    ids = torch.tensor(prompts)
    for _ in range(LIMIT):
        probabilities = model(ids)[:, -1].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    rows = []
    for prompt, written in zip(prompts, ids[:, len(prompts[0]) :].tolist(), strict=True):
        end = written.index(STOP) + 1 if STOP in written else LIMIT
        rows.append((prompt, written[:end]))  # the stop is the policy's own token, too, and is learnt
    return rows


def reward(prompt: list[int], completion: list[int]) -> float:
    """The share of tokens that are right; a judge that gives something for half an answer is easier to learn from."""
    wanted = [*range(prompt[-1] + 1, prompt[-1] + 4), STOP]
    right = sum(one == other for one, other in zip(wanted, completion, strict=False))
    return right / max(len(wanted), len(completion))


def group_advantages(rewards: Tensor) -> Tensor:
    """How much better than its group each completion is, in deviations of the group: [prompts, group] both.

    The division weighs prompts: those where success is rare, or nearly certain, count more than J says. A group of
    equal rewards teaches nothing. Its deviation is 0, or rounding, and is not divided by.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    differ = (rewards.amax(dim=1) - rewards.amin(dim=1) > 1e-6)[:, None]
    return torch.where(differ, centred / rewards.std(dim=1, keepdim=True), 0.0)  # torch divides by the group less one


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """What is to grow, for each token: PPO's clipped ratio times advantage (arXiv:1707.06347, eq. 7).

    After the first step on a rollout the policy is no longer the one that sampled it. E over the old policy becomes one
    over the new by weighing each token with ratio = p_new / p_old. Far from 1 the weight is not to be trusted: where
    the ratio has gone as far as epsilon in the direction that the advantage asks for, min() leaves the clipped one, a
    constant, and the token pulls no further. At ratio 1 the gradient is advantage * grad log p.
    """
    ratio = (log_probs - old_log_probs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)


def grpo_loss(
    policy: nn.Module, reference: nn.Module, rows: list[Row], advantages: Tensor, old_log_probs: Tensor | None
) -> Tensor:
    """The loss of completions with an advantage each, [rows].

    All tokens of a completion have its advantage. The policy is held near the reference by an estimate of their
    divergence, k3 = exp(-x) - 1 + x with x = log p - log p_reference: it is 0 where they agree, and never below.

    `old_log_probs` [rows, time - 1] are those of the policy that sampled; None: it is the policy as it is now.
    """
    batch = collate(rows)
    log_probs, own = token_log_probs(policy, batch)
    with torch.no_grad():
        reference_log_probs, _ = token_log_probs(reference, batch)
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    x = log_probs - reference_log_probs
    losses = -clipped_surrogate(log_probs, old_log_probs, advantages[:, None]) + BETA * ((-x).exp() - 1 + x)
    # The mean over a completion's tokens, then over completions: a long one has as much to say as a short one.
    return (torch.where(own, losses, 0.0).sum(dim=1) / own.sum(dim=1)).mean()


def main() -> None:
    """Samples, judges, compares, and takes two steps; a hundred times."""
    torch.manual_seed(0)
    policy = TinyLanguageModel()
    reference = copy.deepcopy(policy)
    optimizer = AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    numbers = list(range(1, VOCABULARY - 3))
    # Watch the reward, not the loss. The advantages of a group add up to 0, so the loss shows the divergence alone: it
    # starts at 0, and grows as the policy learns.
    print("step   reward   groups with signal   mean length   all right   loss")
    for step in range(101):
        prompts = [[n] for n in torch.tensor(numbers)[torch.randperm(len(numbers))[:8]].tolist() for _ in range(GROUP)]
        rows = sample(policy, prompts)
        rewards = torch.tensor([reward(*row) for row in rows])
        advantages = group_advantages(rewards.view(-1, GROUP)).flatten()
        old_log_probs = None
        for _ in range(2):
            loss = grpo_loss(policy, reference, rows, advantages, old_log_probs)
            if old_log_probs is None:
                shown, old_log_probs = loss, token_log_probs(policy, collate(rows))[0].detach()
            optimizer.zero_grad()
            loss.backward()
            clip(policy.parameters(), 1.0)
            optimizer.step()
        if step % 20 == 0:
            signal = (advantages.view(-1, GROUP) != 0).any(dim=1).float().mean()
            length = sum(len(completion) for _, completion in rows) / len(rows)
            right = (rewards == 1).float().mean()
            print(f"{step:4}  {rewards.mean():7.2f}  {signal:19.0%}  {length:12.1f}  {right:10.0%}  {shown:5.2f}")


if __name__ == "__main__":
    main()
