"""Distillation on environments: which tokens are learnt, that nothing else changes them, and what is refused."""

import copy

import pytest
import torch

from alignment_modules import DistillationModule
from alignment_modules.functional import distribution_divergence
from tests.episodes import GOALS, Unjudged, batch, distils, labelled, policy
from tests.models import other_than

ALL = tuple(range(8))


@pytest.fixture(scope="module")
def start():
    return policy()


@pytest.fixture
def make(start):
    """`make(**options)`: a module whose policy acts, on a copy of the start, with a teacher near it."""

    return lambda **options: distils(start, **options)


@pytest.fixture
def episodes_of(monkeypatch):
    """`episodes_of(module)`: the completions that it makes from now on, a list that grows."""

    def watch(module):
        found, run = [], module.episodes.run

        def kept(*arguments, **options):
            found.append(run(*arguments, **options))
            return found[-1]

        monkeypatch.setattr(module.episodes, "run", kept)
        return found

    return watch


def by_hand(student, teacher, written):
    """Divergences at the policy's own tokens of one padded pass over the whole contexts, in float64."""
    rows = [torch.cat([p[m], c[k]]) for p, m, c, k in zip(
        written.prompts.ids, written.prompts.mask, written.ids, written.mask, strict=True
    )]  # fmt: skip
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ours, theirs = (model(ids, attention_mask=mask).logits.double() for model in (student, teacher))
    found = []
    for row, (own, kept, start) in enumerate(zip(written.own, written.mask, written.prompts.lengths, strict=True)):
        places = own[kept].nonzero()[:, 0] + start - 1
        found.append(distribution_divergence(ours[row, places], theirs[row, places].detach()))
    return found


def test_the_loss_and_its_gradient_are_those_of_the_policys_tokens_alone(make, train, start, episodes_of):
    model = copy.deepcopy(start)
    module = make(max_turns=3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    seen = episodes_of(module)
    metrics = train(module, [batch(ALL)]).callback_metrics
    [written] = seen
    episodes = written.episodes
    assert {1, 2, 3} <= {episode.turns for episode in episodes}
    assert {"answer", "max_turns"} <= {episode.stop_reason for episode in episodes}
    tools = (written.mask & ~written.own).sum(dim=1)
    assert tools.tolist() == [episode.tool_tokens for episode in episodes]
    values = torch.cat(by_hand(model, other_than(start), written))
    assert len(values) == int(written.own.sum())
    values.mean().backward()
    assert float(metrics["train/loss"]) == pytest.approx(float(values.mean()), abs=1e-5)
    for (name, before), after in zip(model.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-5, msg=name)
    assert float(metrics["train/episode/turns"]) == sum(episode.turns for episode in episodes) / 8
    assert float(metrics["train/episode/tool_tokens"]) == float(tools.sum()) / 8
    assert float(metrics["train/completions/mean_length"]) == float(written.mask.sum()) / 8
    assert "train/reward" not in metrics


@pytest.mark.parametrize("size", [3, 8])
def test_cut_and_order_change_nothing(make, update, assert_same, size):
    rows = (5, 1, 7, 0, 2, 6, 3, 4)
    cut = [batch(rows[first : first + size]) for first in range(0, 8, size)]
    assert_same(update(make, [batch(ALL)]), update(make, cut))


def test_a_row_is_written_again_bit_for_bit_and_otherwise_at_another_step(make):
    module = make()
    once, again, later = (
        module.own_rows.write(module.policy, module.engine, module.codec, batch(ALL), step)[0] for step in (2, 2, 3)
    )
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(once[name], again[name])
    assert not torch.equal(once["input_ids"], later["input_ids"])
    alone, _ = module.own_rows.write(module.policy, module.engine, module.codec, batch((3,)), 2)
    real = once["attention_mask"][3].bool()
    assert torch.equal(alone["input_ids"][0], once["input_ids"][3][real])
    assert torch.equal(alone["labels"][0], once["labels"][3][real])


def test_a_share_of_rows_with_completions(make):
    """The others stay as they are; a process whose rows are all given tells the same names."""
    module = make(on_policy_share=0.5)
    given, write = labelled(ALL), module.own_rows.write
    written, told = write(module.policy, module.engine, module.codec, given, 0)
    kept = written["attention_mask"].sum(dim=1) == 6
    assert 0 < int(kept.sum()) < 8
    assert torch.equal(written["input_ids"][kept][:, :6], given["input_ids"][kept])
    assert torch.equal(written["labels"][kept][:, :6], given["labels"][kept])
    assert told["episode/turns"].weight == float((~kept).sum())
    alone = labelled([int(kept.nonzero()[0])])
    _, nothing = write(module.policy, module.engine, module.codec, alone, 0)
    assert nothing.keys() == told.keys()
    assert float(nothing["episode/turns"].weight) == 0


def test_a_row_whose_environment_fails_teaches_nothing(make, update, assert_same):
    without = update(make, [batch(ALL[:7])])
    with pytest.warns(UserWarning, match="reset: RuntimeError: no game"):
        assert_same(without, update(make, [batch(ALL, fails=[False] * 7 + [True])]))


def test_validation_takes_rows_as_they_are(make, start):
    module = make().eval()
    given = labelled(ALL)
    del given["prompt"]
    module.check_batch(given)
    plain = DistillationModule(policy=copy.deepcopy(start), teacher=other_than(start)).eval()
    assert torch.equal(module.objective(given).total, plain.objective(given).total)


@pytest.mark.parametrize("lacking", ["prompt", "goal"])
@pytest.mark.parametrize("rows", [batch, labelled])
def test_what_a_batch_lacks(make, train, lacking, rows):
    given = rows(ALL)
    del given[lacking]
    with pytest.raises(ValueError, match=f"{lacking}.*columns: "):
        train(make(), [given])


@pytest.mark.parametrize("options", [
    {"environments": Unjudged}, {"tools": [len]}, {"environments": Unjudged, "max_turns": 2},
])  # fmt: skip
def test_nothing_to_act_on_without_own_rows(start, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is of the policy's own samples, and on_policy_sh"):
        DistillationModule(policy=start, teacher=start, **options)


def test_limits_of_episodes_without_any(start):
    with pytest.raises(ValueError, match="max_turns=2 has no effect without environments or tools"):
        DistillationModule(policy=start, teacher=start, on_policy_share=1.0, max_turns=2)


def test_says_what_it_acts_on(make):
    assert make().describe()["environments"].startswith("Unjudged; tools add; at most 4 turns")


def test_goals_are_told(make):
    """What `reset` says stands in the prompt that both models read."""
    module = make()
    written, _ = module.own_rows.write(module.policy, module.engine, module.codec, batch((1,)), 0)
    assert f"To {GOALS[1]}.<|assistant|>" in module.tokenizer.decode(written["input_ids"][0])
