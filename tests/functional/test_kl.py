"""KL estimators, and the fixed point that each reaches in a loss or in a reward."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import KL_ESTIMATORS, KL_PLACEMENTS, kl_penalty, validate_kl_placement

REWARD = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
BETA = 0.5
REVERSE_KL_OPTIMUM = [0.5291, 0.2919, 0.1790]
FORWARD_KL_OPTIMUM = [0.5659, 0.2217, 0.2125]


def train_bandit(estimator, placement, steps):
    """Gradient descent on a softmax policy over three answers, with the exact on-policy expectation."""
    logits = REFERENCE.log().clone().requires_grad_()
    for _ in range(steps):
        logps = torch.log_softmax(logits, 0)
        penalty = kl_penalty(logps[None], REFERENCE.log()[None], estimator=estimator)[0]
        rewards = REWARD - BETA * penalty.detach() if placement == "reward" else REWARD
        per_sample = -rewards * logps + (BETA * penalty if placement == "loss" else 0)
        (gradient,) = torch.autograd.grad((logps.exp().detach() * per_sample).sum(), logits)
        logits = (logits.detach() - gradient).requires_grad_()
    return torch.softmax(logits.detach(), 0)


@pytest.mark.parametrize(
    ("estimator", "placement", "expected"),
    [
        ("k1", "reward", REVERSE_KL_OPTIMUM),
        ("k2", "loss", REVERSE_KL_OPTIMUM),
        ("k1+score", "loss", REVERSE_KL_OPTIMUM),
        ("k3+score", "loss", REVERSE_KL_OPTIMUM),
        ("k3", "loss", FORWARD_KL_OPTIMUM),
    ],
)
def test_fixed_points(estimator, placement, expected):
    validate_kl_placement(estimator, placement)
    policy = train_bandit(estimator, placement, steps=400)
    assert [round(p, 4) for p in policy.tolist()] == expected


def test_reverse_kl_optimum_in_closed_form():
    optimum = REFERENCE * (REWARD / BETA).exp()
    assert [round(p, 4) for p in (optimum / optimum.sum()).tolist()] == REVERSE_KL_OPTIMUM


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "loss"), ("k2", "reward")])
def test_combinations_that_collapse(estimator, placement):
    assert train_bandit(estimator, placement, steps=2000)[0] > 0.99
    with pytest.raises(ValueError, match=f"estimator '{estimator}' must not stand in the {placement}: "):
        validate_kl_placement(estimator, placement)


def test_k3_in_the_reward_diverges():
    ratios = [(REFERENCE / train_bandit("k3", "reward", steps)).max().item() for steps in (0, 20, 200)]
    assert ratios[0] == pytest.approx(1)
    assert ratios[2] > 1000
    with pytest.raises(ValueError, match=r"estimator 'k3' must not stand in the reward: .* diverges"):
        validate_kl_placement("k3", "reward")


def test_which_placements_are_allowed():
    allowed = set()
    for estimator in KL_ESTIMATORS:
        for placement in KL_PLACEMENTS:
            try:
                validate_kl_placement(estimator, placement)
            except ValueError as error:
                assert "use 'k" in str(error)  # noqa: PT017
            else:
                allowed.add((estimator, placement))
    losses = {(estimator, "loss") for estimator in ("k2", "k3", "k1+score", "k3+score")}
    assert allowed == losses | {("k1", "reward")}


def test_estimates_agree_with_the_divergence():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expected = (policy * (policy / REFERENCE).log()).sum().item()
    for estimator in ("k1", "k3", "k1+score", "k3+score"):
        values = kl_penalty(policy.log()[None], REFERENCE.log()[None], estimator=estimator)[0]
        assert (policy * values).sum().item() == pytest.approx(expected, rel=1e-12)


def pairs():
    generator = torch.Generator().manual_seed(0)
    return [-3 * torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_by_loops():
    policy, reference, old = pairs()
    formulas = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
    for estimator in KL_ESTIMATORS:
        result = kl_penalty(policy, reference, estimator=estimator, old_token_logps=old)
        for p, r, o, value in zip(*(t.flatten().tolist() for t in (policy, reference, old, result)), strict=True):
            factor = math.exp(p - o) if estimator.endswith("score") else 1
            assert value == pytest.approx(factor * formulas[estimator[:2]](p - r), rel=1e-12)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_gradcheck(estimator):
    policy, reference, old = pairs()
    function = lambda x: kl_penalty(x, reference, estimator=estimator, old_token_logps=old)  # noqa: E731
    assert torch.autograd.gradcheck(function, (policy.requires_grad_(),))


def test_on_policy_score_gradient_is_the_log_ratio():
    policy, reference, _ = pairs()
    policy.requires_grad_()
    kl_penalty(policy, reference, estimator="k3+score").sum().backward()
    torch.testing.assert_close(policy.grad, policy.detach() - reference)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_extremes_stay_finite_and_pull_back(estimator):
    policy = torch.tensor([[-1e3, 0.0]]).requires_grad_()
    values = kl_penalty(policy, torch.tensor([[0.0, -1e3]]), estimator=estimator)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(policy.grad).all()
    if estimator in ("k2", "k3"):
        assert policy.grad[0, 0] < 0
        assert policy.grad[0, 1] > 0


def test_k2_and_k3_are_never_negative():
    policy, reference, _ = pairs()
    for estimator in ("k2", "k3"):
        assert (kl_penalty(policy, reference, estimator=estimator) >= 0).all()


def test_reference_and_old_policy_get_no_gradient():
    policy, reference, old = (x.requires_grad_() for x in pairs())
    kl_penalty(policy, reference, estimator="k3+score", old_token_logps=old).sum().backward()
    assert reference.grad is None
    assert old.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kl_penalty(x, x, estimator="k4"), "estimator must be one of 'k1', .*, got 'k4'"),
        (lambda x: kl_penalty(x, x[:1]), "reference_token_logps must have the shape of token_logps"),
        (
            lambda x: kl_penalty(x, x, estimator="k1+score", old_token_logps=x[:1]),
            "old_token_logps must have the shape",
        ),
        (
            lambda x: validate_kl_placement("k3", "advantage"),
            "placement must be one of 'loss', 'reward', got 'advantage'",
        ),
        (lambda x: validate_kl_placement("kl", "loss"), "estimator must be one of 'k1', .*, got 'kl'"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_a_penalty_in_the_loss_is_one_of_tokens():
    """Completions of two tokens, all expectations exact: only `x` summed from each token on is the divergence's."""
    generator = torch.Generator().manual_seed(0)
    first, second, *reference = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3), (3,), (3, 3))
    )
    first.requires_grad_()
    second.requires_grad_()
    reference = [values.log_softmax(-1) for values in reference]
    logps = torch.stack([first.log_softmax(0)[:, None].expand(3, 3), second.log_softmax(1)], dim=2).reshape(
        9, 2
    )  # every completion [9, 2]
    reference_logps = torch.stack([reference[0][:, None].expand(3, 3), reference[1]], dim=2).reshape(9, 2)
    weights, x = logps.sum(1).exp(), logps - reference_logps

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (first, second), retain_graph=True)])

    divergence = gradient((weights * x.sum(1)).sum())
    sampled, fixed = weights.detach()[:, None], x.detach()
    to_go = torch.stack([fixed.sum(1), fixed[:, 1]], dim=1)
    torch.testing.assert_close(gradient((sampled * to_go * logps).sum()), divergence)
    tokens = gradient((sampled * fixed * logps).sum())
    assert not torch.allclose(tokens, divergence, rtol=0.05)
    for estimator in ("k2", "k1+score", "k3+score"):
        penalty = kl_penalty(logps, reference_logps, estimator=estimator)
        torch.testing.assert_close(gradient((sampled * penalty).sum()), tokens)
