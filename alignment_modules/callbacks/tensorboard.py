"""TensorBoard that opens on what matters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from alignment_modules.rollouts.environments import STOP_REASONS

WORKINGS = "workings/"
"""What comes before the names of metrics that matter to who looks for a fault; it sorts last."""
_WORKINGS = (
    *("clip_ratio/*", "cispo_clip_ratio", "importance_ratio/*", "sampling/*", "logps/*", "frac_not_judged"),
    *("dynamic_sampling/*", "kl_coef", "entropy_coef"),
    *("completions/m??_length", "completions/*_terminated_length", "rewards/m??", "rewards/*/std"),
    *("rewards/*/not_applicable", "sample_accuracy", "samples_per_second", "padding_share", "num_tokens"),
    *("tools/malformed", "episode/tool_tokens", "episode/stop/*"),
    *("steps_without_targets", "time/*", "grad_norm", "learning_rate", "reward_std", "tokens_per_second"),
    # of each source of the data, what is not a loss, a reward or an accuracy
    *("*/entropy", "*/nll_loss", "*/rewards/chosen", "*/rewards/rejected", "*/rewards/margins", "*/rewards/*/mean"),
    *("*/completions/mean_length", "*/groups_with_signal", "*/sample_accuracy", "*/tools/*", "*/episode/turns"),
)
_LAYOUT = {  # charts of the page CUSTOM SCALARS, and the metrics that each holds; a run has those of its first metrics
    "loss": ("train/loss", "val/loss"),
    "reward": ("train/reward", "val/reward"),
    "exact match": ("val/exact_match", "test/exact_match"),
    "accuracy": ("train/mean_token_accuracy", "val/mean_token_accuracy"),
    "preferred over rejected": ("train/rewards/accuracies", "val/rewards/accuracies"),
    "margin": ("train/rewards/margins", "val/rewards/margins"),
    "groups without signal": ("train/frac_reward_zero_std",),
    "length": ("train/completions/mean_length", "val/completions/mean_length"),
    "KL": ("train/kl", "val/kl"),
    "entropy": ("train/entropy", "val/entropy"),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("train/learning_rate",),
}
_BY_SOURCE = {  # likewise, of each source of the data, of which there may be more than in the first metrics
    "loss by source": r"^train/(?!critic/)[^/]+/loss$",
    "reward by source": r"^train/(?!greedy/)[^/]+/reward$",
    "accuracy by source": r"^train/[^/]+/mean_token_accuracy$",
    "preferred over rejected by source": r"^train/[^/]+/rewards/accuracies$",
    "exact match by source": r"^val/[^/]+/exact_match$",
}
_EPISODES = {  # likewise, in a group of its own, of runs whose policy acts on something
    "calls of an episode": ("train/tools/calls", "val/tools/calls", "val/tools/calls_solved"),
    "calls that failed": ("train/tools/failure_rate", "val/tools/failure_rate", "train/tools/malformed"),
    "turns": ("train/episode/turns", "val/episode/turns"),
    "why episodes end": tuple(f"train/episode/stop/{reason}" for reason in STOP_REASONS),
    "tokens of tools": ("train/episode/tool_tokens", "val/episode/tool_tokens"),
    "environments that failed": ("train/environment/errors", "val/environment/errors"),
}
_EVERY_RUN = ("exact match", "gradient norm", "learning rate")  # what other hooks log, later


@cache
def tag_of(name: str) -> str:
    """The tag of a metric: diagnostics stand under `workings/`, which sorts last.

    Example:
        >>> tag_of("train/loss"), tag_of("train/clip_ratio/low_mean")
        ('train/loss', 'workings/train/clip_ratio/low_mean')
        >>> tag_of("train/math/loss"), tag_of("train/math/entropy")
        ('train/math/loss', 'workings/train/math/entropy')
    """
    stage, _, rest = name.partition("/")
    base = rest.partition("/dataloader_idx_")[0]
    if stage == "test":  # sorts before `train`, so that only the results of a chain of stages stand there
        return name if base == "exact_match" or base.startswith("pass@") else WORKINGS + name
    return WORKINGS + name if any(fnmatchcase(base, pattern) for pattern in _WORKINGS) else name


def _charts(layout: Mapping[str, Sequence[str]], metrics: Collection[str]) -> dict[str, list[str | list[str]]]:
    """The charts of a group that a run has metrics for."""
    return {
        title: ["Multiline", [f"^{tag_of(name)}$" for name in names]]
        for title, names in layout.items()
        if title in _EVERY_RUN or any(name in metrics for name in names)
    }


class TensorBoard(TensorBoardLogger):
    """Lightning's `TensorBoardLogger` for runs that people compare.

    Diagnostics have tags under `workings/`, `epoch` has none. The page CUSTOM SCALARS holds what matters, training and
    validation in one chart. Tests stand at the number of stages of training behind the policy, so that the stages of a
    chain make one curve.

    Args:
        save_dir: Folder of the run.
        stages: How many stages of training lie behind a policy that is tested.
    """

    def __init__(self, save_dir: str, stages: int = 0) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)
        self.stages = stages
        self._laid_out = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes numbers, each under its tag."""
        if not self._laid_out:
            self._laid_out = True  # TensorBoard reads a run's first layout alone
            charts = _charts(_LAYOUT, metrics)
            for title, pattern in _BY_SOURCE.items():
                if any(re.match(pattern, name) for name in metrics):
                    charts[title] = ["Multiline", [pattern]]
            groups = {"what matters": charts, "episodes": _charts(_EPISODES, metrics)}
            self.experiment.add_custom_scalars({title: held for title, held in groups.items() if held})
        for name, value in metrics.items():
            if name != "epoch":
                at = self.stages if name.startswith("test/") else step
                self.experiment.add_scalar(tag_of(name), value, at)
