"""Log-probabilities against the textbook formula, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from alignment_modules.functional.logprobs import (
    LinearTokenScores,
    linear_token_log_probs,
    linear_token_scores,
    sequence_logps,
    token_entropy,
    token_log_probs,
)

ONE_ROW_BYTES = 1  # below a row's size: one row a chunk


def plain(hidden, weight, targets, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    correct = log_p.argmax(-1) == targets
    collision = log_p.detach().exp().square().sum(-1).log()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return chosen, entropy, correct, (logits / temperature).logsumexp(-1), log_p.mean(-1), collision, chosen


def head(rows=7, width=5, vocabulary=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, weight, bias = draw(rows, width), draw(vocabulary, width), draw(vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def test_token_log_probs_by_loops():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(6, (3, 4), generator=generator)
    result = token_log_probs(logits, targets, temperature=0.7)
    for row in range(3):
        for time in range(4):
            scaled = [value / 0.7 for value in logits[row, time].tolist()]
            expected = scaled[targets[row, time]] - math.log(sum(math.exp(value) for value in scaled))
            assert result[row, time].item() == pytest.approx(expected, abs=1e-12)
    assert result.dtype == torch.float64


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_token_log_probs_takes_any_leading_shape(leading):
    logits, targets = torch.randn(*leading, 9), torch.randint(9, leading)
    assert token_log_probs(logits, targets).shape == leading
    assert token_entropy(logits).shape == leading


def test_token_log_probs_of_bfloat16_reduces_in_float32():
    logits = torch.randn(4, 1000).bfloat16()
    targets = torch.randint(1000, (4,))
    result = token_log_probs(logits, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, token_log_probs(logits.double(), targets).float())


def test_ignored_targets_give_zero_and_no_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    targets = torch.tensor([[0, -100, 2], [-100, -100, -100]])
    result = token_log_probs(logits, targets)
    result.sum().backward()
    assert (result[targets == -100] == 0).all()
    assert (logits.grad[targets == -100] == 0).all()
    assert (logits.grad[targets != -100] != 0).any()


def test_entropy_of_uniform_and_of_certain():
    assert token_entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    logits = torch.tensor([0.0, float("-inf"), float("-inf")], requires_grad=True)
    entropy = token_entropy(logits)
    (3 * entropy).backward()
    assert entropy.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_gradients_of_plain_functions():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, targets, 1.3), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, 1.3), (logits,))


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 2.0},
    {"temperature": 1.7, "logit_scale": 2.5, "softcap": 3.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("max_chunk_bytes", [ONE_ROW_BYTES, 3 * 11 * 8, 2**20])
def test_linear_matches_plain(settings, with_bias, max_chunk_bytes):
    hidden, weight, bias, targets = head()
    bias = bias if with_bias else None
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    scores = linear_token_scores(
        hidden,
        weight,
        targets,
        bias=bias,
        max_chunk_bytes=max_chunk_bytes,
        with_entropy=True,
        with_correct=True,
        with_normalizer=True,
        with_mean_logp=True,
        with_collision=True,
        with_full_logps=True,
        **settings,
    )
    assert isinstance(scores, LinearTokenScores)
    expected = plain(hidden, weight, targets, bias, **settings)
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(5, hidden.shape[0], dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(sum((upstream[i] * outputs[i]).sum() for i in (0, 1, 3, 4)), inputs)
        for outputs in (scores, expected)
    )
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("max_chunk_bytes", [2 * 6 * 8, 2**20])
@pytest.mark.parametrize("extra", [None, "entropy", "normalizer", "mean_logp"])
def test_linear_gradcheck(settings, max_chunk_bytes, extra):
    hidden, weight, bias, targets = head(rows=5, width=3, vocabulary=6)

    def function(hidden, weight, bias):
        asked = {} if extra is None else {f"with_{extra}": True}
        scores = linear_token_scores(
            hidden, weight, targets, bias=bias, max_chunk_bytes=max_chunk_bytes, **asked, **settings
        )
        return scores.token_logps if extra is None else (scores.token_logps, getattr(scores, extra))

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_linear_blocks_within_a_chunk():
    # 8 MiB of float64 hold five rows of this vocabulary: 12 rows are three blocks.
    hidden, weight, _, targets = head(rows=12, width=2, vocabulary=200_000)
    result = linear_token_log_probs(hidden, weight, targets)
    expected = plain(hidden, weight, targets)[0]
    torch.testing.assert_close(result, expected)
    ours = torch.autograd.grad(result.sum(), [hidden, weight])
    theirs = torch.autograd.grad(expected.sum(), [hidden, weight])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("hidden", "bias"), ("hidden", "weight")])
def test_linear_with_frozen_inputs(frozen):
    inputs = dict(zip(("hidden", "weight", "bias"), head(), strict=False))
    targets = head()[3]
    for name in frozen:
        inputs[name] = inputs[name].detach()
    trainable = [value for value in inputs.values() if value.requires_grad]
    ours = torch.autograd.grad(linear_token_log_probs(targets=targets, **inputs).sum(), trainable)
    theirs = torch.autograd.grad(plain(targets=targets, **inputs)[0].sum(), trainable)
    torch.testing.assert_close(ours, theirs)


def test_linear_backward_twice_gives_the_same():
    hidden, weight, bias, targets = head()
    loss = linear_token_log_probs(hidden, weight, targets, bias=bias).sum()
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight, bias])
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("name", "index"), [("entropy", 1), ("normalizer", 3), ("mean_logp", 4)])
def test_linear_extra_alone_is_differentiable(name, index):
    hidden, weight, _, targets = head()
    ours = getattr(linear_token_scores(hidden, weight, targets, **{f"with_{name}": True}), name)
    theirs = plain(hidden, weight, targets)[index]
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), [hidden, weight]), torch.autograd.grad(theirs.sum(), [hidden, weight])
    )


@pytest.mark.parametrize("max_chunk_bytes", [ONE_ROW_BYTES, 2**20])
def test_linear_without_rows(max_chunk_bytes):
    hidden, weight, bias, targets = head(rows=0)
    result = linear_token_log_probs(hidden, weight, targets, bias=bias, max_chunk_bytes=max_chunk_bytes)
    result.sum().backward()
    assert result.shape == (0,)
    assert hidden.grad.shape == (0, 5)
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


def test_linear_without_grad_keeps_nothing():
    hidden, weight, bias, targets = head()
    with torch.no_grad():
        result = linear_token_log_probs(hidden, weight, targets, bias=bias)
    assert not result.requires_grad
    torch.testing.assert_close(result, plain(hidden, weight, targets, bias)[0].detach())


@pytest.mark.parametrize("max_chunk_bytes", [20 * 500 * 2, 2**20])
def test_linear_in_bfloat16(max_chunk_bytes):
    hidden, weight, bias, targets = head(rows=64, width=32, vocabulary=500, dtype=torch.bfloat16)
    result = linear_token_log_probs(hidden, weight, targets, bias=bias, max_chunk_bytes=max_chunk_bytes)
    assert result.dtype == torch.float32
    result.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = plain(exact[0], exact[1], targets, exact[2])[0]
    expected.sum().backward()
    # bfloat16 logits of size about 20 are off by at most 1/16
    torch.testing.assert_close(result.double(), expected.detach(), rtol=0, atol=0.13)
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - theirs.grad).norm() < 0.03 * theirs.grad.norm()


def test_linear_under_autocast_runs_in_its_dtype():
    hidden, weight, bias, targets = head(rows=16, width=8, vocabulary=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_token_log_probs(hidden, weight, targets, bias=bias)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = linear_token_log_probs(low[0], low[1], targets, bias=low[2])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    result.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip((hidden, weight, bias), low, strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad.float())


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_linear_stays_finite_at_extreme_logits(scale):
    hidden, weight, _, targets = head(dtype=torch.float32)
    scores = linear_token_scores(hidden, weight, targets, logit_scale=scale, with_entropy=True)
    (scores.token_logps.sum() + scores.entropy.sum()).backward()
    for tensor in (scores.token_logps, scores.entropy, hidden.grad, weight.grad):
        assert torch.isfinite(tensor).all()
    assert (scores.token_logps <= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number > 0"),
        ({"softcap": -1.0}, "softcap=-1.0 must be a finite number > 0"),
        ({"max_chunk_bytes": 0}, "max_chunk_bytes=0 must be a finite number > 0"),
        ({"weight": torch.zeros(11, 4)}, r"weight must be \[vocabulary, 5\], got shape \(11, 4\)"),
        ({"targets": torch.zeros(6, dtype=torch.long)}, r"targets must be \[7\], got shape \(6,\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \[11\], got shape \(5,\)"),
        ({"hidden": torch.zeros(1, 7, 5)}, r"hidden must be \[n, d\], got shape \(1, 7, 5\)"),
    ],
)
def test_linear_refuses(change, message):
    hidden, weight, _, targets = head(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_token_log_probs(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


def test_plain_functions_refuse():
    with pytest.raises(ValueError, match=r"targets must have the shape .* \(2, 3\), got \(2, 4\)"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=-1 must be a finite number > 0"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), temperature=-1)


def test_sums_over_thousands_of_tokens_keep_the_sign_of_a_small_margin():
    """Two completions that differ in their last tokens: in float32 the better one has the smaller sum."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        token_logps = (-3 * torch.rand(2, 8192, generator=generator)).requires_grad_()
        with torch.no_grad():
            token_logps[1] = token_logps[0].flip(0)  # other roundings of the same sum
            token_logps[0, -1] += 2e-5
        exact = [math.fsum(row) for row in token_logps.tolist()]
        sums = sequence_logps(token_logps)
        assert sums.tolist() == pytest.approx(exact, abs=1e-9)
        short = token_logps.sum(dim=1)
        if (short[0] > short[1]) != (exact[0] > exact[1]):
            break
    else:
        raise AssertionError("float32 was never wrong")
    assert (sums[0] > sums[1]) == (exact[0] > exact[1])
    sums.sum().backward()
    assert token_logps.grad.dtype == torch.float32
    assert (token_logps.grad == 1).all()
