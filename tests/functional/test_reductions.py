"""Reductions by loops on ragged masks, and their independence of how a batch is cut."""

from __future__ import annotations

import pytest
import torch

from alignment_modules.functional import REDUCTIONS, aggregate, masked_mean

CONSTANTS = {"max_length": 11, "group_size": 2}


def ragged(rows=8, time=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, time, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=generator) < 0.5
    mask[3] = False
    mask[6:8] = False
    return values, mask


def by_loops(values, mask, reduction):
    rows = [[v for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(values, mask, strict=True)]
    filled = [row for row in rows if row]
    if reduction == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if reduction == "sequence_mean_token_mean":
        return sum(sum(row) / len(row) for row in filled) / len(filled)
    if reduction == "sequence_mean_token_sum":
        return sum(map(sum, rows)) / len(filled)
    if reduction == "sequence_mean_token_sum_norm":
        return sum(map(sum, rows)) / 11 / len(filled)
    groups = [group for i in range(0, len(rows), 2) if (group := rows[i] + rows[i + 1])]
    return sum(sum(group) / len(group) for group in groups) / len(groups)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float64])
def test_by_loops(reduction, dtype):
    values, mask = ragged()
    total, weight = aggregate(values, mask.to(dtype), reduction=reduction, **CONSTANTS)
    assert total.shape == weight.shape == ()
    assert not weight.requires_grad
    assert (total / weight).item() == pytest.approx(by_loops(values.tolist(), mask.tolist(), reduction), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pieces_add_up(reduction):
    values, mask = ragged()
    whole = aggregate(values, mask, reduction=reduction, **CONSTANTS)
    pieces = [
        aggregate(values[rows], mask[rows], reduction=reduction, **CONSTANTS)
        for rows in (slice(0, 2), slice(2, 2), slice(2, 6), slice(6, 8))
    ]
    for index in (0, 1):
        torch.testing.assert_close(sum(piece[index] for piece in pieces), whole[index])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_and_nan_outside_the_mask_change_nothing(reduction):
    values, mask = ragged()
    expected = aggregate(values, mask, reduction=reduction, **CONSTANTS)
    padded = torch.nn.functional.pad(values.masked_fill(~mask, torch.nan), (2, 3), value=torch.inf).requires_grad_()
    result = aggregate(padded, torch.nn.functional.pad(mask, (2, 3)), reduction=reduction, **CONSTANTS)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result[0], padded)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_to_count(reduction, shape):
    values = torch.randn(shape, requires_grad=True)
    total, weight = aggregate(values, torch.zeros(shape, dtype=torch.bool), reduction=reduction, **CONSTANTS)
    total.backward()
    assert total.item() == 0
    assert weight.item() == 0
    assert (values.grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    values, mask = ragged()
    function = lambda x: aggregate(x, mask, reduction=reduction, **CONSTANTS)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (values.requires_grad_(),))


def test_masked_mean_of_an_empty_row_is_zero():
    values, mask = ragged()
    result = masked_mean(values.masked_fill(~mask, torch.nan), mask)
    assert result[3] == 0
    torch.testing.assert_close(result[0], values[0][mask[0]].mean())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduction": "mean"}, "reduction must be one of 'token_mean', .*, got 'mean'"),
        ({"reduction": "sequence_mean_token_sum_norm"}, "max_length"),
        ({"reduction": "prompt_mean"}, "group_size"),
        ({"reduction": "prompt_mean", "group_size": 3}, "group_size must divide the batch of 8 rows, got 3"),
    ],
)
def test_refuses(keywords, message):
    with pytest.raises(ValueError, match=message):
        aggregate(*ragged(), **keywords)


def test_refuses_another_shape():
    with pytest.raises(ValueError, match=r"mask must have the shape of values, \(2, 3\), got \(2, 4\)"):
        aggregate(torch.zeros(2, 3), torch.zeros(2, 4), reduction="token_mean")


@pytest.mark.parametrize("sizes", [(8,), (1,) * 8, (3, 4, 1)])
def test_prompt_mean_of_prompts_that_are_cut_apart(sizes):
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[4:] = False  # a prompt without a token is not counted
    tokens = mask.sum(1).view(2, 4).sum(1).repeat_interleave(4)
    total, weight = aggregate(values, mask, reduction="prompt_mean", group_size=4)
    pieces = zip(values.split(sizes), mask.split(sizes), tokens.split(sizes), strict=True)
    parts = [aggregate(v, m, reduction="prompt_mean", prompt_tokens=t) for v, m, t in pieces]
    torch.testing.assert_close(sum(part[0] for part in parts), total)
    torch.testing.assert_close(sum(part[1] for part in parts), weight)
    assert weight == 1
