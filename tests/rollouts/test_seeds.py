import numpy as np
import pytest
import torch

from alignment_modules.rollouts.seeds import sample_uniforms


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
