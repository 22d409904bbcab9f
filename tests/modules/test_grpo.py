"""GRPO: manual optimization, ratios, sampling and what it refuses."""

import copy

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from alignment_modules import GRPOModule
from alignment_modules.functional import group_advantages
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.rollouts import codec
from alignment_modules.training.crediting import completion_advantages
from alignment_modules.training.schedules import LinearSchedule
from tests.batches import Digits, prompts, threes


def lengths_of(module):
    """Tokens of each completion of the last rollout; the stop token is not shown."""
    shown = [len(text.split()) for text in module.last_rollout["completion"]]
    return [count + (not cut) for count, cut in zip(shown, module.last_rollout["truncated"], strict=True)]


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "rewards": threes,
            "num_generations": 4,
            "max_completion_length": 6,
            "tokenizer": Digits(),
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
        }
        return GRPOModule(**(defaults | options))

    return factory


def test_sampled_log_probs_are_those_of_scoring_and_the_first_ratio_is_one(make, train):
    trainer = train(make(), [prompts()])
    metrics = trainer.callback_metrics
    assert metrics["train/sampling/sampling_logp_difference/mean"] < 1e-5
    assert metrics["train/clip_ratio/region_mean"] == 0


def test_first_loss_is_minus_the_mean_advantage_over_tokens(make, train):
    module = make(loss="dapo")
    trainer = train(module, [prompts()])
    lengths = torch.tensor(lengths_of(module))
    advantages = torch.tensor(module.last_rollout["advantage"])
    expected = -(advantages * lengths).sum() / lengths.sum()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected), abs=1e-6)


def test_attention_dropout_is_off_everywhere(make, train, tiny_llama):
    policy = copy.deepcopy(tiny_llama)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    metrics = train(make(policy=policy), [prompts()]).callback_metrics
    assert metrics["train/sampling/sampling_logp_difference/mean"] < 1e-5


@pytest.mark.parametrize(("iterations", "minibatches"), [(1, 1), (2, 2), (3, 1)])
def test_optimizer_steps_and_learning_rates(make, train, iterations, minibatches):
    rates = []

    class Spy(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = make(
        num_iterations=iterations,
        minibatches=minibatches,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )
    trainer = train(module, [prompts(), prompts(3)], callbacks=[Spy()])
    steps = 2 * iterations * minibatches
    assert trainer.global_step == steps
    assert rates == pytest.approx([0.1 / (1 + step) for step in range(steps)])


def test_a_schedule_gets_the_true_total(make, train):
    module = make(num_iterations=2, minibatches=2, lr_scheduler=lambda optimizer: LinearSchedule(optimizer))
    train(module, [prompts(), prompts(3)])
    assert module.lr_schedulers().total_steps == 8


def test_max_steps_is_exact(make, train):
    assert train(make(num_iterations=4), [prompts()] * 5, max_steps=10, max_epochs=-1).global_step == 10


@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_the_trainers_own_switches_are_refused_by_name(make, train, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        train(make(), [prompts()], **option)


def test_the_update_is_clipped_to_the_norm(make, train):
    module = make(max_grad_norm=1e-3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    train(module, [prompts()])
    change = torch.cat([(p.detach() - before[name]).flatten() for name, p in module.named_parameters()])
    assert float(change.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_reference_never_changes(make, train):
    module = make(beta=0.1)
    before = module.reference.fingerprint()
    train(module, [prompts()] * 3)
    assert module.reference.fingerprint() == before
    assert fingerprint(module.policy) != before
    assert not module.train().reference.training
    assert not any(key.startswith("reference") for key in module.state_dict())


def test_throughput_counts_prompts_once_and_every_completion(make, train):
    module = make()
    batch = prompts()
    metrics = train(module, [batch]).callback_metrics
    lengths = sum(lengths_of(module))
    counts = module.count_tokens(batch)
    assert int(counts["tokens"]) == 4 * 3 + lengths == metrics["train/num_tokens"]
    assert counts["samples"] == 16


def test_equal_rewards_leave_the_policy_alone(make, train):
    module = make(rewards=lambda completions: [0.3] * len(completions))
    before = fingerprint(module.policy)
    metrics = train(module, [prompts()]).callback_metrics
    assert fingerprint(module.policy) == before
    assert metrics["train/frac_reward_zero_std"] == 1


def test_kl_in_the_reward_lowers_it_by_the_divergence(make, train, tiny_llama):
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.2)
    options = {
        "beta": 0.5,
        "kl_estimator": "k1",
        "reference": reference,
        "rewards": lambda completions: [1.0] * len(completions),
    }
    metrics = train(make(kl_placement="reward", **options), [prompts()]).callback_metrics
    assert metrics["train/grad_norm"] > 0  # equal rewards, but for the divergence
    assert metrics["train/reward"] == 1
    assert metrics["train/reward_std"] == 0
    assert metrics["train/kl"].isfinite()
    with pytest.raises(ValueError, match="k1"):
        make(kl_placement="loss", **options)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_a_policy_that_equals_its_reference_owes_no_divergence(make, train, tiny_llama, mask_truncated, scale):
    """Also for completions that the loss leaves out: their group's mean has their rewards."""
    policy = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        policy.model.embed_tokens.weight[7] *= 4.0  # some completions end by themselves
    options = {"beta": 0.5, "kl_estimator": "k1", "kl_placement": "reward", "num_iterations": 2}
    module = make(
        policy=policy,
        rewards=lambda completions: [0.3] * len(completions),
        mask_truncated=mask_truncated,
        scale_rewards=scale,
        **options,
    )
    truncated = given(response_mask=(torch.arange(5) < 1 + torch.arange(12)[:, None] % 5).long())
    truncated["responses"] = truncated["responses"].clone()
    truncated["responses"][::2, 0] = 7
    truncated["rewards"] = torch.full((12,), 0.3)
    for batch in (prompts(), truncated):
        metrics = train(module, [batch], max_steps=module.optimizer_steps_per_batch).callback_metrics
        assert 0 < metrics["train/completions/clipped_ratio"] < 1
        assert module.last_rollout["advantage"] == [0.0] * len(module.last_rollout["id"])
        assert metrics["train/kl"] == 0


def test_a_whitened_advantage_spans_the_tokens_of_all_ranks(make, monkeypatch):
    module = make(scale_rewards="batch_tokens")
    own, other = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[5.0, 7.0]])
    lengths, others = torch.tensor([[3, 1], [2, 2]]), torch.tensor([[4, 6]])
    gathered = torch.stack([other.double(), others.double()], dim=-1)
    monkeypatch.setattr(module, "all_gather_ragged", lambda values: [gathered, values])
    monkeypatch.setattr(type(module), "global_rank", 1)
    both = group_advantages(torch.cat([other, own]), scale="batch_tokens", lengths=torch.cat([others, lengths]))
    torch.testing.assert_close(completion_advantages(module, module.estimator, own, lengths), both[1:])


def test_times_are_logged_with_their_step(make, train):
    metrics = train(make(minibatches=2), [prompts()]).callback_metrics
    assert metrics["train/time/rollout"] > 0
    assert metrics["train/time/update"] > 0


def test_a_column_called_rewards_is_a_column(make, train):
    def column(completions, rewards):
        return [float(value) for value in rewards]

    batch = {**prompts(), "rewards": [0.0, 1.0, 2.0, 3.0]}
    assert train(make(rewards=column), [batch]).callback_metrics["train/reward"] == 1.5


@pytest.mark.parametrize(
    ("brought", "named"),
    [
        ({"rewards": torch.zeros(16)}, "rewards without responses"),
        ({"old_logprobs": torch.zeros(16, 3)}, "old_logprobs without responses"),
        ({"responses": torch.ones(16, 3, dtype=torch.long)}, "responses without response_mask"),
    ],
)
def test_a_rollout_that_is_given_in_part_is_refused(make, train, brought, named):
    with pytest.raises(ValueError, match=named):
        train(make(), [prompts() | brought])


def test_prompts_without_an_index_are_seeded_differently_on_each_rank(monkeypatch):
    batch = {key: value for key, value in prompts().items() if key != "index"}
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(codec, "rank_and_world_size", lambda rank=rank: (rank, 2))
        ranks.append(codec.prompt_indices(batch))
    assert ranks == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_piece_without_rows_gives_a_connected_zero(make, train):
    module = make()
    pieces = []
    original = module.objective

    def spy(rollout):
        objective = original(rollout)
        empty = original(rollout.empty())
        pieces.append((objective, empty))
        return objective

    module.objective = spy
    train(module, [prompts()])
    ((objective, empty),) = pieces
    assert float(empty.total) == 0
    assert float(empty.weight) == 0
    assert empty.total.requires_grad
    assert empty.statistics.keys() == objective.statistics.keys()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"beta": -1.0}, "beta"),
        ({"loss": "gpro"}, "'gpro'"),
        ({"scale_rewards": "groups"}, "scale_rewards"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"reference": torch.nn.Linear(1, 1)}, "reference"),
        ({"reward_weights": [1.0, 2.0]}, "weights"),
    ],
)
def test_refuses(make, options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


def given(**changes):
    """Four prompts with three completions each; the second group's rewards are equal."""
    generator = torch.Generator().manual_seed(1)
    responses = torch.randint(8, 40, (12, 5), generator=generator)
    rewards = torch.rand(12, generator=generator)
    rewards[3:6] = 1.0
    batch = {**prompts(), "responses": responses, "response_mask": torch.ones_like(responses), "rewards": rewards}
    return batch | changes


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "32-true"])
def test_a_group_of_equal_rewards_in_any_precision(make, train, precision):
    for batch in (given(), prompts()):
        metrics = train(make(), [batch], precision=precision).callback_metrics
        assert metrics["train/grad_norm"].isfinite()
    if precision == "bf16-true":
        with pytest.raises(ValueError, match=r"old_logprobs is torch\.bfloat16"):
            train(make(), [given(old_logprobs=torch.zeros(12, 5))], precision=precision)


def test_minibatches_never_step_on_nothing(make, train):
    with pytest.raises(ValueError, match="minibatches=5 is more than the 4 prompts"):
        train(make(minibatches=5), [prompts()])
    assert train(make(minibatches=4), [prompts(), prompts(2)]).global_step == 6


def test_a_rollout_without_a_scored_token_moves_nothing(make, train):
    module = make(optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1))
    train(module, [given()])
    before = fingerprint(module.policy)
    empty = given(response_mask=torch.zeros(12, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="nothing to learn in epoch 0"), pytest.warns(UserWarning, match="is skipped"):
        train(module, [empty])
    assert module.trainer.callback_metrics["train/steps_without_targets"] == 1
    assert fingerprint(module.policy) == before


def test_rewards_that_do_not_apply_are_left_out_of_the_means(make, train):
    rewards = torch.tensor([0.0, 1.0, torch.nan] * 4)
    metrics = train(make(), [given(rewards=rewards)]).callback_metrics
    assert metrics["train/reward"] == 0.5
    assert metrics["train/reward_std"] == pytest.approx(0.5**0.5)


def test_padding_of_given_log_probs_may_be_anything(make, update, assert_same, tiny_llama):
    mask = torch.ones(12, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    old = torch.full((12, 5), -3.0)
    options = {"beta": 0.2, "kl_estimator": "k1", "kl_placement": "reward", "reference": copy.deepcopy(tiny_llama)}
    updates = []
    for filler in (5.0, torch.nan):
        logps = torch.where(mask.bool(), old, filler)
        batch = given(response_mask=mask, old_logprobs=logps)
        updates.append(update(lambda **keywords: make(**{**options, **keywords}), [batch]))
    assert_same(*updates)


def test_the_first_token_after_an_empty_prompt_is_not_counted(make, train):
    batch = given()
    batch["prompt_attention_mask"] = batch["prompt_attention_mask"].clone()
    batch["prompt_attention_mask"][0] = 0
    weights = []
    module = make()
    original = module.objective
    module.objective = lambda rollout: (lambda found: (weights.append(float(found.weight)), found)[1])(
        original(rollout)
    )
    train(module, [batch])
    assert weights == [12 * 5 - 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rewards": torch.zeros(5)}, r"rewards has shape \(5,\)"),
        ({"old_logprobs": torch.zeros(12, 4)}, r"old_logprobs has shape \(12, 4\)"),
        ({"response_mask": torch.ones(12, 4)}, r"response_mask has shape \(12, 4\)"),
    ],
)
def test_shapes_of_a_given_rollout(make, train, change, named):
    with pytest.raises(ValueError, match=named):
        train(make(), [given(**change)])


def test_a_schedule_that_waits_for_a_metric_is_refused(make, train):
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        train(make(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau), [prompts()])


def test_the_spread_of_rewards_does_not_depend_on_the_batch_size(make):
    rows = prompts(4)
    found = []
    for size in (1, 2, 4):
        batches = [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, 4, size)]
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        found.append(trainer.validate(make(), loader, verbose=False)[0]["val/rewards/threes/std"])
    assert found == pytest.approx([found[0]] * 3)
