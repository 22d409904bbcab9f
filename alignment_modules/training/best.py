"""The best checkpoint of a run, by its own `ModelCheckpoint`, and a module with its weights for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from alignment_modules.policies.sharded_state import own_state
from alignment_modules.training.sharded_checkpoints import open_checkpoint, read_weights, weight_names


@dataclass(frozen=True)
class Best:
    """What a `ModelCheckpoint` with a monitor holds for the best.

    Attributes:
        path: The checkpoint.
        monitor: The metric.
        score: Its value there; None: not known.
    """

    path: Path
    monitor: str
    score: float | None = None


def monitoring_callback(callbacks: Sequence[Callback]) -> ModelCheckpoint:
    """The one `ModelCheckpoint` among callbacks that says which checkpoint is the best.

    Args:
        callbacks: Those of a Trainer.

    Raises:
        ValueError: If there is none with a `monitor`, or more than one.
    """
    found = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor is not None]
    if len(found) == 1:
        return found[0]
    there = f"{len(found)} monitor a metric ({', '.join(str(one.monitor) for one in found)})" if found else "none does"
    raise ValueError(
        "which='best' needs one callback ModelCheckpoint(monitor=...), such as monitor='val/loss', to say which "
        f"checkpoint is the best; {there}"
    )


def best_of_state(callbacks: Mapping[str, Any], where: Path, option: str = "which") -> Best:
    """The best checkpoint by the state of a run's callbacks.

    Args:
        callbacks: The entry `callbacks` of a checkpoint.
        where: That checkpoint; where the run's folder was moved, the best is looked for beside it.
        option: Which one asks for the best, for errors.

    Raises:
        ValueError: If no callback monitored a metric, several did, or the file is gone.
    """
    states = [state for state in callbacks.values() if isinstance(state, Mapping) and state.get("monitor")]
    found = [state for state in states if state.get("best_model_path")]
    if len(found) != 1:
        names = ", ".join(str(state["monitor"]) for state in found)
        reason = f"several callbacks name one ({names})" if found else "its run had no ModelCheckpoint(monitor=...)"
        raise ValueError(f"{option}='best': {str(where)!r} does not say which checkpoint is the best: {reason}")
    state, path = found[0], Path(found[0]["best_model_path"])
    moved = where.parent / path.name
    if not path.exists() and not moved.exists():
        raise ValueError(f"{option}='best': {str(where)!r} names {str(path)!r} as the best, which is not there")
    score = state.get("best_model_score")
    return Best(path if path.exists() else moved, str(state["monitor"]), None if score is None else float(score))


@contextmanager
def weights_from(module: L.LightningModule, checkpoint: Path) -> Iterator[None]:
    """Runs a block with the weights of a checkpoint of the same run; afterwards the module has its own again.

    Args:
        module: What wrote the checkpoint. What a checkpoint leaves out, such as a frozen base, stays as it is.
        checkpoint: The file, or the folder of a sharded one. All processes call this for a sharded module.

    Raises:
        ValueError: The file cannot be read.
        RuntimeError: The checkpoint does not fit the module.
    """
    saved, folder = open_checkpoint(checkpoint)
    own, found = own_state(module), weight_names(saved, folder)
    kept = {name: own[name].clone() if isinstance(own[name], torch.Tensor) else own[name] for name in found & {*own}}
    read_weights(module, saved, folder, f"checkpoint {str(checkpoint)!r}", strict=False)
    del saved
    try:
        yield
    finally:
        module.load_state_dict({**own, **kept})
