"""GRPO with truncated sampling: what the filters kept is what old policy and policy are scored over."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from alignment_modules import GRPOModule, PPOModule
from alignment_modules.policies import LoraConfig
from alignment_modules.policies.lora import add_lora
from tests.batches import Digits, prompts, threes
from tests.models import Plain

FILTERS = [{"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9, "min_p": 0.02}, {"top_p": 0.999}]


def policy_of(kind, tiny_llama):
    if kind == "plain":
        torch.manual_seed(1)
        return Plain()
    policy = copy.deepcopy(tiny_llama)
    return add_lora(policy, LoraConfig(r=2)) if kind == "lora" else policy


@pytest.fixture
def make(tiny_llama):
    def factory(kind="llama", **options):
        defaults = {
            "policy": policy_of(kind, tiny_llama),
            "rewards": threes,
            "num_generations": 4,
            "max_completion_length": 6,
            "tokenizer": Digits(),
            "temperature": 1.3,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
        }
        return GRPOModule(**(defaults | options))

    return factory


def moved(module, scale=0.02):
    """The policy, a step away from the one that sampled."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def mean_ratio(module, rollout, **options):
    scored = module.score_rollout(rollout, **options)
    return float((scored - rollout.sampled_logps)[rollout.own].exp().mean())


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "lora", "plain"])
def test_the_mean_ratio_of_scoring_and_sampling_is_one(make, train, kind, filters):
    module = make(kind, **filters)
    metrics = train(module, [prompts(8)]).callback_metrics
    assert metrics["train/sampling/sampling_logp_difference/max"] < 1e-5
    module = make(kind, **filters)
    rollout = module.actor.roll_out(module.policy, prompts(8), step=0)
    assert mean_ratio(module, rollout) == pytest.approx(1.0, abs=1e-5)
    whole = mean_ratio(module, rollout, over_support=False)
    assert whole < (0.95 if filters == {"top_p": 0.8} else 1 + 1e-5)


def by_loops(module, rollout, kind):
    """Loss and gradients of the update, token by token, from plain forwards of one row."""
    total, kl, count = 0.0, 0.0, 0
    flat = rollout.support.take(torch.arange(rollout.ids.numel()))
    excluded = flat.excluded(slice(0, len(flat)), 40).view(*rollout.ids.shape, 40)

    def distributions(model, row):
        prompt = rollout.prompt_ids[row // rollout.group][rollout.prompt_mask[row // rollout.group]]
        output = model(torch.cat((prompt, rollout.ids[row][rollout.mask[row]]))[None])
        return getattr(output, "logits", output)[0, len(prompt) - 1 : -1] / 1.3

    for row in range(len(rollout.ids)):
        logits = distributions(module.policy, row)
        with torch.no_grad(), module.reference.reading() as model:
            reference = distributions(model, row).log_softmax(-1)
        tokens = rollout.ids[row][rollout.mask[row], None]
        torch.testing.assert_close(
            rollout.reference_logps[row][rollout.mask[row]],
            reference.gather(1, tokens)[:, 0].float(),
            atol=1e-6,
            rtol=0,
        )
        for time in rollout.trained[row].nonzero()[:, 0].tolist():
            token, out = rollout.ids[row, time], excluded[row, time]
            kept = logits[time].exp().masked_fill(out, 0.0)
            logp = (kept[token] / kept.sum()).log()
            ratio = (logp - rollout.old_logps[row, time]).exp()
            advantage = rollout.advantages[row]
            x = logits[time].log_softmax(-1)[token] - rollout.reference_logps[row, time]
            penalty = ((-x).exp() - 1 + x) * (ratio if kind == "k3+score" else 1.0)
            p = kept / kept.sum()
            entropy = -(p * p.clamp(min=1e-300).log()).sum()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.3 * penalty
            total, kl, count = total - 0.05 * entropy, kl + penalty.detach(), count + 1
    return total, kl, count


@pytest.mark.parametrize("estimator", ["k3", "k3+score"])
@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_the_loss_is_over_the_kept_set_and_the_kl_over_the_vocabulary(make, tiny_llama, kind, estimator):
    policy = policy_of(kind, tiny_llama).double()
    options = {"beta": 0.3, "kl_estimator": estimator, "entropy_coef": 0.05, "num_iterations": 2, "top_p": 0.8}
    module = make(policy=policy, **options)
    moved(module)  # away from the reference
    rollout = module.annotate(module.actor.roll_out(module.policy, prompts(), step=0))
    rollout = replace(rollout, advantages=torch.linspace(-1, 1, 16, dtype=torch.float64))
    assert (rollout.support.sizes[rollout.own] != 0).any()
    moved(module)  # away from the one that sampled
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    objective = module.objective(rollout)
    total, weight, statistics = objective.total, objective.weight, objective.statistics
    expected, kl, count = by_loops(module, rollout, estimator)
    assert int(weight) == count
    assert float(total) == pytest.approx(float(expected), rel=1e-9)
    assert float(statistics["kl"].total / statistics["kl"].weight) == pytest.approx(float(kl) / count, rel=1e-9)
    assert not torch.equal(*(module.score_rollout(one) for one in (rollout, replace(rollout, support=None))))
    for ours, theirs in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        # llama's norms and rotations are in float32 whatever the weights
        rtol, atol = (0, 1e-9) if kind == "plain" else (1e-6, 3e-6)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def penalty_of(module, rollout):
    """The annotated rollout, and what the KL takes from each token's reward."""
    seen = []
    module.credit = lambda rollout, penalty: seen.append(penalty) or rollout
    return module.annotate(rollout), seen[0]


@pytest.mark.parametrize("kind", ["llama", "lora"])
@pytest.mark.parametrize("placement", [{"kl_placement": "loss"}, {"kl_placement": "reward", "kl_estimator": "k1"}])
def test_a_policy_that_equals_its_reference_owes_no_divergence(make, train, kind, placement):
    module = make(kind, beta=0.1, top_p=0.8, top_k=5, num_iterations=2, **placement)
    rollout = module.actor.roll_out(module.policy, prompts(), step=0)
    if placement["kl_placement"] == "reward":
        assert not penalty_of(module, rollout)[1].any()
    else:
        statistics = module.objective(module.annotate(rollout)).statistics
        assert float(statistics["kl"].total) == 0.0


def test_the_kl_in_the_reward_is_over_the_vocabulary_and_the_ratio_over_the_kept_set(make):
    module = make(beta=0.5, kl_placement="reward", kl_estimator="k1", top_p=0.8, num_iterations=2)
    moved(module)
    rollout = module.actor.roll_out(module.policy, prompts(), step=0)
    annotated, penalty = penalty_of(module, rollout)
    full = module.score_rollout(replace(rollout, support=None))
    reference = module.score_rollout(replace(rollout, support=None), module.reference)
    torch.testing.assert_close(penalty, 0.5 * (full - reference).masked_fill(~rollout.own, 0.0))
    assert torch.equal(annotated.old_logps, rollout.sampled_logps)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_pieces_change_nothing(make, update, assert_same, size):
    """Two passes of two minibatches on what was sampled, cut into micro-batches or not."""
    options = {"top_p": 0.8, "beta": 0.1, "num_iterations": 2, "minibatches": 2, "max_grad_norm": None}

    def slower(optimizer, **more):
        return make(**options, **more, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-2))

    whole, cut = (update(partial(slower, **more), [prompts()]) for more in ({}, {"micro_batch_size": size}))
    assert_same(cut, whole)


def test_the_first_ratio_of_each_pass_counts_what_was_kept(make, train):
    """A second pass without a step between: the recorded log-probabilities are those of scoring."""
    still = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}
    metrics = train(make(top_p=0.8, num_iterations=2, **still), [prompts(8)]).callback_metrics
    assert float(metrics["train/importance_ratio/mean"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("critic", [None, "shared"])
def test_ppo_is_over_the_kept_set_too(train, tiny_llama, critic):
    """The first ratio is 1, and a policy that equals its reference owes nothing in the reward."""
    slow = {} if critic else {"critic_optimizer": lambda groups: torch.optim.SGD(groups, lr=1e-3)}
    module = PPOModule(
        policy=copy.deepcopy(tiny_llama),
        critic=critic,
        rewards=threes,
        tokenizer=Digits(),
        max_completion_length=6,
        temperature=1.3,
        top_p=0.8,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
        **slow,
    )
    metrics = train(module, [prompts(8)]).callback_metrics
    assert (module.rollout.support.sizes != 0).any()
    # a shared trunk is read for its values, too, in products of other shapes than the reference's
    assert abs(float(metrics["train/objective/kl"])) <= (1e-6 if critic else 0)
    assert float(metrics["train/val/ratio"]) == pytest.approx(1.0, abs=1e-5)
    assert mean_ratio(module, module.rollout) == pytest.approx(1.0, abs=1e-5)


def test_given_completions_are_scored_over_the_whole_vocabulary(make):
    ids = torch.randint(8, 40, (8, 5), generator=torch.Generator().manual_seed(0))
    batch = prompts(2) | {"responses": ids, "response_mask": torch.ones_like(ids), "rewards": torch.arange(8.0)}
    found = []
    for filters in ({}, {"top_p": 0.5}):
        module = make(**filters)
        rollout = module.actor.roll_out(module.policy, batch, step=0)
        assert rollout.support is None
        found.append(module.score_rollout(rollout))
    assert torch.equal(*found)


def test_an_engine_that_does_not_tell_what_it_kept_is_scored_over_the_whole_vocabulary(make, train):
    module = make(top_p=0.8, num_iterations=2)
    tells = module.actor.engine.generate

    def generate(*args, **options):
        told = tells(*args, **options)
        return replace(told, support=None, token_logps=torch.full_like(told.token_logps, torch.nan))

    module.actor.engine.generate = generate
    with pytest.warns(UserWarning, match=r"InProcessEngine does not tell what top_p=0.8, top_k=0, min_p=0 kept"):
        train(module, [prompts()])
    assert module.rollout.support is None
    torch.testing.assert_close(
        module.rollout.old_logps, make(top_p=0.8).score_rollout(module.rollout), rtol=0, atol=1e-5
    )
