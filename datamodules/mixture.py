"""Several sources trained on together, each a data module of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.base import AlignmentDataModule
from datamodules.batching import Table
from datamodules.mixed import LIMITS, REWARDS, SOURCE, WEIGHTS, MixedCollate, MixedTable
from datamodules.mixture_sources import (
    MixtureSource,
    Plan,
    check_effects,
    checked_sources,
    naming,
    plan,
    same_tokenizer,
)
from datamodules.orders import Order
from datamodules.orders.mixture import MixtureOrder
from datamodules.ranges import Count, Range, Seed, check_options
from datamodules.reading import Batches
from datamodules.splits import SPLITS

logger = logging.getLogger(__name__)


class MixtureDataModule(AlignmentDataModule):
    """Several sources in one, each a data module of one class with its own columns, template, lengths and validation.

    Every batch of all ranks holds rows of the sources by their shares, to within one row since the start of training.
    The shares follow the sources' `weight`; or the rows each source has, flattened by `temperature`; or `epochs`, by
    default one pass over each. Batches are those of the sources' class, with `source_name` (one a row), and where a
    source asks for it `source_weights` `[batch]` (float32, factors of the rows' loss), `completion_limits` and
    `reward_names`. `index` is counted through all sources. There is one loader a source for validation and test.

    Args:
        sources: The sources by name: data modules, or each with options in a `MixtureSource`.
        temperature: Shares are proportional to `rows ** (1 / temperature)` (arXiv:1910.10683); not with weights or
            epochs.
        tokenizer: The tokenizer of all sources, its folder or its hub id; None takes that of a source.
        added_tokens: As in `AlignmentDataModule`.
        batch_size: Rows in a batch of one process, all sources together.
        eval_batch_size: The same for validation, test and predict; None takes `batch_size`.
        shuffle: Draw a new order of each source's training rows each pass.
        seed: Seed of these orders, and of where in a batch each source's rows stand.
        drop_last: Leave out a last training batch that is not full.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: There is no source, sources are of two classes, or options exclude each other or have no effect.
    """

    def __init__(
        self,
        *,
        sources: dict[str, MixtureSource | AlignmentDataModule],
        temperature: Annotated[float, Range(1)] | None = None,
        tokenizer: str | object | None = None,
        added_tokens: list[str] | None = None,
        batch_size: Count = 8,
        eval_batch_size: Count | None = None,
        shuffle: bool = True,
        seed: Seed = 0,
        drop_last: bool = False,
        num_workers: Annotated[int, Range(0, 1024)] = 0,
    ) -> None:
        check_options(MixtureDataModule.__init__, locals())
        self.parts = checked_sources(sources)
        first = next(iter(self.parts.values())).data
        if any(isinstance(part.data, MixtureDataModule) for part in self.parts.values()):
            raise ValueError("sources: a mixture cannot be a source of another; give all sources to one")
        check_effects(self.parts, temperature, first.gives_prompts)
        given: dict[str, Any] = {
            split: {name: part.data.sources[split] for name, part in self.parts.items() if part.has(split)} or None
            for split in SPLITS
        }
        super().__init__(
            **given,
            tokenizer=tokenizer,
            max_length=max(part.data.max_length for part in self.parts.values()),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            added_tokens=added_tokens,
        )
        self.temperature, self.plan = temperature, Plan((), 0)
        self.accepts, self.gives_prompts = first.accepts, first.gives_prompts

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of all sources, with their chat template where all have the same.

        Raises:
            ValueError: None was given and no source has one, it cannot be loaded, or a source has another.
        """
        if self._tokenizer is None:
            offered = self.offered_tokenizers()
            shared = super().tokenizer
            for name, part in self.parts.items():
                own = part.data.offered_tokenizers()
                if self.given_tokenizer is not None and part.data.given_tokenizer is None:
                    own = []  # what rows bring along gives way, as it does without a mixture
                if not all(same_tokenizer(offered[0], one) for one in own):
                    raise ValueError(
                        f"source {name!r} has another tokenizer than the mixture or a source before it; all need the "
                        "same: give it once, as the mixture's tokenizer"
                    )
            for part in self.parts.values():
                part.data.lend_tokenizer(shared)
            templated = [part.data.tokenizer for part in self.parts.values()]
            if len({getattr(one, "chat_template", None) for one in templated}) == 1:
                self._tokenizer = templated[0]
        return self._tokenizer

    def offered_tokenizers(self) -> list[Any]:
        """The tokenizer that was given, else those of the sources, as they came."""
        if self.given_tokenizer is not None:
            return [self.given_tokenizer]
        return [tokenizer for part in self.parts.values() for tokenizer in part.data.offered_tokenizers()]

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion in any source."""
        self._prepare()
        found = [token for part in self.parts.values() for token in part.data.stop_token_ids]
        return tuple(dict.fromkeys(found))

    def prepare_data(self) -> None:
        """Prepares the sources once per machine."""
        self._prepare()
        for name, part in self.parts.items():
            with naming(name):
                part.data.prepare_data()

    def tables(self, split: str) -> dict[str, Batches]:
        """The tables of a split, for training one of all sources, else one of each.

        Args:
            split: "train", "validation", "test" or "predict".

        Raises:
            ValueError: No source has rows for the split, or a source's cannot be used; the message names it.
        """
        return super().tables(split) if split == "train" or not self.sources[split] else self._make(split)

    def _prepare(self) -> None:
        """Hands tokenizer and Trainer on to the sources."""
        if self.tokenizer is not None:
            for part in self.parts.values():
                part.data.trainer = self.trainer

    def _make(self, split: str) -> dict[str, Batches]:
        self._prepare()
        made: dict[str, dict[str, Batches]] = {}
        for name, part in self.parts.items():
            if part.has(split):
                with naming(name):
                    for key, batches in part.data.tables(split).items():
                        made.setdefault(key, {})[name] = batches
        self._report(split)
        if split != "train":
            return {key: one for view, found in made.items() for key, one in self._apart(view, found).items()}
        rows = {name: len(table) for name, (table, _) in made[split].items()}
        self.plan = plan({name: self.parts[name] for name in rows}, rows, self.temperature)
        _log(rows, self.plan)
        return {split: self._together(made[split])}

    def _together(self, found: Mapping[str, Batches]) -> Batches:
        """Rows of several sources in one table."""
        tables, collates = zip(*found.values(), strict=True)
        table = MixedTable(tables, [self.parts[name].origin(name) for name in found])
        return table, MixedCollate(collates, self._keys())

    def _apart(self, view: str, found: Mapping[str, Batches]) -> dict[str, Batches]:
        """A table of each source."""
        made, index = dict[str, Batches](), 0
        for name, (own, collate) in found.items():
            table = MixedTable([own], [self.parts[name].origin(name)], index)
            made[f"{view} of {name}"] = table, MixedCollate([collate], self._keys())
            index = table.next_index
        return made

    def _keys(self) -> list[str]:
        """What batches say of their rows' sources."""
        parts = self.parts.values()
        asked = {
            WEIGHTS: any(part.loss_weight != 1 for part in parts),
            LIMITS: any(part.max_completion_length is not None for part in parts),
            REWARDS: any(part.rewards is not None for part in parts),
        }
        return [SOURCE, *(key for key, wanted in asked.items() if wanted)]

    def _report(self, split: str) -> None:
        own = {name: part.data.reports[split] for name, part in self.parts.items() if part.has(split)}
        self.reports[split] = summed(own.values())
        self.reports |= {f"{split}/{name}": report for name, report in own.items()}

    def training_order(self, table: Table, replicas: int, shuffle: bool) -> Order:
        """Rows of all sources, by their shares."""
        sizes = table.sizes if isinstance(table, MixedTable) else [len(table)]
        return MixtureOrder(
            sizes,
            self.plan.shares,
            self.plan.epoch_rows,
            batch_size=self.batch_size,
            num_replicas=replicas,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=self.drop_last,
        )

    def _first_prompts(self, count: int) -> Batches | None:
        having = [name for name, part in self.parts.items() if part.has("validation")]
        self._prepare()
        found = dict[str, Batches]()
        for number, name in enumerate(having):
            share = count // len(having) + (number < count % len(having))
            with naming(name):
                made = self.parts[name].data._first_prompts(share) if share else None
            if made is not None:
                found[name] = made
        return self._together(found) if found else None


def summed(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of several tables in one: counts added, the longest of all, what is text named once each."""
    total: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if isinstance(value, str):
                total[key] = ", ".join(dict.fromkeys([*filter(None, [total.get(key)]), value]))
            else:
                total[key] = max(total.get(key, 0), value) if key == "longest" else total.get(key, 0) + value
    return total


@rank_zero_only
def _log(rows: Mapping[str, int], mixed: Plan) -> None:
    whole = sum(mixed.shares)
    told = [
        f"{name} {share / whole:.1%} of the rows ({mixed.epoch_rows * share / whole / rows[name]:.3g} passes an epoch)"
        for name, share in zip(rows, mixed.shares, strict=True)
    ]
    logger.info("train: a mixture, %d rows an epoch: %s", mixed.epoch_rows, ", ".join(told))
