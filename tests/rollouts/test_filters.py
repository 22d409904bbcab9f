import pytest
import torch

from alignment_modules.rollouts.filters import inverse_cdf, token_probabilities, truncate_support


def chi_square(tokens, probabilities):
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() / probabilities.sum() * len(tokens)
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    return float(((counts - expected) ** 2 / expected)[used].sum()), int(used.sum()) - 1


@pytest.mark.parametrize("vocabulary", [7, 1024, 2050])
def test_inverse_cdf_draws_the_distribution(vocabulary):
    torch.manual_seed(0)
    weights = torch.rand(vocabulary)
    weights[torch.rand(vocabulary) < 0.3] = 0
    draws = 400 * vocabulary if vocabulary < 10 else 60 * vocabulary
    uniforms = (torch.arange(draws, dtype=torch.float64) + torch.rand(draws, dtype=torch.float64)) / draws
    tokens = torch.cat([inverse_cdf(weights.expand(len(u), -1), u) for u in uniforms.split(4096)])
    statistic, freedom = chi_square(tokens, weights)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # stratified draws stay far below


@pytest.mark.parametrize("vocabulary", [5, 1024, 1100, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_equals_a_plain_search(vocabulary, dtype):
    torch.manual_seed(1)
    weights = torch.softmax(4 * torch.randn(200, vocabulary, dtype=dtype), -1)
    uniforms = torch.rand(200, dtype=torch.float64)
    cumulative = weights.double().cumsum(-1)
    wanted = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    got = inverse_cdf(weights, uniforms)
    distance = (cumulative.gather(1, got[:, None]).squeeze(1) - uniforms).abs()
    assert ((got == wanted) | (distance < 1e-6)).all()
    assert (got == wanted).sum() >= 198


@pytest.mark.parametrize("vocabulary", [6, 1030, 2048])
def test_extreme_uniforms_stay_on_the_support(vocabulary):
    weights = torch.zeros(3, vocabulary)
    weights[:, 2], weights[:, 4] = 0.25, 0.5
    below_one = 1 - 2.0**-53
    tokens = inverse_cdf(weights, torch.tensor([0.0, below_one, 1 / 3 - 1e-9], dtype=torch.float64))
    assert tokens.tolist() == [2, 4, 2]


def test_temperature_divides_logits_in_float32():
    logits = torch.randn(3, 9).bfloat16()
    got = token_probabilities(logits, 0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.softmax(logits.float() / 0.5, -1))
    assert token_probabilities(logits.double(), 1.0).dtype == torch.float64


def brute_force(row, top_k, top_p, min_p):
    order = sorted(range(len(row)), key=lambda token: -row[token])
    kept = order[: top_k or None]
    mass, total, most, nucleus = 0.0, sum(row[token] for token in kept), max(row), []
    for token in kept:
        if nucleus and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += row[token]
    return {token for token in nucleus if row[token] >= min_p * most}


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_support_is_exactly_the_filters(top_k, top_p, min_p):
    torch.manual_seed(2)
    probabilities = torch.softmax(2 * torch.randn(6, 12, dtype=torch.float64), -1)
    original = probabilities.clone()
    kept = truncate_support(probabilities, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(probabilities, original)
    for row, kept_row in zip(probabilities.tolist(), kept, strict=True):
        assert set(kept_row.nonzero().flatten().tolist()) == brute_force(row, top_k, top_p, min_p)
    assert torch.equal(kept[kept > 0], probabilities[kept > 0])


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.5003}, {"top_p": 0.9007}, {"top_k": 40}, {"top_k": 700, "top_p": 0.8003}], ids=str
)
def test_a_large_vocabulary_is_cut_as_a_small_one(filters):
    """Nuclei of a few tokens and of most, in one batch, with equal probabilities at the cut."""
    generator = torch.Generator().manual_seed(4)
    scales = torch.tensor([[0.0], [0.3], [2.0], [6.0]], dtype=torch.float64)
    logits = scales * torch.randn(4, 9001, dtype=torch.float64, generator=generator)
    probabilities = torch.softmax((4 * logits).round() / 4, -1)  # many are equal
    kept = truncate_support(probabilities, **filters)
    sizes = [len(row.nonzero()) for row in kept]
    assert "top_p" not in filters or (max(sizes) > 256 > min(sizes))
    for row, kept_row in zip(probabilities.tolist(), kept, strict=True):
        wanted = brute_force(row, filters.get("top_k", 0), filters.get("top_p", 1.0), 0.0)
        assert set(kept_row.nonzero().flatten().tolist()) == wanted


def test_support_equals_transformers():
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(3)
    logits = torch.randn(8, 30)
    scores = logits
    for warper in (TopKLogitsWarper(9), TopPLogitsWarper(0.7), MinPLogitsWarper(0.2)):
        scores = warper(None, scores)
    kept = truncate_support(torch.softmax(logits, -1), top_k=9, top_p=0.7, min_p=0.2)
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), torch.softmax(scores, -1))
