"""Lesson 2 ends with the weights of `SFTModule` under Lightning's Trainer, bit for bit, also where it was killed."""

import copy
import os
import signal
import subprocess
import sys
from functools import partial

import lightning as L
import pytest
import torch

from alignment_modules import SFTModule
from alignment_modules.training.schedules import CosineSchedule
from tests.examples.conftest import EXAMPLES

STEPS = 12
KILLED = """
import os, signal, torch
from pathlib import Path
from trainer_from_scratch import TinyLanguageModel, Trainer, counting_rows

torch.set_num_threads({threads})
torch.manual_seed(0)
trainer = Trainer(TinyLanguageModel(dropout=0.1), counting_rows(), steps={steps})
torch.manual_seed(1)
for step, _ in enumerate(trainer.fit()):
    if step == 6:
        trainer.save(Path("last.ckpt"))
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def lesson_2(lesson):
    return lesson("trainer_from_scratch")


@pytest.fixture
def adapted(lesson):
    """Lesson 1's AdamW as a torch optimizer, which Lightning wants."""
    own = lesson("optimizer_from_scratch").AdamW

    class Adapted(torch.optim.Optimizer):
        def __init__(self, groups, lr):
            defaults = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
            super().__init__(groups, defaults)
            self.own = own(self.param_groups)
            self.own.param_groups = self.param_groups

        def step(self, closure=None):
            loss = closure()
            self.own.step()
            return loss

    return Adapted


class SeedOnce(L.Callback):
    """Dropout begins where the lesson's did, whatever was drawn to set up the run."""

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(1)


def from_scratch(lesson, make_optimizer=None, **options):
    options |= {} if make_optimizer is None else {"make_optimizer": make_optimizer}
    torch.manual_seed(0)
    trainer = lesson.Trainer(lesson.TinyLanguageModel(dropout=0.1), lesson.counting_rows(), steps=STEPS, **options)
    start = copy.deepcopy(trainer.model)
    torch.manual_seed(1)
    losses = list(trainer.fit())
    return trainer, start, losses


def by_the_module(trainer, start, make_optimizer, train, **options):
    """Trains `start` on the same micro-batches."""
    module = SFTModule(
        policy=start,
        optimizer=lambda groups: make_optimizer(groups, lr=trainer.lr),
        lr_scheduler=lambda optimizer: CosineSchedule(optimizer, warmup_steps=5),
    )
    batches = [batch for step in range(STEPS) for batch in trainer.micro_batches(step)]
    options |= {"accumulate_grad_batches": trainer.accumulate, "gradient_clip_val": trainer.max_norm}
    found = train(module, batches, callbacks=[SeedOnce()], **options)
    return module, float(found.callback_metrics["train/loss"])


def assert_same_bits(model, other):
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_bit_equal_to_the_module_with_lesson_1s_optimizer(lesson_2, adapted, train, bf16):
    trainer, start, losses = from_scratch(lesson_2, bf16=bf16)
    precision = "bf16-mixed" if bf16 else "32-true"
    module, loss = by_the_module(trainer, start, adapted, train, precision=precision)
    assert_same_bits(trainer.model, module.policy)
    assert losses[-1] < losses[0] - 0.5
    assert len(losses) == STEPS
    assert loss == pytest.approx(losses[-1], rel=1e-6)


def test_bit_equal_to_the_module_with_torchs_optimizer(lesson_2, train):
    fused = partial(torch.optim.AdamW, fused=True)  # as the module makes it
    trainer, start, _ = from_scratch(lesson_2, fused)
    module, _ = by_the_module(trainer, start, fused, train)
    assert_same_bits(trainer.model, module.policy)


def test_bit_equal_to_the_module_after_it_was_killed(lesson_2, adapted, train, tmp_path):
    program = KILLED.format(threads=torch.get_num_threads(), steps=STEPS)
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES / "tutorial")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, start, _ = from_scratch(lesson_2)
    resumed = lesson_2.Trainer(lesson_2.TinyLanguageModel(dropout=0.1), lesson_2.counting_rows(), steps=STEPS)
    resumed.load(tmp_path / "last.ckpt")
    assert resumed.step == 7
    assert len(list(resumed.fit())) == STEPS - 7
    module, _ = by_the_module(whole, start, adapted, train)
    assert_same_bits(resumed.model, module.policy)
    assert not list(tmp_path.glob("*.part"))


def test_an_epoch_has_each_row_once_and_another_order(lesson_2):
    trainer = lesson_2.Trainer(lesson_2.TinyLanguageModel(), [([i % 24], [i // 24]) for i in range(96)])
    epochs = [
        [tuple(row) for step in steps for batch in trainer.micro_batches(step) for row in batch["input_ids"].tolist()]
        for steps in (range(3), range(3, 6))
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 96
    assert epochs[0] != epochs[1]


def test_what_a_reader_sees(printed):
    lines = printed("trainer_from_scratch").splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[0] > 3
    assert losses[-1] < 0.3
    assert lines[-1] == "stopped at 25 and resumed: the same bits"
