"""Prompts, sampling and comparisons for an engine over HTTP and the one in process."""

import torch

from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds

GENERATE = "/inference/v1/generate"
PARAMETERS = SamplingParameters(6, temperature=0.8, stop_token_ids=tuple(range(0, 40, 5)))
FILTERED = SamplingParameters(6, temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, stop_token_ids=(0, 5))
PROMPTS = Prompts.from_rows([[3, 8, 1, 9], [11], [2, 6, 4, 4, 21, 30]], torch.device("cpu"))
SEEDS = Seeds([5, 2, 9], seed=3, step=1, draw=1)


def changed(policy):
    """The same policy after an update that can be seen."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    return policy


def written(engine, policy, parameters=PARAMETERS, prompts=PROMPTS, seeds=SEEDS, num_samples=2):
    engine.push(policy)
    return engine.generate(prompts, parameters, num_samples=num_samples, seeds=seeds)


def assert_equal(found, wanted):
    """Tokens and ends exactly; log-probabilities to the rounding of another batch."""
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.truncated, wanted.truncated)
    torch.testing.assert_close(found.token_logps, wanted.token_logps, atol=1e-5, rtol=0)
    assert (found.support is None) == (wanted.support is None)
    if found.support is not None:
        sets = [
            one.take(torch.arange(one.sizes.numel())).excluded(slice(None), 40)
            for one in (found.support, wanted.support)
        ]
        assert torch.equal(*sets)
