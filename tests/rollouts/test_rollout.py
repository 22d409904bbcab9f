"""Cutting a rollout: every field goes along, whatever it is called."""

from dataclasses import dataclass, field, fields, replace

import pytest
import torch

from alignment_modules.functional.support import Support
from alignment_modules.rollouts.rollout import PER_PROMPT, Rollout


def sets(rows, time):
    """Of each token a set that tells it from the others."""
    mask = torch.zeros(rows * time, 4 * rows * time, dtype=torch.bool)
    mask[:, 0] = mask[torch.arange(rows * time), torch.arange(rows * time)] = True
    return Support.from_mask(mask).take(torch.arange(rows * time).view(rows, time))


def rollout(kind=Rollout, prompts=3, group=4, time=5, **more):
    rows = prompts * group
    grid = torch.arange(rows * time).view(rows, time)
    optional = {name: grid.float() for name in ("old_logps", "reference_logps", "values", "weights")}
    return kind(
        prompt_ids=torch.arange(prompts * 2).view(prompts, 2),
        prompt_mask=torch.ones(prompts, 2, dtype=torch.bool),
        group=group,
        ids=grid,
        mask=grid >= 0,
        own=grid % 2 == 0,
        trained=grid % 4 == 0,
        rewards=torch.arange(rows).float(),
        truncated=torch.arange(rows) % 3 == 0,
        sampled_logps=grid.float(),
        advantages=torch.arange(rows).float(),
        support=sets(rows, time),
        **optional,
        **more,
    )


@dataclass(frozen=True)
class Longer(Rollout):
    """With a field for each completion, one for each prompt, and one that is neither."""

    margins: torch.Tensor | None = None
    topics: torch.Tensor | None = field(default=None, metadata=PER_PROMPT)
    name: str = "rollout"


def test_a_new_field_is_cut_like_the_others():
    longer = rollout(Longer, margins=torch.arange(12), topics=torch.arange(3))
    for prompts, completions, rows in (
        (slice(1, 3), slice(0, 2), [4, 5, 8, 9]),
        (torch.tensor([2, 0]), slice(None), [8, 9, 10, 11, 0, 1, 2, 3]),
        (torch.tensor([False, True, False]), slice(3, 4), [7]),
        (slice(0, 0), slice(None), []),
    ):
        part = longer.select(prompts, completions)
        assert (part.name, part.group) == ("rollout", len(range(4)[completions]))
        assert part.margins.tolist() == rows
        assert part.topics.tolist() == torch.arange(3)[prompts].tolist()
        for one in fields(longer):
            whole, cut = getattr(longer, one.name), getattr(part, one.name)
            if isinstance(whole, torch.Tensor):
                wanted = whole[prompts] if one.metadata else whole[rows]
                assert torch.equal(cut, wanted), one.name
        tokens = part.support.take(torch.arange(part.ids.numel())).excluded(slice(0, part.ids.numel()), 240)
        assert (~tokens).nonzero()[:, 1].tolist() == [
            t for n in longer.ids[rows].flatten().tolist() for t in sorted({0, n})
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"margins": torch.zeros(3)},
            r"Longer.margins has 3 rows; 3 prompts with 4 completions each need 12, ",
        ),
        ({"topics": torch.zeros(12)}, r"Longer.topics has 12 rows; .* need 3, one a prompt"),
        ({"advantages": torch.zeros(3, 4)}, r"Longer.advantages has 3 rows"),
        ({"support": Support.whole((3, 5))}, r"Longer.support has 3 rows"),
    ],
)
def test_a_field_of_other_rows_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(rollout(Longer), **change)


def test_pieces_hold_every_completion_once():
    whole = rollout(prompts=5, group=3)
    for size in (None, 1, 2, 3, 7, 100):
        pieces = whole.micro_batches(size)
        assert torch.cat([piece.ids for piece in pieces])[:, 0].sort().values.tolist() == whole.ids[:, 0].tolist()
        assert all(size is None or len(piece.ids) <= size for piece in pieces)
        assert all(len(piece.ids) == len(piece) * piece.group for piece in pieces)
    assert len(whole.empty()) == len(whole.empty().ids) == 0
    assert whole.empty().micro_batches(None) == []
    parts = list(whole.minibatches(7, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [1] * 5 + [0] * 2
    assert sorted(torch.cat([part.rewards for part in parts]).tolist()) == whole.rewards.tolist()


def test_joined_rollouts_are_their_rows_in_order():
    wide, narrow = rollout(prompts=2, time=7), rollout(prompts=3, time=5)
    joined = Rollout.join([narrow, wide.empty(), wide])
    assert len(joined) == 5
    for one in fields(Rollout):
        whole, first, last = (getattr(part, one.name) for part in (joined, narrow, wide))
        if isinstance(whole, torch.Tensor):
            rows, width = len(first), first.shape[1:]
            assert torch.equal(whole[rows:], last), one.name
            head = whole[:rows]
            assert torch.equal(head[:, : width[0]] if width else head, first), one.name
            assert not width or not head[:, width[0] :].any(), one.name
    assert torch.equal(joined.support.sizes[12:], wide.support.sizes)
    assert torch.equal(joined.support.ids, torch.cat([narrow.support.ids, wide.support.ids]))
    assert not joined.support.sizes[:12, 5:].any()


def test_what_cannot_be_joined_is_named():
    plain = rollout()
    for other, name in (
        (replace(plain, old_logps=None), "old_logps"),
        (replace(plain, support=None), "support"),
        (rollout(group=2), "group"),
        (replace(plain, advantages=plain.sampled_logps), "advantages"),
    ):
        with pytest.raises(ValueError, match=f"cannot be joined: {name} "):
            Rollout.join([plain, other])


def test_a_rollout_comes_back_from_its_state(tmp_path):
    before = replace(rollout(), values=None)
    torch.save(before.state_dict(), tmp_path / "state")
    after = Rollout(**torch.load(tmp_path / "state", weights_only=True))
    for one in fields(Rollout):
        old, new = getattr(before, one.name), getattr(after, one.name)
        if isinstance(old, Support):
            old, new = (torch.cat([s.sizes.flatten(), s.ids, s.bits.flatten()]) for s in (old, new))
        assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old, one.name
