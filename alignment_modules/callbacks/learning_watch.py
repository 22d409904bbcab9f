"""Says once what makes a run learn nothing."""

import lightning as L
from lightning.pytorch import Callback

from alignment_modules.callbacks.logged_metrics import LoggedMetrics
from alignment_modules.functional.ranges import Count, NonNegative, Share, check_options


class LearningWatch(LoggedMetrics, Callback):
    """Warns, once each and without stopping the run, of what a curve shows too late.

    While training on samples: in no group did the rewards differ; most completions were cut off at the length limit;
    the policy's entropy is all but 0. Each must hold at `patience` logging steps in a row. At the start: most training
    rows were truncated.

    Args:
        patience: Logging steps in a row before a warning.
        max_truncated: Share of completions, or of training rows, that may be cut off.
        min_entropy: Entropy in nats a token below which sampling hardly varies.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, patience: Count = 10, max_truncated: Share = 0.5, min_entropy: NonNegative = 0.01) -> None:
        check_options(LearningWatch.__init__, locals())
        self.patience = patience
        self.max_truncated = max_truncated
        self.min_entropy = min_entropy
        self._in_a_row: dict[str, int] = {}
        self._said: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at what the data module has cut."""
        super().on_train_start(trainer, pl_module)
        self._in_a_row.clear()
        self._said.clear()
        report = getattr(getattr(trainer, "datamodule", None), "reports", {}).get("train", {})
        truncated, kept = report.get("truncated", 0), report.get("kept", 0)
        if kept and truncated > self.max_truncated * kept:
            self._warn(
                trainer,
                f"{truncated} of {kept} training rows were truncated to data.max_length: what was cut is not learnt; "
                "raise it, or drop long rows with data.overflow=drop",
            )

    def on_logged(self, trainer: L.Trainer, step: int, metrics: dict[str, float]) -> None:
        """Counts how long each trouble has lasted."""
        if "train/reward" not in metrics:
            return
        clipped, entropy = metrics.get("train/completions/clipped_ratio", 0.0), metrics.get("train/entropy")
        for name, holds, message in (
            (
                "equal",
                metrics.get("train/frac_reward_zero_std", 0.0) > 1 - 1e-6,
                "in no group did the rewards differ, so nothing is learnt: look at the rewards and the completions "
                "(SampleTable shows them), take easier or harder prompts, or sample more",
            ),
            (
                "clipped",
                clipped > self.max_truncated,
                f"{clipped:.0%} of the completions were cut off at the length limit: raise max_completion_length, or "
                "look whether the policy knows its stop token",
            ),
            (
                "entropy",
                entropy is not None and entropy < self.min_entropy,
                f"the entropy is {entropy if entropy is None else round(entropy, 5)} nats a token: the samples hardly "
                "differ; lower the learning rate or raise beta, entropy_coef or epsilon_high",
            ),
        ):
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if holds else 0
            if self._in_a_row[name] >= self.patience and name not in self._said:
                self._said.add(name)
                self._warn(trainer, f"at {self.patience} logging steps in a row up to step {step} {message}")

    def _warn(self, trainer: L.Trainer, message: str) -> None:
        if trainer.is_global_zero:
            trainer.print(f"warning: {message}")
