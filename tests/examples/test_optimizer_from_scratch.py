"""Lesson 1 steps as torch does, and its table shows what its text says."""

import pytest
import torch

from alignment_modules.training import schedules

SGD = {"lr": 0.05}
OPTIMIZERS = {
    "sgd": ("SGD", torch.optim.SGD, SGD, SGD),
    "momentum": ("SGD", torch.optim.SGD, SGD | {"momentum": 0.9}, SGD | {"momentum": 0.9}),
    "adam": ("Adam", torch.optim.Adam, {"lr": 0.02}, {"lr": 0.02}),
    "adam, l2": (
        "Adam",
        torch.optim.Adam,
        {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adamw": ("AdamW", torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.1}),
    "adamw, defaults": ("AdamW", torch.optim.AdamW, {}, {}),
}


@pytest.fixture
def lesson_1(lesson):
    return lesson("optimizer_from_scratch")


def weights():
    """Two weights, the second in a group with options of its own."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (3,))]
    return made, [{"params": made[:1]}, {"params": made[1:], "lr": 0.03}]


def gradients(made, step):
    """Of a loss that depends on the weights, and on noise as training does."""
    noise = torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    for weight in made:
        weight.grad = None
    ((torch.ones(4, dtype=torch.float64) @ made[0] + made[1] - noise) ** 4).sum().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
def test_50_steps_are_torchs(lesson_1, name, clipped):
    ours, theirs, our_options, their_options = OPTIMIZERS[name]
    (own, own_groups), (other, other_groups) = weights(), weights()
    optimizers = getattr(lesson_1, ours)(own_groups, **our_options), theirs(other_groups, **their_options)
    start = own[0].detach().clone()
    for step in range(50):
        for made in (own, other):
            gradients(made, step)
        if clipped or ours == "SGD":  # which explodes without
            norm = lesson_1.clip(own, 1.0)
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(other, 1.0), rtol=0, atol=1e-7)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            optimizer.step()
    assert float((own[0].detach() - start).abs().max()) > 0.01
    for weight, expected in zip(own, other, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_schedule_is_the_librarys_and_torchs(lesson_1, shape, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if shape == "constant":
        library = schedules.ConstantSchedule(optimizer, warmup_steps=warmup)
    else:
        kind = {"linear": schedules.LinearSchedule, "cosine": schedules.CosineSchedule}[shape]
        library = kind(optimizer, warmup_steps=warmup, total_steps=50)
    found = [lesson_1.schedule(step, 50, warmup, shape) for step in range(50)]
    assert found == pytest.approx([library.factor(step) for step in range(50)], abs=1e-12)
    if not warmup:
        after = {
            "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0),
            "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=50),
            "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50),
        }[shape](torch.optim.SGD([torch.zeros(1)], lr=1.0))
        for rate in found:
            assert rate == pytest.approx(after.get_last_lr()[0], abs=1e-7)
            after.optimizer.step()
            after.step()


def test_an_optimizer_goes_on_where_another_was(lesson_1):
    (whole, whole_groups), (cut, cut_groups) = weights(), weights()
    first, second = lesson_1.AdamW(whole_groups), lesson_1.AdamW(cut_groups)
    for step in range(10):
        for made, optimizer in ((whole, first), (cut, second)):
            gradients(made, step)
            optimizer.step()
        if step == 4:
            state, second = second.state_dict(), lesson_1.AdamW(cut_groups)
            second.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(whole, cut, strict=True))


def test_what_a_reader_sees(printed):
    out = printed("optimizer_from_scratch")
    losses = {line.split(",")[0]: [float(n) for n in line.split()[-5:]] for line in out.splitlines()[1:4]}
    assert losses["momentum 0.8"][3] < losses["SGD"][3] / 10
    assert losses["SGD"][4] != losses["SGD"][4]  # not a number: it exploded
    assert losses["Adam"][4] == losses["Adam"][3]  # the loss's scale is nothing to Adam
    kept = {line.split(",")[0]: [float(n) for n in line.split()[-2:]] for line in out.splitlines()[6:]}
    assert kept["Adam"][1] - kept["Adam"][0] > 0.3
    assert abs(kept["AdamW"][1] - kept["AdamW"][0]) < 0.05
