"""Divergences between two distributions: constants, closed forms, gradients, and the chunked twin."""

import math

import pytest
import torch

from alignment_modules.functional import LinearHead, distribution_divergence, linear_divergence

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]
TEACHER, STUDENT = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()


def heads(seed=0, *, rows=7, vocabulary=11, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student, teacher = ((drawn(rows, size), drawn(vocabulary, size), drawn(vocabulary)) for size in sizes)
    return student, teacher, options


def logits(hidden, head):
    found = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    return found if head.softcap is None else torch.tanh(found / head.softcap) * head.softcap


@pytest.mark.parametrize(
    ("kind", "jsd_beta", "expected"),
    [
        ("forward", 0.5, 0.634897),
        ("reverse", 0.5, 0.675806),
        ("jsd", 0.1, 0.055891),
        ("jsd", 0.5, 0.151358),
        ("jsd", 0.9, 0.058399),
    ],
)
def test_constants_of_three_tokens(kind, jsd_beta, expected):
    found = distribution_divergence(STUDENT.log(), TEACHER.log(), kind=kind, jsd_beta=jsd_beta)
    assert found.item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
def test_sums_over_the_vocabulary(kind, jsd_beta):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distribution_divergence(student, teacher, kind=kind, jsd_beta=jsd_beta, temperature=2.0)
    for row in range(4):
        s = [math.exp(value / 2) for value in student[row].tolist()]
        t = [math.exp(value / 2) for value in teacher[row].tolist()]
        s, t = [value / sum(s) for value in s], [value / sum(t) for value in t]
        m = [jsd_beta * b + (1 - jsd_beta) * a for a, b in zip(s, t, strict=True)]

        def kl(one, other):
            return sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))

        by_kind = {"forward": kl(t, s), "reverse": kl(s, t), "jsd": jsd_beta * kl(t, m) + (1 - jsd_beta) * kl(s, m)}
        assert found[row].item() == pytest.approx(by_kind[kind], rel=1e-12)


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
def test_gradients_of_logits(kind, jsd_beta):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_(True)
    options = {"kind": kind, "jsd_beta": jsd_beta, "temperature": 0.7}
    assert torch.autograd.gradcheck(lambda x: distribution_divergence(x, teacher, **options), student)


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
def test_a_teacher_that_is_the_student_moves_nothing(kind, jsd_beta):
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found = distribution_divergence(student, student, kind=kind, jsd_beta=jsd_beta)
    found.sum().backward()
    assert found.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_the_teacher_is_a_constant():
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    distribution_divergence(student, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
@pytest.mark.parametrize("chunk", [1, 3 * 11 * 8, 2**20], ids=["rows", "three rows", "at once"])
@pytest.mark.parametrize("caps", [(None, None), (2.0, 3.0), (None, 1.5)], ids=["plain", "capped", "teacher capped"])
def test_chunks_give_what_all_logits_give(kind, jsd_beta, chunk, caps):
    (hidden, weight, bias), (theirs, teacher_weight, teacher_bias), _ = heads()
    leaves = [part.clone().requires_grad_(True) for part in (hidden, weight, bias)]
    teacher_head = LinearHead(teacher_weight, teacher_bias, scale=0.6, softcap=caps[1])
    options = {"kind": kind, "jsd_beta": jsd_beta, "temperature": 0.8}
    upstream = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)

    expected = distribution_divergence(
        logits(leaves[0], LinearHead(*leaves[1:], scale=1.3, softcap=caps[0])), logits(theirs, teacher_head), **options
    )
    wanted = torch.autograd.grad(expected @ upstream, leaves)
    head = LinearHead(leaves[1], leaves[2], scale=1.3, softcap=caps[0])
    found = linear_divergence(leaves[0], head, theirs, teacher_head, max_chunk_bytes=chunk, **options)
    got = torch.autograd.grad(found @ upstream, leaves, retain_graph=True)
    again = torch.autograd.grad(found @ upstream, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(again, got, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
@pytest.mark.parametrize("chunk", [2 * 11 * 8, 2**20])
def test_gradients_of_chunks(kind, jsd_beta, chunk):
    (hidden, weight, bias), (theirs, *rest), _ = heads(3)

    def divergence(hidden, weight, bias):
        head, teacher = LinearHead(weight, bias, softcap=4.0), LinearHead(*rest)
        return linear_divergence(hidden, head, theirs, teacher, kind=kind, jsd_beta=jsd_beta, max_chunk_bytes=chunk)

    assert torch.autograd.gradcheck(divergence, [part.requires_grad_(True) for part in (hidden, weight, bias)])


@pytest.mark.parametrize("chunk", [3 * 50 * 2, 2**20])
def test_bfloat16_heads_reduce_in_float32(chunk):
    (hidden, weight, _), (theirs, teacher_weight, _), _ = heads(4, rows=9, vocabulary=50, dtype=torch.bfloat16)
    hidden, weight = hidden.requires_grad_(True), weight.requires_grad_(True)
    found = linear_divergence(
        hidden, LinearHead(weight), theirs, LinearHead(teacher_weight), kind="jsd", max_chunk_bytes=chunk
    )
    assert found.dtype == torch.float32
    exact = [part.detach().double().requires_grad_(True) for part in (hidden, weight)]
    expected = distribution_divergence(exact[0] @ exact[1].T, theirs.double() @ teacher_weight.double().T, kind="jsd")
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02)
    got, wanted = (torch.autograd.grad(v.sum(), leaves) for v, leaves in ((found, [hidden, weight]), (expected, exact)))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.05 * other.norm()


def test_autocast_computes_in_its_dtype():
    (hidden, weight, _), (theirs, teacher_weight, _), _ = heads(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_divergence(hidden, LinearHead(weight), theirs, LinearHead(teacher_weight))
    rounded = [part.bfloat16() for part in (hidden, weight, theirs, teacher_weight)]
    expected = linear_divergence(rounded[0], LinearHead(rounded[1]), rounded[2], LinearHead(rounded[3]))
    assert torch.equal(found, expected)


def test_no_position_gives_no_value_and_a_gradient_of_zero():
    (hidden, weight, bias), (theirs, *rest), _ = heads(rows=0)
    weight.requires_grad_(True)
    found = linear_divergence(hidden, LinearHead(weight, bias), theirs, LinearHead(*rest))
    assert found.shape == (0,)
    found.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.96, 1.0, math.nan])
def test_the_ends_of_the_mixture_are_refused(beta):
    with pytest.raises(ValueError, match=r"jsd_beta=.* from 0.05 to 0.95"):
        distribution_divergence(STUDENT.log(), TEACHER.log(), kind="jsd", jsd_beta=beta)


def test_vocabularies_of_two_sizes_are_refused():
    (hidden, weight, _), (theirs, teacher_weight, _), _ = heads()
    with pytest.raises(ValueError, match="11 and 10 tokens"):
        linear_divergence(hidden, LinearHead(weight), theirs, LinearHead(teacher_weight[:10]))
    with pytest.raises(ValueError, match="teacher_logits must have the shape"):
        distribution_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="kind='backward'"):
        distribution_divergence(torch.zeros(2, 3), torch.zeros(2, 3), kind="backward")
