"""The sources of a mixture: what they may be, their shares, and the tokenizer that they have in common."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from datamodules.base import AlignmentDataModule
from datamodules.mixed import Origin
from datamodules.orders.shares import tempered, whole_shares
from datamodules.ranges import Count, Positive, check_options
from datamodules.text.encoding import load_tokenizer, written_backend

_OF_THE_MIXTURE = ("batch_size", "eval_batch_size", "shuffle", "drop_last", "num_workers", "added_tokens")
"""Options of a data module that have no effect in a mixture, which has them itself."""
_DEFAULTS = {name: one.default for name, one in inspect.signature(AlignmentDataModule.__init__).parameters.items()}


@dataclass
class MixtureSource:
    """A source of a mixture: a data module, and what becomes of its rows.

    Args:
        data: Reads and tokenises the rows, with columns, template, `max_length`, packing and validation rows of its
            own. All sources of a mixture are of one class.
        weight: Share of the rows of every batch, against the weights of the other sources.
        epochs: Passes over the training rows in an epoch of the mixture, such as 0.5 or 3.
        loss_weight: Factor of the loss of its rows.
        rewards: Names of the module's rewards that judge completions of its prompts; None: all.
        max_completion_length: Most tokens of a completion of its prompts, at most the module's own; None: that.

    Raises:
        ValueError: An option is out of range, or two exclude each other.
    """

    data: AlignmentDataModule
    weight: Positive | None = None
    epochs: Positive | None = None
    loss_weight: Positive = 1.0
    rewards: list[str] | None = None
    max_completion_length: Count | None = None

    def __post_init__(self) -> None:
        check_options(MixtureSource, vars(self))
        if self.weight is not None and self.epochs is not None:
            raise ValueError(f"weight={self.weight} and epochs={self.epochs} of one source: give one of them")
        if self.rewards is not None and not self.rewards:
            raise ValueError("rewards=[] judges nothing; leave it out for all rewards, or name some")

    def has(self, split: str) -> bool:
        """Whether there are rows for a split."""
        return self.data.sources[split] is not None

    def origin(self, name: str) -> Origin:
        """What batches say of its rows, under the source's name."""
        rewards = None if self.rewards is None else tuple(self.rewards)
        return Origin(name, float(self.loss_weight), self.max_completion_length, rewards)


def checked_sources(sources: Any) -> dict[str, MixtureSource]:
    """The sources of a mixture by name, those that are data modules alone with the options' defaults.

    Raises:
        ValueError: There is none, one is no data module or of another class than the first, or one has an option that
            has no effect in a mixture.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise ValueError(f"sources={sources!r} must be data modules by name, at least one")
    found: dict[str, MixtureSource] = {}
    for name, source in sources.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"sources: the name {name!r} must be of letters, digits, '_' and '-'; metrics are named by it"
            )
        found[name] = source if isinstance(source, MixtureSource) else MixtureSource(source)
        _check_data(name, found[name].data)
        first = next(iter(found))
        if type(found[name].data) is not type(found[first].data):
            classes = [type(found[one].data).__name__ for one in (first, name)]
            raise ValueError(
                f"sources {first!r} and {name!r} are of two classes, {' and '.join(classes)}; all sources of a mixture "
                "are of one"
            )
    _check_shares({name: source for name, source in found.items() if source.has("train")})
    return found


def _check_data(name: str, data: Any) -> None:
    if not isinstance(data, AlignmentDataModule) or not data.accepts:
        raise ValueError(
            f"source {name!r} is a {type(data).__name__}; it must be a data module such as SFTDataModule, alone or as "
            "`data` of a MixtureSource"
        )
    if data.streaming is not None:
        raise ValueError(
            f"source {name!r}: its training rows are a stream, and a mixture needs to know how many there are; leave "
            "stream out, or give rows with a length"
        )
    for option in _OF_THE_MIXTURE:
        value = getattr(data, option)
        if (value or None) != (_DEFAULTS[option] or None):
            raise ValueError(
                f"source {name!r}: {option}={value!r} has no effect, as batches are the mixture's; give the mixture "
                f"{option}"
            )


def _check_shares(trained: Mapping[str, MixtureSource]) -> None:
    ways = {"weight": [], "epochs": []}  # type: dict[str, list[str]]
    for name, source in trained.items():
        for way, names in ways.items():
            if getattr(source, way) is not None:
                names.append(name)
    if ways["weight"] and ways["epochs"]:
        raise ValueError(
            f"source {ways['weight'][0]!r} has a weight and source {ways['epochs'][0]!r} has epochs; shares follow one "
            "or the other, for all sources"
        )
    if ways["weight"] and len(ways["weight"]) < len(trained):
        without = next(name for name in trained if name not in ways["weight"])
        raise ValueError(
            f"source {ways['weight'][0]!r} has a weight and source {without!r} has none; give all one, or none"
        )


def check_effects(sources: Mapping[str, MixtureSource], temperature: float | None, gives_prompts: bool) -> None:
    """Refuses options of a mixture that have no effect or exclude each other.

    Args:
        sources: As `checked_sources` gave them.
        temperature: The mixture's.
        gives_prompts: Whether the sources' rows are prompts that are completed in training.

    Raises:
        ValueError: There are some; the message names source and option.
    """
    for name, source in sources.items():
        for option in ("weight", "epochs"):
            value = getattr(source, option)
            if value is not None and not source.has("train"):
                raise ValueError(f"source {name!r}: {option}={value} has no effect, as train=None")
            if value is not None and temperature is not None:
                raise ValueError(
                    f"temperature={temperature} and {option}={value} of source {name!r}: shares follow one of them"
                )
        for option in ("max_tokens", "curriculum"):
            if getattr(source.data, option) is not None:
                raise ValueError(
                    f"source {name!r}: {option}={getattr(source.data, option)} has no effect: the mixture makes the "
                    "batches"
                )
        if source.rewards is not None and not gives_prompts:
            raise ValueError(
                f"source {name!r}: rewards={source.rewards} has no effect, as {type(source.data).__name__} gives no "
                "prompts to train on"
            )


@dataclass(frozen=True)
class Plan:
    """How the rows of the sources are mixed.

    Attributes:
        shares: Whole numbers, each source's part of their sum.
        epoch_rows: Rows of an epoch.
    """

    shares: tuple[int, ...]
    epoch_rows: int


def plan(sources: Mapping[str, MixtureSource], rows: Mapping[str, int], temperature: float | None) -> Plan:
    """The shares of sources, and the length of an epoch.

    By weights and by temperature an epoch has as many rows as all sources together, else `epochs` times each source's.

    Args:
        sources: Those that have training rows.
        rows: How many each has, in rows of the batches (with packing, packed ones).
        temperature: The mixture's.
    """
    counts = [rows[name] for name in sources]
    if temperature is not None:
        return Plan(tuple(whole_shares(tempered(counts, temperature))), sum(counts))
    weights = [source.weight for source in sources.values() if source.weight is not None]
    if weights:
        return Plan(tuple(whole_shares(weights)), sum(counts))
    passes = [Fraction(repr(float(source.epochs or 1))) for source in sources.values()]
    wanted = [number * count for number, count in zip(passes, counts, strict=True)]
    return Plan(tuple(whole_shares(wanted)), max(1, round(sum(wanted))))


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers, as objects, folders or hub ids, make the same ids of a text; templates do not count."""
    if first is second or (isinstance(first, str) and first == second):
        return True
    first, second = (load_tokenizer(one) if isinstance(one, str) else one for one in (first, second))
    return all(getattr(first, name, None) == getattr(second, name, None) for name in _IDS) and _content(
        first
    ) == _content(second)


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def _content(tokenizer: Any) -> Any:
    """What makes ids: the whole backend where there is one, else the vocabulary, else the object itself."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return written_backend(tokenizer) or (vocabulary() if callable(vocabulary) else id(tokenizer))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts a source's name before what is said of its rows."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error
