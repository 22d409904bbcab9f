"""Presets of policy-gradient modules: settings that go by a paper's name, of which each may still be given."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from alignment_modules.functional.checks import check_choice

_IN_REWARD = {"kl_estimator": "k1", "kl_placement": "reward"}


@dataclass(frozen=True)
class Preset:
    """What a paper sets, as far as it differs from the defaults or defines the method.

    Attributes:
        source: The paper.
        settings: Options by name.
    """

    source: str
    settings: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "grpo": Preset(
            "arXiv:2402.03300", {"loss": "grpo", "beta": 0.04, "kl_estimator": "k3", "kl_placement": "loss"}
        ),
        "dapo": Preset("arXiv:2503.14476", {"loss": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0}),
        "dr_grpo": Preset("arXiv:2503.20783", {"loss": "dr_grpo", "scale_rewards": "none", "beta": 0.0}),
        "gspo": Preset(
            "arXiv:2507.18071",
            {"loss": "grpo", "importance_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
        ),
        "cispo": Preset("arXiv:2506.13585", {"loss": "cispo", "beta": 0.0}),
        "sapo": Preset("arXiv:2511.20347", {"loss": "sapo", "beta": 0.0}),
        "gmpo": Preset("arXiv:2507.20673", {"loss": "gmpo", "epsilon": 0.4, "beta": 0.0}),
        "rloo": Preset(
            "arXiv:2402.14740",
            {"loss": "reinforce", "reduction": "sequence_mean_token_sum", "baseline": "leave_one_out", "beta": 0.05}
            | _IN_REWARD,
        ),
        "reinforce_pp": Preset(
            "arXiv:2501.03262",
            {"loss": "dapo", "epsilon": 0.2, "baseline": "none", "scale_rewards": "batch_tokens", "beta": 0.01}
            | _IN_REWARD,
        ),
        "remax": Preset(
            "arXiv:2310.10505",
            {"loss": "reinforce", "reduction": "sequence_mean_token_sum", "baseline": "greedy", "beta": 0.0},
        ),
        "opo": Preset("arXiv:2505.23585", {"baseline": "length_weighted", "beta": 0.0}),
        "maxrl": Preset("arXiv:2602.02710", {"scale_rewards": "mean", "beta": 0.0}),
        "lite_ppo": Preset("arXiv:2508.08221", {"loss": "dapo", "scale_rewards": "batch", "beta": 0.0}),
        "gdpo": Preset(
            "arXiv:2601.05242", {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"}
        ),
    }
)
"""Every preset by its name. A baseline's own scale, and a loss's own numbers, are not said again."""


@dataclass(frozen=True)
class Settings:
    """Options with what a preset fills in.

    Args:
        preset: A key of `PRESETS`; None: nothing is filled in.
        given: Options by name, of which those that some preset sets are kept; None: not given.

    Raises:
        ValueError: If there is no such preset.

    >>> settings = Settings("dr_grpo", {"loss": None, "scale_rewards": "group", "beta": None})
    >>> settings.resolved
    {'loss': 'dr_grpo', 'scale_rewards': 'group', 'beta': 0.0}
    >>> settings.describe()
    "dr_grpo (arXiv:2503.20783): loss 'dr_grpo', beta 0.0; but scale_rewards 'group'"
    """

    preset: str | None
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_choice("preset", self.preset, PRESETS)
        known = {name for preset in PRESETS.values() for name in preset.settings}
        object.__setattr__(self, "given", {name: value for name, value in self.given.items() if name in known})

    @property
    def filled(self) -> dict[str, Any]:
        """What the preset fills in: its settings that were not given."""
        settings = {} if self.preset is None else PRESETS[self.preset].settings
        return {name: value for name, value in settings.items() if self.given.get(name) is None}

    @property
    def resolved(self) -> dict[str, Any]:
        """What was given and what the preset fills in; what neither says is left out."""
        return {name: value for name, value in (dict(self.given) | self.filled).items() if value is not None}

    def describe(self) -> str:
        """The preset, what it fills in, and what was given instead; "none" without one."""
        if self.preset is None:
            return "none"
        preset, filled = PRESETS[self.preset], self.filled
        instead = {name: self.given[name] for name in preset.settings if name not in filled}
        return f"{self.preset} ({preset.source}): " + "; but ".join(_listed(part) for part in (filled, instead) if part)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Adds what the preset fills in to an error about one of these options, which nobody typed."""
        try:
            yield
        except ValueError as error:
            told = str(error)
            filled = {n: value for n, value in self.filled.items() if f"{n}=" in told or told.startswith(f"{n} ")}
            if type(error) is not ValueError or not filled:
                raise
            raise ValueError(f"{error} (preset={self.preset!r} gives {_listed(filled)})") from error


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in options.items())
