"""The trained policy as a folder that any other tool reads."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from alignment_modules.callbacks.averaging import PolicyAverage
from alignment_modules.functional.ranges import check_options
from alignment_modules.policies.export import check_export, metrics_of, note_metrics, note_stages, read_note, stages_of
from alignment_modules.policies.model_card import CardFacts, DataFacts, base_path, write_model_card
from alignment_modules.policies.sharded import sharded_parts
from alignment_modules.training.best import monitoring_callback, weights_from


class ExportPolicy(Callback):
    """Writes the policy at the end of `fit`, by the module's `export(directory, lora=...)`, on rank 0.

    A sharded module's `export` is called on all ranks, which take part in putting it together.

    The folder's model card (`README.md`) says what was trained on what, with the configuration and the last metrics.
    A fit with nothing left to train logs none: where it exports the weights that are there, their metrics stay.
    Nothing is written after an exception, nor in a `fast_dev_run`.

    Args:
        directory: Where to; None: `export` in the Trainer's `default_root_dir`.
        lora: "merge" folds adapters into the weights; "adapter" writes them alone.
        enabled: False writes nothing.
        which: "last" writes the weights as training left them; "best" those of the checkpoint that the run's
            `ModelCheckpoint(monitor=...)` found the best. The module keeps its own.
        unaveraged: With `PolicyAverage`, whose average is what is exported: also write the weights as training left
            them, into `unaveraged` in that folder.
        license: A licence's identifier on model hubs, such as "apache-2.0", for the model card; None: it says nothing.

    Raises:
        ValueError: If `lora` is neither "merge" nor "adapter", or `which` neither "last" nor "best"; or `unaveraged` is
            asked for beside the best weights.
    """

    def __init__(
        self,
        directory: str | None = None,
        lora: Literal["merge", "adapter"] = "merge",
        enabled: bool = True,
        which: Literal["last", "best"] = "last",
        unaveraged: bool = False,
        license: str | None = None,
    ) -> None:
        check_options(ExportPolicy.__init__, locals())
        if unaveraged and which == "best":
            raise ValueError("unaveraged=True is not allowed with which='best', whose weights are averages: set 'last'")
        self.directory = directory
        self.lora = lora
        self.enabled = enabled
        self.which = which
        self.unaveraged = unaveraged
        self.license = license
        self._stages: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot be exported before it has been trained for hours.

        Raises:
            TypeError: If the module has no `export` method.
            ValueError: If the module's `policy` cannot be written as asked for: the directory holds something else,
                there are no adapters to write alone, their base is not on disk, nothing says which checkpoint is the
                best, or `unaveraged` is asked for and nothing is averaged.
        """
        if stage != "fit" or not self.enabled:
            return
        if not callable(getattr(pl_module, "export", None)):
            raise TypeError(f"ExportPolicy needs {type(pl_module).__name__}.export(directory, lora=...); it has none")
        if self.unaveraged and _averaging(trainer) is None:
            raise ValueError("export.unaveraged=True has no effect: no callback PolicyAverage averages weights here")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.which == "best":
            monitoring_callback(trainer.callbacks)  # type: ignore[attr-defined]
        self._stages = stages_of(_started_from(pl_module))  # read now: the folder may be the one that is replaced
        policy = getattr(pl_module, "policy", None)
        if isinstance(policy, nn.Module):
            tokenizer = getattr(pl_module, "tokenizer", None)
            check_export(policy, self._target(trainer), lora=self.lora, tokenizer=tokenizer)

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.directory) if self.directory else Path(trainer.default_root_dir) / "export"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = self._target(trainer)
        weights = None
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        former = metrics_of(directory) if trainer.is_global_zero and not metrics else {}
        digests = _digests(directory) if former else {}
        if trainer.is_global_zero or sharded_parts(pl_module):
            with ExitStack() as stack:
                weights = self._take_best(stack, trainer, pl_module) if self.which == "best" else None
                pl_module.export(directory, lora=self.lora)  # type: ignore[operator]
            average = _averaging(trainer)
            if average is not None and average.updates and weights is None:
                weights = f"an exponential moving average of {average.updates} updates, decay {average.decay:g}"
            if average is not None and self.unaveraged:
                with average.unaveraged(pl_module):
                    pl_module.export(directory / "unaveraged", lora=self.lora)  # type: ignore[operator]
        if trainer.is_global_zero:
            if read_note(directory):  # a module's own `export` may write something else
                metrics = former if former and _digests(directory) == digests else metrics
                write_model_card(directory, self._facts(trainer, pl_module, weights, metrics))
                note_metrics(directory, metrics)
                note_stages(directory, [*self._stages, str(getattr(pl_module, "paradigm", type(pl_module).__name__))])
            rank_zero_info(f"exported the policy to {directory}{f' ({weights})' if weights else ''}")
        trainer.strategy.barrier("export_policy")

    def _take_best(self, stack: ExitStack, trainer: L.Trainer, module: L.LightningModule) -> str | None:
        """Gives the module the best weights until the stack is left; says in words which."""
        callback = monitoring_callback(trainer.callbacks)  # type: ignore[attr-defined]
        if not callback.best_model_path:
            rank_zero_warn(f"which='best': {callback.monitor} was never logged, so the last weights are exported")
            return None
        stack.enter_context(weights_from(module, Path(callback.best_model_path)))
        score = "" if callback.best_model_score is None else f" {float(callback.best_model_score):.6g}"
        return f"those of the best {callback.monitor}{score}, {Path(callback.best_model_path).name}"

    def _facts(
        self, trainer: L.Trainer, module: L.LightningModule, weights: str | None, metrics: Mapping[str, float]
    ) -> CardFacts:
        saves_config = any(isinstance(one, SaveConfigCallback) for one in trainer.callbacks)  # type: ignore[attr-defined]
        config = Path(trainer.default_root_dir) / "config.yaml"  # another program's where no command line wrote it
        return CardFacts(
            base=_started_from(module),
            trained_by=type(module).__name__,
            paradigm=getattr(module, "paradigm", None),
            license=self.license,
            weights=weights or f"the last, after {trainer.global_step} optimizer steps",
            data=_data_facts(getattr(trainer, "datamodule", None)),
            metrics=metrics,
            config=config.read_text(encoding="utf-8") if saves_config and config.is_file() else None,
        )


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights of an export."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _averaging(trainer: L.Trainer) -> PolicyAverage | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, PolicyAverage)), None)


def _started_from(module: L.LightningModule) -> str | None:
    """The path of the policy as it was given, else as its model tells it."""
    given: Any = module.hparams.get("policy")
    given = given.get("path") if isinstance(given, Mapping) else given
    policy = getattr(module, "policy", None)
    return given if isinstance(given, str) else base_path(policy) if isinstance(policy, nn.Module) else None


def _data_facts(datamodule: Any) -> list[DataFacts]:
    """What was read in training, as a data module with `sources` and `reports` tells it; of a mixture each source."""
    sources, reports = getattr(datamodule, "sources", {}), getattr(datamodule, "reports", {})
    facts = []
    for name, report in reports.items():
        split, _, part = name.partition("/")
        source = sources.get(split)
        if split in ("train", "validation") and (part or not isinstance(source, Mapping)):
            source = (source or {})[part] if part else source
            facts.append(DataFacts(name, _named(source), report.get("kept", report.get("rows")), report.get("tokens")))
    return facts


def _named(source: Any) -> str:
    if isinstance(source, float):
        return f"{source:g} of train"
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"
