"""A teacher in GRPO: its term in each token's advantage against a loop in float64, and what is refused."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.functional import group_advantages
from tests.batches import rollouts
from tests.contract.two_ranks import NoTokenizer, many_threes
from tests.models import adapted, other_than
from tests.paradigms import never_called


@pytest.fixture
def make(tiny_llama):
    def factory(policy=None, **options):
        defaults = {"rewards": never_called, "max_completion_length": 8, "max_grad_norm": None, "num_generations": 4}
        defaults |= {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "scale_rewards": "none"}
        return GRPOModule(policy=copy.deepcopy(policy or tiny_llama), **(defaults | options))

    return factory


def completion_logps(model, batch, row, temperature, group=4):
    """Log-probabilities of one completion's tokens, in float64."""
    prompt = batch["prompts"][row // group][batch["prompt_attention_mask"][row // group].bool()]
    completion = batch["responses"][row][batch["response_mask"][row].bool()]
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


@pytest.mark.parametrize("old", [False, True], ids=["its own samples", "another policy's"])
@pytest.mark.parametrize(("coef", "temperature"), [(1.0, 1.0), (0.25, 0.6)])
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(make, train, tiny_llama, coef, temperature, old):
    batch, teacher, model = rollouts(range(4)), other_than(tiny_llama), copy.deepcopy(tiny_llama)
    batch["rewards"][4:8] = 1.0  # a group that only the teacher can teach
    if not old:
        del batch["old_logprobs"]
    compared = group_advantages(batch["rewards"].view(4, 4), scale="none").flatten()
    losses, ratios = [], []
    for row in range(16):
        ours = completion_logps(model, batch, row, temperature)
        known = batch["old_logprobs"][row][: len(ours)].double() if old else ours.detach()
        log_ratio = known - completion_logps(teacher, batch, row, temperature).detach()
        advantages = compared[row] - coef * log_ratio
        ratio = (ours - known).exp()
        losses.append(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages))
        ratios.append(log_ratio)
    loss = torch.cat(losses).mean()
    loss.backward()
    module = make(teacher=copy.deepcopy(teacher), teacher_coef=coef, temperature=temperature)
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(loss.detach()), abs=1e-5)
    assert float(metrics["train/teacher_kl"]) == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-5)
    for (name, before), after in zip(model.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=2e-6, msg=name)
    for before, after in zip(teacher.parameters(), module.teacher.module.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_teacher_that_is_the_policy_adds_nothing(make, update, assert_same, tiny_llama):
    batch = {key: value for key, value in rollouts(range(4)).items() if key != "old_logprobs"}
    assert_same(update(make, [batch]), update(lambda **more: make(teacher=copy.deepcopy(tiny_llama), **more), [batch]))


def test_the_gradient_is_that_of_the_reverse_kl(make, train, tiny_llama):
    """Without rewards' differences: of every token there is to draw, weighed by its probability."""
    model, teacher = copy.deepcopy(tiny_llama), other_than(tiny_llama)
    prompt = torch.tensor([[5, 9, 11]])
    ours, theirs = (one(prompt).logits[0, -1].double().log_softmax(-1) for one in (model, teacher))
    (ours.exp() * (ours - theirs.detach())).sum().backward()
    change = dict.fromkeys([name for name, _ in model.named_parameters()], 0.0)
    for token in range(40):
        batch = {"prompts": prompt, "prompt_attention_mask": torch.ones_like(prompt), "rewards": torch.ones(2)}
        batch |= {"responses": torch.full((2, 1), token), "response_mask": torch.ones(2, 1).bool()}
        module = make(teacher=copy.deepcopy(teacher), num_generations=2)
        train(module, [batch])
        for name, parameter in module.policy.named_parameters():
            moved = (tiny_llama.get_parameter(name) - parameter).detach().double() / 0.1
            change[name] = change[name] + ours[token].detach().exp() * moved
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(change[name].float(), parameter.grad, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("policy", [lambda policy: policy, adapted], ids=["whole", "lora"])
def test_it_is_scored_once_a_rollout(make, train, tiny_llama, monkeypatch, policy):
    batch = {key: value for key, value in rollouts(range(4)).items() if key.startswith("prompt")}
    batch |= {"index": list(range(4))}
    module = make(policy(tiny_llama), teacher=other_than(tiny_llama), rewards=many_threes, tokenizer=NoTokenizer(),
                  num_iterations=2, minibatches=2)  # fmt: skip
    scored, plain = [], module.score_rollout

    def counted(rollout, companion=None, **options):
        scored.append(companion)
        return plain(rollout, companion, **options)

    monkeypatch.setattr(module, "score_rollout", counted)
    trainer = train(module, [batch])
    assert trainer.global_step == 4
    assert scored == [module.teacher]  # the policy's are those it sampled with
    assert float(trainer.callback_metrics["train/teacher_kl"]) > 0
    assert "times each token's log-ratio to the teacher" in module.describe()["advantages"]


def test_an_own_token_alone_is_judged(make, train, tiny_llama):
    batch = {key: value for key, value in rollouts(range(4)).items() if key != "old_logprobs"}
    batch["response_loss_mask"] = batch["response_mask"].clone()
    batch["response_loss_mask"][:, 1::3] = False
    module = make(teacher=other_than(tiny_llama))
    train(module, [batch])
    advantages = module.rollout.advantages
    assert (advantages[batch["response_loss_mask"]] != 0).all()
    assert (advantages[~batch["response_loss_mask"]] == 0).all()


def test_refuses(make, train, write_model, tmp_path, tiny_llama):
    with pytest.raises(ValueError, match=r"teacher_coef=0\.5 is the weight of a teacher, and teacher=None"):
        make(teacher_coef=0.5)
    with pytest.raises(ValueError, match="teacher_coef=0 must be"):
        make(teacher=other_than(tiny_llama), teacher_coef=0)
    write_model(tmp_path / "small", list("0123"))
    with pytest.raises(ValueError, match=r"teacher has \d+ ids and the policy 40"):
        train(make(teacher=str(tmp_path / "small")), [rollouts(range(2))])
