"""Lesson 5, PPO: a critic says what each token has changed (arXiv:1707.06347).

Lesson 4 gives all tokens of a completion one advantage, although some were right and some wrong. A critic V(s) learns
what is still to be earned from a state s, the prompt and the tokens so far. What token t is worth can then be told by
what happened to that number:

    delta_t = r_t + gamma * V(s_t+1) - V(s_t).

It is exact if V is, and biased if V is not. What was truly earned from there on, less V(s_t), has no bias but all the
noise of the tokens that follow. Generalized advantage estimation (arXiv:1506.02438) lies between, at lambda 0 and 1:

    A_t = delta_t + gamma * lambda * delta_t+1 + (gamma * lambda)^2 * delta_t+2 + ...

So no group is needed, and one completion of each prompt will do. The price is a second model.

The task and the clipped surrogate are those of lesson 4. The tests hold both gradients to those of `PPOModule`.

Run `python examples/tutorial/ppo_from_scratch.py`.
"""

import copy

import torch
from grpo_from_scratch import clipped_surrogate, reward, sample
from optimizer_from_scratch import AdamW, clip
from torch import Tensor, nn
from trainer_from_scratch import VOCABULARY, Row, TinyLanguageModel, collate, token_log_probs

GAMMA, LAMBDA, CRITIC_LAMBDA = 1.0, 0.95, 1.0
BETA = 0.01  # small, as the reference is a model that knows nothing
VALUE_CLIP = 0.2


def values_of(critic: nn.Module, rows: list[Row]) -> Tensor:
    """V of the state before each token, [rows, time - 1]: a model with one output reads what the token follows."""
    return critic(collate(rows)["input_ids"][:, :-1])[..., 0]


def token_rewards(rewards: Tensor, log_probs: Tensor, reference_log_probs: Tensor, own: Tensor) -> Tensor:
    """The reward of each token, [rows, time - 1]: the judge's on the last one, and what the reference takes on each.

    The policy is to earn much and stay near the reference: E[R] - beta * KL. The KL is the mean of log p - log
    p_reference over samples, so it can be taken from the rewards, token by token, and the critic foresees it, too.
    """
    last = own & (own.flip(1).cumsum(dim=1).flip(1) == 1)  # no token of the policy's own follows
    penalty = BETA * (log_probs - reference_log_probs)
    return torch.where(own, torch.where(last, rewards[:, None], 0.0) - penalty, 0.0)


def generalized_advantages(rewards: Tensor, values: Tensor, own: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """A_t, and the returns A_t + V(s_t), which the critic is to learn: [rows, time - 1].

    From the end backwards, A_t = delta_t + gamma * lambda * A_t+1. Nothing follows the last token, so V is 0 there,
    also where a completion was cut off.
    """
    advantages, following, next_value = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        following = torch.where(own[:, t], delta + GAMMA * lam * following, following)
        next_value = torch.where(own[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(own[:, t], following, 0.0)
    return advantages, torch.where(own, advantages + values, 0.0)


def whitened(advantages: Tensor, own: Tensor) -> Tensor:
    """The advantages of all tokens with mean 0 and deviation 1, so that one learning rate suits all rewards."""
    mean, deviation = advantages[own].mean(), advantages[own].std()
    return torch.where(own, (advantages - mean) / deviation, 0.0)


def token_mean(losses: Tensor, own: Tensor) -> Tensor:
    """The mean over all tokens that the policy wrote."""
    return torch.where(own, losses, 0.0).sum() / own.sum()


def policy_loss(policy: nn.Module, rows: list[Row], advantages: Tensor, old_log_probs: Tensor) -> Tensor:
    """Lesson 4's surrogate, with an advantage for each token."""
    log_probs, own = token_log_probs(policy, collate(rows))
    return token_mean(-clipped_surrogate(log_probs, old_log_probs, advantages), own)


def critic_loss(critic: nn.Module, rows: list[Row], old_values: Tensor, returns: Tensor) -> Tensor:
    """Half the squared error, or that of a value held within VALUE_CLIP of the old one, if larger.

    As the clipped ratio does for the policy, it leaves nothing to gain from moving far on one rollout.
    """
    values, own = values_of(critic, rows), collate(rows)["labels"][:, 1:] >= 0
    held = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return token_mean(0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2), own)


@torch.no_grad()
def judged(
    policy: nn.Module, critic: nn.Module, reference: nn.Module, rows: list[Row], rewards: Tensor
) -> dict[str, Tensor]:
    """What the steps on a rollout need of the models as they were when it was sampled: [rows, time - 1] each.

    The policy's advantages and the critic's returns come from the same rewards and values, with a lambda each: at 1 the
    critic learns what was truly earned, and not what it thought itself.
    """
    log_probs, own = token_log_probs(policy, collate(rows))
    values = torch.where(own, values_of(critic, rows), 0.0)
    earned = token_rewards(rewards, log_probs, token_log_probs(reference, collate(rows))[0], own)
    advantages, _ = generalized_advantages(earned, values, own, LAMBDA)
    _, returns = generalized_advantages(earned, values, own, CRITIC_LAMBDA)
    return {"log_probs": log_probs, "values": values, "advantages": whitened(advantages, own), "returns": returns}


def main() -> None:
    """Samples, judges, and takes two steps of critic and policy; eighty times."""
    torch.manual_seed(0)
    policy, critic = TinyLanguageModel(), TinyLanguageModel(outputs=1)
    nn.init.zeros_(critic.head.weight)  # before it has seen anything it expects nothing
    nn.init.zeros_(critic.head.bias)
    reference = copy.deepcopy(policy)
    models = [(critic, AdamW(critic.parameters(), lr=1e-2)), (policy, AdamW(policy.parameters(), lr=1e-2))]
    print("step   reward   all right   variance explained by the critic")
    for step in range(81):
        prompts = torch.randint(1, VOCABULARY - 3, (128, 1)).tolist()
        rows = sample(policy, prompts)
        rewards = torch.tensor([reward(*row) for row in rows])
        old = judged(policy, critic, reference, rows, rewards)
        for _ in range(2):
            losses = (
                critic_loss(critic, rows, old["values"], old["returns"]),
                policy_loss(policy, rows, old["advantages"], old["log_probs"]),
            )
            for (model, optimizer), loss in zip(models, losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                clip(model.parameters(), 1.0)
                optimizer.step()
        if step % 20 == 0:
            # 1: the critic knows what will be earned; 0: it knows no more than the mean.
            own = collate(rows)["labels"][:, 1:] >= 0
            explained = 1 - (old["returns"] - old["values"])[own].var() / old["returns"][own].var()
            print(f"{step:4}  {rewards.mean():7.2f}  {(rewards == 1).float().mean():10.0%}  {explained:33.2f}")


if __name__ == "__main__":
    main()
