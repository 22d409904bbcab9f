"""One padding-free layout for every paradigm: a flat row of tokens cut into segments, with shared prompts.

A batch of padded rows becomes one row of tokens. Each *segment* is a run of consecutive tokens; a segment with a parent
continues it, so that the completions of one prompt share its tokens: `prompt | completion 1 | completion 2 | prompt |
...`. What is asked of the policy is a list of *targets*: the token whose hidden state predicts each, its id, and
where its log-probability belongs in the padded output.

Only tokens on which some target depends are kept. Under causal attention a token after the last predicting one of its
segment (the final token of every row, for instance) changes nothing, nor does a row without targets: they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment_modules.functional.logprobs import IGNORED_TARGET


@dataclass(frozen=True, eq=False)
class Segments:
    """Tokens without padding, what depends on what, and which tokens are to be scored.

    Attributes:
        token_ids: `[tokens]` int64, the tokens that the targets depend on, segment after segment.
        position_ids: `[tokens]` int64; a segment without a parent starts at 0, a child continues after its parent.
        lengths: Tokens of each segment, in order; none is 0.
        parents: Index of each segment's parent, or -1. A parent comes before its children and has no parent itself.
        source: `[targets]` int64, index into `token_ids` of the token whose hidden state predicts the target.
        target_ids: `[targets]` int64, the ids to be scored.
        slot: `[targets]` int64, index into the flattened `[rows, time]` output; no slot occurs twice.
        shape: `(rows, time)` of the output.
    """

    token_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    source: Tensor
    target_ids: Tensor
    slot: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_labels(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Segments:
        """Builds the segments of pretraining and SFT batches.

        Entry `[b, t]` of the output is `log p(labels[b, t] | the real tokens before t)`.

        Args:
            input_ids: `[batch, time]` token ids, padded on either side or in between.
            labels: `[batch, time]` ids to be scored, -100 where not supervised. As in Hugging Face, the label at `t`
                stands for token `t` and is predicted by the real token before it; a document's first is never scored.
            attention_mask: `[batch, time]`, nonzero at real tokens; all are real where it is None.
            position_ids: `[batch, time]`; a real token at position 0 inside a row starts a new document, which
                sees nothing of the one before it (packing). Otherwise only the order of the real tokens counts.

        Returns:
            The segments, one for each document that has a target.

        Raises:
            ValueError: If a tensor is not `[batch, time]` with `input_ids`' shape.
        """
        _check_shape("input_ids", input_ids, None)
        _check_shape("labels", labels, input_ids)
        device = input_ids.device
        given = [input_ids, labels]
        given += [_check_shape("attention_mask", attention_mask, input_ids)] if attention_mask is not None else []
        given += [_check_shape("position_ids", position_ids, input_ids)] if position_ids is not None else []
        host = _to_host(given)  # the only synchronisation with an accelerator
        ids, targets = host[0], host[1]
        real = host[2] != 0 if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)

        rows, time = ids.shape
        where = real.flatten().nonzero().squeeze(1)
        row = where // max(time, 1)
        first = torch.ones_like(where, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        if position_ids is not None:
            first |= host[-1].flatten()[where] == 0
        segment = first.cumsum(0) - 1
        labels_flat = targets.flatten()[where]
        scored = ((labels_flat != IGNORED_TARGET) & ~first).nonzero().squeeze(1)
        count = int(first.sum())
        return _assemble(
            token_ids=ids.flatten()[where],
            segment=segment,
            parents=torch.full((count,), -1),
            source=scored - 1,
            target_ids=labels_flat[scored],
            slot=where[scored],
            owner=segment[scored],
            shape=(rows, time),
            device=device,
        )

    @classmethod
    def from_prompts(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        target_mask: Tensor | None = None,
    ) -> Segments:
        """Builds the segments of completions that share prompts.

        Entry `[n, t]` of the output is the log-probability of completion `n`'s token `t`.

        Args:
            prompt_ids: `[prompts, prompt_time]` token ids, padded anywhere.
            prompt_mask: `[prompts, prompt_time]`, nonzero at real tokens.
            completion_ids: `[prompts * K, time]`, prompt 0's K completions first.
            completion_mask: `[prompts * K, time]`, nonzero at real tokens.
            target_mask: `[prompts * K, time]`, nonzero where a real completion token is to be scored; None: all.

        Returns:
            The segments: a prompt, its completions, the next prompt ... The first token of a completion whose prompt is
            empty has nothing to be predicted from and is not scored.

        Raises:
            ValueError: If shapes do not fit together, or the completions are not a multiple of the prompts.
        """
        _check_shape("prompt_ids", prompt_ids, None)
        _check_shape("prompt_mask", prompt_mask, prompt_ids)
        _check_shape("completion_ids", completion_ids, None)
        _check_shape("completion_mask", completion_mask, completion_ids)
        given = [prompt_ids, prompt_mask, completion_ids, completion_mask]
        given += [_check_shape("target_mask", target_mask, completion_ids)] if target_mask is not None else []
        prompts, rows = prompt_ids.shape[0], completion_ids.shape[0]
        if (rows % prompts if prompts else rows) != 0:
            raise ValueError(
                f"completion_ids has {rows} rows, which is not a multiple of the {prompts} rows of prompt_ids; "
                "expected the same number of completions for every prompt"
            )
        device = completion_ids.device
        host = _to_host(given)
        samples = rows // prompts if prompts else 1
        prompt_time, time = prompt_ids.shape[1], completion_ids.shape[1]

        # [prompts, 1 + samples, width]: a prompt and its completions are neighbours, so flattening gives the layout.
        block = (prompts, 1 + samples, max(prompt_time, time, 1))
        ids = torch.zeros(block, dtype=torch.int64)
        real = torch.zeros(block, dtype=torch.bool)
        wanted = torch.zeros(block, dtype=torch.bool)
        slots = torch.zeros(block, dtype=torch.int64)
        if rows:
            grouped = (prompts, samples, time)
            ids[:, 0, :prompt_time], real[:, 0, :prompt_time] = host[0], host[1] != 0
            ids[:, 1:, :time], real[:, 1:, :time] = host[2].view(grouped), host[3].view(grouped) != 0
            wanted[:, 1:, :time] = host[-1].view(grouped) != 0  # the target mask, or else the completion mask
            slots[:, 1:, :time] = torch.arange(rows * time).view(grouped)

        where = real.flatten().nonzero().squeeze(1)
        segment = where // block[2]
        count = block[0] * block[1]
        lengths = torch.bincount(segment, minlength=count)
        ends = lengths.cumsum(0)
        index = torch.arange(count)
        parents = torch.where(index % block[1] == 0, -1, index - index % block[1])
        has_parent = (parents >= 0) & (lengths[parents.clamp_min(0)] > 0)
        parents = torch.where(has_parent, parents, -1)

        first = torch.arange(len(where)) == (ends - lengths)[segment]
        scored = (wanted.flatten()[where] & (~first | has_parent[segment])).nonzero().squeeze(1)
        owner = segment[scored]
        before = ends[parents[owner].clamp_min(0)] - 1
        return _assemble(
            token_ids=ids.flatten()[where],
            segment=segment,
            parents=parents,
            source=torch.where(first[scored], before, scored - 1),
            target_ids=ids.flatten()[where][scored],
            slot=slots.flatten()[where][scored],
            owner=owner,
            shape=(rows, time),
            device=device,
        )

    @classmethod
    def from_pairs(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        chosen_ids: Tensor,
        chosen_mask: Tensor,
        rejected_ids: Tensor,
        rejected_mask: Tensor,
        chosen_loss_mask: Tensor | None = None,
        rejected_loss_mask: Tensor | None = None,
    ) -> Segments:
        """Builds the segments of preference pairs; output rows alternate chosen and rejected, `[2 * pairs, time]`.

        Args:
            prompt_ids: `[pairs, prompt_time]` token ids, padded anywhere.
            prompt_mask: `[pairs, prompt_time]`, nonzero at real tokens.
            chosen_ids: `[pairs, chosen_time]`, the completion alone.
            chosen_mask: `[pairs, chosen_time]`.
            rejected_ids: `[pairs, rejected_time]`, the completion alone.
            rejected_mask: `[pairs, rejected_time]`.
            chosen_loss_mask: `[pairs, chosen_time]`, nonzero where a chosen token is to be scored; None: all that
                exist. What is not scored stays in the context of what is.
            rejected_loss_mask: `[pairs, rejected_time]`, likewise.

        Raises:
            ValueError: If shapes do not fit together, or a loss mask marks a token that does not exist.
        """
        width = max(chosen_ids.shape[1], rejected_ids.shape[1])

        def paired(chosen: Tensor, rejected: Tensor) -> Tensor:
            sides = [torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (chosen, rejected)]
            return torch.stack(sides, dim=1).flatten(0, 1)

        targets = None
        if chosen_loss_mask is not None or rejected_loss_mask is not None:
            targets = paired(
                chosen_mask if chosen_loss_mask is None else _check_loss_mask("chosen", chosen_loss_mask, chosen_mask),
                rejected_mask
                if rejected_loss_mask is None
                else _check_loss_mask("rejected", rejected_loss_mask, rejected_mask),
            )
        return cls.from_prompts(
            prompt_ids, prompt_mask, paired(chosen_ids, rejected_ids), paired(chosen_mask, rejected_mask), targets
        )

    @property
    def tokens(self) -> int:
        """Number of tokens the policy computes."""
        return self.token_ids.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest context: a parent and its longest child, or a lone segment."""
        own = self.lengths
        return max((n + (own[p] if p >= 0 else 0) for n, p in zip(own, self.parents, strict=True)), default=0)

    def mask(self) -> Tensor:
        """Where the output is scored: `[rows, time]` bool."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.slot.device)
        return flat.index_fill_(0, self.slot, True).view(self.shape)

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same question as right-padded rows, for policies that cannot read segments; prompts are repeated.

        Returns:
            `input_ids` and `attention_mask` `[sequences, longest]` int64 (padded by repeating the last token), and for
            each target the `row` and the `column` of the token that predicts it, `[targets]` int64.
        """
        device = self.token_ids.device
        parents = torch.tensor(self.parents, dtype=torch.int64)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        count = len(lengths)
        has_child = torch.zeros(count, dtype=torch.bool)
        has_child[parents[parents >= 0]] = True
        leaves = (~has_child).nonzero().squeeze(1)
        prefix = torch.where(parents[leaves] >= 0, lengths[parents[leaves].clamp_min(0)], 0)
        totals = prefix + lengths[leaves]

        column = torch.arange(self.longest)[None]
        shifted = column - prefix[:, None]
        index = torch.where(shifted < 0, starts[parents[leaves].clamp_min(0)][:, None] + column, 0)
        index = torch.where(shifted >= 0, starts[leaves][:, None] + shifted, index)
        mask = column < totals[:, None]
        index = torch.where(mask, index, (starts + lengths)[leaves][:, None] - 1)

        row_of_segment = torch.full((count,), len(leaves))
        row_of_segment[leaves] = torch.arange(len(leaves))
        shared = parents >= 0  # a parent's targets are scored in its first child's row
        row_of_segment.scatter_reduce_(0, parents[shared], row_of_segment[shared], "amin")
        row_of_token = row_of_segment.repeat_interleave(lengths).to(device)
        mask = mask.to(device)
        input_ids = self.token_ids[index.to(device)]
        return input_ids, mask.long(), row_of_token[self.source], self.position_ids[self.source]


def _check_shape(name: str, value: Tensor, like: Tensor | None) -> Tensor:
    """Refuses tensors that are not `[batch, time]`, or not of the shape of the one they belong to."""
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [batch, time]")
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected its token ids' shape {tuple(like.shape)}")
    return value


def _check_loss_mask(side: str, loss_mask: Tensor, mask: Tensor) -> Tensor:
    """Refuses a loss mask that does not lie within the mask of the tokens that exist."""
    stray = (_check_shape(f"{side}_loss_mask", loss_mask, mask) != 0) & (mask == 0)
    if stray.any():
        row, column = stray.nonzero()[0].tolist()
        raise ValueError(
            f"{side}_loss_mask marks token {column} of row {row}, which does not exist: {side}_attention_mask is 0 "
            "there; only tokens that exist can be scored"
        )
    return loss_mask


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Brings integer or boolean tensors to the CPU as int64, in one transfer when they are elsewhere."""
    if tensors[0].device.type == "cpu":
        return [tensor.to(torch.int64) for tensor in tensors]
    flat = torch.cat([tensor.to(tensors[0].device, torch.int64).flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _assemble(
    *,
    token_ids: Tensor,
    segment: Tensor,
    parents: Tensor,
    source: Tensor,
    target_ids: Tensor,
    slot: Tensor,
    owner: Tensor,
    shape: tuple[int, int],
    device: torch.device,
) -> Segments:
    """Drops what no target depends on, numbers the rest anew and moves it to `device`.

    Args:
        token_ids: `[tokens]` real tokens, segment after segment.
        segment: `[tokens]` segment of each token.
        parents: `[segments]` parent of each segment or -1.
        source: `[targets]` index of the predicting token.
        target_ids: `[targets]`.
        slot: `[targets]`.
        owner: `[targets]` segment that the target itself stands in.
        shape: Of the output.
        device: Of the result.

    Returns:
        The segments. A parent left with a single child becomes one segment with it.
    """
    count, tokens = len(parents), len(token_ids)
    arange = torch.arange(tokens)
    last = torch.full((count,), -1).scatter_reduce(0, segment[source], source, "amax")
    keep = arange <= last[segment]
    # A parent is needed whole as soon as one child has tokens or targets.
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

    renumber = keep.cumsum(0) - 1
    kept = lengths > 0
    segment_number = kept.cumsum(0) - 1
    kept_parents = parents[kept]
    new_parents = torch.where(kept_parents >= 0, segment_number[kept_parents.clamp_min(0)], -1)
    new_lengths = lengths[kept]
    starts = new_lengths.cumsum(0) - new_lengths
    offset = torch.where(new_parents >= 0, new_lengths[new_parents.clamp_min(0)], 0) - starts
    position_ids = torch.arange(int(new_lengths.sum())) + offset.repeat_interleave(new_lengths)
    return Segments(
        token_ids=token_ids[keep].to(device, non_blocking=True),
        position_ids=position_ids.to(device, non_blocking=True),
        lengths=tuple(new_lengths.tolist()),
        parents=tuple(new_parents.tolist()),
        source=renumber[source].to(device, non_blocking=True),
        target_ids=target_ids.to(device, non_blocking=True),
        slot=slot.to(device, non_blocking=True),
        shape=shape,
    )
