"""What a checkpoint keeps of a module's constructor arguments: plain values, and the dataclasses made of them."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import lightning as L
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters  # what the command line hands over

from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.functional import Correction
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.lora import LoraConfig
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.training.moved import tell_moved

_CONFIGURATIONS = (PolicyConfig, LoraConfig, EvaluationConfig, Correction, ToolOptions)


class PlainHyperparameters(L.LightningModule):
    """Remembers what the constructor was given, and says what is missing where a checkpoint alone makes no module."""

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        """Notes the constructor's arguments by name: here a subclass's own are seen whole, before any is passed on."""
        module = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        object.__setattr__(module, "_given", dict(zip(names, args, strict=False)) | keywords)
        return module

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, for modules whose arguments were plain values or configurations; others are given again.

        Raises:
            TypeError: If an argument without a default was an object, which a checkpoint does not hold.
            ValueError: If it names a class by the path that it had in 0.1.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (ValueError, ImportError) as error:
            if moved := tell_moved(str(error)):
                raise ValueError(f"{str(checkpoint_path)!r}: {moved} Give that argument again") from error
            raise
        except TypeError as error:
            raise TypeError(
                f"{error}. A checkpoint keeps plain values and configurations, no objects: give those again, as in "
                f"{cls.__name__}.load_from_checkpoint({str(checkpoint_path)!r}, policy=...)"
            ) from error


def keep_hyperparameters(module: PlainHyperparameters) -> None:
    """Saves what the constructor was given as hyperparameters; defaults are the class's, then as now.

    A checkpoint read with `weights_only=True` holds no objects: those are left out, configurations become mappings. The
    command line hands over its own text of every argument, which is plain.

    Args:
        module: The module under construction.
    """
    given = module.__dict__.pop("_given")
    if _given_hyperparameters.get() is not None:
        module.save_hyperparameters()
        return
    plain = {name: as_plain(value) for name, value in given.items()}
    module.save_hyperparameters({name: value for name, value in plain.items() if _is_plain(value)})


def as_plain(value: Any) -> Any:
    """A configuration as the mapping of those of its fields that differ from their defaults; other values unchanged.

    So are the configurations in a mapping.
    """
    if isinstance(value, dict):
        return {key: as_plain(entry) for key, entry in value.items()}
    if not isinstance(value, _CONFIGURATIONS):
        return value
    return {
        field.name: as_plain(getattr(value, field.name))
        for field in fields(value)
        if getattr(value, field.name) != _default(field)
    }


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
