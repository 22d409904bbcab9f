"""Optimizers on the CPU: updated in one pass where torch may choose, and left alone where the user chose."""

import functools

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from alignment_modules import SFTModule
from alignment_modules.training.makers import fuse


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_update_is_the_plain_one(make, dtype):
    plain, fused = parameters(dtype), parameters(dtype)
    optimizers = [make(plain), make(fused)]
    fuse(optimizers[1])
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert [group["fused"] for optimizer in optimizers for group in optimizer.param_groups] == [None, True]
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chosen", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"capturable": True}])
def test_what_was_chosen_stays(chosen):
    optimizer = Adam(parameters(), **chosen)
    fuse(optimizer)
    assert optimizer.param_groups[0]["fused"] is chosen.get("fused")


def test_other_optimizers_and_devices_are_left_alone():
    optimizer = SGD(parameters(), lr=0.1)  # of embeddings with sparse gradients, which a fused update refuses
    fuse(optimizer)
    assert optimizer.param_groups[0]["fused"] is None
    away = AdamW([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    fuse(away)
    assert away.param_groups[0]["fused"] is None


def test_a_module_fuses_each_group_of_its_optimizer(train, tiny_llama):
    module = SFTModule(policy=tiny_llama, optimizer=functools.partial(AdamW, lr=1e-3))
    ids = torch.tensor([[1, 2, 3]])
    train(module, [{"input_ids": ids, "labels": ids}])
    groups = module.optimizers().param_groups
    assert len(groups) == 2
    assert all(group["fused"] for group in groups)
