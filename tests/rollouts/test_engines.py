"""Sessions: a turn that keeps its cache gives what a fresh run of the whole context gives, for every decoder."""

from dataclasses import replace

import pytest
import torch

from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.decoders.base import RecomputeDecoder
from alignment_modules.rollouts.decoders.cached import CachedDecoder
from alignment_modules.rollouts.decoders.llama.decoder import FastDecoder
from alignment_modules.rollouts.engines import InProcessEngine
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import draw, draw_uniforms
from alignment_modules.rollouts.seeds import Seeds

PARAMETERS = SamplingParameters(6, temperature=0.8, stop_token_ids=tuple(range(0, 40, 5)))
PROMPTS = [[3, 8, 1, 9], [11], [2, 6, 4, 4, 21, 30]]
SEEDS = Seeds([5, 2, 9], seed=3, step=1)
# Rows and what is appended: some end after each turn, and tool results are of unequal length.
TURNS = [([0, 2, 3, 5], [[12, 13], [14], [15, 16, 17, 18, 19], [1, 2]]), ([2, 5], [[31, 32, 33], [34]])]

POLICIES = {
    "fast": ("llama", {}, FastDecoder),
    "fast qwen3": ("qwen3", {"head_dim": 16}, FastDecoder),
    "cached": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, CachedDecoder),
    "cached llama": ("llama", {"attention_bias": True}, CachedDecoder),
    "sliding window": ("gemma2", {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}, CachedDecoder),
    "bigram": (None, {}, RecomputeDecoder),
}


@pytest.fixture(params=POLICIES)
def case(request, make_policy, bigram):
    kind, options, decoder = POLICIES[request.param]
    if kind is None:
        torch.manual_seed(0)
        return type(bigram)(40), decoder
    return make_policy(kind, **options), decoder


def opened(policy, num_samples=2, parameters=PARAMETERS):
    engine = InProcessEngine(Codec())
    engine.push(policy)
    prompts = Prompts.from_rows(PROMPTS, torch.device("cpu"))
    return engine, engine.open(prompts, parameters, num_samples=num_samples, seeds=SEEDS)


def fresh(policy, decoder, contexts, rows, turn):
    """The same turn by a decoder that runs every context from its start."""
    made = decoder(policy, Prompts.from_rows(contexts, torch.device("cpu")), 1, PARAMETERS.max_completion_length)
    uniforms = draw_uniforms(SEEDS, PARAMETERS, 2, torch.device("cpu"), turn)[:, rows]
    with torch.no_grad():
        return draw(made, len(rows), PARAMETERS, uniforms)


def tokens(completions):
    return [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]


def test_a_turn_equals_a_fresh_run_of_the_whole_context(case):
    policy, decoder = case
    engine, session = opened(policy)
    assert type(session.decoder) is decoder
    alone = engine.generate(Prompts.from_rows(PROMPTS, torch.device("cpu")), PARAMETERS, num_samples=2, seeds=SEEDS)
    assert tokens(session.turn) == tokens(alone)
    torch.testing.assert_close(session.turn.token_logps, alone.token_logps, atol=1e-5, rtol=0)
    contexts = [
        [*prompt, *written]
        for prompt, written in zip([prompt for prompt in PROMPTS for _ in range(2)], tokens(alone), strict=True)
    ]
    for number, (rows, appended) in enumerate(TURNS, start=1):
        got = engine.extend(session, rows, appended)
        for row, new in zip(rows, appended, strict=True):
            contexts[row] += new
        wanted = fresh(policy, decoder, [contexts[row] for row in rows], rows, number)
        assert tokens(got) == tokens(wanted)
        assert torch.equal(got.truncated, wanted.truncated)
        torch.testing.assert_close(got.token_logps, wanted.token_logps, atol=1e-5, rtol=0)
        for row, new in zip(rows, tokens(got), strict=True):
            contexts[row] += new
    whole = engine.close(session)
    starts = [len(prompt) for prompt in PROMPTS for _ in range(2)]
    assert tokens(whole) == [context[start:] for context, start in zip(contexts, starts, strict=True)]
    assert (whole.mask & ~whole.own).sum(dim=1).tolist() == [2, 0, 1 + 3, 5, 0, 2 + 1]
    for row, (context, start) in enumerate(zip(contexts, starts, strict=True)):
        with torch.no_grad():
            output = policy(torch.tensor([context]))
        logits = getattr(output, "logits", output)[0, start - 1 : -1].double()
        logps = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(context[start:])[:, None])[:, 0]
        own = whole.own[row][: len(context) - start]
        torch.testing.assert_close(whole.token_logps[row][: len(own)][own].double(), logps[own], atol=1e-4, rtol=0)


def test_a_session_tells_what_its_turns_were_drawn_from(case):
    """Of each of the policy's tokens; what others wrote was drawn from nothing."""
    policy, _ = case
    engine, session = opened(policy, parameters=replace(PARAMETERS, top_p=0.8, top_k=20))
    turns = [(list(range(6)), session.turn)]
    for rows, appended in TURNS:
        turns.append((rows, engine.extend(session, rows, appended)))
    whole = engine.close(session)
    sizes = iter(torch.cat([turn.support.sizes[i][turn.mask[i]] for row in range(6) for turn, i in of(turns, row)]))
    for row in range(6):
        assert whole.support.sizes[row][~whole.own[row]].eq(0).all()
        assert whole.support.sizes[row][whole.own[row]].tolist() == [
            int(next(sizes)) for _ in range(int(whole.own[row].sum()))
        ]
    excluded = whole.support.take(torch.arange(whole.ids.numel())).excluded(slice(0, whole.ids.numel()), 40)
    for row, (context, start) in enumerate((one.context, one.start) for one in session.rows):
        with torch.no_grad():
            output = policy(torch.tensor([context]))
        logits = getattr(output, "logits", output)[0, start - 1 : -1].double() / 0.8
        outside = excluded.view(*whole.ids.shape, 40)[row, : len(logits)]
        logps = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
        logps = logps.gather(1, torch.tensor(context[start:])[:, None])[:, 0]
        own = whole.own[row][: len(logits)]
        torch.testing.assert_close(whole.token_logps[row][: len(own)][own].double(), logps[own], atol=1e-4, rtol=0)


def of(turns, row):
    return [(turn, rows.index(row)) for rows, turn in turns if row in rows]


def test_what_is_in_the_cache_is_not_run_again(make_policy):
    policy = make_policy("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    engine, session = opened(policy)
    written = session.turn.mask.sum(dim=1)
    shapes = []
    policy.register_forward_hook(
        lambda _, args, options, output: shapes.append(options["input_ids"].shape), with_kwargs=True
    )
    engine.extend(session, *TURNS[0])
    # At most the token drawn last and what was appended.
    assert shapes[0] == (
        4,
        max(
            len(new) + (int(written[row]) == session.parameters.max_completion_length)
            for row, new in zip(*TURNS[0], strict=True)
        ),
    )
    fast = opened(make_policy())
    lengths = [len(row.context) for row in fast[1].rows]
    decoder = fast[1].decoder
    fast[0].extend(fast[1], *TURNS[0])
    assert fast[1].decoder is decoder
    assert all(
        lengths[row] - 1 <= int(cached) <= lengths[row] for row, cached in zip(TURNS[0][0], decoder.cached, strict=True)
    )


def test_after_a_push_the_context_is_run_again(make_policy):
    policy = make_policy()
    engine, session = opened(policy)
    contexts = [list(row.context) for row in session.rows]
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.3)
    engine.push(policy)
    got = engine.extend(session, *TURNS[0])
    grown = [contexts[row] + new for row, new in zip(*TURNS[0], strict=True)]
    wanted = fresh(policy, FastDecoder, grown, TURNS[0][0], 1)
    assert tokens(got) == tokens(wanted)
    torch.testing.assert_close(got.token_logps, wanted.token_logps, atol=1e-5, rtol=0)
    assert engine.version() == 2


def test_a_greedy_session_of_one_token_a_turn(make_policy):
    greedy = SamplingParameters(1, greedy=True)
    for policy in (make_policy(), make_policy(attention_bias=True)):
        engine, session = opened(policy, num_samples=1, parameters=greedy)
        assert len(engine.extend(session, [0, 1, 2], [[1], [2, 3], [4]]).ids) == 3
        whole = engine.close(session)
        context = torch.tensor([PROMPTS[1] + whole.ids[1][whole.mask[1]].tolist()])
        assert whole.ids[1].tolist()[3] == int(policy(context[:, :-1]).logits[0, -1].argmax())


@pytest.mark.parametrize(
    ("rows", "appended"), [([], []), ([2, 0], [[1], [1]]), ([0, 1], [[1], []]), ([9], [[1]]), ([0], [[1], [2]])]
)
def test_rows_that_cannot_go_on_are_refused(make_policy, rows, appended):
    engine, session = opened(make_policy())
    with pytest.raises(ValueError, match="must be some of the open rows"):
        engine.extend(session, rows, appended)
    engine.extend(session, [0, 3], [[1], [2]])
    with pytest.raises(ValueError, match=r"rows=\[1\] .*open rows \[0, 3\]"):
        engine.extend(session, [1], [[1]])


def test_an_engine_without_a_policy_says_so():
    with pytest.raises(ValueError, match="push one first"):
        InProcessEngine(Codec()).generate(Prompts.from_rows([[1]], torch.device("cpu")), PARAMETERS, seeds=SEEDS)
