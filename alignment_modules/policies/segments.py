"""One padding-free layout for every paradigm: a flat row of tokens cut into segments, with shared prompts.

A batch of padded rows becomes one row of tokens. Each *segment* is a run of consecutive tokens; a segment with a parent
continues it, so that the completions of one prompt share its tokens: `prompt | completion 1 | completion 2 | prompt |
...`. What is asked of the policy is a list of *reads*: the tokens whose hidden states are wanted. A *target* is a token
to be scored: the state that predicts it is read, and its score belongs somewhere in the padded output. The state of
each row's last token can be asked for too.

Only tokens on which some read depends are kept. Under causal attention a token after the last one read of its segment
(the final token of every row, where targets alone are asked for) changes nothing, nor does a row without reads: they
cost nothing.

Segments are made on the host of host tensors, and carried to the policy's device once, all in one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment_modules.functional.logprobs import IGNORED_TARGET
from alignment_modules.policies.layout import Last, Reads, Targets, assemble, of_prompts
from alignment_modules.policies.masks import check_shape, check_within, hole, to_host

_TENSORS = ("token_ids", "position_ids", "source", "target_ids", "slot", "last_rows")


@dataclass(frozen=True, eq=False)
class Segments:
    """Tokens without padding, what depends on what, and which states are to be read.

    Attributes:
        token_ids: `[tokens]` int64, the tokens that the reads depend on, segment after segment.
        position_ids: `[tokens]` int64; a segment without a parent starts at 0, a child continues after its parent.
        lengths: Tokens of each segment, in order; none is 0.
        parents: Index of each segment's parent, or -1. A parent comes before its children and has no parent itself.
        source: `[reads]` int64, index into `token_ids` of the token whose state is read: for each target the one that
            predicts it, then, where they are asked for, the rows' last tokens.
        target_ids: `[targets]` int64, the ids to be scored.
        slot: `[targets]` int64, index into the flattened `[rows, time]` output; no slot occurs twice.
        shape: `(rows, time)` of the output.
        last_rows: `[reads - targets]` int64, ascending: the rows that have a last token; None: it is not asked for.
        given_lengths: Tokens that each segment was given with, also those that no read depends on.
        host: The same on the host, for those that were carried elsewhere.
    """

    token_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    source: Tensor
    target_ids: Tensor
    slot: Tensor
    shape: tuple[int, int]
    last_rows: Tensor | None = None
    given_lengths: tuple[int, ...] = ()
    host: Segments | None = field(default=None, repr=False)

    @classmethod
    def from_labels(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        reads: Reads = "targets",
    ) -> Segments:
        """Builds the segments of pretraining and SFT batches.

        Entry `[b, t]` of the output is `log p(labels[b, t] | the real tokens before t)`.

        Args:
            input_ids: `[batch, time]` token ids, padded on either side.
            labels: `[batch, time]` ids to be scored, -100 where not supervised. As in Hugging Face, the label at `t`
                stands for token `t` and is predicted by the real token before it; a document's first is never scored.
            attention_mask: `[batch, time]`, nonzero at real tokens; all are real where it is None.
            position_ids: `[batch, time]`; a real token at position 0 inside a row starts a new document, which
                sees nothing of the one before it (packing). Otherwise only the order of the real tokens counts.
            reads: "targets", each row's "last" token, or "targets+last".

        Returns:
            The segments, one for each document that is read, on the device of the tensors.

        Raises:
            ValueError: If a tensor is not `[batch, time]` with `input_ids`' shape, or the attention mask has a hole
                within a document.
        """
        check_shape("input_ids", input_ids)
        check_shape("labels", labels, input_ids)
        given = [input_ids, labels]
        given += [check_shape("attention_mask", attention_mask, input_ids)] if attention_mask is not None else []
        given += [check_shape("position_ids", position_ids, input_ids)] if position_ids is not None else []
        host = to_host(given)  # the only synchronisation with an accelerator
        ids, targets = host[0], host[1]
        real = host[2] != 0 if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)

        rows, time = ids.shape
        where = real.flatten().nonzero().squeeze(1)
        row = where // max(time, 1)
        first = torch.ones_like(where, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        ends = torch.ones_like(where, dtype=torch.bool)
        ends[:-1] = first[1:]
        if position_ids is not None:
            first |= host[-1].flatten()[where] == 0
        broken = (~first[1:] & (where.diff() != 1)).nonzero()
        if len(broken):
            place = int(where[broken[0]]) + 1
            raise hole("attention_mask", place // time, place % time)
        segment = first.cumsum(0) - 1
        labels_flat = targets.flatten()[where]
        scored = ((labels_flat != IGNORED_TARGET) & ~first).nonzero().squeeze(1)
        last = ends.nonzero().squeeze(1)
        layout = assemble(
            token_ids=ids.flatten()[where],
            segment=segment,
            parents=torch.full((int(first.sum()),), -1),
            targets=Targets(scored - 1, segment[scored], labels_flat[scored], where[scored]),
            last=Last(last, segment[last], row[last]),
            reads=reads,
            shape=(rows, time),
        )
        return cls(*layout).to(input_ids.device)

    @classmethod
    def from_prompts(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        target_mask: Tensor | None = None,
        *,
        reads: Reads = "targets",
    ) -> Segments:
        """Builds the segments of completions that share prompts.

        Entry `[n, t]` of the output is the log-probability of completion `n`'s token `t`.

        Args:
            prompt_ids: `[prompts, prompt_time]` token ids, padded on either side.
            prompt_mask: `[prompts, prompt_time]`, nonzero at real tokens.
            completion_ids: `[prompts * K, time]`, prompt 0's K completions first.
            completion_mask: `[prompts * K, time]`, nonzero at real tokens.
            target_mask: `[prompts * K, time]`, nonzero where a real completion token is to be scored; None: all. What
                is not scored stays in the context of what is.
            reads: "targets", each row's "last" token (the prompt's, where the completion is empty), or "targets+last".

        Returns:
            The segments, on the device of the tensors: a prompt, its completions, the next prompt ... The first token
            of a completion whose prompt is empty has nothing to be predicted from and is not scored.

        Raises:
            ValueError: If shapes do not fit together, the completions are not a multiple of the prompts, or a mask of
                real tokens has a hole.
        """
        check_shape("prompt_ids", prompt_ids)
        check_shape("prompt_mask", prompt_mask, prompt_ids)
        check_shape("completion_ids", completion_ids)
        check_shape("completion_mask", completion_mask, completion_ids)
        given = [prompt_ids, prompt_mask, completion_ids, completion_mask]
        given += [check_shape("target_mask", target_mask, completion_ids)] if target_mask is not None else []
        prompts, rows = prompt_ids.shape[0], completion_ids.shape[0]
        if (rows % prompts if prompts else rows) != 0:
            raise ValueError(
                f"completion_ids has {rows} rows, which is not a multiple of the {prompts} rows of prompt_ids; "
                "expected the same number of completions for every prompt"
            )
        host = to_host(given)
        masks = {"prompt_mask": host[1] != 0, "completion_mask": host[3] != 0}
        prompt, real = masks.values()
        wanted = real if target_mask is None else host[4] != 0
        return cls(*of_prompts(host[0], prompt, host[2], real, wanted, masks, reads)).to(completion_ids.device)

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
        *,
        reads: Reads = "targets",
        score_prompts: bool = False,
    ) -> Segments:
        """Builds the segments of preference pairs; output rows alternate chosen and rejected, `[2 * pairs, time]`.

        Args:
            prompt_ids: `[pairs, prompt_time]` token ids, padded on either side.
            prompt_mask: `[pairs, prompt_time]`, nonzero at real tokens.
            chosen_ids: `[pairs, chosen_time]`, the completion alone.
            chosen_mask: `[pairs, chosen_time]`.
            rejected_ids: `[pairs, rejected_time]`, the completion alone.
            rejected_mask: `[pairs, rejected_time]`.
            chosen_loss_mask: `[pairs, chosen_time]`, nonzero where a chosen token is to be scored; None: all that
                exist. What is not scored stays in the context of what is.
            rejected_loss_mask: `[pairs, rejected_time]`, likewise.
            reads: As in `from_prompts`.
            score_prompts: Whether the prompts' tokens are scored, too, but for each first: `[3 * pairs, longest]`, the
                prompts' rows behind the others.

        Raises:
            ValueError: If shapes do not fit together, a loss mask marks a token that does not exist, or another mask
                has a hole.
        """
        sides = {
            "prompt": (prompt_ids, prompt_mask, None),
            "chosen": (chosen_ids, chosen_mask, chosen_loss_mask),
            "rejected": (rejected_ids, rejected_mask, rejected_loss_mask),
        }
        for name, (ids, mask, loss_mask) in sides.items():
            check_shape(f"{name}_attention_mask", mask, check_shape(f"{name}_input_ids", ids))
            if loss_mask is not None:
                check_shape(f"{name}_loss_mask", loss_mask, ids)
            if len(ids) != len(prompt_ids):
                raise ValueError(
                    f"{name}_input_ids has {len(ids)} rows and prompt_input_ids {len(prompt_ids)}; expected one of "
                    "each for every pair"
                )
        host = iter(to_host([tensor for side in sides.values() for tensor in side if tensor is not None]))
        width = max(chosen_ids.shape[1], rejected_ids.shape[1])
        parts, masks = [], {}
        for name, (_, _, loss_mask) in sides.items():
            ids, mask = next(host), next(host) != 0
            scored = masks[f"{name}_attention_mask"] = mask
            if loss_mask is not None:
                scored = check_within(f"{name}_loss_mask", next(host), f"{name}_attention_mask", mask) != 0
            if name != "prompt":
                ids, mask, scored = (F.pad(part, (0, width - part.shape[1])) for part in (ids, mask, scored))
            parts.append((ids, mask, scored))
        prompt, *both = parts
        ids, mask, wanted = (torch.stack(side, dim=1).flatten(0, 1) for side in zip(*both, strict=True))
        return cls(*of_prompts(prompt[0], prompt[1], ids, mask, wanted, masks, reads, score_prompts)).to(
            chosen_ids.device
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Segments:
        """The same on another device, carried over in one transfer; Lightning calls it on whatever a batch holds.

        Args:
            device: Where the policy computes.
            non_blocking: Whether the host may go on meanwhile.
        """
        device = torch.device(device)
        if self.token_ids.device == device:
            return self
        if device.type == "cpu" and self.host is not None:
            return self.host
        given = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        there = torch.cat(list(given.values())).to(device, non_blocking=non_blocking)
        moved = zip(given, there.split([len(value) for value in given.values()]), strict=True)
        return replace(self, **dict(moved), host=self.host or (self if self.token_ids.device.type == "cpu" else None))

    def of_rows(self, rows: Tensor) -> Segments:
        """The targets of some rows of the output; tokens on which none of these depends are left out.

        Args:
            rows: `[rows]` bool.

        Returns:
            Segments of the same shape, on the same device. Rows' last tokens are not read.

        Raises:
            ValueError: If there is not one value for each row.
        """
        if rows.shape != self.shape[:1]:
            raise ValueError(f"rows must be [{self.shape[0]}], one for each row of the output, got {tuple(rows.shape)}")
        whole = self.to("cpu")
        segment = torch.arange(len(whole.lengths)).repeat_interleave(torch.tensor(whole.lengths, dtype=torch.int64))
        mine = rows.cpu()[whole.slot // max(self.shape[1], 1)]
        source = whole.source[: len(mine)][mine]
        nothing = source[:0]
        layout = assemble(
            token_ids=whole.token_ids,
            segment=segment,
            parents=torch.tensor(whole.parents, dtype=torch.int64),
            targets=Targets(source, segment[source], whole.target_ids[mine], whole.slot[mine]),
            last=Last(nothing, nothing, nothing),
            reads="targets",
            shape=self.shape,
        )
        return Segments(*layout).to(self.token_ids.device)

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
        """Where the output is scored: `[rows, time]` bool; all false where targets are not asked for."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.slot.device)
        return flat.index_fill_(0, self.slot, True).view(self.shape)

    def has_last(self) -> Tensor:
        """Which rows have a last token whose state is read: `[rows]` bool."""
        found = torch.zeros(self.shape[0], dtype=torch.bool, device=self.slot.device)
        return found if self.last_rows is None else found.index_fill_(0, self.last_rows, True)

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same question as right-padded rows, for policies that cannot read segments; prompts are repeated.

        Returns:
            `input_ids` and `attention_mask` `[sequences, longest]` int64 (padded by repeating the last token), and for
            each read the `row` and the `column` of its token, `[reads]` int64.
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
        shared = parents >= 0  # a parent's tokens are read in its first child's row
        row_of_segment.scatter_reduce_(0, parents[shared], row_of_segment[shared], "amin")
        row_of_token = row_of_segment.repeat_interleave(lengths).to(device)
        mask = mask.to(device)
        input_ids = self.token_ids[index.to(device)]
        return input_ids, mask.long(), row_of_token[self.source], self.position_ids[self.source]
