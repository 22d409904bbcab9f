"""From padded rows to segments: the tokens that some read depends on, numbered anew. All on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from alignment_modules.policies.masks import check_unbroken

Reads = Literal["targets", "last", "targets+last"]


class Targets(NamedTuple):
    """Tokens to be scored, all `[targets]` int64: where they are predicted, the segment they stand in, id and slot."""

    source: Tensor
    owner: Tensor
    ids: Tensor
    slot: Tensor


class Last(NamedTuple):
    """The rows' last tokens, all `[rows that have one]` int64: where, in which segment, of which row."""

    source: Tensor
    owner: Tensor
    rows: Tensor


class Layout(NamedTuple):
    """The fields of `Segments`, on the host."""

    token_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    source: Tensor
    target_ids: Tensor
    slot: Tensor
    shape: tuple[int, int]
    last_rows: Tensor | None
    given_lengths: tuple[int, ...]


def of_prompts(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    wanted: Tensor,
    masks: Mapping[str, Tensor],
    reads: Reads,
    score_prompts: bool = False,
) -> Layout:
    """Lays out completions behind the prompts that they share.

    Args:
        prompt_ids: `[prompts, prompt_time]` int64 on the host, and so are the others.
        prompt_mask: `[prompts, prompt_time]` bool.
        ids: `[prompts * K, time]` of the completions.
        mask: `[prompts * K, time]` bool.
        wanted: `[prompts * K, time]` bool, the completion tokens to be scored.
        masks: The masks of existing tokens as they were given, by name.
        reads: What is asked for.
        score_prompts: Whether the prompts' tokens are scored, too: in `prompts` more rows of the output, behind those
            of the completions, which is as wide as the longest of all.

    Raises:
        ValueError: If one of `masks` has a hole.
    """
    prompts, prompt_time = prompt_ids.shape
    rows, time = ids.shape
    samples = rows // prompts if prompts else 1
    width = max(time, prompt_time) if score_prompts else time

    # [prompts, 1 + samples, width]: a prompt and its completions are neighbours, so flattening gives the layout.
    block = (prompts, 1 + samples, max(prompt_time, time, 1))
    tokens = torch.zeros(block, dtype=torch.int64)
    real = torch.zeros(block, dtype=torch.bool)
    asked = torch.zeros(block, dtype=torch.bool)
    slots = torch.zeros(block, dtype=torch.int64)
    if rows:
        grouped = (prompts, samples, time)
        tokens[:, 0, :prompt_time], real[:, 0, :prompt_time] = prompt_ids, prompt_mask
        tokens[:, 1:, :time], real[:, 1:, :time] = ids.view(grouped), mask.view(grouped)
        asked[:, 1:, :time] = wanted.view(grouped)
        slots[:, 1:, :width] = torch.arange(rows * width).view(prompts, samples, width)
    if score_prompts and prompts:
        asked[:, 0, :prompt_time] = prompt_mask
        slots[:, 0, :width] = rows * width + torch.arange(prompts * width).view(prompts, width)

    where = real.flatten().nonzero().squeeze(1)
    segment = where // block[2]
    if bool(((where.diff() != 1) & (segment.diff() == 0)).any()):
        for name, given in masks.items():
            check_unbroken(name, given)
    count = block[0] * block[1]
    lengths = torch.bincount(segment, minlength=count)
    ends = lengths.cumsum(0)
    index = torch.arange(count)
    parents = torch.where(index % block[1] == 0, -1, index - index % block[1])
    has_parent = (parents >= 0) & (lengths[parents.clamp_min(0)] > 0)
    last = torch.where((lengths == 0) & has_parent, parents, index)[index % block[1] != 0]  # an empty one's prompt
    last_rows = (lengths[last] > 0).nonzero().squeeze(1)
    parents = torch.where(has_parent, parents, -1)

    first = torch.arange(len(where)) == (ends - lengths)[segment]
    scored = (asked.flatten()[where] & (~first | has_parent[segment])).nonzero().squeeze(1)
    owner = segment[scored]
    before = ends[parents[owner].clamp_min(0)] - 1
    flat = tokens.flatten()[where]
    return assemble(
        token_ids=flat,
        segment=segment,
        parents=parents,
        targets=Targets(
            torch.where(first[scored], before, scored - 1), owner, flat[scored], slots.flatten()[where][scored]
        ),
        last=Last(ends[last[last_rows]] - 1, last[last_rows], last_rows),
        reads=reads,
        shape=(rows + prompts if score_prompts else rows, width),
    )


def assemble(
    *,
    token_ids: Tensor,
    segment: Tensor,
    parents: Tensor,
    targets: Targets,
    last: Last,
    reads: Reads,
    shape: tuple[int, int],
) -> Layout:
    """Drops what no read depends on and numbers the rest anew; all on the host.

    Args:
        token_ids: `[tokens]` real tokens, segment after segment.
        segment: `[tokens]` segment of each token.
        parents: `[segments]` parent of each segment or -1.
        targets: What may be scored.
        last: The rows' last tokens.
        reads: What is asked for.
        shape: Of the output.

    Returns:
        The layout. A parent left with a single child becomes one segment with it.

    Raises:
        ValueError: If `reads` has another value than those allowed.
    """
    if reads not in get_args(Reads):
        raise ValueError(f"reads={reads!r}: allowed are {', '.join(map(repr, get_args(Reads)))}")
    if reads == "last":
        targets = Targets(*(part[:0] for part in targets))
    source, owner = targets.source, targets.owner
    if reads != "targets":
        source, owner = torch.cat((source, last.source)), torch.cat((owner, last.owner))
    count, tokens = len(parents), len(token_ids)
    arange = torch.arange(tokens)
    furthest = torch.full((count,), -1).scatter_reduce(0, segment[source], source, "amax")
    keep = arange <= furthest[segment]
    # A parent is needed whole as soon as one child has tokens or reads.
    needed = torch.zeros(count, dtype=torch.bool)
    parent_of_owner = parents[owner]
    needed[parent_of_owner[parent_of_owner >= 0]] = True
    keep |= needed[segment]

    children = torch.zeros(count, dtype=torch.int64)
    lengths = torch.bincount(segment[keep], minlength=count)
    alive = (lengths > 0) & (parents >= 0)
    children.scatter_add_(0, parents[alive], torch.ones_like(parents[alive]))
    only = alive & (children[parents.clamp_min(0)] == 1)
    home = torch.where(only, parents, torch.arange(count))
    parents = torch.where(only, -1, parents)
    lengths = torch.zeros(count, dtype=torch.int64).scatter_add_(0, home, lengths)
    given = torch.zeros(count, dtype=torch.int64).scatter_add_(0, home, torch.bincount(segment, minlength=count))

    renumber = keep.cumsum(0) - 1
    kept = lengths > 0
    segment_number = kept.cumsum(0) - 1
    kept_parents = parents[kept]
    new_parents = torch.where(kept_parents >= 0, segment_number[kept_parents.clamp_min(0)], -1)
    new_lengths = lengths[kept]
    starts = new_lengths.cumsum(0) - new_lengths
    offset = torch.where(new_parents >= 0, new_lengths[new_parents.clamp_min(0)], 0) - starts
    position_ids = torch.arange(int(new_lengths.sum())) + offset.repeat_interleave(new_lengths)
    return Layout(
        token_ids=token_ids[keep],
        position_ids=position_ids,
        lengths=tuple(new_lengths.tolist()),
        parents=tuple(new_parents.tolist()),
        source=renumber[source],
        target_ids=targets.ids,
        slot=targets.slot,
        shape=shape,
        last_rows=None if reads == "targets" else last.rows,
        given_lengths=tuple(given[kept].tolist()),
    )
