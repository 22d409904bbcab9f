"""Online DPO: its pairs, loss and metrics against a loop over prompts in float64, and what is refused."""

import copy
import math

import lightning as L
import pytest
import torch

from alignment_modules import OnlineDPOModule
from alignment_modules.functional import preference_loss
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.segments import Segments
from alignment_modules.training.pairs import best_and_worst
from tests.batches import rollouts
from tests.contract.two_ranks import NoTokenizer, many_threes
from tests.models import adapted, other_than
from tests.paradigms import never_called

nan = float("nan")


@pytest.fixture
def make(tiny_llama):
    def factory(policy=None, **options):
        defaults = {"rewards": never_called, "max_completion_length": 8, "max_grad_norm": None, "beta": 0.5}
        defaults["optimizer"] = lambda groups: torch.optim.SGD(groups, lr=0.1)
        return OnlineDPOModule(policy=copy.deepcopy(policy or tiny_llama), **(defaults | options))

    return factory


def judged(rewards, group=4):
    """Given completions with these rewards."""
    return rollouts(range(len(rewards) // group), group=group) | {"rewards": torch.tensor(rewards)}


REWARDS = [0.0, 1.0, 0.5, 0.2, 1.0, 1.0, 1.0, 1.0, nan, 3.0, nan, nan, nan, 2.0, 1.0, nan, 0.1, 0.1 + 1e-7, 0.1, 0.1]
PAIRS = {0: (1, 0), 3: (1, 2)}  # of five prompts; two are ties, of one a single completion is judged


def logps_by_hand(model, batch, row, group, temperature):
    """Log-probability of one completion, token by token in float64."""
    prompt = batch["prompts"][row // group][batch["prompt_attention_mask"][row // group].bool()]
    completion = batch["responses"][row][batch["response_mask"][row].bool()]
    logits = model(torch.cat([prompt, completion])[None]).logits[0].double() / temperature
    return sum(logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(completion.tolist())), len(
        completion
    )


def by_hand(policy, reference, batch, pairs, *, group=4, temperature=1.0, **options):
    """The mean loss of some pairs, and the log-ratios of each, chosen first."""
    losses, ratios = [], []
    for prompt, places in pairs.items():
        sides = []
        for place in places:
            row = group * prompt + place
            (ours, length), (theirs, _) = (
                logps_by_hand(model, batch, row, group, temperature) for model in (policy, reference)
            )
            sides.append((ours, theirs.detach(), length))
        ratios.append([float(ours - theirs) for ours, theirs, _ in sides])
        h = [(ours - theirs) / (length if options.get("ipo_logps") == "mean" else 1) for ours, theirs, length in sides]
        beta, difference = options["beta"], h[0] - h[1]
        losses.append(
            {
                "sigmoid": -torch.nn.functional.logsigmoid(beta * difference),
                "ipo": (difference - 1 / (2 * beta)) ** 2,
                "hinge": torch.relu(1 - beta * difference),
            }[options["loss"]]
        )
    return sum(losses) / len(losses), torch.tensor(ratios)


@pytest.mark.parametrize("options", [
    {"loss": "sigmoid", "beta": 0.5},
    {"loss": "sigmoid", "beta": 0.2, "temperature": 0.6},
    {"loss": "ipo", "beta": 0.5, "ipo_logps": "mean"},
    {"loss": "ipo", "beta": 0.1, "ipo_logps": "sum"},
    {"loss": "hinge", "beta": 2.0},
], ids=str)  # fmt: skip
def test_loss_and_gradient_are_those_of_a_loop_over_pairs(make, train, tiny_llama, options):
    batch, reference, model = judged(REWARDS), other_than(tiny_llama), copy.deepcopy(tiny_llama)
    loss, ratios = by_hand(model, reference, batch, PAIRS, **options)
    loss.backward()
    module = make(reference=copy.deepcopy(reference), **options)
    metrics = {name: float(value) for name, value in train(module, [batch]).callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["train/objective/kl"] == pytest.approx(float(ratios.mean()), abs=1e-5)
    if options["loss"] != "ipo":
        margins = options["beta"] * (ratios[:, 0] - ratios[:, 1])
        assert metrics["train/rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
        assert metrics["train/rewards/accuracies"] == float((margins > 0).float().mean())
    for (name, before), after in zip(model.named_parameters(), module.policy.parameters(), strict=True):
        change = 0.1 * before.grad
        close = 2e-6 + 1e-5 * float(change.abs().max())  # a float32 forward pass beside one in float64
        torch.testing.assert_close(after, before - change, rtol=0, atol=close, msg=name)


def test_what_is_logged_of_the_rewards(make, train, tiny_llama):
    module = make(reference=other_than(tiny_llama))
    metrics = {name: float(value) for name, value in train(module, [judged(REWARDS)]).callback_metrics.items()}
    rewards = torch.tensor(REWARDS)
    assert metrics["train/objective/scores"] == pytest.approx(float(rewards.nanmean()))
    assert metrics["train/ties"] == 2 / 4
    assert metrics["train/objective/scores_margin"] == pytest.approx((1.0 + 0.0 + 1.0 + 0.0) / 4)
    kl = metrics["train/objective/kl"]
    assert metrics["train/objective/non_score_reward"] == pytest.approx(-0.5 * kl, abs=1e-6)
    of_pairs = (1.0 + 0.0 + 2.0 + 1.0) / 4  # the rewards of the completions that make the two pairs
    assert metrics["train/objective/rlhf_reward"] == pytest.approx(of_pairs - 0.5 * kl, abs=1e-6)
    chosen, rejected = metrics["train/logps/chosen"], metrics["train/logps/rejected"]
    assert metrics["train/objective/entropy"] == pytest.approx(-(chosen + rejected) / 2, abs=1e-5)


def test_the_best_is_held_against_the_worst():
    rewards = torch.tensor([[0.2, 0.9, 0.9, -1.0], [nan, 3.0, 2.0, nan], [nan, 3.0, nan, nan], [nan, nan, nan, nan]])
    places, differ = best_and_worst(rewards)
    assert places[:2].tolist() == [[1, 3], [1, 2]]
    assert differ.tolist() == [True, True, False, False]
    close = torch.tensor([[0.5, 0.5 + 5e-7], [0.5, 0.5 + 5e-6]], dtype=torch.float64)
    assert best_and_worst(close)[1].tolist() == [False, True]


def test_prompts_without_a_pair_might_as_well_not_be_there(make, update, assert_same, monkeypatch):
    whole = judged(REWARDS)
    kept = torch.tensor([number // 4 in PAIRS for number in range(20)])
    few = {name: value[kept] if len(value) == 20 else value[[0, 3]] for name, value in whole.items()}
    assert_same(update(make, [whole]), update(make, [few]))
    read, plain = [], Segments.from_prompts

    def counted(*tensors, **options):
        read.append(plain(*tensors, **options))
        return read[-1]

    monkeypatch.setattr(Segments, "from_prompts", counted)
    for batch in (whole, few):
        update(make, [batch])
    assert [segments.tokens for segments in read[:2]] == [segments.tokens for segments in read[2:]]


def test_a_step_of_ties_moves_nothing_and_is_no_error(make, train):
    module = make()
    before = fingerprint(module.policy)
    metrics = train(module, [judged([1.0, 1.0] * 4)]).callback_metrics
    assert module.trainer.global_step == metrics["train/steps_without_targets"] == 1
    assert metrics["train/ties"] == 1
    assert fingerprint(module.policy) == before
    with pytest.raises(ValueError, match="nothing to learn in epoch 0"):
        train(make(), [judged([1.0, nan, nan, nan] * 4)])


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "min_p": 0.02}], ids=["all", "kept"])
@pytest.mark.parametrize("policy", [lambda policy: policy, adapted], ids=["whole", "lora"])
def test_the_first_loss_is_ln_2_of_what_it_samples(make, train, tiny_llama, policy, filters):
    batch = {key: value for key, value in rollouts(range(6)).items() if key.startswith("prompt")}
    batch |= {"index": list(range(6))}
    module = make(policy(tiny_llama), rewards=many_threes, tokenizer=NoTokenizer(), temperature=1.3, **filters)
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/loss"]) == float(torch.tensor(2.0).log())
    assert metrics["train/objective/kl"] == metrics["train/rewards/margins"] == 0
    assert metrics["train/sampling/sampling_logp_difference/max"] < 1e-5
    assert module.rollout.group == 2
    rewards = module.rollout.rewards.view(-1, 2)
    assert metrics["train/ties"] == ((rewards[:, 0] - rewards[:, 1]).abs() < 1e-6).float().mean()


def test_passes_and_minibatches_go_on_with_the_same_pairs(make, train, tiny_llama):
    reference = other_than(tiny_llama)
    batch = judged([0.0, 1.0] * 8, group=2)
    pairs = {prompt: (1, 0) for prompt in range(8)}
    model, options = copy.deepcopy(tiny_llama), {"loss": "sigmoid", "beta": 0.5}
    for _ in range(3):
        loss, _ = by_hand(model, reference, batch, pairs, group=2, **options)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    module = make(reference=reference, num_iterations=3, **options)
    trainer = train(module, [batch])
    assert trainer.global_step == 3
    for ours, theirs in zip(module.policy.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert train(make(num_iterations=2, minibatches=4), [batch]).global_step == 8


@pytest.mark.parametrize(("options", "message"), [
    ({"micro_batch_size": 1}, "micro_batch_size=1 must be at least 2"),
    ({"num_generations": 1}, "num_generations=1 must be an integer of 2 or more"),
    ({"loss": "kto_pair"}, "loss='kto_pair' must be 'sigmoid' or"),
    ({"ipo_logps": "sum"}, "ipo_logps must be 'mean' for loss='sigmoid'"),
    ({"beta": 0.0}, "beta=0.0 must be"),
])  # fmt: skip
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_says_what_it_does(make):
    said = make(loss="ipo", ipo_logps="sum", num_generations=4, minibatches=2).describe()
    assert said["loss"] == "ipo of sums over tokens, beta 0.5"
    assert "best and the worst of 4" in said["pairs"]
    assert said["updates"].startswith("2 a rollout")


def test_loss_is_that_of_the_function(make, tiny_llama):
    """Without a Trainer, a piece of a rollout gives what `preference_loss` makes of it."""
    module = make(reference=other_than(tiny_llama))
    L.seed_everything(0)
    pairs = module.pair(module.actor.roll_out(module.policy, judged([0.0, 1.0] * 4, group=2), step=0))
    objective = module.objective(pairs)
    logps = module.score_rollout(pairs).double().sum(dim=1).view(-1, 2)
    theirs = pairs.reference_logps.double().sum(dim=1).view(-1, 2)
    expected = preference_loss(*logps.unbind(1), *theirs.unbind(1), beta=0.5).sum()
    assert float(objective.total) == pytest.approx(float(expected), abs=1e-6)
    assert float(objective.weight) == 4
    assert math.isfinite(float(expected))
