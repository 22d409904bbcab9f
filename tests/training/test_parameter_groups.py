"""Which parameters decay, and which are hidden matrices."""

import pytest
import torch
from torch import nn

from alignment_modules.training.parameter_groups import parameter_groups


class MatrixNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def test_parameter_groups():
    module = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 3),
            "linear": nn.Linear(3, 4),
            "norm": nn.LayerNorm(4),
            "matrix_norm": MatrixNorm(),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
            "head": nn.Linear(3, 5, bias=False),
        }
    )
    module["head"].weight = module["embed"].weight
    module["embed"].register_parameter("scale", nn.Parameter(torch.ones(3)))
    module["linear"].register_parameter("grid_bias", nn.Parameter(torch.ones(3, 3)))
    names = {id(p): n for n, p in module.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in parameter_groups(module)]
    assert groups == [
        ["embed.weight", "linear.weight"],
        ["embed.scale", "linear.bias", "linear.grid_bias", "norm.weight", "norm.bias", "matrix_norm.weight"],
    ]
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=0.1, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_parameter_groups_of_a_llama(tiny_llama):
    decay, no_decay = parameter_groups(tiny_llama)
    assert all(p.ndim == 2 for p in decay["params"])
    assert len(no_decay["params"]) == 5
    assert sum(p.numel() for g in (decay, no_decay) for p in g["params"]) == tiny_llama.num_parameters()


def test_parameter_groups_edge_cases():
    assert [g["name"] for g in parameter_groups(nn.LayerNorm(2))] == ["no_decay"]
    assert [g["name"] for g in parameter_groups(nn.Linear(2, 2, bias=False))] == ["decay"]
    with pytest.raises(ValueError, match="module=Linear has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def test_weight_decay_moves_only_the_decay_group():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=0.1, weight_decay=0.5)
    before = {n: p.clone() for n, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = [n for n, p in module.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["0.weight"]
