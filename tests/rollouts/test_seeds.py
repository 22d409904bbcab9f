import numpy as np
import pytest
import torch

from alignment_modules.rollouts.seeds import sample_uniforms, token_draws


def numpy_uniforms(seed, step, index, sample, length, turn=0):
    key = np.random.SeedSequence((seed, step)).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, sample, index, turn])).random(length)


def test_equal_numpys_own_generator():
    drawn = sample_uniforms(11, 5, [3, 2**40], 3, 9)
    for row, (index, sample) in enumerate((i, g) for i in (3, 2**40) for g in range(3)):
        np.testing.assert_array_equal(drawn[row].numpy(), numpy_uniforms(11, 5, index, sample, 9))


def test_each_turn_draws_numbers_of_its_own():
    drawn = sample_uniforms(11, 5, [3], 2, 9, turn=4)
    np.testing.assert_array_equal(drawn[1].numpy(), numpy_uniforms(11, 5, 3, 1, 9, turn=4))
    assert not torch.isclose(drawn, sample_uniforms(11, 5, [3], 2, 9)).any()


def test_each_draw_of_a_step_draws_numbers_of_its_own():
    drawn = sample_uniforms(11, 5, [3], 2, 9, draw=2)
    assert not torch.isclose(drawn, sample_uniforms(11, 5, [3], 2, 9)).any()
    assert not torch.isclose(drawn, sample_uniforms(11, 5, [3], 2, 9, draw=1)).any()
    assert torch.equal(sample_uniforms(11, 5, [9, 3], 2, 9, draw=2)[2:], drawn)


def test_a_row_depends_on_its_own_names_only():
    batch = sample_uniforms(1, 2, [8, 4, 6], 4, 30)
    alone = sample_uniforms(1, 2, [4], 2, 12)
    assert torch.equal(batch[4:6, :12], alone)
    for other in (
        sample_uniforms(0, 2, [4], 2, 12),
        sample_uniforms(1, 3, [4], 2, 12),
        sample_uniforms(1, 2, [5], 2, 12),
    ):
        assert not torch.isclose(other, alone).any()


def test_uniform_and_uncorrelated():
    drawn = sample_uniforms(0, 0, range(100), 10, 100)
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square, 99 degrees of freedom, p = 0.001
    rows = torch.corrcoef(drawn[:50]) - torch.eye(50)
    assert rows.abs().max() < 0.5


@pytest.mark.parametrize(
    ("name", "arguments"), [("seed", (-1, 0, [0])), ("step", (0, -1, [0])), ("prompt_indices", (0, 0, [3, -2]))]
)
def test_negative_names_are_refused(name, arguments):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -"):
        sample_uniforms(*arguments, 1, 1)


def rows_of(numbers, extra=0, side="right"):
    """Prompts and two completions each, with so much padding; what a row holds depends on its number alone."""

    def padded(rows):
        width = max(map(len, rows)) + extra
        ids, mask = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.bool)
        for row, kept in zip(rows, range(len(rows)), strict=True):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[kept, place], mask[kept, place] = torch.tensor(row), True
        return ids, mask

    prompts = [[n + 1] * (1 + n % 3) for n in numbers]
    completions = [[n % 5, 7 + g] + [n] * (n % 4) for n in numbers for g in range(2)]
    return *padded(prompts), *padded(completions)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_tokens_draw_depends_on_its_row_and_place_alone(side):
    def drawn(*arguments, **options):
        *_, mask = rows = rows_of(*arguments, **options)
        draws = token_draws(1, 2, *rows)
        return [row[kept].tolist() for row, kept in zip(draws, mask, strict=True)]

    alone = drawn(range(6))
    assert drawn(range(6), extra=4, side=side) == alone
    turned = drawn([5, 0, 3])
    assert turned == [alone[2 * n + g] for n in (5, 0, 3) for g in range(2)]
    values = [value for row in alone for value in row]
    assert len(set(values)) == len(values)


def test_draws_are_uniform_and_change_with_seed_and_step():
    rows = rows_of(range(2000))
    mask = rows[-1]
    one = token_draws(0, 0, *rows)[mask]
    assert 0 <= one.min() < 0.002
    assert 0.998 < one.max() < 1
    assert one.mean() == pytest.approx(0.5, abs=0.01)
    assert one.std() == pytest.approx(12**-0.5, abs=0.01)
    for seed, step in ((1, 0), (0, 1)):
        other = token_draws(seed, step, *rows)[mask]
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05
    neighbours = torch.corrcoef(torch.stack([one[:-1], one[1:]]))
    assert abs(neighbours[0, 1]) < 0.05


def test_no_rows():
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert token_draws(0, 0, empty, empty.bool(), empty, empty.bool()).shape == (0, 3)
