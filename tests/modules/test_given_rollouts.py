"""Rollouts that a batch brings: what exists, what the policy wrote, and what is refused."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.functional import kl_penalty


class Ids:
    """A tokenizer of ids; 3 is the text END."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self):
        return 40

    def decode(self, ids, skip_special_tokens=False):
        return " ".join("END" if token == 3 else str(token) for token in ids)

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row) for row in rows]


LENGTHS = torch.tensor([8, 6, 7, 5, 8, 3])
TOOLS = [(0, 2, 5), (1, 1, 2), (2, 3, 6), (4, 0, 3)]  # row, and where a tool's result starts and ends


def episodes(**changes):
    """Two prompts with three completions each; tools wrote in some of them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, 40, (6, 8), generator=generator)
    mask = torch.arange(8) < LENGTHS[:, None]
    own = mask.clone()
    for row, start, end in TOOLS:
        own[row, start:end] = False
    prompts = torch.randint(8, 40, (2, 4), generator=generator)
    prompt_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    return {
        "prompts": prompts,
        "prompt_attention_mask": prompt_mask,
        "responses": ids,
        "response_mask": mask.long(),
        "response_loss_mask": own.long(),
        "rewards": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0]),
    } | changes


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "rewards": lambda completions: [0.0] * len(completions),
            "tokenizer": Ids(),
            "max_grad_norm": None,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
        }
        return GRPOModule(**(defaults | options))

    return factory


def padded_logps(policy, batch):
    """Log-probabilities [6, 8] from whole, right-padded contexts."""
    rows = []
    for number, (ids, mask) in enumerate(zip(batch["responses"], batch["response_mask"], strict=True)):
        prompt = batch["prompts"][number // 3][batch["prompt_attention_mask"][number // 3].bool()]
        context = torch.cat([prompt, ids[mask.bool()]])
        logits = policy(torch.nn.functional.pad(context, (0, 12 - len(context)))[None]).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : len(context) - 1]
        found = logps.gather(1, context[len(prompt) :, None])[:, 0]
        rows.append(torch.nn.functional.pad(found, (0, 8 - len(found))))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"beta": 0.3, "entropy_coef": 0.1, "micro_batch_size": 2}])
def test_an_update_with_gaps_is_that_of_the_whole_context(make, train, assert_same, options):
    """Tokens of tools are context: in no sum, but before all that follows them."""
    batch = episodes()
    module = make(loss="dapo", scale_rewards="none", **options)
    plain, reference = copy.deepcopy(module.policy), copy.deepcopy(module.policy)
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    with torch.no_grad():
        for policy in (module.policy, plain):
            policy.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    metrics = train(module, [copy.deepcopy(batch)]).callback_metrics
    changed = {name: p.detach() - before[name] for name, p in module.policy.named_parameters()}

    own, logps = batch["response_loss_mask"].bool(), padded_logps(plain, batch)
    rewards = batch["rewards"].view(2, 3)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()[:, None]
    values = -(logps - logps.detach()).exp() * advantages
    if options:
        divergence = kl_penalty(logps, padded_logps(reference, batch).detach(), estimator="k3")
        assert float(metrics["train/kl"]) == pytest.approx(float(divergence[own].mean()), rel=1e-4)
        values = values + 0.3 * divergence - 0.1 * entropies(plain, batch)
    loss = values[own].sum() / own.sum()
    loss.backward()
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-5)
    assert_same(changed, {name: -p.grad for name, p in plain.named_parameters()})


def entropies(policy, batch):
    rows = []
    for number, (ids, mask) in enumerate(zip(batch["responses"], batch["response_mask"], strict=True)):
        prompt = batch["prompts"][number // 3][batch["prompt_attention_mask"][number // 3].bool()]
        logps = policy(torch.cat([prompt, ids[mask.bool()]])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(torch.nn.functional.pad(-(logps.exp() * logps).sum(-1), (0, 8 - len(logps))))
    return torch.stack(rows)


def test_log_probabilities_with_gaps_are_those_of_the_whole_context(make, train):
    batch, module = episodes(), make(beta=0.2, num_iterations=2)
    plain = copy.deepcopy(module.policy)
    train(module, [copy.deepcopy(batch)])
    own = batch["response_loss_mask"].bool()
    with torch.no_grad():
        expected = padded_logps(plain, batch).masked_fill(~own, 0.0)
    torch.testing.assert_close(module.rollout.old_logps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(module.rollout.reference_logps, expected, atol=1e-5, rtol=0)
    assert torch.equal(module.rollout.own, own)
    assert torch.equal(module.rollout.mask, batch["response_mask"].bool())


@pytest.mark.parametrize("padding", [0, 2])
def test_the_divergence_in_the_reward_is_of_what_the_policy_wrote(make, train, tiny_llama, padding):
    """What a tool wrote may have any log-probability, and so may padding, on either side."""
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.2)
    batch = episodes(old_logprobs=torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) - 3)
    own = batch["response_loss_mask"].bool()
    batch["old_logprobs"] = batch["old_logprobs"].masked_fill(~own, torch.nan)
    with torch.no_grad():
        divergence = (batch["old_logprobs"] - padded_logps(reference, batch)).masked_fill(~own, 0.0).sum(dim=1)
    rewards = (batch["rewards"] - 0.5 * divergence).view(2, 3)
    options = {"beta": 0.5, "kl_estimator": "k1", "kl_placement": "reward", "reference": reference}
    for key in ("responses", "response_mask", "response_loss_mask", "old_logprobs"):
        batch[key] = torch.nn.functional.pad(batch[key], (padding, 0))
    module = make(scale_rewards="none", **options)
    train(module, [batch])
    expected = rewards - rewards.mean(dim=1, keepdim=True)
    assert module.last_rollout["advantage"] == pytest.approx(expected.flatten().tolist(), abs=1e-5)


def test_truncated_is_what_does_not_end_with_a_stop(make, train):
    batch = episodes()
    ends = LENGTHS - 1
    batch["responses"][torch.arange(6), ends] = torch.tensor([7, 20, 3, 7, 20, 7])
    batch["responses"][1, 0] = 7  # another one wrote on after its stop
    batch["responses"][4, 4] = 3
    module = make(stop_strings=["END"], mask_truncated=True)
    train(module, [batch])
    assert module.last_rollout["truncated"] == [False, True, False, False, True, False]
    assert module.rollout.trained.any(dim=1).tolist() == [True, False, True, True, False, True]
    assert torch.equal(module.rollout.own, batch["response_loss_mask"].bool())


@pytest.mark.parametrize(
    ("name", "row", "column", "message"),
    [
        ("response_mask", 2, 3, r"response_mask .* row 2, column 3"),
        ("response_loss_mask", 3, 6, r"response_loss_mask marks token 6 of row 3, which does not exist: response_mask"),
    ],
)
def test_masks_that_contradict_what_exists_are_refused(make, train, name, row, column, message):
    batch = episodes()
    if name == "response_mask":
        batch["response_loss_mask"] = torch.zeros_like(batch["response_loss_mask"])
    batch[name][row, column] = 1 - batch[name][row, column]
    with pytest.raises(ValueError, match=message):
        train(make(), [batch])


def test_a_mask_of_what_was_written_alone_is_refused(make, train):
    batch = {k: v for k, v in episodes().items() if k not in ("responses", "response_mask", "rewards")}
    with pytest.raises(ValueError, match="response_loss_mask without responses"):
        train(make(), [batch])
    with pytest.raises(ValueError, match=r"response_loss_mask has shape \(6, 7\)"):
        train(make(), [episodes(response_loss_mask=torch.ones(6, 7))])
