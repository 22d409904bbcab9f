import pytest
import torch
import torch.nn.functional as F

from alignment_modules.policies import attention
from alignment_modules.policies.attention import plan_attention, segment_attention_forward
from alignment_modules.policies.segments import Segments


class Layer(torch.nn.Module):
    is_causal = True


def make_segments(lengths, parents):
    tokens = sum(lengths)
    ids = torch.arange(tokens)
    positions = [torch.arange(n) + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True)]
    return Segments(ids, torch.cat(positions), tuple(lengths), tuple(parents), ids, ids, ids, (1, tokens))


def dense_attention(segments, query, key, value):
    """Softmax over an explicit [tokens, tokens] mask, in the segments' own order."""
    owner = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths))
    parent = torch.tensor(segments.parents)[owner]
    same = owner[:, None] == owner[None]
    causal = torch.ones_like(same).tril()
    mask = (same & causal) | (parent[:, None] == owner[None])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * 0.3
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


CASES = {
    "one": ([5], [-1]),
    "equal": ([4, 4, 4], [-1, -1, -1]),
    "ragged": ([1, 7, 3, 7, 2], [-1] * 5),
    "family": ([3, 4, 2, 4, 1], [-1, 0, 0, 0, 0]),
    "families": ([3, 2, 2, 5, 3, 4, 2, 6, 3, 1, 2], [-1, 0, 0, -1, -1, 4, 4, -1, -1, 8, 8]),
    "parents of one length": ([3, 2, 2, 3, 2, 5], [-1, 0, 0, -1, 3, 3]),
}


@pytest.mark.parametrize("padding", [0, 1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_dense_attention(case, padding, monkeypatch):
    monkeypatch.setattr(attention, "_PADDING_PER_CALL_CPU", padding * 16**2)
    torch.manual_seed(0)
    segments = make_segments(*CASES[case])
    plan = plan_attention(segments, 16)
    query, key, value = (
        torch.randn(1, segments.tokens, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    )
    expected = dense_attention(segments, query, key, value)
    laid_out = [part[:, :, plan.gather] for part in (query, key, value)]
    output, _ = segment_attention_forward(Layer(), *laid_out, None, scaling=0.3, segment_plan=plan)
    found = output[:, plan.position]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_equal_lengths_share_a_call_and_padding_is_bounded(monkeypatch):
    segments = make_segments([4, 9, 4, 9, 5], [-1] * 5)
    monkeypatch.setattr(attention, "_PADDING_PER_CALL_CPU", 0)
    plan = plan_attention(segments, 16)
    assert [(bucket.width, len(bucket.rows)) for bucket in plan.buckets] == [(9, 2), (5, 1), (4, 2)]
    assert len(plan.gather) == segments.tokens
    assert plan_attention(segments, 16) is plan  # made once
    monkeypatch.setattr(attention, "_PADDING_PER_CALL_CPU", 2 * 16**2)
    merged = plan_attention(make_segments([4, 9, 4, 9, 5], [-1] * 5), 16)
    assert [(bucket.width, len(bucket.rows)) for bucket in merged.buckets] == [(9, 2), (5, 3)]
    assert len(merged.gather) == segments.tokens + 2


def test_the_whole_row_is_never_masked_at_once(monkeypatch):
    shapes = []
    original = F.scaled_dot_product_attention

    def record(query, key, value, **options):
        shapes.append((query.shape[2], key.shape[2], options["attn_mask"]))
        return original(query, key, value, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", record)
    segments = make_segments([6, 4, 3, 8], [-1, 0, 0, -1])
    plan = plan_attention(segments, 16)
    parts = [torch.randn(1, 2, len(plan.gather), 4) for _ in range(3)]
    segment_attention_forward(Layer(), *parts, None, segment_plan=plan)
    assert max(q for q, _, _ in shapes) == 8
    assert all(mask is None or mask.shape == (q, k) for q, k, mask in shapes)
    assert all((mask is None) == (q == k) for q, k, mask in shapes)


def test_without_a_plan_it_is_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 4) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    for given in (None, mask):
        ours, _ = segment_attention_forward(Layer(), query, key, value, given, scaling=0.5)
        theirs, _ = sdpa_attention_forward(Layer(), query, key, value, given, scaling=0.5)
        assert torch.equal(ours, theirs)


def test_a_plan_made_in_inference_mode_serves_training():
    segments = make_segments([3, 2, 2], [-1, 0, 0])
    with torch.inference_mode():
        plan = plan_attention(segments, 16)
        plan.mask(2, 3)
    parts = [torch.randn(1, 2, 7, 4, requires_grad=True) for _ in range(3)]
    output, _ = segment_attention_forward(Layer(), *parts, None, segment_plan=plan)
    output.sum().backward()
    assert all(part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize(
    ("request_", "message"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.ones(2)}, "s_aux"), ({"sliding_window": 4}, "sliding_window=4")],
)
def test_attention_that_a_plan_cannot_give_is_refused(request_, message):
    plan = plan_attention(make_segments([5], [-1]), 16)
    parts = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        segment_attention_forward(Layer(), *parts, None, segment_plan=plan, **request_)
    segment_attention_forward(Layer(), *parts, None, segment_plan=plan, sliding_window=5)
