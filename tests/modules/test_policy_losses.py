"""A whole step with each loss, gate and selection of tokens against plain loops over unpadded rows, in float64."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.functional import CORRECTIONS, Correction
from alignment_modules.rollouts.seeds import token_draws
from tests.batches import Digits, never_called, rollouts, threes
from tests.models import other_than

GROUP, PROMPTS = 4, 5
OWN = {"prompts": torch.tensor([[5, 6, 7], [8, 9, 10]]), "prompt_attention_mask": torch.ones(2, 3).long()}


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama).double(),
            "rewards": never_called,
            "num_generations": GROUP,
            "max_completion_length": 8,
            "max_grad_norm": None,
            "micro_batch_size": 3,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
        }
        return GRPOModule(**(defaults | options))

    return factory


def near(model, given, spread):
    """Sampled log-probabilities that differ from the policy's."""
    noise = torch.randn(given["old_logprobs"].shape, generator=torch.Generator().manual_seed(5))
    found = spread * noise
    for row, (logps, _) in enumerate(rows_of(model, given)):
        found[row, : len(logps)] += logps.detach().float()
    return given | {"old_logprobs": found.clamp(max=-0.01)}


def rows_of(model, given):
    """Log-probabilities and entropies of each completion, from a plain forward pass of the row alone."""
    for row, (ids, mask) in enumerate(zip(given["responses"], given["response_mask"], strict=True)):
        prompt = given["prompts"][row // GROUP][given["prompt_attention_mask"][row // GROUP].bool()]
        completion = ids[mask.bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
        logps = logits.log_softmax(-1)
        yield logps.gather(1, completion[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


class Step:
    """All tokens of the step in one line, with what the losses are made of."""

    def __init__(self, model, given, reference=None):
        self.reference = (
            None if reference is None else torch.cat([logps.detach() for logps, _ in rows_of(reference, given)])
        )
        found = list(rows_of(model, given))
        self.lengths = [len(logps) for logps, _ in found]
        self.logps = torch.cat([logps for logps, _ in found])
        self.entropies = torch.cat([entropies.detach() for _, entropies in found])
        mask = given["response_mask"].bool()
        self.sampled = given["old_logprobs"][mask].double()
        rewards = given["rewards"].double().view(-1, GROUP)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True).clamp(min=1e-9)
        self.row_advantages = advantages.flatten()
        self.advantages = advantages.flatten().repeat_interleave(torch.tensor(self.lengths))
        self.now, self.count = self.logps.detach(), len(self.logps)
        host = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
        self.draws = token_draws(0, 0, host["prompts"], host["prompt_attention_mask"].bool(), host["responses"], mask)[
            mask
        ]

    def by_row(self, values):
        return values.split(self.lengths)

    def spread(self, rows):
        return torch.cat([row.expand(length) for row, length in zip(rows, self.lengths, strict=True)])

    def clip(self, old, low=0.2, high=0.2):
        ratio = (self.logps - old).exp()
        return -torch.minimum(ratio * self.advantages, ratio.clamp(1 - low, 1 + high) * self.advantages)


def tis(step):
    return (step.clip(step.now) * (step.now - step.sampled).exp().clamp(max=2)).sum() / step.count


def with_kl(step):
    """Neither weight nor selection acts on the KL, nor on the entropy."""
    x = step.logps - step.reference
    kept = step.entropies >= step.entropies.quantile(0.6)
    weights = (step.now - step.sampled).exp().clamp(max=2) * kept
    return (step.clip(step.now) * weights + 0.5 * ((-x).exp() - 1 + x)).sum() / step.count


def mis(step):
    ratio = step.spread([x.sum().exp() for x in step.by_row(step.now - step.sampled)])
    return (step.clip(step.now) * ratio * (ratio <= 3)).sum() / step.count


def geo_rs(step):
    mean = step.spread([x.mean().exp() for x in step.by_row(step.now - step.sampled)])
    weight = (step.now - step.sampled).exp() * ((mean >= 0.8) & (mean <= 1.2))
    return (step.clip(step.now) * weight).sum() / step.count


def opsm(step):
    mean = step.spread([x.mean() for x in step.by_row(step.sampled - step.now)])
    kept = (step.advantages >= 0) | (mean <= 1e-4)
    return (step.clip(step.sampled) * kept).sum() / step.count


def top_entropy(step):
    kept = step.entropies >= step.entropies.quantile(0.6)
    return (step.clip(step.sampled) * kept).sum() / step.count


def covariances(step):
    return (step.now - step.now.mean()) * (step.advantages - step.advantages.mean())


def clip_cov(step):
    covariance, ratio = covariances(step), (step.now - step.sampled).exp()
    clipped = ((ratio < 0.8) & (step.advantages < 0)) | ((ratio > 1.2) & (step.advantages > 0))
    open_to_it = ((covariance > 0.01) & (covariance < 5) & ~clipped).nonzero()[:, 0].tolist()
    drawn = sorted(open_to_it, key=lambda i: step.draws[i].item())[: int(0.1 * step.count)]
    kept = torch.ones(step.count)
    kept[drawn] = 0
    assert len(drawn) == int(0.1 * step.count) < len(open_to_it)
    return (step.clip(step.sampled) * kept).sum() / step.count


def kl_cov(step):
    highest = covariances(step).argsort(descending=True)[: int(0.1 * step.count)]
    apart = torch.zeros(step.count)
    apart[highest] = 1
    log_ratio = step.logps - step.sampled
    return (-log_ratio.exp() * step.advantages + 2.0 * log_ratio.abs() * apart).sum() / step.count


def dppo_tv(step):
    moved = step.now.exp() - step.sampled.exp()
    kept = torch.where(step.advantages > 0, moved <= 0.005, moved >= -0.005)
    ratio = (step.now - step.sampled).exp().clamp(max=20)
    return (-ratio * step.advantages * step.logps * kept).sum() / step.count


def vespo(step):
    w = step.spread([x.sum().exp() for x in step.by_row(step.now - step.sampled)])
    k, rate = (torch.where(step.advantages >= 0, one, other) for one, other in ((2.0, 3.0), (3.0, 2.0)))
    return (-(w**k) * (rate * (1 - w)).exp() * step.advantages * step.logps).sum() / step.count


def prompt_mean(step):
    values = step.by_row(step.clip(step.sampled))
    groups = [torch.cat(values[start : start + GROUP]) for start in range(0, len(values), GROUP)]
    return sum(group.mean() for group in groups) / len(groups)


def gspo_token(step):
    ratio = step.spread([x.mean().exp() for x in step.by_row(step.now - step.sampled)])
    ratio = ratio * (step.logps - step.now).exp()
    values = -torch.minimum(ratio * step.advantages, ratio.clamp(0.8, 1.2) * step.advantages)
    return sum(row.mean() for row in step.by_row(values)) / len(step.lengths)


COVARIANCE = {"share": 0.1}
CASES = {
    "tis": (tis, {"correction": "tis"}),
    "with KL": (with_kl, {"correction": "tis", "top_entropy_quantile": 0.4, "beta": 0.5}),
    "mis": (mis, {"correction": CORRECTIONS["mis"]}),
    "geo_rs": (geo_rs, {"correction": {"level": "geometric", "action": "mask", "low": 0.8, "high": 1.2}}),
    "opsm": (opsm, {"correction": "opsm"}),
    "top entropy": (top_entropy, {"top_entropy_quantile": 0.4}),
    "clip_cov": (clip_cov, {"loss": "clip_cov", "loss_options": COVARIANCE | {"covariance_low": 0.01}}),
    "kl_cov": (kl_cov, {"loss": "kl_cov", "loss_options": COVARIANCE | {"kl_coef": 2.0}}),
    "dppo_tv": (dppo_tv, {"loss": "dppo_tv", "epsilon": 0.005}),
    "vespo": (vespo, {"loss": "vespo"}),
    "prompt mean": (prompt_mean, {"reduction": "prompt_mean"}),
    "gspo token": (gspo_token, {"loss": "grpo", "importance_level": "sequence_token", "epsilon": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_by_loops(make, train, tiny_llama, name):
    paper, options = CASES[name]
    model = copy.deepcopy(tiny_llama).double()
    given = near(model, rollouts(range(PROMPTS), group=GROUP), 0.4)
    reference = other_than(model) if "beta" in options else None
    expected = paper(Step(model, given, reference))
    names = [key for key, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(expected, list(model.parameters())), strict=True))
    module = make(**options, reference=reference)
    before = {key: value.detach().clone() for key, value in module.policy.named_parameters()}
    metrics = train(module, [given]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    for key, value in module.policy.named_parameters():
        torch.testing.assert_close(value.detach() - before[key], -gradients[key], rtol=1e-5, atol=1e-7)


def test_a_correction_is_that_of_the_rollouts_start_in_every_update(make, train, tiny_llama):
    """Two steps by hand: the weights stay what they were, the ratio is to the policy of the first step."""
    model = copy.deepcopy(tiny_llama).double()
    given = near(model, rollouts(range(PROMPTS), group=GROUP), 0.4)
    start = Step(model, given)
    weights = (start.now - start.sampled).exp().clamp(max=2)
    for _ in range(2):
        step = Step(model, given)
        model.zero_grad()
        ((step.clip(start.now) * weights).sum() / step.count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    module = make(correction="tis", num_iterations=2, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05))
    train(module, [given])
    for one, other in zip(module.policy.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_a_correction_logs(make, train, tiny_llama):
    given = near(tiny_llama.double(), rollouts(range(PROMPTS), group=GROUP), 0.4)
    step = Step(tiny_llama, given)
    metrics = train(make(correction="icepop"), [given]).callback_metrics
    ratio = (step.now - step.sampled).exp()
    kept = (ratio >= 0.5) & (ratio <= 5)
    assert metrics["train/importance_ratio/mean"] == 1
    assert float(metrics["train/correction/masked"]) == pytest.approx((~kept).double().mean().item(), abs=1e-6)
    assert float(metrics["train/correction/weight"]) == pytest.approx((ratio * kept).mean().item(), rel=1e-5)
    assert float(metrics["train/sampling/importance_sampling_ratio/mean"]) == pytest.approx(
        ratio.mean().item(), rel=1e-5
    )
    assert 0 < metrics["train/correction/masked"] < 1


@pytest.mark.parametrize("options", [{"correction": "mis"}, {"loss": "vespo"}, {"loss": "dppo_kl"}])
def test_of_its_own_samples_there_is_nothing_to_correct(make, train, options):
    """Sampled and scored log-probabilities are the same up to rounding."""
    rewards = {"rewards": threes, "tokenizer": Digits()}
    metrics = train(make(**rewards, **options), [OWN]).callback_metrics
    one = "correction/weight" if "correction" in options else "importance_ratio/mean"
    assert float(metrics[f"train/{one}"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("options", [{"correction": "tis"}, {"correction": "opsm"}, {"loss": "dppo_tv"}])
def test_completions_without_the_samplers_probabilities_are_refused(make, train, options):
    given = {key: value for key, value in rollouts(range(PROMPTS), group=GROUP).items() if key != "old_logprobs"}
    with pytest.raises(ValueError, match=r"compares with the probabilities .* needs old_logprobs, too"):
        train(make(**options), [given])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "tis", "loss": "vespo"}, "correction='tis' must be None with loss='vespo'"),
        ({"correction": "vtrace"}, "correction must be one of 'tis', .*, got 'vtrace'"),
        ({"correction": {"hi": 2.0}}, "correction must be one of 'level', .*, got 'hi'"),
        ({"correction": {"high": 0.5}}, "correction.high=0.5 must be at least 1"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile=0.0 must be a finite number in \(0, 1\]"),
        ({"top_entropy_quantile": 0.2, "loss": "gmpo"}, "top_entropy_quantile=0.2 must be 1 with loss='gmpo'"),
        ({"loss": "sapo", "loss_options": {"temperature": 1.0}}, "loss_options={'temperature': 1.0}: loss='sapo' has"),
        ({"loss": "luspo", "reduction": "token_mean"}, "reduction='token_mean': loss='luspo' is one of completions"),
    ],
)
def test_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_penalty_without_a_gradient_is_refused(make, train):
    own = {"rewards": threes, "tokenizer": Digits(), "loss": "kl_cov"}
    with pytest.raises(ValueError, match="loss='kl_cov' penalises a ratio that moves"):
        train(make(**own), [OWN])
    assert train(make(**own, num_iterations=2), [OWN]).global_step == 2


def test_says_what_it_resolved_to(make):
    options = {"loss": "grpo", "importance_level": "sequence", "reduction": "token_mean", "correction": "tis"}
    said = make(**options, top_entropy_quantile=0.2).describe()
    assert said["loss"] == "grpo, sequence-level ratio clipped to [0.9997, 1.0004]"
    assert said["normaliser"].startswith("token_mean over the optimizer step")
    assert said["correction"] == CORRECTIONS["tis"].describe()
    assert said["tokens"] == "the 0.2 of highest entropy in the rollout, on all ranks"
    assert not {"correction", "tokens"} & make().describe().keys()


@pytest.mark.parametrize("given", ["opsm", CORRECTIONS["opsm"], Correction(high=3.0), {"high": 3.0}])
def test_a_checkpoint_keeps_the_correction(make, train, tmp_path, tiny_llama, given):
    module = make(correction=given, loss_options=None, rewards="ExactMatch")
    trainer = train(module, [rollouts(range(PROMPTS), group=GROUP)])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = GRPOModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True, policy=tiny_llama.double())
    assert again.correction == module.correction


def test_several_updates_draw_other_tokens(make, train):
    """Tokens are drawn anew in each optimizer step, from its seed."""
    drawn = []

    class Watched(GRPOModule):
        def before_updates(self, pieces):
            pieces = super().before_updates(pieces)
            drawn.append(torch.cat([piece.covariant[piece.trained] for piece in pieces]))
            return pieces

    options = {"share": 0.2, "covariance_low": -9.0, "covariance_high": 9.0}
    for _ in range(2):
        still = lambda groups: torch.optim.SGD(groups, lr=0.0)  # noqa: E731
        module = make(loss="clip_cov", loss_options=options, num_iterations=2, optimizer=still)
        module.__class__ = Watched
        train(module, [rollouts(range(PROMPTS), group=GROUP)])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert all(tokens.sum() == int(0.2 * len(tokens)) for tokens in drawn)
