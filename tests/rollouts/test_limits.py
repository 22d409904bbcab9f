"""Limits of single prompts: a completion that reaches its own is the beginning of what it would have been."""

import pytest
import torch

from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.engines import EngineError, InProcessEngine
from alignment_modules.rollouts.limits import check_kept, check_limits
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds

PROMPTS = Prompts.from_rows([[3, 8, 1, 9], [11], [2, 6, 4, 4, 21, 30], [5, 5]], torch.device("cpu"))
SEEDS = Seeds([5, 2, 9, 4], seed=3, step=1)
LIMITS = (2, 9, 1, 5)
SAMPLED = SamplingParameters(9, temperature=0.9, stop_token_ids=(3, 7, 11))
FILTERED = SamplingParameters(9, temperature=0.9, top_k=12, top_p=0.9, stop_token_ids=(3, 7, 11))
GREEDY = SamplingParameters(9, greedy=True, stop_token_ids=(3,))


def completions(policy, prompts, parameters, num_samples=3):
    engine = InProcessEngine(Codec())
    engine.push(policy)
    return engine.generate(prompts, parameters, num_samples=num_samples, seeds=SEEDS)


@pytest.mark.parametrize("path", ["recompute", "cached", "fast"])
@pytest.mark.parametrize("parameters", [SAMPLED, FILTERED, GREEDY], ids=["sampled", "filtered", "greedy"])
def test_a_completion_is_the_beginning_of_the_one_without_a_limit(make_policy, force, path, parameters):
    force(path)
    policy = make_policy()
    free, held = (completions(policy, prompts, parameters) for prompts in (PROMPTS, PROMPTS.limited(LIMITS)))
    limits = torch.tensor(LIMITS).repeat_interleave(3)
    lengths = free.mask.sum(dim=1)
    assert (lengths > limits).any()
    assert (lengths <= limits).any()
    assert torch.equal(held.mask.sum(dim=1), torch.minimum(lengths, limits))
    width = held.ids.shape[1]
    assert torch.equal(held.ids, free.ids[:, :width] * held.mask)
    torch.testing.assert_close(held.token_logps, free.token_logps[:, :width] * held.mask, atol=1e-5, rtol=0)
    assert torch.equal(held.truncated, free.truncated | (lengths > limits))  # one that stops at its limit has stopped
    if free.support is not None:
        everywhere = torch.arange(held.mask.numel()).view(held.mask.shape)
        rows = everywhere // width * free.ids.shape[1] + everywhere % width
        wanted = free.support.take(rows.masked_fill(~held.mask, -1))
        assert torch.equal(held.support.sizes, wanted.sizes)
        assert torch.equal(held.support.ids, wanted.ids)


def test_the_decoder_is_asked_for_no_more_than_the_longest_limit(make_policy, force):
    force("cached")
    policy, asked = make_policy(), []
    policy.register_forward_pre_hook(lambda *_: asked.append(1))
    never = SamplingParameters(9, temperature=0.9)
    completions(policy, PROMPTS, never)
    free = len(asked)
    completions(policy, PROMPTS.limited((2, 1, 2, 2)), never)
    assert (free, len(asked) - free) == (9, 2)


def test_a_limit_beyond_the_parameters_changes_nothing(make_policy):
    policy = make_policy()
    free, held = (completions(policy, p, SAMPLED) for p in (PROMPTS, PROMPTS.limited((50, 9, None, 10))))
    assert torch.equal(free.ids, held.ids)
    assert torch.equal(free.truncated, held.truncated)


@pytest.mark.parametrize("limits", [(1, 2, 3), (1, 2, 3, 0)])
def test_prompts_refuse_other_limits(limits):
    with pytest.raises(ValueError, match=r"limits=\[1, 2, 3.*at least 1 for each of 4 prompts"):
        PROMPTS.limited(limits)


@pytest.mark.parametrize("limit", [0, -1, 9, 2.0, True, "3"])
def test_a_batch_with_another_limit_is_refused_by_row_and_source(limit):
    batch = {"completion_limits": [8, limit], "source_name": ["math", "code"]}
    with pytest.raises(ValueError, match=r"row 1 of a batch \(source 'code'\) has completion_limits=.*from 1 to .*=8"):
        check_limits(batch, 2, 8)


def test_a_batch_with_too_few_limits_is_refused():
    with pytest.raises(ValueError, match="`completion_limits` has 2 numbers for 3 rows"):
        check_limits({"completion_limits": [1, 2]}, 3)


def test_an_engine_that_writes_on_is_told_of(make_policy):
    found = completions(make_policy(), PROMPTS, SamplingParameters(4, temperature=1.0), num_samples=1)
    assert check_kept(found, (4, 4, 4, 4), "Mine") is found
    with pytest.raises(EngineError, match=r"Mine gave 4 tokens where the prompt's own limit is 3.*prompts.limits"):
        check_kept(found, (4, 4, 3, 4), "Mine")


def test_a_turn_has_limits_of_its_own(make_policy):
    """They end it, and change no token before."""
    engine, found = InProcessEngine(Codec()), []
    engine.push(make_policy())
    for limits in (None, [2, 50]):
        session = engine.open(PROMPTS.limited(LIMITS), SAMPLED, seeds=SEEDS)
        assert [len(row.context) - row.start <= limit for row, limit in zip(session.rows, LIMITS, strict=True)] == [
            True
        ] * 4
        found.append(engine.extend(session, [1, 3], [[3], [4, 5]], limits=limits))
    free, held = found
    assert free.mask[0].sum() > 2
    assert held.mask.sum(dim=1).tolist() == [2, int(free.mask[1].sum())]
    assert torch.equal(held.ids, free.ids[:, : held.ids.shape[1]] * held.mask)
    assert held.truncated.tolist() == [True, bool(free.truncated[1])]


@pytest.mark.parametrize("limits", [[0, 3], [3]])
def test_a_turn_refuses_other_limits(make_policy, limits):
    engine = InProcessEngine(Codec())
    engine.push(make_policy())
    session = engine.open(PROMPTS, SAMPLED, seeds=SEEDS)
    with pytest.raises(ValueError, match=r"limits=.* must hold a number of at least 1 for each of the 2 rows"):
        engine.extend(session, [0, 1], [[3], [4]], limits=limits)
