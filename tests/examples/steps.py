"""Gradient descent of rate 1 by hand, for comparison with a module's step, and what lessons print."""

import copy

import torch


def moved(model, seed):
    """A copy of a model a little way off."""
    random, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=random))
    return other


def descend(model, loss):
    """Moves a model by minus the gradient of its loss."""
    weights = list(model.parameters())
    with torch.no_grad():
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.sub_(gradient)


def changes(before, after):
    """What models, each under its name, were changed by: by the names that a module gives to their weights."""
    return {
        f"{name}.{key}": (weight - start).detach()
        for name in before
        for (key, weight), start in zip(after[name].named_parameters(), before[name].parameters(), strict=True)
    }


def numbers(lines):
    """The columns of a table of numbers and percentages, a list a line."""
    return [[float(cell.rstrip("%")) for cell in line.split()] for line in lines]
