"""StopAndSave and Checkpoints: what lies on disk when a run ends early, and that it resumes exactly."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from alignment_modules import SFTModule
from alignment_modules.callbacks import AtomicCheckpointIO, Checkpoints, ExactResume, FiniteGuard, StopAndSave
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder

VOCABULARY = 16


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as at a terminal: a program started in the background may have it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


class At(Callback):
    """Does something in a hook at a step, once."""

    def __init__(self, hook, step, act, batch=None):
        self.step, self.act, self.batch = step, act, batch
        setattr(self, hook, self.run)

    def run(self, trainer, module, *arguments):
        if trainer.global_step == self.step and self.batch in (None, arguments[-1] if arguments else None):
            self.step = None
            self.act(module)


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(batch["input_ids"].tolist())


def module():
    torch.manual_seed(0)
    policy = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, VOCABULARY)
    )
    return SFTModule(policy=policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05))


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (16, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Fits on 8 batches an epoch, 2 epochs; returns the module and the rows trained on."""

    def run(*callbacks, saver=None, ckpt_path=None, validation=False, **options):
        rows, made, table = Rows(), module(), batches()
        saver = Checkpoints() if saver is None else saver
        trainer = make_trainer(
            rows, *callbacks, FiniteGuard(), ExactResume(seed=0), saver, StopAndSave(),
            enable_checkpointing=True, plugins=[AtomicCheckpointIO()], max_epochs=2, **options,
        )  # fmt: skip
        loader = ResumableLoader(table, UniformOrder(len(table), batch_size=2))
        held = torch.utils.data.DataLoader(table, batch_size=4) if validation else None
        run.module, run.rows = made, rows.rows
        trainer.fit(made, loader, held, ckpt_path=ckpt_path)
        return made, rows.rows

    return run


def weights(made):
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def only(folder):
    [path] = folder.glob("**/*.ckpt")
    return path


def send(number):
    return lambda module: os.kill(os.getpid(), number)


def fail(module):
    raise RuntimeError("no more memory")


def poison(module):
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))


class FailsInBackward(Callback):
    """Leaves half a gradient."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            raise RuntimeError("no more memory")


ENDS = {
    "SIGTERM": (lambda: At("on_train_batch_start", 5, send(signal.SIGTERM)), SIGTERMException),
    "SIGHUP": (lambda: At("on_train_batch_start", 5, send(signal.SIGHUP)), SIGTERMException),
    "Ctrl-C": (lambda: At("on_before_backward", 5, send(signal.SIGINT)), SIGTERMException),
    "an error before a batch": (lambda: At("on_train_batch_start", 5, fail), RuntimeError),
    "an error in a batch": (lambda: At("on_before_backward", 5, fail), RuntimeError),
    "an error after backward": (lambda: FailsInBackward(5), RuntimeError),
    "an error before the step": (lambda: At("on_before_optimizer_step", 5, fail), RuntimeError),
    "an error after a batch": (lambda: At("on_train_batch_end", 5, fail), RuntimeError),
    "NaN": (lambda: At("on_train_batch_start", 5, poison), FloatingPointError),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("end", ENDS)
def test_an_early_end_resumes_exactly(fit, tmp_path, capfd, end, accumulate):
    make, error = ENDS[end]
    whole, rows = fit(accumulate_grad_batches=accumulate)
    only(tmp_path).unlink()
    with pytest.raises(error) as raised:
        fit(make(), accumulate_grad_batches=accumulate)
    path, done = only(tmp_path), len(fit.rows)
    message = capfd.readouterr().err
    assert f"checkpoint {path}" in message
    assert ("once more ends it at once" in message) == (error is SIGTERMException)
    resumed, more = fit(ckpt_path=path, accumulate_grad_batches=accumulate)
    assert same(weights(whole), weights(resumed))
    assert more == rows[len(rows) - len(more) :]
    again = done + len(more) - len(rows)  # micro-batches of an optimizer step that was not taken
    assert again in range(accumulate)
    if error is SIGTERMException:
        assert raised.value.code == 128 + {"SIGTERM": 15, "SIGHUP": 1, "Ctrl-C": 2}[end]


def test_nothing_is_saved_before_the_first_step(fit, tmp_path, capfd):
    with pytest.raises(RuntimeError):
        fit(At("on_before_backward", 0, fail))
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "checkpoint" not in capfd.readouterr().err


def test_an_error_right_after_a_resume_saves_nothing_new(fit, tmp_path):
    with pytest.raises(RuntimeError):
        fit(At("on_before_backward", 5, fail))
    path = only(tmp_path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        fit(At("on_before_backward", 5, fail), ckpt_path=path)
    assert only(tmp_path).read_bytes() == before


def test_a_validation_is_broken_off_by_a_signal_and_training_resumes_exactly(fit, tmp_path):
    options = {"validation": True, "val_check_interval": 4, "num_sanity_val_steps": 0}
    whole, rows = fit(**options)
    only(tmp_path).unlink()
    seen = Rows()
    seen.on_validation_batch_end = lambda *arguments: seen.rows.append(arguments[-1])
    with pytest.raises(SIGTERMException):
        fit(At("on_validation_batch_start", 4, send(signal.SIGTERM)), seen, **options)
    assert len(seen.rows) == 4 + 1  # training batches of `seen`, and one of four of the validation
    resumed, more = fit(ckpt_path=only(tmp_path), **options)
    assert same(weights(whole), weights(resumed))
    assert more == rows[4:]


def test_a_signal_in_the_last_batch_keeps_its_exit_status(fit, tmp_path):
    with pytest.raises(SIGTERMException) as raised:
        fit(At("on_train_batch_start", 15, send(signal.SIGTERM)))
    assert raised.value.code == 143
    assert torch.load(only(tmp_path), weights_only=True)["global_step"] == 16


def test_the_users_own_checkpoints_and_one_more(fit, tmp_path):
    """Also where theirs is saved on exceptions, and where one holds weights alone."""
    mine = ModelCheckpoint(tmp_path / "mine", save_on_exception=True, every_n_train_steps=4, save_top_k=-1)
    with pytest.raises(RuntimeError):
        fit(At("on_before_backward", 6, fail), saver=mine)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert steps == {"epoch=0-step=4.ckpt": 4, "stopped-epoch=0-step=6.ckpt": 6}
    light = ModelCheckpoint(tmp_path / "light", save_weights_only=True)
    with pytest.raises(RuntimeError):
        fit(At("on_before_backward", 6, fail), saver=light)
    assert not list((tmp_path / "light").rglob("*.ckpt"))


def test_a_checkpoint_that_cannot_be_saved_does_not_hide_the_error(fit, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="no more memory"):
        fit(At("on_before_backward", 5, fail), saver=Checkpoints(dirpath=str(tmp_path / "file")))
    assert f"could not save a checkpoint: cannot write checkpoint '{tmp_path / 'file'}" in capfd.readouterr().err


def test_a_second_signal_ends_the_process_at_once(fit, monkeypatch):
    """What would end it, the signal's own default action, is caught here."""
    sent = []

    class EndedError(BaseException):
        pass

    def end(process, number):
        sent.append((process, number, signal.getsignal(number)))
        raise EndedError

    def twice(module):
        monkeypatch.setattr(os, "kill", end)
        signal.raise_signal(signal.SIGINT)
        assert not sent
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(EndedError):
        fit(At("on_train_batch_start", 3, twice))
    assert sent == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]


def test_ignored_signals_stay_ignored(fit):
    """As of a program started with `nohup`."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(At("on_train_batch_start", 3, send(signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_handlers_are_put_back(fit):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    fit()
    with pytest.raises(SIGTERMException):
        fit(At("on_train_batch_start", 3, send(signal.SIGHUP)))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


class TestCheckpoints:
    def saves(self, boring, make_trainer, loader, monkeypatch, *arguments, manual=0, **options):
        steps = []
        write = AtomicCheckpointIO.save_checkpoint

        def note(self, checkpoint, path, storage_options=None):
            steps.append(checkpoint["global_step"])
            write(self, checkpoint, path, storage_options)

        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
        saver = Checkpoints(*arguments)
        settings = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], **options}
        make_trainer(saver, **settings).fit(boring(manual=manual), loader)
        return steps

    def test_once_an_epoch(self, boring, make_trainer, loader, monkeypatch, tmp_path):
        assert self.saves(boring, make_trainer, loader, monkeypatch, max_epochs=2) == [6, 12]
        assert only(tmp_path).name == "epoch=1-step=12.ckpt"

    def test_by_the_clock(self, boring, make_trainer, loader, monkeypatch):
        assert self.saves(boring, make_trainer, loader, monkeypatch, 1e-9) == [1, 2, 3, 4, 5, 6]

    def test_by_the_clock_under_manual_optimization(self, boring, make_trainer, loader, monkeypatch):
        assert self.saves(boring, make_trainer, loader, monkeypatch, 1e-9, manual=3) == [3, 6, 9, 12, 15, 18]

    def test_steps_that_jump_over_the_interval(self, boring, make_trainer, loader, monkeypatch):
        assert self.saves(boring, make_trainer, loader, monkeypatch, None, 5, manual=3) == [6, 12, 15, 18]

    def test_never_within_a_step(self, boring, make_trainer, loader, monkeypatch):
        options = {"accumulate_grad_batches": 3}
        assert self.saves(boring, make_trainer, loader, monkeypatch, 1e-9, **options) == [1, 2]

    def test_at_the_end_of_epochs_without_validation(self, boring, make_trainer, loader, monkeypatch):
        options = {"max_epochs": 3, "check_val_every_n_epoch": 2}
        assert self.saves(boring, make_trainer, loader, monkeypatch, **options) == [6, 12, 18]

    def test_many_resumes_leave_two_files(self, fit, tmp_path):
        path = None
        for step in (3, 6, 9, 12):
            with pytest.raises(RuntimeError):
                fit(At("on_before_backward", step, fail), ckpt_path=path)
            found = {torch.load(path, weights_only=True)["global_step"]: path for path in tmp_path.rglob("*.ckpt")}
            assert max(found) == step
            assert len(found) <= 2
            path = found[step]

    def test_mistakes(self):
        with pytest.raises(ValueError, match="every_n_minutes=0 must be a finite number > 0 or null"):
            Checkpoints(every_n_minutes=0)
        with pytest.raises(ValueError, match="every_n_steps=-1"):
            Checkpoints(every_n_steps=-1)
