"""ORPO: its loss row by row, both units of the likelihood, what is logged."""

import copy
import math

import pytest
import torch

from alignment_modules import ORPOModule
from tests.batches import pairs


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        options.setdefault("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
        return ORPOModule(policy=copy.deepcopy(tiny_llama), **options)

    return factory


def row_logps(model, batch, side, row):
    """Log-probabilities of a prompt's tokens but the first, and of one completion, by a plain pass over one row."""
    prompt, completion = (
        batch[f"{name}_input_ids"][row][batch[f"{name}_attention_mask"][row].bool()] for name in ("prompt", side)
    )
    ids = torch.cat([prompt, completion])
    logps = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[: len(prompt) - 1], logps[len(prompt) - 1 :]


def by_hand(model, batch, beta, on_prompt, unit):
    """The objective of a step, differentiable; and the likelihood's part."""
    nlls, tokens, ratios = [], [], []
    for row in range(len(batch["prompt_input_ids"])):
        (prompt, chosen), (_, rejected) = (row_logps(model, batch, side, row) for side in ("chosen", "rejected"))
        learnt = torch.cat([prompt, chosen]) if on_prompt else chosen
        nlls.append(-learnt.sum())
        tokens.append(len(learnt))
        p, q = chosen.mean().exp(), rejected.mean().exp()
        ratios.append(-torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))).log())
    if unit == "tokens":
        nll = sum(nlls) / sum(tokens)
    else:
        nll = sum(n / count for n, count in zip(nlls, tokens, strict=True)) / len(nlls)
    return nll + beta * sum(ratios) / len(ratios), nll, sum(ratios) / len(ratios)


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("unit", ["pairs", "tokens"])
def test_loss_and_gradient_are_the_papers(make, train, tiny_llama, on_prompt, unit):
    batch, model = pairs(range(5)), copy.deepcopy(tiny_llama)
    loss, nll, ratio = by_hand(model, batch, 0.3, on_prompt, unit)
    loss.backward()
    more = {"max_grad_norm": None} if unit == "tokens" else {}
    module = make(beta=0.3, nll_on_prompt=on_prompt, nll_unit=unit, **more)
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-5)
    assert float(metrics["train/nll_loss"]) == pytest.approx(float(nll), abs=1e-5)
    assert float(metrics["train/log_odds_ratio"]) == pytest.approx(-float(ratio), abs=1e-5)
    moved = dict(module.policy.named_parameters())
    for (name, parameter), old in zip(model.named_parameters(), tiny_llama.parameters(), strict=True):
        torch.testing.assert_close(moved[name], old - 0.1 * parameter.grad, rtol=0, atol=1e-5, msg=name)


def test_the_unit_of_the_likelihood_matters(make, train):
    """Long completions weigh more by tokens."""
    batch = pairs(range(5))
    losses = [float(train(make(nll_unit=u), [batch]).callback_metrics["train/nll_loss"]) for u in ("pairs", "tokens")]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_logged_loss_is_the_objective(make, train):
    """Over several micro-batches, as its two terms have units of their own."""
    batch = pairs(range(6))
    whole = train(make(nll_unit="tokens", beta=0.4), [batch]).callback_metrics
    cut = train(make(nll_unit="tokens", beta=0.4, micro_batch_size=2), [batch]).callback_metrics
    expected = float(whole["train/nll_loss"]) - 0.4 * float(whole["train/log_odds_ratio"])
    for metrics in (whole, cut):
        assert float(metrics["train/loss"]) == pytest.approx(expected, abs=1e-5)


def test_it_learns_both(make, train):
    metrics = train(make(optimizer=lambda groups: torch.optim.Adam(groups, lr=3e-3)), [pairs(range(6))] * 25)
    values = metrics.callback_metrics
    assert values["train/rewards/accuracies"] == 1
    assert values["train/log_odds_chosen"] > 1
    assert values["train/nll_loss"] < math.log(40) - 1


def test_metrics_are_those_of_the_field(make, train):
    metrics = train(make(), [pairs(range(4))]).callback_metrics
    names = {"nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected", "mean_token_accuracy"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert {f"train/{name}" for name in names} <= set(metrics)
    margin = float(metrics["train/rewards/chosen"]) - float(metrics["train/rewards/rejected"])
    assert float(metrics["train/rewards/margins"]) == pytest.approx(margin, abs=1e-6)


def test_options_of_its_own_steps_are_refused_where_the_trainer_steps(make, train):
    with pytest.raises(ValueError, match="micro_batch_size=2 is not allowed with this ORPOModule"):
        train(make(micro_batch_size=2), [pairs(range(4))])
    with pytest.raises(ValueError, match="beta=-1"):
        make(beta=-1)
    with pytest.raises(ValueError, match="nll_unit='words'"):
        make(nll_unit="words")
