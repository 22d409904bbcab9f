"""GRPO's baselines beyond the group's mean: each rollout's advantages by loops from the papers."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from tests.batches import Digits, never_called, rollouts, rollouts_of_two_rewards


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama).double(),
            "rewards": never_called,
            "num_generations": 4,
            "max_completion_length": 8,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0),
        }
        return GRPOModule(**(defaults | options))

    return factory


def reference_of(policy):
    other = copy.deepcopy(policy).double()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.2)
    return other


def distributions(policy, batch):
    """Log-probabilities of all tokens, [time, vocab] for each completion, from whole contexts."""
    found = []
    group = len(batch["responses"]) // len(batch["prompts"])
    for number, (ids, mask) in enumerate(zip(batch["responses"], batch["response_mask"], strict=True)):
        prompt = batch["prompts"][number // group][batch["prompt_attention_mask"][number // group].bool()]
        context = torch.cat([prompt, ids[mask.bool()]])
        logps = policy(context[None]).logits[0].double().log_softmax(-1)
        found.append(logps[len(prompt) - 1 : -1].detach())
    return found


def chosen(logps, batch):
    """Of each completion's own tokens, lists."""
    rows = zip(logps, batch["responses"], batch["response_mask"], strict=True)
    return [table.gather(1, ids[mask.bool()][:, None])[:, 0].tolist() for table, ids, mask in rows]


def to_go(rewards, costs):
    """Each completion's reward less the costs from each of its tokens on."""
    return [[r - sum(own[t:]) for t in range(len(own))] for r, own in zip(rewards, costs, strict=True)]


def assert_advantages(module, expected):
    found, mask = module.rollout.advantages, module.rollout.own
    assert found.dtype == torch.float32
    for row, values in enumerate(expected):
        assert found[row][mask[row]].tolist() == pytest.approx(values, abs=1e-5)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize(("baseline", "scale"), [("none", "batch_tokens"), ("greedy", "none"), ("none", "none")])
def test_a_penalty_in_the_reward_counts_from_each_token_on(make, train, tiny_llama, baseline, scale):
    """REINFORCE++ and ReMax: the return to go of -beta k1 and the reward at the last token."""
    batch = {key: value for key, value in rollouts(range(4)).items() if key != "old_logprobs"}
    reference = reference_of(tiny_llama)
    own, other = (
        chosen(distributions(policy, batch), batch) for policy in (copy.deepcopy(tiny_llama).double(), reference)
    )
    costs = [[0.3 * (a - b) for a, b in zip(*rows, strict=True)] for rows in zip(own, other, strict=True)]
    rewards = batch["rewards"].tolist()
    if baseline == "greedy":
        rewards = [r - batch["greedy_rewards"][row // 4].item() for row, r in enumerate(rewards)]
    expected = to_go(rewards, costs)
    if scale == "batch_tokens":
        tokens = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
        expected = [[((x - tokens.mean()) / tokens.std()).item() for x in row] for row in expected]
    options = {"beta": 0.3, "kl_estimator": "k1", "kl_placement": "reward", "reference": reference}
    module = make(baseline=baseline, scale_rewards=scale, **options)
    train(module, [batch])
    assert_advantages(module, expected)


def test_reinforce_pp_without_a_penalty_whitens_the_rewards_over_tokens(make, train):
    batch = rollouts(range(4))
    batch["rewards"][5] = torch.nan
    module = make(baseline="none", scale_rewards="batch_tokens")
    train(module, [batch])
    lengths = batch["response_mask"].sum(dim=1)
    judged = ~batch["rewards"].isnan()
    tokens = batch["rewards"].double()[judged].repeat_interleave(lengths[judged])
    expected = torch.where(judged, (batch["rewards"] - tokens.mean()) / tokens.std(), 0.0).float()
    torch.testing.assert_close(module.rollout.advantages, expected)
    assert module.rollout.trained.any(dim=1).tolist() == judged.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"scale_rewards": "batch_tokens"}, {"num_iterations": 2, "micro_batch_size": 3}]
)
@pytest.mark.parametrize("penalised", [False, True])
def test_optimal_token_baseline_by_loops(make, train, tiny_llama, options, penalised):
    batch = {key: value for key, value in rollouts(range(3)).items() if key != "old_logprobs"}
    batch["rewards"][2] = torch.nan
    reference, policy = reference_of(tiny_llama), copy.deepcopy(tiny_llama).double()
    tables = distributions(policy, batch)
    own, other = chosen(tables, batch), chosen(distributions(reference, batch), batch)
    squares = [(2 * table).exp().sum(dim=1).tolist() for table in tables]
    share = 0.3 if penalised else 0.0
    costs = [[share * (a - b) for a, b in zip(*rows, strict=True)] for rows in zip(own, other, strict=True)]
    returns = to_go(batch["rewards"].tolist(), costs)
    expected = [[0.0] * len(row) for row in returns]
    for first in range(0, 12, 4):
        members = [row for row in range(first, first + 4) if row != 2]
        for t in range(max(len(returns[row]) for row in members)):
            alive = [row for row in members if len(returns[row]) > t]
            norms = {
                i: sum(1 - 2 * torch.tensor(own[i][s]).exp().item() + squares[i][s] for s in range(t + 1))
                for i in alive
            }
            mean = sum(norms[i] * returns[i][t] for i in alive) / sum(norms.values()) if len(alive) > 1 else 0.0
            for i in alive:
                expected[i][t] = returns[i][t] - mean
    if "scale_rewards" in options:
        tokens = torch.tensor([x for i, row in enumerate(expected) for x in row if i != 2], dtype=torch.float64)
        expected = [
            [((x - tokens.mean()) / tokens.std()).item() * (i != 2) for x in row] for i, row in enumerate(expected)
        ]
    if penalised:
        options = options | {"beta": 0.3, "kl_estimator": "k1", "kl_placement": "reward", "reference": reference}
    module = make(baseline="optimal_token", **options)
    metrics = train(module, [batch]).callback_metrics
    assert_advantages(module, expected)
    assert metrics["train/importance_ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert not module.rollout.trained[2].any()


def test_gdpo_by_loops(make, train):
    batch = rollouts_of_two_rewards(range(4))
    batch["rewards"][3] = torch.nan
    module = make(
        multi_objective_aggregation="normalize_then_sum", rewards=[never_called] * 2, reward_weights=[0.5, 2.0]
    )
    train(module, [batch])
    sums = torch.zeros(16, dtype=torch.float64)
    for column, weight in enumerate((0.5, 2.0)):
        for first in range(0, 16, 4):
            rows = [row for row in range(first, first + 4) if not batch["rewards"][row, column].isnan()]
            values = batch["rewards"][rows, column].double()
            if values.max() - values.min() > 1e-6:
                sums[rows] += weight * (values - values.mean()) / values.std()
    judged = ~batch["rewards"].isnan().all(dim=1)
    expected = torch.where(judged, sums / sums[judged].std(), 0.0).float()
    torch.testing.assert_close(module.rollout.advantages, expected)
    assert module.rollout.trained.any(dim=1).tolist() == judged.tolist()


def test_remax_makes_and_judges_one_greedy_completion_a_prompt(make, train):
    seen = []

    def threes(completions):
        seen.append(list(completions))
        return [float(text.count("3")) for text in completions]

    ids = torch.randint(1, 40, (4, 3), generator=torch.Generator().manual_seed(4))
    batch = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(4))}
    module = make(rewards=threes, tokenizer=Digits(), baseline="greedy", num_generations=1)
    metrics = train(module, [batch]).callback_metrics
    sampled, greedy = seen
    assert len(sampled) == len(greedy) == 4
    alone = module.actor.complete(module.policy, batch, 0, greedy=True)  # the learning rate is 0
    texts = Digits().batch_decode([row[kept].tolist() for row, kept in zip(alone.ids, alone.mask, strict=True)])
    assert [text.split() for text in greedy] == [text.removesuffix(" 7").split() for text in texts]
    scores = [torch.tensor([float(text.count("3")) for text in column]) for column in (sampled, greedy)]
    torch.testing.assert_close(module.rollout.advantages, scores[0] - scores[1])
    assert metrics["train/greedy/reward"] == scores[1].mean()
    assert metrics["train/greedy/mean_length"] == alone.mask.sum() / 4
    counted = ids.numel() + module.rollout.mask.sum() + alone.mask.sum()
    assert metrics["train/num_tokens"] == counted
    assert "train/frac_reward_zero_std" not in metrics


def test_a_prompt_whose_greedy_completion_nobody_judged_is_left_out(make, train):
    batch = rollouts(range(4))
    batch["greedy_rewards"][1] = torch.nan
    module = make(baseline="greedy")
    train(module, [batch])
    assert module.rollout.trained.view(4, -1).any(dim=1).tolist() == [True, False, True, True]
    assert (module.rollout.advantages[4:8] == 0).all()


def test_one_given_completion_a_prompt_where_none_is_compared(make, train):
    batch = rollouts(range(8), group=1)
    metrics = train(make(baseline="none", num_generations=1), [batch]).callback_metrics
    assert metrics["train/reward"] == batch["rewards"].mean()
    with pytest.raises(ValueError, match=r"responses has 8 rows for 8 prompts: GRPOModule compares .* at least 2"):
        train(make(), [batch])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "baseline must be one of 'group'"),
        ({"baseline": "greedy", "scale_rewards": "group"}, "scale_rewards='group' does not go with baseline='greedy'"),
        (
            {"num_generations": 1, "baseline": "pass_at_k"},
            "num_generations=1 must be at least 2: with baseline='pass_at_k'",
        ),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "needs two or more rewards, got never_called"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "rewards": [never_called] * 2}
            | {"beta": 0.1, "kl_estimator": "k1", "kl_placement": "reward"},
            "beta=0.1 is taken from the sum of the rewards",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "rewards": [never_called] * 2}
            | {"missing_eos_penalty": 1.0},
            "missing_eos_penalty=1.0 is taken from the sum",
        ),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"baseline": "greedy"}, {"greedy_rewards": torch.zeros(3)}, r"greedy_rewards has shape \(3,\); for 4 prompts"),
        ({"baseline": "greedy"}, {"greedy_rewards": None}, "tokenizer"),
        ({}, {"rewards": torch.zeros(16, 2)}, r"rewards has shape \(16, 2\): .* must have 1, for never_called"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "rewards": [never_called] * 2},
            {},
            r"the batch's rewards must be \[completions, 2\], got shape \(16,\)",
        ),
    ],
)
def test_given_rewards_that_do_not_fit(make, train, options, change, message):
    with pytest.raises(ValueError, match=message):
        train(make(**options), [rollouts(range(4)) | change])
