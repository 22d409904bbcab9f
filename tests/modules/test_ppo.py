"""PPO: its updates against loops over tokens, the critic, its pretraining, and what is refused."""

import copy
import math

import pytest
import torch

from alignment_modules import PPOModule
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.reading import read
from tests.batches import rollouts
from tests.models import Plain, Stops, adapted, critic_beside, other_than
from tests.paradigms import build, never_called

GIVEN = {"beta": 0.1, "epsilon": 0.2, "epsilon_high": 0.3, "value_clip": 0.2}


def slow(groups):
    """A rate at which neither policy nor critic runs away."""
    return torch.optim.SGD(groups, lr=1e-3)


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "rewards": never_called,
            "num_generations": 4,
            "max_completion_length": 8,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
            "max_grad_norm": None,
        }
        return PPOModule(**(defaults | options))

    return factory


def gae(rewards, values, gamma, lam, end):
    following = [*values[1:], end]
    deltas = [r + gamma * f - v for r, f, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def rows_of(batch):
    """Prompt, completion, reward and old log-probabilities of each row, without padding."""
    for row, mask in enumerate(batch["response_mask"]):
        prompt = batch["prompts"][row // 4][batch["prompt_attention_mask"][row // 4].bool()]
        length = int(mask.sum())
        old = batch["old_logprobs"][row, :length].double()
        yield prompt, batch["responses"][row, :length], float(batch["rewards"][row]), old


def logps(model, prompt, completion):
    logits = model(torch.cat([prompt, completion])[None]).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]


def values(critic, prompt, completion, last=False):
    states = critic.model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[0]
    found = states @ critic.score.weight[0]
    return (found[len(prompt) - 1 : -1], found[-1]) if last else found[len(prompt) - 1 : -1]


def by_loops(policy, reference, critic, batch, *, gamma=1.0, lam=0.95, critic_lam=1.0, alpha=None, mu=0.0, stops=None):
    """Gradients of policy and critic of one update, written from the papers, one row after another in float64."""
    rows, advantages, returns, olds = list(rows_of(batch)), [], [], []
    for prompt, completion, reward, old in rows:
        with torch.no_grad():
            kl = old - logps(reference, prompt, completion)
            value, end = values(critic, prompt, completion, last=True)
        scored = (-GIVEN["beta"] * kl).tolist()
        scored[-1] += reward
        cut = stops is not None and int(completion[-1]) not in stops
        v, end = value.tolist(), float(end) if cut else 0.0
        own = lam if alpha is None else min(max(1 - 1 / max(alpha * len(v), 1), 0), 1)
        advantages.append(gae(scored, v, gamma, own, end))
        returns.append([a + b for a, b in zip(gae(scored, v, gamma, critic_lam, end), v, strict=True)])
        olds.append(v)
    every = [a for row in advantages for a in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1))
    low, high = 1 - GIVEN["epsilon"], 1 + GIVEN["epsilon_high"]
    loss, critic_loss, nll, rewarded = 0.0, 0.0, 0.0, 0
    for (prompt, completion, reward, old), row, targets, held in zip(rows, advantages, returns, olds, strict=True):
        new, value = logps(policy, prompt, completion), values(critic, prompt, completion)
        for t, raw in enumerate(row):
            a, ratio = (raw - mean) / deviation, (new[t] - old[t]).exp()
            loss = loss - torch.minimum(ratio * a, ratio.clamp(low, high) * a)
            near = value[t].clamp(held[t] - GIVEN["value_clip"], held[t] + GIVEN["value_clip"])
            critic_loss = critic_loss + 0.5 * torch.maximum((value[t] - targets[t]) ** 2, (near - targets[t]) ** 2)
            if reward > 0:
                nll, rewarded = nll - new[t], rewarded + 1
    (loss / len(every) + mu * nll / max(rewarded, 1)).backward()
    (critic_loss / len(every)).backward()
    parts = {"policy": policy, "critic": critic}
    return {f"{name}.{key}": -p.grad for name, part in parts.items() for key, p in part.named_parameters()}


@pytest.mark.parametrize(
    ("options", "loops"),
    [
        ({}, {}),
        ({"gamma": 0.9, "lam": 0.7, "critic_lam": 0.8}, {"gamma": 0.9, "lam": 0.7, "critic_lam": 0.8}),
        ({"length_adaptive_alpha": 0.4}, {"alpha": 0.4}),
        ({"positive_nll_coef": 0.3}, {"mu": 0.3}),
        ({"truncation": "bootstrap", "tokenizer": Stops()}, {"stops": (2, 7)}),
    ],
    ids=["default", "lambdas", "length adaptive", "positive nll", "bootstrap"],
)
def test_an_update_by_loops(make, update, tiny_llama, options, loops):
    policy = tiny_llama.double()
    reference, critic = other_than(policy), critic_beside(policy)
    batch = rollouts(range(4))
    expected = by_loops(copy.deepcopy(policy), reference, copy.deepcopy(critic), batch, **loops)
    own = {"reference": copy.deepcopy(reference), "critic": copy.deepcopy(critic), "policy": policy} | GIVEN | options
    own["critic_optimizer"] = lambda groups: torch.optim.SGD(groups, lr=1.0)
    found = update(lambda **more: make(**(own | more)), [batch])
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # advantages and values are kept in float32
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_shared_trunk_gets_the_sum_of_two_gradients(make, update, tiny_llama):
    """Its value loss has a unit of its own, the token, where the surrogate's is the completion."""
    common = {"beta": 0.0, "loss": "grpo", "whiten_advantages": False}
    batch = rollouts(range(4))
    both = update(lambda **more: make(critic="shared", value_coef=0.5, **common, **more), [batch])
    alone = update(lambda **more: make(critic="shared", value_coef=0.0, **common, **more), [batch])
    head = both["critic.weight"]
    assert (alone["critic.weight"] == 0).all()
    expected, tokens = torch.zeros(32), 0  # the head starts at 0, so only its own gradient is there yet
    for prompt, completion, reward, _ in rows_of(batch):
        states = tiny_llama.model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[0]
        expected += reward * states[len(prompt) - 1 : -1].sum(dim=0)
        tokens += len(completion)
    torch.testing.assert_close(head, 0.5 * expected.detach() / tokens, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(both[key], alone[key]) for key in both if key != "critic.weight")


def test_a_shared_trunk_is_read_once_for_scores_and_values(make, train, tiny_llama, monkeypatch):
    """Once for the rollout, though the KL in the reward asks for its log-probabilities, and once for the update."""
    passes = []

    def counted(model, *given, **options):
        if model is module.policy:
            passes.append(torch.is_grad_enabled())
        return read(model, *given, **options)

    for place in ("acting", "actor_critic"):
        monkeypatch.setattr(f"alignment_modules.training.{place}.read", counted)
    module = make(policy=tiny_llama, critic="shared", beta=0.1, truncation="bootstrap", optimizer=slow)
    torch.nn.init.normal_(module.critic.weight)
    batch = {key: value for key, value in rollouts(range(4)).items() if key != "old_logprobs"}
    train(module, [batch])
    assert passes == [False, True]
    before = module.rollout.values
    module.critic.weight.data.zero_()
    assert before.abs().sum() > 0
    values, last = module.eval().value_rollout(module.rollout, last=True)
    assert (values == 0).all()
    assert (last == 0).all()


def test_only_the_steps_of_the_policy_count(make, train):
    module = make(num_iterations=2, minibatches=2, optimizer=slow)
    assert train(module, [rollouts(range(4))] * 2).global_step == 8


def test_the_critics_rate_is_ten_times_the_policys(make, train):
    rates = {}
    module = make(lr_scheduler=None, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4))
    trainer = train(module, [rollouts(range(4))])
    for name, optimizer in zip(module.windows, trainer.optimizers, strict=True):
        rates[name] = {group["lr"] for group in optimizer.param_groups}
    assert rates == {"policy": {1e-4}, "critic": {1e-3}}


def test_schedules_of_their_own(make, train):
    halves = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    module = make(critic_lr_scheduler=halves, critic_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.8))
    trainer = train(module, [rollouts(range(4))] * 2)
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [1.0, 0.2]


def test_dropout_is_off_in_the_critic(make, train, tiny_llama):
    critic = critic_beside(tiny_llama)
    for layer in critic.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = [train(make(critic=copy.deepcopy(critic)), [rollouts(range(4))]).callback_metrics for _ in range(2)]
    assert found[0]["train/critic/loss"] == found[1]["train/critic/loss"]


class TestPretraining:
    def test_the_policy_stands_still(self, make, train):
        """Three critic's steps over two rollouts of two steps each; the policy begins with the third."""
        module = make(critic_pretrain_steps=3, num_iterations=2, value_clip=None, optimizer=slow)
        policy, critic = fingerprint(module.policy), fingerprint(module.critic)
        trainer = train(module, [rollouts(range(4))] * 2)
        assert trainer.global_step == 0
        assert not module.pretraining
        assert fingerprint(module.policy) == policy
        assert fingerprint(module.critic) != critic
        module = make(critic_pretrain_steps=3, num_iterations=2, optimizer=slow)
        assert train(module, [rollouts(range(4))] * 3).global_step == 2
        assert fingerprint(module.policy) != policy

    def test_on_monte_carlo_returns(self, make, train, tiny_llama):
        """Whatever `critic_lam` is, the first step of a head that starts at 0 is towards the rewards to come."""
        heads = {}
        for name, options in (("pretrained", {"critic_pretrain_steps": 1, "critic_lam": 0.0}), ("learnt", {})):
            module = make(beta=0.0, gamma=0.9, critic_optimizer=lambda g: torch.optim.SGD(g, lr=0.1), **options)
            train(module, [rollouts(range(4))])
            heads[name] = module.critic.score.weight.detach()
        torch.testing.assert_close(heads["pretrained"], heads["learnt"], rtol=1e-6, atol=0)

    def test_takes_no_seed_of_a_later_rollout(self, make, train):
        module, seeds = make(critic_pretrain_steps=2), []
        roll_out = module.actor.roll_out
        module.actor.roll_out = lambda *given, step, **more: seeds.append(step) or roll_out(*given, step=step, **more)
        train(module, [rollouts(range(4))] * 4)
        assert seeds == [0, 1, 2, 3]

    def test_that_leaves_nothing_for_the_policy_is_refused(self, make, train):
        from alignment_modules.training.schedules import LinearSchedule

        module = make(critic_pretrain_steps=3, lr_scheduler=LinearSchedule)
        with pytest.raises(ValueError, match=r"critic_pretrain_steps=3 takes all of the run's 3 batches"):
            train(module, [rollouts(range(4))] * 3)

    def test_schedules_know_their_own_lengths(self, make, train):
        from alignment_modules.training.schedules import LinearSchedule

        module = make(critic_pretrain_steps=2, lr_scheduler=LinearSchedule)
        train(module, [rollouts(range(4))] * 5)
        assert [schedule.total_steps for schedule in module.lr_schedulers()] == [3, 5]


def test_metrics_of_a_critic(make, train, tiny_llama):
    """A critic that knows the rewards explains all of them; one that knows nothing, none."""
    metrics = train(make(beta=0.0), [rollouts(range(4))]).callback_metrics
    assert float(metrics["train/critic/explained_variance"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["train/critic/values"]) == 0.0
    assert float(metrics["train/critic/returns"]) > 0.0
    assert float(metrics["train/val/ratio_var"]) > 0.0
    assert float(metrics["train/loss/value_avg"]) == float(metrics["train/critic/loss"])


def test_one_completion_of_a_prompt(make, train):
    batch = rollouts(range(4), group=1)
    metrics = train(make(num_generations=1), [batch]).callback_metrics
    assert "train/reward_std" not in metrics
    assert float(metrics["train/loss"]) != 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "shared", "critic_pretrain_steps": 5}, "critic_pretrain_steps=5 would have no effect"),
        ({"critic": "shared", "critic_optimizer": torch.optim.SGD}, "critic_optimizer would have no effect: .* null"),
        ({"value_coef": 0.5}, "value_coef=0.5 would have no effect: the critic has an optimizer of its own"),
        ({"lam": 0.9, "length_adaptive_alpha": 0.05}, "lam=0.9 would not be read with length_adaptive_alpha=0.05"),
        ({"truncation": "mask", "missing_eos_penalty": 1.0}, "missing_eos_penalty=1.0 would not be read"),
        ({"gae_unit": "word"}, "gae_unit='word'"),
        ({"truncation": "drop"}, "truncation='drop'"),
        ({"gamma": 1.5}, "gamma=1.5 must be a finite number from 0 to 1"),
        ({"value_clip": 0.0}, "value_clip=0.0 must be"),
        ({"mask_truncated": True}, "mask_truncated"),
        ({"policy": Plain()}, "critic=None .* Plain cannot be told"),
        ({"policy": Plain(), "critic": "shared"}, "critic='shared' .* Plain cannot be told"),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**options)


def test_bootstrapping_needs_stops(make, train, tiny_llama):
    tiny_llama.config.eos_token_id = tiny_llama.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="truncation='bootstrap' needs a tokenizer"):
        train(make(policy=tiny_llama, truncation="bootstrap"), [rollouts(range(4))])


def test_says_what_it_does(tiny_llama):
    told = build("ppo", tiny_llama).describe()
    assert told["critic"].startswith("LlamaForSequenceClassification")
    assert told["critic"].endswith("half the larger squared error, value_clip 0.2; its own optimizer")
    white = ", whitened (ddof 1) over the rollout's tokens on all ranks"
    assert told["advantages"] == f"GAE by token, gamma 1, lambda 0.95{white}"
    assert told["returns"] == "GAE with lambda 1, before whitening"


@pytest.mark.parametrize("kind", ["own", "shared", "lora"])
def test_the_critic_is_exported_beside_the_policy(make, train, tiny_llama, tmp_path, kind):
    """What is written reads the same values, as the critic of another run."""
    options = {"critic": "shared", "value_coef": 0.5} if kind == "shared" else {}
    module = make(policy=adapted(tiny_llama) if kind == "lora" else tiny_llama, optimizer=slow, **options)
    train(module, [rollouts(range(4))])
    for _ in range(2):  # also over its own former export
        module.export(tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").exists()
    again = make(policy=str(tmp_path / "export"), critic=str(tmp_path / "export" / "critic"))
    rollout = module.eval().rollout
    with torch.no_grad():
        values, last = module.value_rollout(rollout, last=True)
        found = again.eval().value_rollout(rollout, last=True)
    assert values.abs().sum() > 0
    torch.testing.assert_close(found[0], values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], last, rtol=1e-5, atol=1e-6)
