"""FiniteGuard: no step is taken with, and no checkpoint saved after, a gradient that is not finite."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from alignment_modules import GRPOModule, SFTModule
from alignment_modules.callbacks import FiniteGuard


@pytest.mark.parametrize("manual", [0, 3])
def test_raises_before_the_step_and_names_it(boring, make_trainer, loader, manual):
    reference, module = boring(manual=manual), boring(manual=manual)
    make_trainer(max_steps=3).fit(reference, loader)
    module.poison_at = 4
    with pytest.raises(
        FloatingPointError, match=r"optimizer step 5 is not finite.* nan for 'layer.weight' and 1 more of 2"
    ):
        make_trainer(FiniteGuard()).fit(module, loader)
    assert module.layer.weight.isfinite().all()
    assert module.global_step == 4


def test_an_infinite_gradient_of_one_parameter(boring, make_trainer, loader):
    module = boring()
    module.layer.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 1 .* inf for 'layer.bias' \(of 2 parameters\)"):
        make_trainer(FiniteGuard()).fit(module, loader)


def test_large_but_finite_gradients_pass(boring, make_trainer, loader):
    module = boring()
    module.layer.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    make_trainer(FiniteGuard(), max_steps=2).fit(module, loader)


def test_the_guard_changes_nothing_in_a_healthy_run(boring, make_trainer, loader):
    plain, guarded, deferred = boring(), boring(), boring()
    make_trainer().fit(plain, loader)
    make_trainer(FiniteGuard()).fit(guarded, loader)
    make_trainer(FiniteGuard(every_step=False)).fit(deferred, loader)
    assert torch.equal(plain.layer.weight, guarded.layer.weight)
    assert torch.equal(plain.layer.weight, deferred.layer.weight)


@pytest.mark.parametrize(("interval", "taken"), [(4, 3), (100, 6), (0, 6)])
def test_deferred_report_keeps_weights_finite_and_names_the_first_step(boring, make_trainer, loader, interval, taken):
    module = boring()
    module.poison_at = 1
    with pytest.raises(FloatingPointError, match=r"optimizer step 2 is not finite.* nan for 'layer.weight'"):
        make_trainer(FiniteGuard(every_step=False), log_every_n_steps=interval).fit(module, loader)
    assert module.layer.weight.isfinite().all()
    assert len(module.losses) == min(taken + 1, 6)


def test_deferred_report_waits_for_the_device_only_when_due(boring, make_trainer, loader, monkeypatch):
    reads = []
    original = FiniteGuard.raise_if_noted

    def counted(self):
        reads.append(self._first_step is not None)
        original(self)

    monkeypatch.setattr(FiniteGuard, "raise_if_noted", counted)
    make_trainer(FiniteGuard(every_step=False), log_every_n_steps=3).fit(boring(), loader)
    assert reads.count(True) == 3  # steps 3 and 6, and the end


def test_no_checkpoint_after_a_bad_step(tmp_path, boring, make_trainer, loader):
    module = boring()
    module.poison_at = 2
    saver = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    guard = FiniteGuard(every_step=False)
    with pytest.raises(FloatingPointError, match="optimizer step 3"):
        make_trainer(guard, saver, enable_checkpointing=True, log_every_n_steps=100).fit(module, loader)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_guard_can_be_used_again(boring, make_trainer, loader):
    guard, module = FiniteGuard(every_step=False), boring()
    module.poison_at = 0
    with pytest.raises(FloatingPointError):
        make_trainer(guard).fit(module, loader)
    make_trainer(guard).fit(boring(), loader)


def test_the_scaler_of_16_mixed_keeps_its_own_rule(boring, make_trainer, loader):
    module = boring()
    module.poison_at = 0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = make_trainer(FiniteGuard(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_steps=2)
    trainer.fit(module, loader)
    assert scaler.get_scale() < 1024.0
    assert module.layer.weight.isfinite().all()


def test_frozen_and_unused_parameters(boring, make_trainer, loader):
    module = boring()
    module.layer.bias.requires_grad_(False)
    module.unused = torch.nn.Parameter(torch.ones(2))
    make_trainer(FiniteGuard(), max_steps=2).fit(module, loader)


def test_gradients_whose_norm_overflows_are_not_clipped_to_zero(boring, make_trainer, loader):
    module = boring()
    module.layer.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite: its largest entry is 1.* for 'layer.weight'"):
        make_trainer(FiniteGuard(), gradient_clip_val=1.0).fit(module, loader)
    deferred = boring()
    deferred.layer.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite"):
        make_trainer(FiniteGuard(every_step=False), gradient_clip_val=1.0).fit(deferred, loader)


@pytest.mark.parametrize("every_step", [True, False])
def test_what_clipping_made_is_looked_at(train, tiny_llama, every_step):
    class Broken(SFTModule):
        def clip_gradients(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for parameter in self.parameters():
                parameter.grad.mul_(float("nan"))

    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(FloatingPointError, match="optimizer step 1 is not finite"):
        train(
            Broken(policy=tiny_llama),
            [{"input_ids": ids, "labels": ids}],
            gradient_clip_val=1.0,
            callbacks=[FiniteGuard(every_step)],
        )
    assert all(parameter.isfinite().all() for parameter in tiny_llama.parameters())


def test_a_norm_to_clip_at_must_be_a_number(tiny_llama):
    with pytest.raises(ValueError, match="max_grad_norm=nan"):
        GRPOModule(policy=tiny_llama, rewards=len, max_grad_norm=float("nan"))
