"""Training and evaluation mode of a module, borrowed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards, also after an exception, every submodule has its own mode again.

    The flags are set directly: a module may override `train` to keep parts of it in one mode for ever.

    Args:
        module: Any module.
    """
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
