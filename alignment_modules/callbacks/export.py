"""The trained policy as a folder that any other tool reads."""

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from alignment_modules.functional.ranges import check_options
from alignment_modules.policies.export import check_export


class ExportPolicy(Callback):
    """Writes the policy at the end of `fit`, by the module's `export(directory, lora=...)`, on rank 0.

    Nothing is written after an exception, nor in a `fast_dev_run`.

    Args:
        directory: Where to; None: `export` in the Trainer's `default_root_dir`.
        lora: "merge" folds adapters into the weights; "adapter" writes them alone.
        enabled: False writes nothing.

    Raises:
        ValueError: If `lora` is neither "merge" nor "adapter".
    """

    def __init__(
        self,
        directory: str | None = None,
        lora: Literal["merge", "adapter"] = "merge",
        enabled: bool = True,
    ) -> None:
        check_options(ExportPolicy.__init__, locals())
        self.directory = directory
        self.lora = lora
        self.enabled = enabled

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot be exported before it has been trained for hours.

        Raises:
            TypeError: If the module has no `export` method.
            ValueError: If the module's `policy` cannot be written as asked for: the directory holds something else,
                there are no adapters to write alone, or their base is not on disk.
        """
        if stage != "fit" or not self.enabled:
            return
        if not callable(getattr(pl_module, "export", None)):
            raise TypeError(f"ExportPolicy needs {type(pl_module).__name__}.export(directory, lora=...); it has none")
        policy = getattr(pl_module, "policy", None)
        if isinstance(policy, nn.Module) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            tokenizer = getattr(pl_module, "tokenizer", None)
            check_export(policy, self._target(trainer), lora=self.lora, tokenizer=tokenizer)

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.directory) if self.directory else Path(trainer.default_root_dir) / "export"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = self._target(trainer)
        if trainer.is_global_zero:
            pl_module.export(directory, lora=self.lora)  # type: ignore[operator]
            rank_zero_info(f"exported the policy to {directory}")
        trainer.strategy.barrier("export_policy")
