"""Dynamic sampling: what an update is made of, what is logged of it, and that every moment of it can be resumed."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from alignment_modules import GRPOModule
from alignment_modules.training.dynamic_sampling import WaitingGroups
from datamodules.loader import ResumableLoader
from datamodules.orders import UniformOrder
from tests.batches import rollouts
from tests.contract.two_ranks import NoTokenizer
from tests.paradigms import never_called

DULL = [1.0] * 4
KEEN = [1.0, 0.0, 0.5, 0.0]


def judged(rows, *rewards, old=True):
    """Prompts of these numbers whose groups have these rewards."""
    batch = rollouts(rows)
    if not old:
        del batch["old_logprobs"]
    return batch | {"rewards": torch.tensor(rewards).flatten(), "index": list(rows)}


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        settings = {"num_generations": 4, "max_completion_length": 8, "max_grad_norm": None, "rewards": never_called}
        return GRPOModule(
            policy=copy.deepcopy(tiny_llama),
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
            **(settings | options),
        )

    return factory


class Noted(Callback):
    """The optimizer step after each batch, and what was logged by then."""

    def __init__(self):
        self.steps, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(train, module, given, **options):
    noted = Noted()
    train(module, given, callbacks=[noted], **options)
    return noted


def assert_equal(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


BATCHES = [
    judged([0, 1, 2], KEEN, DULL, DULL),
    judged([3, 4, 5], DULL, DULL, DULL),
    judged([6, 7, 8], KEEN, KEEN, DULL),
    judged([9, 10], KEEN, DULL),
]


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "micro_batch_size": 3}, {"scale_rewards": "batch"}])
def test_an_update_is_made_of_the_groups_that_differ(make, train, options):
    """Three batches give three groups, as many as a batch has prompts; the fourth begins anew."""
    dynamic, plain = make(dynamic_sampling=4, **options), make(**options)
    steps = options.get("num_iterations", 1)
    noted = fit(train, dynamic, BATCHES)
    assert noted.steps == [0, 0, steps, steps]
    train(plain, [judged([0, 6, 7], KEEN, KEEN, KEEN)])
    for (name, value), other in zip(dynamic.policy.named_parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert dynamic.waiting.draws == dynamic.waiting.found == 1


def test_what_is_more_than_wanted_is_learnt_from_too(make, train):
    first, second = judged([0, 1, 2], KEEN, KEEN, DULL), judged([3, 4, 5], KEEN, KEEN, KEEN)
    dynamic, plain = make(dynamic_sampling=4), make()
    train(dynamic, [first, second])
    train(plain, [judged([0, 1, 3, 4, 5], *[KEEN] * 5)])
    for value, other in zip(dynamic.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
    assert dynamic.waiting.draws == 0


def test_the_cap_ends_the_waiting(make, train):
    dynamic, plain = make(dynamic_sampling=2), make()
    noted = fit(train, dynamic, BATCHES[:2])
    assert noted.steps == [0, 1]
    train(plain, [judged([0], KEEN)])
    for value, other in zip(dynamic.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
    assert noted.metrics[1]["train/dynamic_sampling/draws"] == 2
    assert noted.metrics[1]["train/dynamic_sampling/groups"] == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_rewards": "batch"}, {"scale_rewards": "batch_tokens", "minibatches": 2, "num_iterations": 2}],
)
def test_a_step_without_a_group_is_counted_and_moves_nothing(make, train, options):
    module = make(dynamic_sampling=2, **options)
    before = copy.deepcopy(module)
    dull = [judged([n, n + 1, n + 2], DULL, DULL, DULL) for n in (0, 3)]
    keen = judged([6, 7, 8], KEEN, KEEN, KEEN)
    fit(train, module, [*dull, keen])  # an epoch of nothing would be an error
    noted = fit(train, before, [keen])
    assert module.global_step - noted.steps[-1] == options.get("num_iterations", 1)
    assert float(module.window.skipped) == options.get("num_iterations", 1)
    if not options.get("minibatches"):
        assert_equal(module, before)
    with pytest.raises(ValueError, match="nothing to learn in epoch 0"):
        train(make(dynamic_sampling=2), dull)


def test_all_that_was_sampled_is_logged_with_the_update(make, train):
    module = make(dynamic_sampling=4)
    metrics = fit(train, module, BATCHES[:3]).metrics
    assert not any(name.startswith("train/") for name in metrics[1])
    last = metrics[2]
    everything = torch.cat([batch["rewards"] for batch in BATCHES[:3]])
    assert last["train/reward"] == pytest.approx(float(everything.mean()))
    assert last["train/groups_with_signal"] == pytest.approx(3 / 9)
    assert (last["train/dynamic_sampling/draws"], last["train/dynamic_sampling/groups"]) == (3, 3)
    counted = sum(int(b[name].sum()) for b in BATCHES[:3] for name in ("prompt_attention_mask", "response_mask"))
    assert last["train/num_tokens"] == counted
    # the tables show the last batch, with 0 for what was not learnt from
    advantages = module.last_rollout["advantage"]
    assert advantages[:4] == advantages[4:8] == pytest.approx([1.3056, -0.7833, 0.2611, -0.7833], abs=1e-4)
    assert advantages[8:] == [0.0] * 4


def test_groups_wait_beyond_an_epoch_and_the_rest_is_said(make, train):
    module = make(dynamic_sampling=8)
    with pytest.warns(UserWarning, match=r"last 1 batches were not learnt from: 1 of 2 groups were found whose"):
        noted = fit(train, module, [BATCHES[3]], max_epochs=3)
    assert noted.steps == [0, 1, 1]


def test_a_prompt_that_comes_again_is_answered_anew(make, train):
    """No step lies between two epochs of one batch, which no group of is ever of use."""
    seen = []
    module = make(dynamic_sampling=8, rewards=lambda completions: [0.0] * len(completions), tokenizer=NoTokenizer())

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((module.rollout.ids.clone(), module.last_rollout["id"][5]))

    prompts = {key: rollouts([0, 1])[key] for key in ("prompts", "prompt_attention_mask")} | {"index": [0, 1]}
    train(module, [prompts], callbacks=[Look()], max_epochs=3)
    assert [name for _, name in seen] == ["0/1/1", "0.1/1/1", "0.2/1/1"]
    assert len({tuple(ids.flatten().tolist()) for ids, _ in seen}) == 3


def rare(completions):
    """A reward that few groups differ in."""
    return [float(text.startswith("2")) for text in completions]


def resumable():
    keys = ("prompts", "prompt_attention_mask")
    given = [{**{k: rollouts([n, n + 1])[k] for k in keys}, "index": [n, n + 1]} for n in range(0, 10, 2)]
    return ResumableLoader(given, UniformOrder(len(given), batch_size=1), collate_fn=lambda rows: rows[0])


class SaveEach(Callback):
    def __init__(self, folder):
        self.folder, self.count, self.waiting = folder, 0, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += 1
        self.waiting.append((module.waiting.draws, module.waiting.found))
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}
SAMPLING = {"rewards": rare, "tokenizer": NoTokenizer(), "dynamic_sampling": 4, "num_iterations": 2}
SAMPLING |= {"micro_batch_size": 3, "seed": 3, "top_p": 0.95}


def test_every_batch_can_be_resumed_from_bit_for_bit(make, tmp_path):
    saver, whole = SaveEach(tmp_path), make(**SAMPLING)
    trainer = L.Trainer(max_epochs=3, callbacks=[saver], **QUIET)
    trainer.fit(whole, resumable())
    middles = [number for number, (draws, _) in enumerate(saver.waiting, start=1) if draws]
    assert any(found for _, found in saver.waiting)
    assert any(not draws for draws, _ in saver.waiting)
    assert 5 in middles or 10 in middles  # the end of an epoch
    compared = []
    for number in {*middles[:3], *middles[-3:], 5, 10} & {*middles}:
        resumed = make(**SAMPLING)
        again = L.Trainer(max_epochs=3, **QUIET)
        again.fit(resumed, resumable(), ckpt_path=str(tmp_path / f"{number}.ckpt"))
        assert again.global_step == trainer.global_step
        assert_equal(resumed, whole)
        if again.callback_metrics:  # else there was no further update
            for name in ("train/reward", "train/num_tokens", "train/dynamic_sampling/draws", "train/loss"):
                assert again.callback_metrics[name] == trainer.callback_metrics[name], name
            compared.append(number)
        states = [module.extra_state()["waiting_groups"][0] for module in (resumed, whole)]
        assert [state["draws"] for state in states] == [saver.waiting[-1][0]] * 2
    assert len(compared) > 1


def test_a_draw_that_fails_is_drawn_again(make, tmp_path):
    watch, whole = SaveEach(tmp_path), make(**SAMPLING)
    trainer = L.Trainer(max_epochs=2, callbacks=[watch], **QUIET)
    trainer.fit(whole, resumable())
    waited = next(number for number, (_, found) in enumerate(watch.waiting, start=1) if found)
    calls = []

    def fails_once(completions):
        calls.append(1)
        if len(calls) == waited + 1:
            raise ZeroDivisionError("once")
        return rare(completions)

    class SaveOnError(Callback):
        def on_exception(self, trainer, module, exception):
            self.draws = module.waiting.draws
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    saver = SaveOnError()
    with pytest.raises(ValueError, match="once"):
        L.Trainer(max_epochs=2, callbacks=[saver], **QUIET).fit(make(**SAMPLING | {"rewards": fails_once}), resumable())
    assert saver.draws == watch.waiting[waited - 1][0]
    resumed = make(**SAMPLING)
    again = L.Trainer(max_epochs=2, **QUIET)
    again.fit(resumed, resumable(), ckpt_path=str(tmp_path / "failed.ckpt"))
    assert_equal(resumed, whole)
    assert again.callback_metrics["train/num_tokens"] == trainer.callback_metrics["train/num_tokens"]


class KillAt(Callback):
    """Ends its own process before a batch, counted over all epochs."""

    def __init__(self, batch):
        self.batch, self.count = batch, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.count += 1
        if self.count == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_while_groups_wait_is_resumed_bit_for_bit(make, tmp_path):
    watch, whole = SaveEach(tmp_path), make(**SAMPLING)
    L.Trainer(max_epochs=2, callbacks=[watch], **QUIET).fit(whole, resumable())
    waited = next(number for number, (_, found) in enumerate(watch.waiting, start=1) if found)
    folder = tmp_path / "killed"
    folder.mkdir()

    def run():
        trainer = L.Trainer(max_epochs=2, callbacks=[SaveEach(folder), KillAt(waited + 1)], **QUIET)
        trainer.fit(make(**SAMPLING), resumable())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    last = max(folder.iterdir(), key=lambda path: int(path.stem))
    assert int(last.stem) == waited
    resumed = make(**SAMPLING)
    L.Trainer(max_epochs=2, **QUIET).fit(resumed, resumable(), ckpt_path=str(last))
    assert_equal(resumed, whole)


def test_the_first_ratio_is_1(make, train):
    given = [judged([0, 1], KEEN, DULL, old=False), judged([2, 3], DULL, KEEN, old=False)]
    metrics = fit(train, make(dynamic_sampling=2), given).metrics[-1]
    assert metrics["train/importance_ratio/mean"] == 1.0


def test_the_steps_of_a_run_are_at_most_those_of_its_batches(make, train):
    module = make(dynamic_sampling=2, num_iterations=3)
    trainer = train(module, BATCHES)
    assert module.total_optimizer_steps == 12 > trainer.global_step
    assert "of at most 2 batches an update" in module.describe()["dynamic sampling"]
    assert "dynamic sampling" not in make().describe()


def test_a_state_of_another_number_of_processes_is_refused(make, train):
    module = make(dynamic_sampling=8)
    train(module, BATCHES[:1])
    state = module.extra_state()
    assert state["waiting_groups"][0]["draws"] == 1
    with pytest.raises(ValueError, match="holds groups of 2 processes that wait for an update, and this run has 1"):
        module.load_extra_state(state | {"waiting_groups": state["waiting_groups"] * 2})
    empty = [WaitingGroups().state_dict()] * 2
    module.load_extra_state(state | {"waiting_groups": empty})


def cut(rewards):
    """Completions of a group of four, of which the last hit the limit: none ends with a stop token."""
    batch = judged([0], rewards)
    batch["responses"] = batch["responses"].clone()
    lengths = batch["response_mask"].sum(dim=1)
    for row, length in enumerate(lengths[:3].tolist()):
        batch["responses"][row, length - 1] = 7
    return batch


@pytest.mark.parametrize("stays", [True, False])
def test_truncated_completions_are_in_the_baseline_where_they_are_to_be(make, train, stays):
    module = make(mask_truncated=True, truncated_in_baseline=stays, scale_rewards="none", tokenizer=NoTokenizer())
    train(module, [cut([1.0, 0.0, 0.5, 4.5])])
    rollout = module.rollout
    assert rollout.truncated.tolist() == [False] * 3 + [True]
    baseline = 1.5 if stays else 0.5
    assert rollout.advantages[:3].tolist() == pytest.approx([1.0 - baseline, -baseline, 0.5 - baseline])
    assert rollout.trained.any(dim=1).tolist() == [True] * 3 + [False]
    assert rollout.rewards.tolist() == [1.0, 0.0, 0.5, 4.5]
    assert module.informative(rollout).tolist() == [True]
    equal = make(mask_truncated=True, truncated_in_baseline=stays, dynamic_sampling=2, tokenizer=NoTokenizer())
    train(equal, [cut([1.0, 1.0, 1.0, 0.0])])
    assert equal.waiting.found == 0 if not stays else equal.global_step == 1


def test_rewards_that_are_normalised_alone_may_differ_where_their_sum_does_not(make, train):
    """GDPO: the second group is of use, though its completions have one reward in all."""
    options = {"rewards": [rare, never_called], "dynamic_sampling": 4}
    batch = judged([0, 1], DULL, DULL)
    batch["rewards"] = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    alone = make(**options, multi_objective_aggregation="normalize_then_sum")
    together = make(**options)
    for module in (alone, together):
        train(module, [batch])
    assert (alone.waiting.found, together.waiting.found) == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_sampling": 2, "baseline": "none"}, "dynamic_sampling=2 replaces groups of equal rewards"),
        ({"dynamic_sampling": 0}, "dynamic_sampling=0 must be an integer from 1"),
        ({"truncated_in_baseline": False}, "truncated_in_baseline=False needs mask_truncated=True"),
        ({"dynamic_sampling": 2, "num_generations": 1}, "num_generations=1 must be at least 2"),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_more_minibatches_than_prompts_are_refused_at_the_first_draw(make, train):
    with pytest.raises(ValueError, match="minibatches=4 is more than the 3 prompts of a batch"):
        train(make(dynamic_sampling=8, minibatches=4), BATCHES)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_resumed_with_what_each_has_found(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "tests.training.waiting_groups", str(tmp_path), *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]

    run()
    held = {}
    for path in tmp_path.glob("*.ckpt"):
        ranks = torch.load(path, weights_only=True)["alignment_module"]["extra"]["waiting_groups"]
        held[path] = [0 if rank["rollout"] is None else len(rank["rollout"]["prompt_ids"]) for rank in ranks]
    unequal = [path for path, (one, other) in held.items() if one != other]
    assert unequal, held
    run(str(min(unequal, key=lambda path: int(path.stem))))
    whole, again = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "again"))
    assert again["metrics"] == whole["metrics"]
    for name, value in whole["weights"].items():
        assert torch.equal(value, again["weights"][name]), name
