"""An inspection in words and numbers: titled lists of facts, which the terminal and the page show alike."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alignment_modules.cli.inspection.findings import (
    Actions,
    Inspection,
    Judged,
    Memory,
    Passage,
    Plan,
    RewardUse,
    Row,
    Sizes,
)
from alignment_modules.cli.inspection.tokens import printable

LEFT_OUT = "activations, buffers, copies that a strategy makes, reward models, and a sampler's cache"
GATHERED = "what is gathered of weights and gradients while a layer computes, embeddings and head"
_BINS = 10
_WHY = {
    "truncated": "longer than max_length, cut to it",
    "split": "longer than max_length, split into several",
    "dropped_too_long": "longer than max_length (overflow=drop)",
    "dropped_without_target": "nothing left that could be learnt",
    "dropped_identical": "both completions are the same",
    "ties": "all completions are equally good",
    "longest": "tokens, before anything was cut",
    "targets": "tokens that the loss is computed on",
    "packed_rows": "rows after packing",
    "weighted": "with weights of their own in the loss",
}


@dataclass(frozen=True)
class Fact:
    """A name, its value, and what is to be said about it; `warns` where something was lost."""

    name: str
    value: str
    note: str = ""
    warns: bool = False


@dataclass(frozen=True)
class Section:
    """Facts under a title.

    Attributes:
        title: The title.
        facts: The facts.
        bars: Counts by label, to be drawn.
        note: What is to be said below.
    """

    title: str
    facts: tuple[Fact, ...] = ()
    bars: tuple[tuple[str, int], ...] = ()
    note: str = ""


def sections(found: Inspection) -> Iterator[Section]:
    """All that was found beside the rows.

    Args:
        found: The inspection.
    """
    for split, report in found.reports.items():
        yield Section(f"Rows of {split}", tuple(_reported(report)))
    yield _lengths(found)
    yield Section("An epoch", tuple(_epoch(found.sizes, found.max_length, found.plan)))
    if found.plan is not None:
        yield Section("The run", tuple(_run(found.plan, found.sizes)))
    if found.memory is not None:
        left_out = LEFT_OUT if found.memory.processes == 1 else f"{GATHERED}, {LEFT_OUT}"
        yield Section("Memory of a device", tuple(_memory(found.memory)), note=f"Left out: {left_out}.")
    if found.rewards:
        yield Section("Rewards", tuple(map(_reward, found.rewards)))
    if found.actions is not None:
        yield Section("Tools", tuple(_actions(found.actions)))


def measure(passage: Passage) -> str:
    """A passage's name and length."""
    targets = "" if passage.name == "prompt" else f", {passage.targets:,} of them targets"
    return f"{passage.name}   {passage.length:,} tokens{targets}".strip()


def columns(row: Row) -> list[Fact]:
    """What a row brings beside its text."""
    return [Fact(name, value) for name, value in row.columns.items()]


def judgement(judged: Judged) -> Fact:
    """What rewards say of a completion, in a line."""
    values = ", ".join(f"{name} {_number(value)}" for name, value in judged.values.items())
    total = f", in all {_number(judged.total)}" if len(judged.values) > 1 else ""
    return Fact(judged.what, f'"{printable(judged.completion, 40)}"', f"{values}{total}")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:g}"


def _reported(report: dict[str, Any]) -> Iterator[Fact]:
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        lost = name.startswith("dropped") or name in ("truncated", "ties")
        yield Fact(name.replace("_", " "), shown, _WHY.get(name, ""), lost)


def _lengths(found: Inspection) -> Section:
    limit = "" if found.max_length is None else f"; max_length is {found.max_length:,}"
    what = "documents" if found.sizes.packed_into is not None else "rows"
    return Section(f"Lengths of {what} in tokens{limit}", bars=tuple(bins(found.sizes.lengths)))


def bins(lengths: tuple[int, ...]) -> list[tuple[str, int]]:
    """Counts of lengths, in at most ten ranges of equal width, a round number.

    >>> bins((1, 2, 2, 30))
    [('1-5', 3), ('6-10', 0), ('11-15', 0), ('16-20', 0), ('21-25', 0), ('26-30', 1)]
    """
    if not lengths:
        return []
    least, most = min(lengths), max(lengths)
    width, scale = 1, 1
    while (most - 1) // width - (max(least, 1) - 1) // width >= _BINS:
        width = next((f * scale for f in (1, 2, 5) if f * scale > width), 10 * scale)
        scale *= 10 if width == 10 * scale else 1
    first, last = (max(least, 1) - 1) // width, max(most - 1, 0) // width
    counts = [0] * (last - first + 1)
    for length in lengths:
        counts[max(length - 1, 0) // width - first] += 1
    starts = [(first + number) * width + 1 for number in range(len(counts))]
    return [
        (str(s) if width == 1 else f"{s:,}-{s + width - 1:,}", count) for s, count in zip(starts, counts, strict=True)
    ]


def _epoch(sizes: Sizes, max_length: int | None, plan: Plan | None) -> Iterator[Fact]:
    several = plan is not None and plan.processes > 1
    whose = f"of one of {plan.processes} processes" if plan is not None and several else ""
    whose = whose if sizes.complete else f"the first {sizes.batches} alone: the loader does not tell how many it has"
    yield Fact("batches", f"{sizes.batches:,}", whose)
    yield Fact("rows", f"{sizes.rows:,}", f"at most {sizes.most_rows:,} in a batch")
    yield Fact("tokens", f"{sizes.tokens:,}", "without padding")
    if sizes.targets:
        yield Fact("targets", f"{sizes.targets:,}", f"{_share(sizes.targets, sizes.tokens)} of the tokens")
    yield Fact("padding", f"{sizes.padding_share:.1%}", "of all places of the batches")
    if sizes.packing_efficiency is not None:
        yield Fact("packing", f"{sizes.packing_efficiency:.1%}", f"full: {sizes.rows:,} rows of {max_length:,} places")
    yield Fact("largest batch", f"{sizes.largest:,}", "tokens, padding included")


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _run(plan: Plan, sizes: Sizes) -> Iterator[Fact]:
    rows = sizes.most_rows * plan.accumulate * plan.processes
    factors = [f"{sizes.most_rows:,} in a batch"]
    factors += [f"{plan.accumulate} batches"] if plan.accumulate > 1 else []
    factors += [f"{plan.processes} processes"] if plan.processes > 1 else []
    of = "step" if plan.steps_per_batch == 1 else "batch"  # whose steps each see a part of it, or see it again
    yield Fact(f"rows of a {of}", f"{rows:,}", " x ".join(factors) if len(factors) > 1 else "")
    if plan.steps_per_batch > 1:
        yield Fact("steps of a batch", f"{plan.steps_per_batch:,}")
    if plan.completions is not None:
        of_each, longest = plan.completions
        yield Fact("completions of them", f"{rows * of_each:,}", f"{of_each:,} a prompt, of at most {longest:,} tokens")
    yield Fact("steps of an epoch", f"{plan.steps_per_epoch:,}")
    limit = f"max_epochs {plan.epochs:,}" if plan.epochs is not None else "no limit on epochs"
    if plan.max_steps is not None:
        limit += f", max_steps {plan.max_steps:,}"
    yield Fact("optimizer steps", "no end" if math.isinf(plan.steps) else f"{int(plan.steps):,}", limit)
    if not math.isinf(plan.steps):
        read = sizes.tokens * plan.processes * plan.steps / max(plan.steps_per_epoch, 1)
        what = "read" if plan.completions is None else "of prompts"
        yield Fact("tokens", f"{round(read):,}", f"{what} in the whole run, without padding")


def _memory(memory: Memory) -> Iterator[Fact]:
    trained = "all trained" if memory.trained == memory.parameters else f"{memory.trained:,} trained"
    yield Fact("parameters", f"{memory.parameters:,}", trained)
    if memory.processes > 1:
        yield Fact("shared by", f"{memory.processes} processes", "each of which holds what follows")
    yield Fact("weights", _size(memory.weights), "of what is trained")
    yield Fact("gradients", _size(memory.gradients))
    state = "not known without weights" if memory.optimizer is None else _size(memory.optimizer)
    yield Fact("optimizer", state, memory.optimizer_name)
    if memory.frozen:
        yield Fact("frozen", _size(memory.frozen), "base under adapters, or reference")
    yield Fact("in all", _size(memory.total))


def _size(count: int) -> str:
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_of:
            return f"{count / bytes_of:,.1f} {unit}"
    return f"{count} B"


def _actions(actions: Actions) -> Iterator[Fact]:
    for tool in actions.tools:
        of = f" of {tool.environment}" if tool.environment else ""
        yield Fact(printable(f"{tool.name}{of}"), printable(f"({tool.arguments})"), printable(tool.description))
    yield Fact("calls as", actions.form, printable(actions.call, 200))
    yield Fact("a turn ends at", " ".join(map(printable, actions.stops)))
    turns, _, others = actions.limits.partition(", ")
    yield Fact("at most", turns, others)


def _reward(use: RewardUse) -> Fact:
    asked = ", ".join(column for column in use.columns if column != "*")
    more = "; is given all columns" if "*" in use.columns else ""
    more += "" if use.computes else "; judges nothing here, since its weights are not read"
    return Fact(use.name, f"weight {use.weight:g}", f"asks for {asked}{more}")
