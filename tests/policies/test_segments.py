import pytest
import torch

from alignment_modules.policies.segments import Segments


def reference_labels(input_ids, labels, mask=None, position_ids=None):
    """Context and id of every target by plain loops: {slot: (tokens before, target id)}."""
    found = {}
    for b in range(input_ids.shape[0]):
        before = []
        for t in range(input_ids.shape[1]):
            if mask is not None and not mask[b, t]:
                continue
            if position_ids is not None and position_ids[b, t] == 0:
                before = []
            if before and labels[b, t] != -100:
                found[b * input_ids.shape[1] + t] = (tuple(before), int(labels[b, t]))
            before.append(int(input_ids[b, t]))
    return found


def reference_prompts(prompt_ids, prompt_mask, completion_ids, completion_mask, target_mask=None):
    found = {}
    samples = len(completion_ids) // max(len(prompt_ids), 1)
    time = completion_ids.shape[1]
    for n in range(len(completion_ids)):
        before = prompt_ids[n // samples][prompt_mask[n // samples].bool()].tolist()
        for t in range(time):
            if not completion_mask[n, t]:
                continue
            if before and (target_mask is None or target_mask[n, t]):
                found[n * time + t] = (tuple(before), int(completion_ids[n, t]))
            before.append(int(completion_ids[n, t]))
    return found


def contents(segments):
    """The same, read from the segments; also checks that the parts fit together."""
    assert len(segments.lengths) == len(segments.parents)
    assert sum(segments.lengths) == segments.tokens == len(segments.position_ids)
    assert 0 not in segments.lengths
    tokens = segments.token_ids.split(list(segments.lengths))
    owner = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths, dtype=torch.int64))
    found, position = {}, segments.position_ids.tolist()
    starts = [sum(segments.lengths[:i]) for i in range(len(segments.lengths))]
    for index, parent in enumerate(segments.parents):
        assert parent < index
        assert parent < 0 or segments.parents[parent] < 0
        first = segments.lengths[parent] if parent >= 0 else 0
        start = starts[index]
        assert position[start : start + segments.lengths[index]] == list(range(first, first + segments.lengths[index]))
    for source, target, slot in zip(
        segments.source.tolist(), segments.target_ids.tolist(), segments.slot.tolist(), strict=True
    ):
        index = int(owner[source])
        parent = segments.parents[index]
        before = tokens[parent].tolist() if parent >= 0 else []
        before += tokens[index].tolist()[: source - starts[index] + 1]
        assert slot not in found
        found[slot] = (tuple(before), target)
    return found


def runs(rows, time, g):
    """Masks of existing tokens: one run in each row, which may be empty or whole."""
    ends = torch.randint(time + 1, (rows, 2), generator=g).sort(dim=1).values
    column = torch.arange(time)
    return (ends[:, :1] <= column) & (column < ends[:, 1:])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_from_labels_equals_plain_loops(seed, masked, packed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (4, 9), generator=g)
    labels = torch.where(torch.rand(4, 9, generator=g) < 0.5, torch.randint(50, (4, 9), generator=g), -100)
    mask = runs(4, 9, g) if masked else None
    position_ids = None
    if packed:
        position_ids = torch.zeros(4, 9, dtype=torch.int64)
        for t in range(1, 9):
            restart = torch.rand(4, generator=g) < 0.3
            position_ids[:, t] = torch.where(restart, 0, position_ids[:, t - 1] + 1)
    if masked:
        mask[1] = False
    segments = Segments.from_labels(ids, labels, mask, position_ids)
    expected = reference_labels(ids, labels, mask, position_ids)
    assert contents(segments) == expected
    assert segments.shape == (4, 9)
    assert segments.mask().flatten().nonzero().squeeze(1).tolist() == sorted(expected)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_targets", [False, True])
def test_from_prompts_equals_plain_loops(seed, with_targets):
    g = torch.Generator().manual_seed(seed)
    samples = 1 + seed % 4
    prompt_ids, completion_ids = (
        torch.randint(50, (3, 5), generator=g),
        torch.randint(50, (3 * samples, 6), generator=g),
    )
    prompt_mask, completion_mask = runs(3, 5, g), runs(3 * samples, 6, g)
    prompt_mask[seed % 3] &= seed % 2 == 0  # an empty prompt in every second case
    completion_mask[(seed + 1) % (3 * samples)] = False
    target_mask = (torch.rand(3 * samples, 6, generator=g) < 0.3) if with_targets else None
    given = (prompt_ids, prompt_mask.long(), completion_ids, completion_mask, target_mask)
    segments = Segments.from_prompts(*given)
    expected = reference_prompts(*given)
    assert contents(segments) == expected
    assert segments.shape == (3 * samples, 6)


def test_a_shared_prompt_is_stored_once_and_a_single_completion_joins_it():
    prompt, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    completions = torch.tensor([[4, 5, 6], [7, 8, 9]])
    shared = Segments.from_prompts(prompt, mask, completions, torch.ones(2, 3))
    assert shared.token_ids.tolist() == [1, 2, 3, 4, 5, 7, 8]  # the last token of a row predicts nothing
    assert (shared.lengths, shared.parents) == ((3, 2, 2), (-1, 0, 0))
    single = Segments.from_prompts(prompt, mask, completions[:1], torch.ones(1, 3))
    assert (single.lengths, single.parents) == ((5,), (-1,))
    one_left = Segments.from_prompts(prompt, mask, completions, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert (one_left.lengths, one_left.parents) == ((5,), (-1,))


def test_nothing_is_kept_that_no_target_depends_on():
    ids = torch.arange(12).view(2, 6)
    labels = torch.full((2, 6), -100)
    labels[0, 2] = 2
    segments = Segments.from_labels(ids, labels)
    assert segments.token_ids.tolist() == [0, 1]
    no_advantage = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])
    groups = Segments.from_prompts(
        torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2), torch.tensor([[5, 6]] * 4), torch.ones(4, 2), no_advantage
    )
    assert groups.token_ids.tolist() == [3, 4, 5, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_amount_change_nothing_but_the_slots(side):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    plain = Segments.from_labels(ids, torch.where(mask == 1, ids, -100), mask)
    pad = (3, 0) if side == "left" else (0, 3)
    wide, wide_mask = torch.nn.functional.pad(ids, pad), torch.nn.functional.pad(mask, pad)
    padded = Segments.from_labels(wide, torch.where(wide_mask == 1, wide, -100), wide_mask)
    for name in ("token_ids", "position_ids", "source", "target_ids"):
        assert torch.equal(getattr(plain, name), getattr(padded, name))
    assert plain.lengths == padded.lengths


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    segments = Segments.from_labels(ids, ids)
    assert segments.tokens == 0
    assert segments.lengths == ()
    assert segments.mask().shape == shape
    prompts = Segments.from_prompts(ids, ids, ids, ids)
    assert prompts.tokens == 0
    assert prompts.shape == shape


@pytest.mark.parametrize("seed", range(6))
def test_padded_rows_ask_the_same(seed):
    g = torch.Generator().manual_seed(seed)
    given = (
        torch.randint(1, 50, (3, 5), generator=g),
        runs(3, 5, g),
        torch.randint(1, 50, (9, 6), generator=g),
        runs(9, 6, g),
    )
    segments = Segments.from_prompts(*given)
    input_ids, mask, row, column = segments.padded()
    assert (mask.diff(dim=1) <= 0).all()  # right-padded
    assert input_ids.shape[1] == segments.longest == mask.sum(1).max()
    found = {
        slot: (tuple(input_ids[r, : c + 1].tolist()), target)
        for slot, r, c, target in zip(
            segments.slot.tolist(), row.tolist(), column.tolist(), segments.target_ids.tolist(), strict=True
        )
    }
    assert all(mask[r, c] for r, c in zip(row.tolist(), column.tolist(), strict=True))
    assert found == reference_prompts(*given)


def test_shapes_that_do_not_fit_are_named():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\).*\(2, 3\)"):
        Segments.from_labels(ids, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        Segments.from_labels(ids[0], ids[0])
    with pytest.raises(ValueError, match="completion_mask has shape"):
        Segments.from_prompts(ids, ids, ids, ids[:1])
    with pytest.raises(ValueError, match="3 rows, which is not a multiple of the 2 rows"):
        Segments.from_prompts(ids, ids, ids.new_zeros(3, 4), ids.new_zeros(3, 4))


def test_what_is_not_scored_stays_in_the_context():
    ones = torch.ones(1, 3)
    prompt, chosen, rejected = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]]), torch.tensor([[7, 8, 9]])
    scored = torch.tensor([[1, 0, 1]])
    segments = Segments.from_pairs(prompt, ones, chosen, ones, rejected, ones, rejected_loss_mask=scored)
    assert contents(segments) == {
        0: ((1, 2, 3), 4), 1: ((1, 2, 3, 4), 5), 2: ((1, 2, 3, 4, 5), 6),
        3: ((1, 2, 3), 7), 5: ((1, 2, 3, 7, 8), 9),
    }  # fmt: skip
    with pytest.raises(ValueError, match="chosen_loss_mask has shape"):
        Segments.from_pairs(prompt, ones, chosen, ones, rejected, ones, torch.ones(1, 2))


IDS = torch.arange(1, 13).view(2, 6)
WHOLE = torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_on_any_side_is_no_hole(padding):
    mask = WHOLE.clone()
    mask[1, :2] = mask[1, :2] if padding == "right" else 0
    mask[1, 4:] = mask[1, 4:] if padding == "left" else 0
    Segments.from_prompts(IDS, mask, IDS, mask)
    Segments.from_labels(IDS, IDS, mask)
    Segments.from_pairs(IDS, mask, IDS, mask, IDS, mask)


def test_a_hole_between_tokens_is_refused_by_name():
    broken = WHOLE.clone()
    broken[1, 2:4] = 0
    where = "has a hole: it is 0 at row 1, column 2, between tokens that exist"
    with pytest.raises(ValueError, match=f"^prompt_mask {where}"):
        Segments.from_prompts(IDS, broken, IDS, WHOLE)
    with pytest.raises(ValueError, match=f"^completion_mask {where}"):
        Segments.from_prompts(IDS, WHOLE, IDS, broken)
    for position, name in enumerate(("prompt", "chosen", "rejected")):
        given = [IDS, WHOLE] * 3
        given[2 * position + 1] = broken
        with pytest.raises(ValueError, match=f"^{name}_attention_mask {where}"):
            Segments.from_pairs(*given)
    with pytest.raises(ValueError, match=f"^attention_mask {where}"):
        Segments.from_labels(IDS, IDS, broken)
    documents = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 1]])  # padding between documents is none
    Segments.from_labels(IDS, IDS, broken, documents)
    documents[1, 4] = 2
    with pytest.raises(ValueError, match=r"^attention_mask has a hole: it is 0 at row 1, column 2"):
        Segments.from_labels(IDS, IDS, broken, documents)


def test_a_gap_in_what_is_scored_leaves_no_gap_in_the_context():
    own = WHOLE.clone()
    own[:, 2:4] = 0  # a tool's result
    segments = Segments.from_prompts(IDS, WHOLE, IDS, WHOLE, own)
    assert contents(segments) == reference_prompts(IDS, WHOLE, IDS, WHOLE, own)
    assert contents(segments)[4][0] == (*range(1, 7), *range(1, 5))


def test_pairs_of_unequal_number_are_named():
    with pytest.raises(ValueError, match="rejected_input_ids has 1 rows and prompt_input_ids 2"):
        Segments.from_pairs(IDS, WHOLE, IDS, WHOLE, IDS[:1], WHOLE[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_scored_where_asked_for(side):
    """Their rows stand behind those of the completions, as wide as the longest of all."""
    generator = torch.Generator().manual_seed(0)
    sides = {}
    for name, width in (("prompt", 6), ("chosen", 3), ("rejected", 4)):
        ids = torch.randint(1, 40, (3, width), generator=generator)
        mask = (torch.arange(width)[None] < torch.tensor([[width], [2], [1]])).long()
        sides[name] = (ids, mask.flip(1) if side == "left" else mask)
    given = [part for pair in sides.values() for part in pair]
    plain, segments = Segments.from_pairs(*given), Segments.from_pairs(*given, score_prompts=True)
    assert (plain.shape, segments.shape) == ((6, 4), (9, 6))
    expected = {}
    for slot, target in contents(plain).items():
        expected[slot // 4 * 6 + slot % 4] = target
    for row in range(3):
        before = []
        for column in range(6):
            if sides["prompt"][1][row, column]:
                if before:
                    expected[36 + 6 * row + column] = (tuple(before), int(sides["prompt"][0][row, column]))
                before.append(int(sides["prompt"][0][row, column]))
    assert contents(segments) == expected
    assert segments.tokens <= sum(int(mask.sum()) for _, mask in sides.values())
    assert segments.mask()[6:].sum(dim=1).tolist() == [5, 1, 0]
