"""What the contract promises of completions holds of episodes: cuts, order, scoring, masks and ranks change nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F

from alignment_modules.rewards import RewardError
from tests.episodes import OPTIONS, batch, build, policy
from tests.models import critic_beside, other_than

ALL = tuple(range(8))
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "grpo" else pytest.mark.slow) for name in OPTIONS]
)


@pytest.fixture(scope="module")
def start():
    return policy()


@pytest.fixture
def make(start):
    """`make(name, **options)`: builds that paradigm's module, each time on a fresh copy of the policy."""
    return lambda name, **options: lambda **more: build(name, start, **(options | more))


@pytest.fixture
def played(start, train):
    """`played(name, **options)`: a module after a step of rate 0, its rollout and what was logged."""

    def play(name, rows=ALL, **options):
        module = build(name, start, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), **options)
        metrics = train(module, [batch(rows)]).callback_metrics
        return module, module.rollout, metrics

    return play


def forward(model, rollout):
    """Log-probabilities [N, T] of all completion tokens, from one padded pass over whole contexts, in float32."""
    prompts = rollout.prompt_mask.sum(dim=1).repeat_interleave(rollout.group).tolist()
    ids = rollout.prompt_ids.repeat_interleave(rollout.group, dim=0)
    masks = rollout.prompt_mask.repeat_interleave(rollout.group, dim=0)
    rows = [torch.cat([ids[n][masks[n]], rollout.ids[n][rollout.mask[n]]]) for n in range(len(ids))]
    width = max(map(len, rows))
    whole = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (0, width - len(row))) for row in rows])
    if hasattr(model, "score"):  # a critic, which tells one number a token
        output = model.score(model.model(whole, attention_mask=mask).last_hidden_state)
    else:
        output = model(whole, attention_mask=mask).logits
    found = []
    for n, start in enumerate(prompts):
        length = len(rows[n]) - start
        if output.shape[-1] == 1:  # what a token is worth is read before it is written
            told = output[n, start - 1 : start - 1 + length, 0]
        else:
            logps = output[n, start - 1 : start - 1 + length].log_softmax(dim=-1)
            told = logps.gather(1, rows[n][start:, None])[:, 0]
        found.append(F.pad(told, (0, rollout.ids.shape[1] - length)))
    return torch.stack(found)


def same_where(mask, found, expected):
    torch.testing.assert_close(found[mask], expected.detach()[mask], rtol=1e-5, atol=1e-5)


@EVERY
def test_episodes_differ_in_their_turns(played, name):
    """Else the others below would show nothing."""
    module, rollout, _ = played(name)
    episodes = module.actor.seen.episodes
    assert {1, 2, 4} <= {episode.turns for episode in episodes}
    assert {"answer", "max_turns"} <= {episode.stop_reason for episode in episodes}
    assert (rollout.mask & ~rollout.own).any(dim=1).sum() > len(episodes) / 4
    assert len(set(rollout.rewards.tolist())) > 2


@EVERY
@pytest.mark.parametrize("size", [2, 3, 7])
def test_split(make, update, assert_same, name, size):
    whole = update(make(name), [batch(ALL)])
    assert_same(whole, update(make(name, micro_batch_size=size), [batch(ALL)]))


@EVERY
def test_split_of_later_steps(make, update, assert_same, name):
    """Two passes over two parts: the policy is no longer the old one."""

    def several(**options):
        options["optimizer"] = lambda groups: torch.optim.SGD(groups, lr=0.01)
        if name.startswith("ppo"):
            options["critic_optimizer"] = options["optimizer"]
        return make(name, minibatches=2, num_iterations=2)(**options)

    whole = update(several, [batch(ALL)])
    assert_same(whole, update(lambda **more: several(micro_batch_size=3, **more), [batch(ALL)]))


@EVERY
def test_order(make, update, assert_same, name):
    whole = update(make(name), [batch(ALL)])
    assert_same(whole, update(make(name), [batch((5, 1, 7, 0, 2, 6, 3, 4))]))


@EVERY
def test_a_row_whose_environment_fails_adds_nothing(make, update, assert_same, name):
    without = update(make(name), [batch(ALL[:7])])
    with pytest.warns(UserWarning, match=r"episodes are not judged.*get_reward: RuntimeError: no reward"):
        assert_same(without, update(make(name), [batch(ALL, fails=[False] * 7 + [True])]))


@EVERY
def test_a_step_whose_environments_all_fail_ends_the_run(make, update, name):
    """As one does whose rewards apply to nothing; before it is told what failed."""
    with (
        pytest.warns(UserWarning, match=r"of \d+ episodes are not judged.*get_reward: RuntimeError: no reward"),
        pytest.raises(RewardError, match="optimizer step 1 has nothing to learn from: 'environment' gave None or NaN"),
    ):
        update(make(name), [batch(ALL, fails=[True] * 8)])


@EVERY
def test_scores_are_those_of_one_padded_pass_over_the_whole_context(played, start, name):
    critic = critic_beside(other_than(start))
    more = {"critic": copy.deepcopy(critic)} if name.startswith("ppo") else {}
    _, rollout, _ = played(name, num_iterations=2, **more)
    logps = forward(start, rollout)
    same_where(rollout.own, rollout.sampled_logps, logps)
    if rollout.reference_logps is not None:
        same_where(rollout.own, rollout.reference_logps, forward(other_than(start), rollout))
    if name != "online_dpo":  # which has no old policy
        same_where(rollout.own, rollout.old_logps, logps)
    assert (rollout.values is not None) == name.startswith("ppo")
    if rollout.values is not None:
        same_where(rollout.own, rollout.values, forward(critic, rollout))


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("grpo", "train/importance_ratio/mean"),
        pytest.param("rloo", "train/importance_ratio/mean", marks=pytest.mark.slow),
        pytest.param("ppo", "train/val/ratio", marks=pytest.mark.slow),
        ("ppo turns", "train/val/ratio"),
    ],
)
def test_the_first_ratio_is_exactly_one(played, name, metric):
    _, _, metrics = played(name)
    assert float(metrics[metric]) == 1.0


def test_the_first_loss_of_online_dpo_is_exactly_that_of_no_difference(played):
    _, _, metrics = played("online_dpo", reference=None)
    assert float(metrics["train/loss"]) == float(torch.tensor(2.0).log())


def test_the_gradient_is_that_of_the_policys_tokens_alone(start, make, update, assert_same):
    """REINFORCE written out over one padded pass: tools' tokens are read, and nothing else."""
    made = []

    def factory(**more):
        made.append(make("grpo", beta=0.0, reference=None)(**more))
        return made[-1]

    found = update(factory, [batch(ALL)])
    rollout, model = made[0].rollout, made[0].policy
    model.load_state_dict(start.state_dict())
    model.zero_grad()
    trained = rollout.trained
    tools = (rollout.mask & ~trained).sum(dim=1).tolist()
    assert tools == [episode.tool_tokens for episode in made[0].actor.seen.episodes]
    loss = -(rollout.advantages.view(-1, 1) * forward(model, rollout))[trained].sum() / trained.sum()
    loss.backward()
    assert_same(found, {f"policy.{key}": -p.grad for key, p in model.named_parameters()})
