"""PolicyAverage: the average by its formula, of the policy alone, in validation, export, checkpoints and on resume."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from alignment_modules import DPOModule, PolicyConfig, SFTModule
from alignment_modules.callbacks import ExportPolicy, PolicyAverage
from tests.batches import pairs, supervised
from tests.models import adapted
from tests.paradigms import ROWS, build, headed

BATCHES = [supervised([row, row + 1]) for row in range(4)]
DECAY = 0.7


class Seen(L.Callback):
    """Notes the policy's weights after each optimizer step, and those that validation reads."""

    def __init__(self):
        self.after, self.validated, self.reads = [], [], []

    def on_fit_start(self, trainer, pl_module):
        index = list(pl_module.trained()).index("policy")
        trainer.optimizers[index].register_step_post_hook(lambda *_: self.after.append(weights(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(weights(pl_module))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.reads.append(weights(pl_module))


def weights(module):
    return {name: value.detach().clone() for name, value in module.policy.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def averaged(steps, decay=DECAY):
    """The formula, in float64."""
    average = {name: value.double() for name, value in steps[0].items()}
    for later in steps[1:]:
        average = {name: decay * value + (1 - decay) * later[name].double() for name, value in average.items()}
    return average


def assert_close(found, expected, tolerance=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def sft(tiny_llama):
    def make(policy=None, **options):
        optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
        return SFTModule(policy=copy.deepcopy(policy or tiny_llama), optimizer=optimizer, **options)

    return make


@pytest.fixture
def fit(tmp_path):
    """Fits on batches with an average and `Seen`; returns the Trainer, the average and what was seen."""

    def run(module, batches=BATCHES, *, average=None, start=None, validation=None, more=(), **options):
        average, seen = average or PolicyAverage(decay=DECAY), Seen()
        settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False}
        settings["enable_checkpointing"] = any(isinstance(one, ModelCheckpoint) for one in more)
        settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        trainer = L.Trainer(**(settings | options), callbacks=[average, seen, *more])
        loaders = [None if part is None else DataLoader(part, batch_size=None) for part in (batches, validation)]
        trainer.fit(module, *loaders, ckpt_path=start)
        return trainer, average, seen

    return run


def test_the_policy_ends_as_the_average_of_its_steps(sft, fit):
    module = sft()
    _, average, seen = fit(module)
    assert len(seen.after) == average.updates == 4
    assert_close(weights(module), averaged(seen.after))
    assert not equal(weights(module), seen.after[-1])


def test_training_does_not_notice(sft, fit, train):
    plain, module = sft(), sft()
    train(plain, BATCHES)
    _, _, seen = fit(module, validation=BATCHES[:1], val_check_interval=1)
    assert equal(seen.after[-1], weights(plain))


def test_with_accumulation_one_update_an_optimizer_step(sft, fit):
    module = sft()
    _, average, seen = fit(module, accumulate_grad_batches=2)
    assert len(seen.after) == average.updates == 2
    assert_close(weights(module), averaged(seen.after))


def test_some_steps_only(sft, fit):
    module = sft()
    _, average, seen = fit(module, average=PolicyAverage(DECAY, update_every_n_steps=2, update_starting_at_step=1))
    assert average.updates == 1
    assert equal(weights(module), seen.after[2])
    with pytest.raises(ValueError, match=r"decay=1.0 must be a finite number in"):
        PolicyAverage(decay=1.0)
    with pytest.raises(ValueError, match="update_every_n_steps=0"):
        PolicyAverage(update_every_n_steps=0)


@pytest.mark.parametrize("name", ["grpo", "ppo", "kto"])
def test_a_module_that_takes_its_own_steps(tiny_llama, fit, name):
    """One update an optimizer step of the policy, of which a batch has several; a critic's own steps are none."""
    several = {} if name == "kto" else {"num_iterations": 2, "minibatches": 2}
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    module = build(name, headed(name, tiny_llama), optimizer=optimizer, **several)
    _, average, seen = fit(module, [ROWS[name].batch(range(4))] * 2)
    assert average.updates == len(seen.after) == (2 if name == "kto" else 8)
    assert_close(weights(module), averaged(seen.after))


def test_nothing_frozen_and_no_critic_is_held(tiny_llama, fit, tmp_path):
    held = {}

    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{pl_module.paradigm}.ckpt")
            held[pl_module.paradigm] = torch.load(tmp_path / f"{pl_module.paradigm}.ckpt", weights_only=True)

    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    shared = build("ppo", headed("ppo", tiny_llama), optimizer=optimizer, critic="shared", critic_optimizer=None)
    for module, batch in (
        (DPOModule(policy=adapted(tiny_llama), optimizer=optimizer), pairs(range(4))),
        (build("ppo", headed("ppo", tiny_llama), optimizer=optimizer), ROWS["ppo"].batch(range(4))),
    ):
        fit(module, [batch], more=[Look()])
        names = {f"policy.{name}" for name, p in module.policy.named_parameters() if p.requires_grad}
        entry = held[module.paradigm]["weight_average"]
        assert entry["average"].keys() == entry["training"].keys() == names
    fit(shared, [ROWS["ppo"].batch(range(4))], more=[Look()])
    assert all(name.startswith("policy.") for name in held["ppo"]["weight_average"]["average"])


def test_of_adapters_their_factors(tiny_llama, sft, fit):
    module = sft(adapted(tiny_llama))
    _, _, seen = fit(module)
    assert_close(weights(module), averaged(seen.after))


def test_validation_reads_the_average_and_training_its_own(sft, fit):
    module = sft()
    trainer, _, seen = fit(module, validation=BATCHES[:1], val_check_interval=1, num_sanity_val_steps=1)
    first, *later = seen.validated
    assert equal(first, seen.reads[0])  # before the first step there is no average
    for step, found in enumerate(later, start=1):
        assert_close(found, averaged(seen.after[:step]))
    assert all(equal(read, after) for read, after in zip(seen.reads[1:], seen.after, strict=False))
    at_the_average = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    [again] = at_the_average.validate(module, DataLoader(BATCHES[:1], batch_size=None), verbose=False)
    assert again["val/loss"] == float(trainer.callback_metrics["val/loss"])


def test_whose_numbers_are_logged_is_said(sft, fit, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(sft())
    assert "average   20 tensors of the policy" in caplog.text
    assert "val/..., the weights in checkpoints and the export are the average's" in caplog.text


@pytest.mark.parametrize("bits", [32, 16])
def test_a_checkpoint_holds_both_and_resumes_bit_for_bit(sft, fit, tmp_path, tiny_llama, bits):
    policy = tiny_llama.to(torch.bfloat16) if bits == 16 else tiny_llama
    whole, first, second = sft(policy), sft(policy), sft(policy)
    _, straight, seen = fit(whole, max_epochs=2)
    fit(first)[0].save_checkpoint(tmp_path / "one.ckpt")
    held = torch.load(tmp_path / "one.ckpt", weights_only=True)
    own = {name.removeprefix("policy."): value for name, value in held["state_dict"].items()}
    assert_close(own, averaged(seen.after[:4]), 1e-6 if bits == 32 else 1e-2)
    assert own["lm_head.weight"].data_ptr() == own["model.embed_tokens.weight"].data_ptr()  # tied, and once on disk
    assert {value.dtype for value in held["weight_average"]["average"].values()} == {torch.float32}
    training = {name.removeprefix("policy."): value for name, value in held["weight_average"]["training"].items()}
    assert equal(training, seen.after[3])
    _, resumed, again = fit(second, start=tmp_path / "one.ckpt", max_epochs=2)
    assert resumed.updates == straight.updates == 8
    assert equal(again.after[-1], seen.after[-1])
    assert equal(weights(second), weights(whole))
    loaded = SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", policy=copy.deepcopy(policy), map_location="cpu")
    assert equal({name: own[name] for name in weights(loaded)}, weights(loaded))


def test_a_checkpoint_of_a_validation_or_of_the_end_is_the_same(sft, fit, tmp_path):
    """The policy holds the average then; what is written is what is written in the midst of training."""

    class Save(L.Callback):
        def on_validation_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "validating.ckpt")

        def on_fit_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    fit(sft(), validation=BATCHES[:1], more=[Save(), ModelCheckpoint(tmp_path, "usual")], num_sanity_val_steps=0)
    usual, validating, end = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("usual", "validating", "end")
    )
    for other in (validating, end):
        assert equal(usual["state_dict"], other["state_dict"])
        for part in ("average", "training"):
            assert equal(usual["weight_average"][part], other["weight_average"][part])


def test_resuming_without_it_or_from_a_checkpoint_without_one(sft, fit, train, tmp_path):
    fit(sft(), more=[ModelCheckpoint(tmp_path, "average")])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"holds averaged weights.*with the callback that wrote it, PolicyAverage"):
        trainer.fit(sft(), DataLoader(BATCHES, batch_size=None), ckpt_path=tmp_path / "average.ckpt")
    train(sft(), BATCHES[:2]).save_checkpoint(tmp_path / "plain.ckpt")
    module = sft()
    _, average, seen = fit(module, start=tmp_path / "plain.ckpt", max_epochs=2)
    assert average.updates == len(seen.after) > 0
    assert_close(weights(module), averaged(seen.after))


def test_another_part_of_the_policy_is_refused(tiny_llama, tiny_llama_config, sft, fit, tmp_path):
    fit(sft(), more=[ModelCheckpoint(tmp_path, "all")])
    tiny_llama.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"average and what this policy trains differ in 9 tensors, such as 'policy"):
        fit(sft(tiny_llama), start=tmp_path / "all.ckpt")


def test_an_exception_leaves_the_weights_of_the_training(sft, fit):
    module, stopped = sft(), []

    class Break(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            stopped.append(weights(pl_module))
            raise RuntimeError("broken")

    seen = Seen()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, validation=BATCHES[:1], more=[Break(), seen], num_sanity_val_steps=0)
    assert equal(weights(module), seen.after[-1])
    assert not equal(stopped[0], weights(module))


@pytest.mark.parametrize("both", [False, True])
def test_the_export_is_the_average(model_folder, fit, tmp_path, both):
    module = SFTModule(policy=model_folder, optimizer=functools.partial(torch.optim.AdamW, lr=0.01))
    export = ExportPolicy(directory=str(tmp_path / "export"), unaveraged=both)
    _, _, seen = fit(module, more=[export])
    assert_close(load_file(tmp_path / "export" / "model.safetensors"), averaged(seen.after))
    assert (tmp_path / "export" / "unaveraged").exists() == both
    if both:
        assert equal(load_file(tmp_path / "export" / "unaveraged" / "model.safetensors"), seen.after[-1])
    assert_close(weights(module), averaged(seen.after))
    assert "an exponential moving average of 4 updates, decay 0.7" in (tmp_path / "export" / "README.md").read_text()


def test_the_best_weights_are_the_average_of_their_time(sft, fit, tmp_path):
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss")
    export = ExportPolicy(directory=str(tmp_path / "export"), which="best")
    validation = {"validation": BATCHES[:1], "val_check_interval": 2, "num_sanity_val_steps": 0}
    _, _, seen = fit(sft(), more=[best, export], **validation)
    step = int(best.best_model_path.partition("step=")[2].partition(".")[0])
    assert step < len(seen.after)
    assert_close(load_file(tmp_path / "export" / "model.safetensors"), averaged(seen.after[:step]))


def test_what_is_refused(sft, fit):
    with pytest.raises(ValueError, match=r"export.unaveraged=True has no effect"):
        L.Trainer(accelerator="cpu", logger=False, callbacks=[ExportPolicy(unaveraged=True)]).fit(
            sft(), DataLoader(BATCHES, batch_size=None)
        )
    with pytest.raises(ValueError, match="unaveraged=True is not allowed with which='best'"):
        ExportPolicy(unaveraged=True, which="best")
    with pytest.raises(ValueError, match=r"ModelCheckpoint.save_weights_only=True. is not allowed with PolicyAverage"):
        fit(sft(), more=[ModelCheckpoint(save_weights_only=True)])
    with pytest.raises(ValueError, match="PolicyAverage is not allowed with strategy ModelParallelStrategy, which sha"):
        PolicyAverage().setup(SimpleNamespace(strategy=ModelParallelStrategy()), sft(), "fit")


def test_another_lightning_module(boring, make_trainer, loader):
    module = boring(manual=2)
    average = PolicyAverage(decay=DECAY)
    steps = []

    class Note(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(
                lambda *_: steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
            )

    make_trainer(average, Note()).fit(module, loader)
    assert average.updates == len(steps) == 12
    assert_close(dict(module.named_parameters()), averaged(steps))


def test_a_policy_from_a_configuration_is_averaged_in_its_trained_part(tiny_llama_config, fit):
    policy = PolicyConfig(config=tiny_llama_config, trainable=["model.layers.1.*"])
    module = SFTModule(policy=policy, optimizer=functools.partial(torch.optim.AdamW, lr=0.01))
    _, _, seen = fit(module)
    assert_close(weights(module), averaged(seen.after))


RANKS = """
import functools, sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import PolicyConfig, SFTModule
from alignment_modules.callbacks import PolicyAverage
from tests.batches import supervised
from tests.callbacks.test_averaging import Seen, weights
from tests.conftest import TINY_LLAMA

if __name__ == "__main__":
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    module, seen = SFTModule(policy=PolicyConfig(config=TINY_LLAMA), optimizer=optimizer), Seen()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[PolicyAverage(decay=0.7), seen],
    )
    trainer.fit(module, DataLoader([supervised([row, row + 1]) for row in range(6)], batch_size=None))
    trainer.save_checkpoint(Path(sys.argv[1]) / "end.ckpt")
    torch.save((seen.after, weights(module)), Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_every_process_has_the_same(tmp_path):
    (tmp_path / "script.py").write_text(RANKS)
    root = Path(__file__).parents[2]
    command = [sys.executable, tmp_path / "script.py", tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (steps, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(steps) == 3
    assert equal(first, second)
    assert_close(first, averaged(steps))
    held = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert equal(first, {name: held["state_dict"][f"policy.{name}"] for name in first})
    assert equal(steps[-1], {name: held["weight_average"]["training"][f"policy.{name}"] for name in first})
