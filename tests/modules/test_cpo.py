"""CPO and SimPO: their losses row by row, defaults of each, what is logged."""

import copy

import pytest
import torch
import torch.nn.functional as F

from alignment_modules import CPOModule
from tests.batches import pairs
from tests.modules.test_orpo import row_logps


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        options.setdefault("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
        return CPOModule(policy=copy.deepcopy(tiny_llama), **options)

    return factory


def sides(model, batch):
    """Chosen and rejected log-probabilities, summed and averaged, by row: [pairs, 2] each."""
    found = [[row_logps(model, batch, side, row)[1] for side in ("chosen", "rejected")] for row in range(5)]
    return tuple(torch.stack([torch.stack([how(x) for x in row]) for row in found]) for how in (torch.sum, torch.mean))


FORMULAS = {
    "cpo": ({}, lambda sums, means: -F.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])) - means[:, 0]),
    "cpo smoothed": (
        {"beta": 0.3, "label_smoothing": 0.2, "nll_coef": 0.5},
        lambda sums, means: (
            -0.8 * F.logsigmoid(0.3 * (sums[:, 0] - sums[:, 1]))
            - 0.2 * F.logsigmoid(-0.3 * (sums[:, 0] - sums[:, 1]))
            - 0.5 * means[:, 0]
        ),
    ),
    "hinge": (
        {"loss": "hinge", "nll_coef": 0.0},
        lambda sums, means: F.relu(1 - 0.1 * (sums[:, 0] - sums[:, 1])),
    ),
    "ipo": ({"loss": "ipo"}, lambda sums, means: (means[:, 0] - means[:, 1] - 5.0).square() - means[:, 0]),
    "simpo": ({"loss": "simpo"}, lambda sums, means: -F.logsigmoid(2.0 * (means[:, 0] - means[:, 1]) - 1.0)),
    "simpo with nll": (
        {"loss": "simpo", "beta": 2.5, "gamma": 1.25, "nll_coef": 0.2},
        lambda sums, means: -F.logsigmoid(2.5 * (means[:, 0] - means[:, 1] - 0.5)) - 0.2 * means[:, 0],
    ),
    "alphapo": (
        {"loss": "simpo", "alpha": 0.25},
        lambda sums, means: -F.logsigmoid(8.0 * ((-means[:, 1] / 4).exp() - (-means[:, 0] / 4).exp()) - 1.0),
    ),
    "alpha of another": (
        {"alpha": 0.25, "beta": 0.5},
        lambda sums, means: -F.logsigmoid(2.0 * ((-means[:, 1] / 4).exp() - (-means[:, 0] / 4).exp())),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_the_papers(make, train, tiny_llama, name):
    options, formula = FORMULAS[name]
    batch, model = pairs(range(5)), copy.deepcopy(tiny_llama)
    loss = formula(*sides(model, batch)).mean()
    loss.backward()
    module = make(**options)
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-5)
    moved = dict(module.policy.named_parameters())
    for (key, parameter), old in zip(model.named_parameters(), tiny_llama.parameters(), strict=True):
        torch.testing.assert_close(moved[key], old - 0.1 * parameter.grad, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize(("options", "of"), [({}, 0), ({"loss": "simpo"}, 1), ({"loss": "ipo"}, 1)])
def test_rewards_are_what_is_compared(make, train, tiny_llama, options, of):
    batch, module = pairs(range(5)), make(**options)
    with torch.no_grad():
        expected = module.options["beta"] * sides(tiny_llama, batch)[of].mean(dim=0)
        sums = sides(tiny_llama, batch)[0].mean(dim=0)
    metrics = train(module, [batch]).callback_metrics
    for place, side in enumerate(("chosen", "rejected")):
        assert float(metrics[f"train/rewards/{side}"]) == pytest.approx(float(expected[place]), abs=1e-5)
        assert float(metrics[f"train/logps/{side}"]) == pytest.approx(float(sums[place]), abs=1e-4)
    assert "train/nll_loss" in metrics


def test_it_learns(make, train):
    metrics = train(make(loss="simpo", optimizer=lambda g: torch.optim.Adam(g, lr=3e-3)), [pairs(range(6))] * 20)
    assert metrics.callback_metrics["train/rewards/accuracies"] == 1
    assert metrics.callback_metrics["train/rewards/margins"] > 1


def test_describe_tells_what_is_in_force(make):
    told = make(loss="simpo").describe()["loss"]
    assert "simpo of means" in told
    assert "gamma 1.0" in told
    assert "nll_coef 0.0" in told
    assert "sigmoid of sums over tokens, beta 0.1, nll_coef 1.0" in make().describe()["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.5}, "gamma must be 0 for loss='sigmoid'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0 for loss='ipo'"),
        ({"loss": "dpo"}, "loss='dpo'"),
        ({"beta": 0}, "beta=0"),
    ],
)
def test_what_contradicts_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
