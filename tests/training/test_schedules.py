"""Learning-rate schedules against closed forms written out here."""

import io
import math

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable
from torch import nn

from alignment_modules.training.schedules import (
    ConstantSchedule,
    CosineSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    Schedule,
    WarmupStableDecaySchedule,
    bind_total_steps,
)

BASE = 0.2


def make_optimizer(lr=BASE, groups=1):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(groups)], lr=lr)


def used_rates(scheduler, steps):
    """The rate that each optimizer step really uses."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def warm(warmup, after):
    return lambda s: (s + 1) / warmup if s < warmup else after(s)


CASES = {
    "constant": (lambda o: ConstantSchedule(o, warmup_steps=4), warm(4, lambda s: 1.0)),
    "constant_cold": (lambda o: ConstantSchedule(o), lambda s: 1.0),
    "linear": (
        lambda o: LinearSchedule(o, warmup_steps=3, total_steps=10, floor=0.1),
        warm(3, lambda s: 0.1 + 0.9 * max(0.0, (10 - s) / 7)),
    ),
    "linear_cold": (lambda o: LinearSchedule(o, total_steps=8), lambda s: max(0.0, 1 - s / 8)),
    "cosine": (
        lambda o: CosineSchedule(o, warmup_steps=2, total_steps=10, floor=0.25),
        warm(2, lambda s: 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * min(1.0, (s - 2) / 8)))),
    ),
    "all_warmup": (lambda o: CosineSchedule(o, warmup_steps=5, total_steps=5), warm(5, lambda s: 0.0)),
    "wsd_linear": (
        lambda o: WarmupStableDecaySchedule(o, warmup_steps=2, total_steps=10, decay_steps=4, floor=0.1),
        warm(2, lambda s: 1.0 if s < 6 else 0.1 + 0.9 * max(0.0, (10 - s) / 4)),
    ),
    "wsd_sqrt": (
        lambda o: WarmupStableDecaySchedule(o, total_steps=10, decay_share=0.5, shape="sqrt"),
        lambda s: 1.0 if s < 5 else 1 - math.sqrt(min(1.0, (s - 5) / 5)),
    ),
    "wsd_cosine": (
        lambda o: WarmupStableDecaySchedule(o, total_steps=10, decay_steps=5, shape="cosine"),
        lambda s: 1.0 if s < 5 else 0.5 * (1 + math.cos(math.pi * min(1.0, (s - 5) / 5))),
    ),
    "wsd_no_decay": (lambda o: WarmupStableDecaySchedule(o, total_steps=12, decay_steps=0), lambda s: 1.0),
    "inverse_sqrt": (
        lambda o: InverseSquareRootSchedule(o, warmup_steps=4),
        warm(4, lambda s: math.sqrt(4 / (s + 1))),
    ),
    "inverse_sqrt_timescale": (
        lambda o: InverseSquareRootSchedule(o, warmup_steps=2, timescale=9),
        warm(2, lambda s: math.sqrt(9 / (9 + s - 1))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rate_of_every_step_is_the_closed_form(name):
    build, closed_form = CASES[name]
    rates = used_rates(build(make_optimizer()), 12)
    assert rates == pytest.approx([BASE * closed_form(s) for s in range(12)], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_first_step_learns(name):
    build, _ = CASES[name]
    assert build(make_optimizer()).optimizer.param_groups[0]["lr"] > 0


@pytest.mark.parametrize("split", [0, 1, 3, 7])
@pytest.mark.parametrize("name", CASES)
def test_resume_equals_the_uninterrupted_run(name, split):
    build, _ = CASES[name]
    whole = used_rates(build(make_optimizer()), 12)
    first = build(make_optimizer())
    head = used_rates(first, split)
    buffer = io.BytesIO()
    torch.save({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = build(make_optimizer(lr=99.0))
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["scheduler"])
    assert head + used_rates(second, 12 - split) == whole


def test_a_resumed_run_follows_the_total_it_is_given_now():
    first = LinearSchedule(make_optimizer(), total_steps=4)
    used_rates(first, 2)
    second = LinearSchedule(make_optimizer(), total_steps=8)
    second.load_state_dict(first.state_dict())
    assert used_rates(second, 2) == pytest.approx([BASE * 6 / 8, BASE * 5 / 8])
    unbound = LinearSchedule(make_optimizer())
    unbound.load_state_dict(first.state_dict())
    assert unbound.total_steps == 4


def test_each_group_keeps_its_own_base_rate_and_tensor_rates_work():
    optimizer = make_optimizer(groups=2)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5, dtype=torch.float64)
    scheduler = LinearSchedule(optimizer)
    rate = optimizer.param_groups[1]["lr"]
    bind_total_steps(scheduler, 4)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASE * 0.75)
    assert optimizer.param_groups[1]["lr"] is rate
    assert rate.item() == pytest.approx(0.375)


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, WarmupStableDecaySchedule])
def test_bound_total_gives_the_same_rates_as_a_given_one(kind):
    bound = kind(make_optimizer(), warmup_steps=2)
    bind_total_steps(bound, 9)
    assert used_rates(bound, 9) == used_rates(kind(make_optimizer(), warmup_steps=2, total_steps=9), 9)


def test_binding_does_not_replace_what_the_user_gave():
    given = LinearSchedule(make_optimizer(), total_steps=5)
    bind_total_steps(given, 100)
    assert given.total_steps == 5


def test_binding_leaves_foreign_schedulers_alone():
    foreign = torch.optim.lr_scheduler.StepLR(make_optimizer(), step_size=2)
    before = dict(foreign.state_dict())
    bind_total_steps(foreign, 7)
    assert foreign.state_dict() == before


def test_a_run_without_end():
    endless = InverseSquareRootSchedule(make_optimizer(), warmup_steps=3)
    bind_total_steps(endless, math.inf)
    assert used_rates(endless, 3)[-1] == BASE
    with pytest.raises(ValueError, match=r"total_steps=inf: CosineSchedule needs a run with an end.*max_steps"):
        bind_total_steps(CosineSchedule(make_optimizer()), math.inf)


def test_a_run_of_batches_that_cannot_be_counted():
    with pytest.raises(
        ValueError, match=r"total_steps=-1: CosineSchedule .* set the Trainer's max_steps \(.*no length"
    ):
        bind_total_steps(CosineSchedule(make_optimizer()), -1)


def test_stepping_without_a_total_is_refused():
    scheduler = CosineSchedule(make_optimizer())
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match="total_steps=None: CosineSchedule needs"):
        scheduler.step()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.99])
def test_a_rehearsal_may_be_shorter_than_the_phases(share):
    for warmup in (0, 1, 7):
        scheduler = WarmupStableDecaySchedule(make_optimizer(), warmup_steps=warmup, decay_share=share)
        bind_total_steps(scheduler, 1, strict=False)
        assert scheduler.total_steps >= 1
        used_rates(scheduler, 1)
    cosine = CosineSchedule(make_optimizer(), warmup_steps=10)
    bind_total_steps(cosine, 1, strict=False)
    assert cosine.total_steps == 10


BAD = {
    "negative warmup": (lambda o: ConstantSchedule(o, warmup_steps=-1), r"warmup_steps=-1 must be an integer from 0"),
    "warmup beyond total": (lambda o: CosineSchedule(o, 11, 10), r"warmup_steps=11 .*total_steps=10"),
    "zero total": (lambda o: LinearSchedule(o, total_steps=0), r"total_steps=0 must be an integer from 1"),
    "floor": (lambda o: CosineSchedule(o, floor=1.5), r"floor=1.5 must be a finite number from 0 to 1"),
    "phases": (
        lambda o: WarmupStableDecaySchedule(o, 6, 10, decay_steps=5),
        r"warmup_steps=6 and decay_steps=5 together .*total_steps=10",
    ),
    "decay": (lambda o: WarmupStableDecaySchedule(o, decay_steps=-2), r"decay_steps=-2 must be an integer from 0"),
    "share": (
        lambda o: WarmupStableDecaySchedule(o, decay_share=0.0),
        r"decay_share=0.0 must be a finite number in \(0, 1\]",
    ),
    "full share": (lambda o: WarmupStableDecaySchedule(o, 2, decay_share=1.0), r"decay_share=1.0 leaves no room"),
    "shape": (lambda o: WarmupStableDecaySchedule(o, shape="cubic"), r"shape='cubic' must be 'linear' or 'cosine'"),
    "timescale": (lambda o: InverseSquareRootSchedule(o, timescale=0), r"timescale=0 must be an integer from 1"),
    "bound total": (lambda o: bind_total_steps(CosineSchedule(o, 11), 10), r"warmup_steps=11 .*total_steps=10"),
    "foreign state": (lambda o: ConstantSchedule(o).load_state_dict({"foo": 1}), r"lacks \['last_epoch', 'base_lrs'\]"),
    "other groups": (
        lambda o: ConstantSchedule(o).load_state_dict(ConstantSchedule(make_optimizer(groups=2)).state_dict()),
        r"base_lrs for 2 parameter groups, the optimizer has 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    act, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        act(make_optimizer())


class Holder:
    def __init__(self, lr_scheduler: LRSchedulerCallable | None = None):
        self.lr_scheduler = lr_scheduler


@pytest.mark.parametrize(
    ("class_path", "init_args", "rates"),
    [
        (
            "alignment_modules.training.schedules.CosineSchedule",
            {"warmup_steps": 2, "total_steps": 6, "floor": 0.5},
            None,
        ),
        ("alignment_modules.training.schedules.WarmupStableDecaySchedule", {"total_steps": 6, "shape": "sqrt"}, None),
        ("alignment_modules.training.schedules.ConstantSchedule", {}, [BASE] * 4),
        ("CosineSchedule", {"total_steps": 6}, None),
        ("torch.optim.lr_scheduler.StepLR", {"step_size": 2, "gamma": 0.1}, [BASE, BASE, BASE / 10, BASE / 10]),
    ],
)
def test_schedules_come_from_yaml_as_the_command_line_takes_them(class_path, init_args, rates):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    config = parser.parse_object({"model": {"lr_scheduler": {"class_path": class_path, "init_args": init_args}}})
    scheduler = parser.instantiate_classes(config).model.lr_scheduler(make_optimizer())
    if rates is None:
        kind = {"Cosine": CosineSchedule, "Warmup": WarmupStableDecaySchedule}[class_path.rpartition(".")[2][:6]]
        assert type(scheduler) is kind
        rates = used_rates(kind(make_optimizer(), **init_args), 4)
    assert used_rates(scheduler, 4) == pytest.approx(rates)


def test_a_typo_in_yaml_is_refused():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    bad = {"class_path": "CosineSchedule", "init_args": {"warmup": 2}}
    with pytest.raises(Exception, match="warmup"):
        parser.parse_object({"model": {"lr_scheduler": bad}})


def test_schedule_stays_out_of_the_way_of_torch():
    assert issubclass(Schedule, torch.optim.lr_scheduler.LRScheduler)
