"""Rollouts: what rewards see and need, completions that none applies to, and what is said of a step."""

import copy
import json

import lightning as L
import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.callbacks import SampleTable
from alignment_modules.functional import ADVANTAGE_SCALES
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.rewards import ExactMatch, RewardError
from alignment_modules.rollouts import Completions
from alignment_modules.rollouts.engines import Engine
from alignment_modules.training.crediting import completion_advantages


class Ids:
    """A tokenizer of ids; 3 is the text END."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self):
        return 40

    def decode(self, ids, skip_special_tokens=False):
        return " ".join("END" if token == 3 else str(token) for token in ids)

    def batch_decode(self, rows, skip_special_tokens=False):
        assert not skip_special_tokens or all(token != 7 for row in rows for token in row)
        return [self.decode(row) for row in rows]


def prompts(count=4, **more):
    ids = torch.randint(8, 40, (count, 3), generator=torch.Generator().manual_seed(count))
    return {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids), "index": list(range(count)), **more}


def given(rewards, group=4, **more):
    """A rollout of completions of unequal length with these rewards."""
    generator = torch.Generator().manual_seed(1)
    responses = torch.randint(8, 40, (len(rewards), 5), generator=generator)
    lengths = torch.arange(len(rewards))[:, None] % 4 + 2
    batch = prompts(len(rewards) // group, responses=responses, rewards=torch.tensor(rewards))
    return batch | {"response_mask": (torch.arange(5) < lengths).long()} | more


def third(completions):
    return [float(text.count("1")) for text in completions]


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "rewards": third,
            "num_generations": 4,
            "max_completion_length": 6,
            "tokenizer": Ids(),
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
        }
        return GRPOModule(**(defaults | options))

    return factory


nan = float("nan")


def without(batch, rows):
    """The same rollout, but for some rows."""
    keep = torch.tensor([row not in rows for row in range(len(batch["rewards"]))])
    return batch | {name: batch[name][keep] for name in ("responses", "response_mask", "rewards")}


KL = {"beta": 0.2, "kl_estimator": "k1", "kl_placement": "reward"}


def first_group(batch):
    """The first prompt with its four completions."""
    return {name: values[: 1 if name in prompts() else 4] for name, values in batch.items()}


@pytest.mark.parametrize("options", [*[{"scale_rewards": scale} for scale in ADVANTAGE_SCALES], KL, {"beta": 0.2}])
def test_completions_that_no_reward_applies_to_might_as_well_not_be_there(make, update, assert_same, options):
    if "beta" in options:
        reference = make().policy
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.2)
        options = options | {"reference": reference}
    batch = given([1.0, nan, 0.0, 3.0, 0.5, 2.0, nan, 4.0])

    def changed(batch):
        return update(lambda **keywords: make(**(copy.deepcopy(options) | keywords | {"max_grad_norm": None})), [batch])

    assert_same(changed(batch), changed(without(batch, (1, 6))))


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"entropy_coef": 0.1}])
def test_a_group_with_a_single_reward_teaches_nothing(make, update, assert_same, options):
    batch = given([1.0, 2.0, 0.0, 3.0, nan, 2.0, nan, nan])

    def changed(batch):
        return update(lambda **keywords: make(**(options | keywords)), [batch])

    first = {name: batch[name][:1] for name in ("prompts", "prompt_attention_mask")}
    alone = (
        batch | first | {name: batch[name][:4] for name in ("responses", "response_mask", "rewards")} | {"index": [0]}
    )
    assert_same(changed(batch), changed(alone))


def test_a_step_with_groups_of_one_reward_only_moves_nothing(make, train):
    module = make(beta=0.5)
    before = fingerprint(module.policy)
    with pytest.raises(ValueError, match=r"nothing to learn in epoch 0: .*groups with fewer than two rewards"):
        train(module, [given([nan, 1.0, nan, nan] * 2)])
    assert module.trainer.global_step == 1
    assert fingerprint(module.policy) == before


def test_scaling_by_the_batch_spans_the_ranks(make, monkeypatch):
    module, other = make(scale_rewards="batch"), torch.tensor([[5.0, nan], [nan, 7.0]])
    own = torch.tensor([[1.0, 2.0], [nan, 3.0]])
    gathered = torch.stack([other.double(), torch.ones(2, 2).double()], dim=-1)
    monkeypatch.setattr(module, "all_gather_ragged", lambda values: [gathered, values])
    monkeypatch.setattr(type(module), "global_rank", 1)
    spread = torch.tensor([5.0, 7.0, 1.0, 2.0, 3.0]).std()
    expected = torch.tensor([[-0.5, 0.5], [0.0, 0.0]]) / spread
    torch.testing.assert_close(completion_advantages(module, module.estimator, own, torch.ones(2, 2)), expected)


def test_what_was_not_judged_is_counted(make, train, tmp_path):
    def judge(completions):
        return [None if row in (0, 5) else float(row) for row in range(len(completions))]

    def other(completions):
        return [nan if row == 5 or row > 7 else 1.0 for row in range(len(completions))]

    module = make(rewards=[judge, other])
    table = SampleTable(rows=16, path=str(tmp_path / "samples.jsonl"))
    metrics = train(module, [prompts()], callbacks=[table]).callback_metrics
    assert metrics["train/rewards/judge/not_applicable"] == 2 / 16
    assert metrics["train/rewards/other/not_applicable"] == 9 / 16
    assert metrics["train/frac_not_judged"] == 1 / 16
    assert metrics["train/rewards/judge/mean"] == pytest.approx((sum(range(16)) - 5) / 14)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows[5]["judge"] is rows[5]["other"] is rows[5]["reward"] is None
    assert (rows[0]["judge"], rows[0]["reward"], rows[5]["advantage"]) == (None, 1.0, 0.0)


def test_a_step_of_which_nothing_could_be_judged_is_an_error(make, train):
    def silent(completions):
        return [None] * len(completions)

    message = "optimizer step 1 has nothing to learn from: 'silent', 'third_of' gave None or NaN for all completions"

    def third_of(completions):
        return [nan] * len(completions)

    with pytest.raises(RewardError, match=message):
        train(make(rewards=[silent, third_of]), [prompts()])
    with pytest.raises(RewardError, match="the batch's rewards are None or NaN"):
        train(make(), [given([nan] * 8)])


def test_validation_leaves_out_what_was_not_judged(make):
    def judge(completions):
        return [None, 1.0, 2.0, None][: len(completions)]

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([prompts()], batch_size=None)
    found = trainer.validate(make(rewards=judge), loader, verbose=False)[0]
    assert (found["val/reward"], found["val/frac_not_judged"]) == (1.5, 0.5)


def test_a_failing_reward_is_named_with_its_step(make, train):
    calls = []

    def judge(completions):
        calls.append(len(completions))
        if len(calls) > 2:
            raise ConnectionError("no judge")
        return third(completions)

    with pytest.raises(
        RewardError, match=r"optimizer step 3: reward 'judge' raised in row 0 .*ConnectionError: no judge"
    ):
        train(make(rewards=judge), [prompts()] * 4)


def test_missing_columns_are_found_before_the_first_rollout(make, train, monkeypatch):
    module = make(rewards=[third, ExactMatch("gold")])
    monkeypatch.setattr(module.engine, "generate", lambda *_, **__: pytest.fail("something was generated"))
    message = r"reward 'exact_match' asks for 'gold', which is not there; found: answer, completion_ids, "
    with pytest.raises(RewardError, match=message):
        train(module, [prompts(answer=["1"] * 4)])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(RewardError, match=message):
        trainer.validate(module, torch.utils.data.DataLoader([prompts(answer=["1"] * 4)], batch_size=None))


def test_given_rewards_need_no_columns(make, train):
    assert train(make(rewards=ExactMatch("gold")), [given([0.0, 1.0] * 4)]).global_step == 1


def test_given_responses_that_end_with_a_stop_string_are_not_truncated(make, train):
    batch = given([0.0, 1.0] * 4)
    ends = batch["response_mask"].sum(dim=1) - 1
    batch["responses"][torch.arange(8), ends] = torch.tensor([3, 7, 20, 3, 3, 3, 7, 3])
    batch["responses"][2, 0] = 3  # in the midst of a completion: another one wrote on
    module = make(stop_strings=["END"], mask_truncated=True)
    trainer = train(module, [batch])
    assert trainer.callback_metrics["train/completions/clipped_ratio"] == 1 / 8
    assert module.last_rollout["truncated"] == [False, False, True] + [False] * 5


def test_what_ends_without_a_stop_is_penalised(make, train):
    batch = given([1.0, 0.0, nan, 0.0] * 2)
    batch["responses"][[1, 2], [2, 3]] = 7  # the last token of the second and the third
    module = make(missing_eos_penalty=0.25)
    metrics = train(module, [batch]).callback_metrics
    plain = train(make(), [batch]).callback_metrics
    assert module.rollout.rewards.nan_to_num(9.0).tolist() == [0.75, 0.0, 9.0, -0.25, 0.75, -0.25, 9.0, -0.25]
    assert float(metrics["train/reward"]) == pytest.approx(float(plain["train/reward"]) - 0.25 * 5 / 6)
    assert metrics["train/rewards/given/mean"] == plain["train/rewards/given/mean"]
    assert "less 0.25 without a stop" in module.describe()["rewards"]


def test_validation_penalises_the_same(make):
    module = make(missing_eos_penalty=0.5, max_completion_length=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    found = trainer.validate(module, torch.utils.data.DataLoader([prompts()], batch_size=None), verbose=False)[0]
    cut = found["val/completions/clipped_ratio"]
    assert cut
    assert found["val/reward"] == pytest.approx(found["val/rewards/third/mean"] - 0.5 * cut)


def test_a_missing_stop_cannot_be_told_without_stops(make, train):
    module = make(missing_eos_penalty=0.5, tokenizer=None)
    module.codec.policy_stops = ()
    with pytest.raises(ValueError, match=r"missing_eos_penalty=0.5 needs a tokenizer: without stop tokens"):
        train(module, [given([1.0, 0.0] * 4)])


def test_logged_shares_cover_the_scored_tokens_alone(make, train):
    """A group of equal rewards is not scored: it says nothing of how far the policy has moved."""
    old = -3 + torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    both = given([0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0], old_logprobs=old)
    found, alone = (train(make(), [batch]).callback_metrics for batch in (both, first_group(both)))
    shown = ("importance_ratio/mean", "entropy", "clip_ratio/region_mean", "clip_ratio/high_max", "clip_ratio/low_min")
    for name in shown:
        assert float(found[f"train/{name}"]) == pytest.approx(float(alone[f"train/{name}"]), rel=1e-5), name
    assert found["train/importance_ratio/mean"] != 1


@pytest.mark.parametrize("where", ["sampling", "scoring", "reference"])
def test_logits_that_are_not_finite_name_the_step(make, train, where):
    module = make(rewards=third, beta=0.1)

    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                model = module.reference.module if where == "reference" else module.policy
                next(iter(model.parameters())).data.fill_(nan)

    batch = prompts() if where == "sampling" else given([0.0, 1.0] * 4)
    who = "reference" if where == "reference" else "policy"
    with pytest.raises(ValueError, match=f"optimizer step 3: {who} gave logits that are not finite"):
        train(module, [batch] * 4, callbacks=[Spoil()])


class Thinks(torch.nn.Module):
    """Writes <t> a </t> and stops; the tags are special tokens of the tokenizer."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(40))

    def forward(self, input_ids):
        following = torch.full((40,), 5)
        following[[5, 1, 6]] = torch.tensor([1, 6, 7])
        return 40.0 * torch.nn.functional.one_hot(following[input_ids], 40) + self.bias


def test_all_but_the_stop_token_is_shown(make, train):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "a", "b", "c", "d", "<t>", "</t>", "<eos>", *(f"w{number}" for number in range(32))]
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.add_special_tokens(["<pad>", "<t>", "</t>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>", pad_token="<pad>")
    seen = []

    def judge(completions):
        seen.extend(completions)
        return [1.0] * len(completions)

    module = make(policy=Thinks(), rewards=judge, tokenizer=tokenizer, num_generations=2)
    train(module, [prompts(1)])
    assert seen == ["<t> a </t>"] * 2 == module.last_rollout["completion"]
    cut = make(policy=Thinks(), rewards=judge, tokenizer=tokenizer, num_generations=2, max_completion_length=2)
    train(cut, [prompts(1)])
    assert seen[2:] == ["<t> a"] * 2


def test_rollouts_are_put_into_words_only_for_who_looks(make, train, monkeypatch):
    calls = []
    original = Ids.batch_decode
    monkeypatch.setattr(
        Ids, "batch_decode", lambda self, rows, **options: (calls.append(rows), original(self, rows, **options))[1]
    )
    module = make()
    assert module.last_rollout == {}
    train(module, [given([0.0, 1.0] * 4)])
    assert not calls
    shown = module.last_rollout
    assert len(shown["prompt"]) == len(shown["completion"]) == 8
    assert len(calls) == 2


class Remote(Engine):
    """An engine elsewhere: writes what it was told, and no log-probabilities."""

    def __init__(self):
        self.asked, self.pushed = [], 0

    def push(self, policy):
        self.pushed += 1

    def version(self):
        return self.pushed

    def generate(self, prompts, parameters, *, num_samples=1, seeds):
        self.asked.append((prompts.count, num_samples, tuple(seeds.indices), seeds.step, parameters.stop_token_ids))
        rows = prompts.count * num_samples
        ids = torch.randint(8, 40, (rows, 5), generator=torch.Generator().manual_seed(rows))
        mask = torch.arange(5) < torch.arange(rows)[:, None] % 4 + 2
        return Completions(ids, mask, torch.full(ids.shape, nan), torch.ones(rows, dtype=torch.bool))


def test_any_engine_serves(make, train):
    """What it does not tell, the log-probabilities, is scored where it is read."""
    module = make(num_iterations=2, rewards=lambda completions: [float(len(text)) for text in completions])
    module.actor.engine = engine = Remote()
    trainer = train(module, [prompts(), prompts(3)])
    assert trainer.global_step == 4
    assert engine.asked == [(4, 4, (0, 1, 2, 3), 0, (2, 7)), (3, 4, (0, 1, 2), 2, (2, 7))]
    assert module.rollout.old_logps[module.rollout.own].isfinite().all()
    assert trainer.callback_metrics["train/importance_ratio/mean"] != 1


def test_rewards_need_a_tokenizer_and_given_ones_do_not(make, train):
    with pytest.raises(ValueError, match="tokenizer=None: rewards read text"):
        train(make(tokenizer=None), [prompts()])
    assert train(make(tokenizer=None), [given([0.0, 1.0, 2.0, 3.0])]).global_step == 1


def test_a_tokenizer_of_unknown_size_is_taken(make, train):
    class Decodes:
        eos_token_id = 7
        batch_decode = Ids.batch_decode
        decode = Ids.decode

    assert train(make(tokenizer=Decodes()), [prompts()]).global_step == 1


def test_rewards_are_told_how_long_completions_may_get(make):
    module = make(rewards=["SoftOverlong", third], reward_weights=[0.5, 1.0], max_completion_length=10)
    assert module.rewards.functions[0].max_length == 10
    assert module.rewards(completions=["1"], completion_ids=[[1] * 9]).total.tolist() == [0.75]
