"""Kept sets are gathered step by step, stored now or later: each token gets its own."""

import pytest
import torch

from alignment_modules.rollouts.kept_sets import KeptSets


@pytest.mark.parametrize("every", [1, 2, 8])
def test_each_token_gets_the_set_it_was_drawn_from(every):
    """Whenever they are stored, and though rows leave on the way."""
    generator = torch.Generator().manual_seed(0)
    lengths, wanted = torch.tensor([5, 1, 3, 4]), torch.ones(4, 5, 60, dtype=torch.bool)
    gathered, rows = KeptSets(4, 7), torch.arange(4)
    for time in range(5):
        kept = torch.rand(len(rows), 60, generator=generator) < 0.1 + 0.2 * time
        kept[:, time] = True
        wanted[rows, time] = kept
        gathered.add(time, rows, kept)
        if (time + 1) % every == 0:
            gathered.store()
        if time == 2:  # the rows that ended at 1 and 3 leave late
            rows = rows[lengths[rows] > 3]
    mask = torch.arange(5) < lengths[:, None]
    wanted[~mask] = True
    support = gathered.support(mask)
    assert support.shape == (4, 5)
    excluded = support.take(torch.arange(20)).excluded(slice(0, 20), 60)
    assert torch.equal(~excluded.view(4, 5, 60), wanted)
