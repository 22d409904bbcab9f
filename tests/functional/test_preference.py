"""Preference losses: closed forms, a scalar transcription of every formula, gradients, extremes, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from alignment_modules.functional import (
    BATCH_COUPLED_LOSSES,
    F_DIVERGENCES,
    PREFERENCE_LOSSES,
    Preference,
    length_desensitized_logps,
    preference_loss,
    reward_pair_loss,
)

BETA = 0.3
ROWWISE = [name for name in PREFERENCE_LOSSES if name not in BATCH_COUPLED_LOSSES]
SMOOTHING = {"exo_pair": 0.05, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1, "sigmoid_norm": 0.1, "sigmoid": 0.1}
LENGTHS = {"chosen_lengths": torch.tensor([3, 7, 1, 5]), "rejected_lengths": torch.tensor([4, 2, 6, 5])}


def log_probs(pairs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(4)]


def options(loss):
    return {"loss": loss, "beta": BETA, "label_smoothing": SMOOTHING.get(loss, 0.0)}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(loss, chosen, rejected, reference_chosen, reference_rejected, chosen_length, rejected_length):
    e, b = SMOOTHING.get(loss, 0.0), BETA
    w, l = chosen - reference_chosen, rejected - reference_rejected  # noqa: E741
    h, mean = w - l, w / chosen_length - l / rejected_length
    mixture = sigmoid(b * h / 0.05)
    return {
        "sigmoid": lambda: -(1 - e) * math.log(sigmoid(b * h)) - e * math.log(sigmoid(-b * h)),
        "robust": lambda: (-(1 - e) * math.log(sigmoid(b * h)) + e * math.log(sigmoid(-b * h))) / (1 - 2 * e),
        "ipo": lambda: (mean - 1 / (2 * b)) ** 2,
        "hinge": lambda: max(0, 1 - b * h),
        "exo_pair": lambda: (
            sigmoid(b * h) * math.log(sigmoid(b * h) / (1 - e)) + sigmoid(-b * h) * math.log(sigmoid(-b * h) / e)
        ),
        "nca_pair": lambda: -math.log(sigmoid(b * w)) - (math.log(sigmoid(-b * w)) + math.log(sigmoid(-b * l))) / 2,
        "bco_pair": lambda: -math.log(sigmoid(b * w)) - math.log(sigmoid(-b * l)),
        "sppo_hard": lambda: (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2,
        "apo_zero": lambda: 1 - sigmoid(b * w) + sigmoid(b * l),
        "apo_down": lambda: sigmoid(b * w) + 1 - sigmoid(b * h),
        "discopop": lambda: -(1 - mixture) * math.log(sigmoid(b * h)) + mixture * math.exp(-b * h),
        "sigmoid_norm": lambda: -(1 - e) * math.log(sigmoid(b * mean)) - e * math.log(sigmoid(-b * mean)),
        "sft": lambda: -chosen / chosen_length,
    }[loss]()


@pytest.mark.parametrize("loss", ROWWISE)
def test_row_by_row(loss):
    logps = log_probs()
    result = preference_loss(*logps, **options(loss), **LENGTHS)
    for row in range(4):
        numbers = [tensor[row].item() for tensor in (*logps, *LENGTHS.values())]
        assert result[row].item() == pytest.approx(by_hand(loss, *numbers), rel=1e-9)


@pytest.mark.parametrize("loss", sorted(BATCH_COUPLED_LOSSES))
def test_sorted_losses(loss):
    chosen, rejected, reference_chosen, reference_rejected = (tensor.tolist() for tensor in log_probs())
    if loss == "aot":
        left = [a - b for a, b in zip(chosen, rejected, strict=True)]
        right = [a - b for a, b in zip(reference_chosen, reference_rejected, strict=True)]
    else:
        left = [a - b for a, b in zip(chosen, reference_chosen, strict=True)]
        right = [a - b for a, b in zip(rejected, reference_rejected, strict=True)]
    expected = [
        -0.9 * math.log(sigmoid(BETA * (a - b))) - 0.1 * math.log(sigmoid(-BETA * (a - b)))
        for a, b in zip(sorted(left), sorted(right), strict=True)
    ]
    torch.testing.assert_close(preference_loss(*log_probs(), **options(loss)).tolist(), expected)


@pytest.mark.parametrize("loss", ROWWISE)
def test_rows_do_not_mix(loss):
    logps = log_probs()
    whole = preference_loss(*logps, **options(loss), **LENGTHS)
    for row in range(4):
        part = slice(row, row + 1)
        lengths = {name: value[part] for name, value in LENGTHS.items()}
        torch.testing.assert_close(
            preference_loss(*(x[part] for x in logps), **options(loss), **lengths), whole[part], rtol=0, atol=0
        )


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_gradcheck(loss):
    chosen, rejected, *reference = log_probs(seed=3)
    function = lambda a, b: preference_loss(a, b, *reference, **options(loss), **LENGTHS)  # noqa: E731
    assert torch.autograd.gradcheck(function, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"])
def test_first_loss_is_log_two(loss):
    policy = torch.tensor([-3.0, -50.0]), torch.tensor([-9.0, -1.0])
    losses = preference_loss(*policy, *policy, loss=loss, **{k: v[:2] for k, v in LENGTHS.items()})
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)), rtol=0, atol=1e-7)


def test_gradient_vanishes_at_the_bradley_terry_optimum():
    """Where pair (i, j) is preferred with probability s(r_i - r_j), the optimum is `log p - log p_ref = r / beta`."""
    rewards = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    reference = torch.log_softmax(torch.tensor([0.1, 1.5, -0.4, 0.0], dtype=torch.float64), 0)
    logits = (reference + rewards / BETA).requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    probability = torch.sigmoid(rewards[first] - rewards[second])

    def gradient(logits):
        policy = torch.log_softmax(logits, 0)
        losses = preference_loss(policy[first], policy[second], reference[first], reference[second], beta=BETA)
        return torch.autograd.grad((probability * losses).sum(), logits)[0]

    torch.testing.assert_close(gradient(logits), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    moved = (logits.detach() + torch.tensor([0.5, 0, 0, 0], dtype=torch.float64)).requires_grad_()
    assert gradient(moved).abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_goes_to_the_sigmoid_of_half_inverse_tau(tau):
    """Two answers, one always preferred, uniform reference: p(preferred) = s(1 / (2 tau)) (arXiv:2310.12036)."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = torch.full((2,), math.log(0.5), dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        loss = preference_loss(policy[:1], policy[1:], reference[:1], reference[1:], loss="ipo", beta=tau).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.softmax(logits, 0)[0].item() == pytest.approx(sigmoid(1 / (2 * tau)), abs=1e-9)


def test_ipo_divides_by_each_length():
    logps = log_probs()
    averages = [x / LENGTHS[f"{side}_lengths"] for x, side in zip(logps, ["chosen", "rejected"] * 2, strict=True)]
    torch.testing.assert_close(preference_loss(*logps, loss="ipo", **LENGTHS), preference_loss(*averages, loss="ipo"))


def test_smoothed_sigmoid_is_least_at_the_label_probability():
    margin = torch.tensor([math.log(0.8 / 0.2) / BETA], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    preference_loss(margin, zero, zero, zero, beta=BETA, label_smoothing=0.2).sum().backward()
    assert margin.grad.abs().item() < 1e-12


def test_robust_is_unbiased_under_flipped_labels():
    chosen, rejected, *reference = log_probs()
    keywords = {"loss": "robust", "beta": BETA, "label_smoothing": 0.2}
    right = preference_loss(chosen, rejected, *reference, **keywords)
    wrong = preference_loss(rejected, chosen, *reversed(reference), **keywords)
    clean = preference_loss(chosen, rejected, *reference, beta=BETA)
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, clean)


@pytest.mark.parametrize("f_divergence", F_DIVERGENCES)
def test_f_divergences(f_divergence):
    derivative = {
        "reverse_kl": lambda t: math.log(t) + 1,
        "forward_kl": lambda t: -1 / t,
        "js": lambda t: math.log(2 * t / (1 + t)),
        "alpha": lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1),
    }[f_divergence]
    logps = log_probs()
    coefficient = {"alpha": 0.3} if f_divergence == "alpha" else {}
    result = preference_loss(*logps, beta=BETA, f_divergence=f_divergence, **coefficient)
    down = preference_loss(*logps, loss="apo_down", beta=BETA, f_divergence=f_divergence, **coefficient)
    for row, (a, b, c, d) in enumerate(zip(*(x.tolist() for x in logps), strict=True)):
        margin = derivative(math.exp(a - c)) - derivative(math.exp(b - d))
        expected = torch.nn.functional.softplus(torch.tensor(-BETA * margin, dtype=torch.float64)).item()
        assert result[row].item() == pytest.approx(expected, rel=1e-9)
        won, other = torch.tensor([a - c, -margin], dtype=torch.float64).mul(BETA).sigmoid().tolist()
        assert down[row].item() == pytest.approx(won + other, rel=1e-9)


def test_alpha_divergence_joins_its_limits():
    logps = log_probs()
    for alpha, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        torch.testing.assert_close(
            preference_loss(*logps, f_divergence="alpha", alpha=alpha), preference_loss(*logps, f_divergence=name)
        )


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
@pytest.mark.parametrize("extreme", [0.0, 1e4])
def test_extreme_log_probabilities_stay_finite(loss, extreme):
    signs = torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [1, 1, -1, -1], [-1, -1, 1, 1]])
    chosen, rejected, *reference = (extreme * signs).T.unbind()
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    for f_divergence in F_DIVERGENCES if loss in ("sigmoid", "ipo", "discopop") else ["reverse_kl"]:
        losses = preference_loss(chosen, rejected, *reference, **options(loss), f_divergence=f_divergence)
        gradients = torch.autograd.grad(losses.sum(), [chosen, rejected], allow_unused=True)
        if f_divergence == "reverse_kl":
            assert torch.isfinite(losses).all()
        for value in (losses, *gradients):
            assert value is None or not value.isnan().any()


def test_reference_gets_no_gradient():
    logps = [x.requires_grad_() for x in log_probs()]
    preference_loss(*logps).sum().backward()
    assert logps[0].grad is not None
    assert logps[2].grad is None
    assert logps[3].grad is None


def test_length_desensitized_by_loops():
    generator = torch.Generator().manual_seed(5)
    token_logps = -torch.rand(6, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    shared = torch.tensor([0, 1, 2, 3, 20, 4])
    result = length_desensitized_logps(token_logps, mask, shared, ld_alpha=0.3)
    for row in range(6):
        kept = token_logps[row][mask[row]].tolist()
        expected = sum(kept[: shared[row]]) + 0.3 * sum(kept[shared[row] :])
        assert result[row].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "loss must be one of 'sigmoid', 'robust', .*, got 'dpo'"),
        ({"beta": 0.0}, "beta=0.0 must be a finite number > 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be a finite number in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0 for loss='ipo'"),
        ({"loss": "exo_pair"}, "label_smoothing must be > 0 for loss='exo_pair'"),
        ({"f_divergence": "hellinger"}, "f_divergence must be one of 'reverse_kl', .*, got 'hellinger'"),
        ({"loss": "apo_zero", "f_divergence": "js"}, "f_divergence must be 'reverse_kl' for loss='apo_zero'"),
    ],
)
def test_refuses_options(change, message):
    keywords = {"loss": "sigmoid", "beta": 0.1} | change
    with pytest.raises(ValueError, match=message):
        Preference(**keywords)
    with pytest.raises(ValueError, match=message):
        preference_loss(*log_probs(), **keywords)


def test_refuses_shapes_and_half_of_the_lengths():
    chosen, *others = log_probs()
    with pytest.raises(ValueError, match=r"policy_rejected_logps must have the shape .* \(3,\), got \(4,\)"):
        preference_loss(chosen[:3], *others)
    with pytest.raises(ValueError, match="must be given together"):
        preference_loss(chosen, *others, loss="ipo", chosen_lengths=torch.ones(4))
    with pytest.raises(ValueError, match="chosen_lengths must have the shape of policy_chosen_logps"):
        preference_loss(chosen, *others, chosen_lengths=torch.ones(4, 2), rejected_lengths=torch.ones(4))
    with pytest.raises(ValueError, match="ld_alpha"):
        length_desensitized_logps(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1), ld_alpha=2)


def test_reward_pairs_by_hand():
    chosen, rejected, margins = ([0.7, -2.0, 3.0], [0.1, 1.5, 3.0], [0.0, 0.5, 1.0])
    result = reward_pair_loss(*map(torch.tensor, (chosen, rejected)), margins=torch.tensor(margins), center_coef=0.01)
    expected = [
        -math.log(sigmoid(a - b - m)) + 0.01 * (a + b) ** 2 for a, b, m in zip(chosen, rejected, margins, strict=True)
    ]
    assert result.tolist() == pytest.approx(expected, rel=1e-6)
    plain = reward_pair_loss(*map(torch.tensor, (chosen, rejected)))
    assert plain.tolist() == pytest.approx([math.log1p(math.exp(b - a)) for a, b in zip(chosen, rejected, strict=True)])


def test_reward_pairs_gradient_is_the_chance_of_being_wrong():
    scores = torch.tensor([[0.3, -1.0]], dtype=torch.float64, requires_grad=True)
    reward_pair_loss(scores[:, 0], scores[:, 1], margins=torch.tensor([0.2])).sum().backward()
    wrong = sigmoid(-(1.3 - 0.2))
    assert scores.grad[0].tolist() == pytest.approx([-wrong, wrong])
    inputs = [x[:3].clone().requires_grad_() for x in log_probs()[:2]]
    assert torch.autograd.gradcheck(lambda a, b: reward_pair_loss(a, b, center_coef=0.1), inputs)


def test_reward_pairs_refuse():
    with pytest.raises(ValueError, match="rejected_scores must have the shape of chosen_scores"):
        reward_pair_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="margins must have the shape of chosen_scores"):
        reward_pair_loss(torch.zeros(2), torch.zeros(2), margins=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="center_coef=-1 must be a finite number of 0 or more"):
        reward_pair_loss(torch.zeros(2), torch.zeros(2), center_coef=-1)


@pytest.mark.parametrize("loss", sorted(BATCH_COUPLED_LOSSES))
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [9], [3, 0, 6]])
def test_sorted_losses_from_parts(loss, cuts):
    """Parts that know their partners give the value and the gradient of the whole, ties included."""
    logps = [x.clone() for x in log_probs(pairs=9)]
    for tensor in logps:
        tensor[4] = tensor[2]  # a pair that is there twice
        tensor[5:7] = tensor[5]
    preference = Preference(**options(loss))
    inputs = [x.clone().requires_grad_() for x in logps[:2]]
    whole = preference(*inputs, *logps[2:]).sum()
    expected = torch.autograd.grad(whole, inputs, allow_unused=True)
    partners, start, total = preference.partners(*logps), 0, 0.0
    for count in cuts:
        rows = slice(start, start + count)
        total = total + preference(*(x[rows] for x in (*inputs, *logps[2:])), partners=partners[rows]).sum()
        start += count
    torch.testing.assert_close(total, whole)
    for found, wanted in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        for twice in ([2, 4], [5, 6]):  # which of the equal ones stands first is nobody's business
            torch.testing.assert_close(found[twice].sum(), wanted[twice].sum())
        torch.testing.assert_close(found[[0, 1, 3, 7, 8]], wanted[[0, 1, 3, 7, 8]])
