"""AdamW of bitsandbytes with a state of 8 bits: it is near torch's, goes on exactly, and is refused where it cannot."""

import copy
import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from alignment_modules import SFTModule
from alignment_modules.training.makers import check_sharded
from tests.batches import supervised

bitsandbytes = pytest.importorskip("bitsandbytes")
BATCHES = [supervised([row, row + 1]) for row in range(2)]


@pytest.fixture
def fit(tiny_llama, tmp_path):
    def run(optimizer, epochs=2, start=None):
        module = SFTModule(policy=copy.deepcopy(tiny_llama), optimizer=optimizer)
        settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
        trainer = L.Trainer(
            max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **settings
        )
        trainer.fit(module, DataLoader(BATCHES, batch_size=None), ckpt_path=start)
        return module, trainer

    return run


eight = functools.partial(bitsandbytes.optim.AdamW8bit, lr=0.01, weight_decay=0.1, min_8bit_size=256)


def test_its_state_has_8_bits_and_its_steps_are_near_torchs(fit, tiny_llama):
    module, trainer = fit(eight)
    other, _ = fit(functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    [optimizer] = trainer.optimizers
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    kinds = {p.ndim: {value.dtype for key, value in state.items() if key.startswith("state")} for p, state in
             optimizer.state.items()}  # fmt: skip
    assert kinds == {2: {torch.uint8}, 1: {torch.float32}}
    for (name, one), two in zip(module.policy.named_parameters(), other.policy.parameters(), strict=True):
        start = tiny_llama.get_parameter(name)
        assert (one - two).norm() < 0.25 * (two - start).norm(), name


def test_a_run_that_resumes_is_the_same(fit, tmp_path):
    whole, _ = fit(eight)
    _, trainer = fit(eight, epochs=1)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    held = torch.load(tmp_path / "two.ckpt", weights_only=True)["optimizer_states"][0]
    assert held["param_groups"][0]["name"] == "decay"
    resumed, _ = fit(eight, start=tmp_path / "two.ckpt")
    for (name, one), two in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_sharded_weights_are_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import distribute_module, init_device_mesh

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        module = distribute_module(nn.Linear(2, 2), init_device_mesh("cpu", (1,)))
        check_sharded(torch.optim.AdamW(module.parameters()))
        with pytest.raises(ValueError, match="optimizer=AdamW8bit of bitsandbytes is not allowed with sharded weights"):
            check_sharded(eight(module.parameters()))
    finally:
        destroy_process_group()
