"""DPO's further options: WPO, LD-DPO, labels, margins, several losses, rewards of means, logits, a moving reference."""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from alignment_modules import DPOModule, LoraConfig, PolicyConfig
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.training.reference_sync import SyncReference
from tests.batches import pairs
from tests.models import Plain, other_than

STILL = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0)}


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "reference": other_than(tiny_llama),
            "beta": 0.5,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5),
        }
        return DPOModule(**(defaults | options))

    return factory


def distributions(model, batch, side, row):
    """Log-probabilities of the vocabulary where each token of a completion is predicted, and the tokens."""
    prompt, completion = (
        batch[f"{name}_input_ids"][row][batch[f"{name}_attention_mask"][row].bool()] for name in ("prompt", side)
    )
    output = model(torch.cat([prompt, completion])[None])
    logits = getattr(output, "logits", output)[0].double()
    return logits[len(prompt) - 1 : -1], completion


def token_logps(model, batch, side, row):
    logits, completion = distributions(model, batch, side, row)
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def log_ratios(policy, reference, batch, weight=lambda own, shared: torch.ones(own)):
    """`log pi - log ref` of both sides of each pair, [pairs, 2]; tokens weighted by the pair's lengths."""
    rows = []
    for row in range(len(batch["prompt_input_ids"])):
        parts = [
            token_logps(policy, batch, side, row) - token_logps(reference, batch, side, row).detach()
            for side in ("chosen", "rejected")
        ]
        shared = min(map(len, parts))
        rows.append(torch.stack([(part * weight(len(part), shared)).sum() for part in parts]))
    return torch.stack(rows)


def lengths_of(batch):
    return torch.stack([batch[f"{side}_attention_mask"].sum(1) for side in ("chosen", "rejected")], dim=1)


def check_step(module, model, loss, metrics):
    """The logged loss, and an SGD step at rate 0.5 along its gradient."""
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss.backward()
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-5)
    moved = dict(module.policy.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[name], old[name] - 0.5 * parameter.grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "sft", "ipo", "bco_pair"])
def test_wpo_by_hand(make, train, tiny_llama, loss):
    """Each pair's loss times the product of how likely the policy is to write either side, without gradient."""
    batch, model, reference = pairs(range(5)), copy.deepcopy(tiny_llama), other_than(tiny_llama)
    module = make(wpo=True, loss=loss, reference=copy.deepcopy(reference))
    weights = []
    for row in range(5):
        sides = []
        for side in ("chosen", "rejected"):
            logits, completion = distributions(model, batch, side, row)
            p = logits.detach().softmax(-1)
            own = p.gather(1, completion[:, None])[:, 0]
            sides.append((own.log() - p.square().sum(-1).log()).mean().exp())
        weights.append(sides[0] * sides[1])
    ratios, lengths = log_ratios(model, reference, batch), lengths_of(batch)
    w, l = ratios.unbind(1)  # noqa: E741
    chosen = torch.stack([token_logps(model, batch, "chosen", row).mean() for row in range(5)])
    losses = {
        "sigmoid": lambda: -F.logsigmoid(0.5 * (w - l)),
        "hinge": lambda: F.relu(1 - 0.5 * (w - l)),
        "sft": lambda: -chosen,
        "ipo": lambda: (w / lengths[:, 0] - l / lengths[:, 1] - 1.0).square(),
        "bco_pair": lambda: -F.logsigmoid(0.5 * w) - F.logsigmoid(-0.5 * l),
    }[loss]()
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/wpo_weight"]) == pytest.approx(float(torch.stack(weights).mean()), abs=1e-5)
    check_step(module, model, (losses * torch.stack(weights)).mean(), metrics)


def test_wpo_of_a_module_without_a_linear_head(train):
    torch.manual_seed(0)
    model, batch = Plain(), pairs(range(4))
    module = DPOModule(policy=copy.deepcopy(model), wpo=True, **STILL)
    found = []
    for row in range(4):
        total = 0.0
        for side in ("chosen", "rejected"):
            logits, completion = distributions(model, batch, side, row)
            p = logits.softmax(-1)
            total = total + (p.gather(1, completion[:, None])[:, 0].log() - p.square().sum(-1).log()).mean()
        found.append(float(total.exp()))
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/wpo_weight"]) == pytest.approx(sum(found) / 4, abs=1e-5)
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2) * sum(found) / 4, abs=1e-5)


def test_tokens_beyond_the_shorter_completion_count_less(make, train, tiny_llama):
    batch, model, reference = pairs(range(5)), copy.deepcopy(tiny_llama), other_than(tiny_llama)
    module = make(ld_alpha=0.25, reference=copy.deepcopy(reference))

    def weight(own, shared):
        return torch.where(torch.arange(own) < shared, 1.0, 0.25)

    w, l = log_ratios(model, reference, batch, weight).unbind(1)  # noqa: E741
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/rewards/margins"]) == pytest.approx(0.5 * float((w - l).mean()), abs=1e-5)
    check_step(module, model, -F.logsigmoid(0.5 * (w - l)).mean(), metrics)
    assert not torch.allclose(w - l, log_ratios(tiny_llama, reference, batch).diff(dim=1)[:, 0].neg())


def test_cached_sums_are_those_of_the_option(make, train):
    batch = pairs(range(4))
    runs = [train(make(ld_alpha=0.25, cache_reference=cache), [batch] * 2, max_epochs=2) for cache in (False, True)]
    plain, cached = (float(run.callback_metrics["train/loss"]) for run in runs)
    assert plain == pytest.approx(cached, abs=1e-6)


def test_several_losses_and_dpo_positive(make, train, tiny_llama):
    batch, model, reference = pairs(range(5)), copy.deepcopy(tiny_llama), other_than(tiny_llama)
    options = {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "dpop_coef": 3.0}
    module = make(reference=copy.deepcopy(reference), **options)
    w, l = log_ratios(model, reference, batch).unbind(1)  # noqa: E741
    chosen = torch.stack([token_logps(model, batch, "chosen", row).mean() for row in range(5)])
    losses = -0.8 * F.logsigmoid(0.5 * (w - l - 3.0 * F.relu(-w)))
    losses = losses + 0.2 * (-F.logsigmoid(0.5 * w) - F.logsigmoid(-0.5 * l)) - chosen
    check_step(module, model, losses.mean(), train(module, [batch]).callback_metrics)
    told = module.describe()["loss"]
    assert "0.8 sigmoid + 0.2 bco_pair + sft" in told
    assert "dpop_coef 3.0" in told


def test_labels_turn_the_likelihood_too(make, train, tiny_llama):
    batch, model, reference = pairs(range(5)), copy.deepcopy(tiny_llama), other_than(tiny_llama)
    labels = torch.tensor([1.0, 0.0, 0.3, 0.5, 0.9])
    module = make(nll_coef=0.4, reference=copy.deepcopy(reference))
    w, l = log_ratios(model, reference, batch).unbind(1)  # noqa: E741
    means = torch.stack(
        [
            torch.stack([token_logps(model, batch, side, row).mean() for side in ("chosen", "rejected")])
            for row in range(5)
        ]
    )
    losses = -labels * F.logsigmoid(0.5 * (w - l)) - (1 - labels) * F.logsigmoid(0.5 * (l - w))
    losses = losses - 0.4 * (labels * means[:, 0] + (1 - labels) * means[:, 1])
    check_step(module, model, losses.mean(), train(module, [batch | {"label": labels}]).callback_metrics)


def test_labels_and_margins_do_not_depend_on_the_split(make, update, assert_same):
    for more in ({"label": torch.linspace(0, 1, 6)}, {"margin": torch.linspace(-1, 2, 6)}):
        batch = pairs(range(6)) | more
        parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
        assert_same(update(make, parts), update(make, [batch]))


def test_margins_of_the_batch(make, train, tiny_llama):
    batch, model, reference = pairs(range(5)), copy.deepcopy(tiny_llama), other_than(tiny_llama)
    margins = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.1])
    module = make(reference=copy.deepcopy(reference))
    w, l = log_ratios(model, reference, batch).unbind(1)  # noqa: E741
    loss = -F.logsigmoid(0.5 * (w - l) - margins).mean()
    check_step(module, model, loss, train(module, [batch | {"margin": margins}]).callback_metrics)


@pytest.mark.parametrize("option", [{"loss": "ipo"}, {"loss": "sigmoid_norm"}, {"loss": "ipo", "ipo_logps": "sum"}])
def test_rewards_are_means_where_the_loss_compares_means(make, train, tiny_llama, option):
    batch, reference = pairs(range(5)), other_than(tiny_llama)
    ratios = log_ratios(tiny_llama, reference, batch).detach()
    if "ipo_logps" not in option:
        ratios = ratios / lengths_of(batch)
    metrics = train(make(reference=reference, **STILL, **option), [batch]).callback_metrics
    for place, side in enumerate(("chosen", "rejected")):
        assert float(metrics[f"train/rewards/{side}"]) == pytest.approx(0.5 * float(ratios[:, place].mean()), abs=1e-5)


def test_logits_are_logged_where_asked_for(make, train, tiny_llama):
    batch = pairs(range(5))
    assert not any("logits/" in name for name in train(make(), [batch]).callback_metrics)
    metrics = train(make(log_logits=True, **STILL), [batch]).callback_metrics
    for side in ("chosen", "rejected"):
        logits = torch.cat([distributions(tiny_llama, batch, side, row)[0] for row in range(5)])
        assert float(metrics[f"train/logits/{side}"]) == pytest.approx(float(logits.mean()), abs=1e-5)


# A reference that follows the policy


def fit(module, steps, batches, ckpt_path=None, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, **(defaults | options))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_reference_moves_when_it_is_due(make, tiny_llama, alpha, accumulated):
    """Before the first step that sees it moved: after 2 steps, and after 4."""
    module = make(reference=None, sync_reference=SyncReference(alpha=alpha, every_n_steps=2))
    seen = []
    original = module.objective

    def spy(batch):
        seen.append(
            [p.detach().clone() for model in (module.policy, module.reference.module) for p in model.parameters()]
        )
        return original(batch)

    module.objective = spy
    fit(module, 5, [pairs([row, row + 1]) for row in range(6)], accumulate_grad_batches=accumulated)
    count = len(list(tiny_llama.parameters()))
    policy, reference = ([step[half] for step in seen[::accumulated]] for half in (slice(count), slice(count, None)))
    for before, after in zip(seen[::accumulated], seen[accumulated - 1 :: accumulated], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # not within a step
    expected = [p.detach().clone() for p in tiny_llama.parameters()]
    for step in range(5):
        if step in (2, 4):
            expected = [old.lerp(new, alpha) for old, new in zip(expected, policy[step], strict=True)]
        for old, new in zip(reference[step], expected, strict=True):
            torch.testing.assert_close(old, new, rtol=0, atol=1e-7)


def test_dictionary_and_description(make):
    module = make(reference=None, sync_reference={"alpha": 1.0, "every_n_steps": 3})
    assert "replaced by the policy every 3 optimizer steps" in module.describe()["reference"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("stop", [2, 3])
def test_resume_is_exact(tiny_llama_config, tmp_path, lora, alpha, stop):
    """A run that ends just before the reference moves, or just after, goes on as if it had not ended."""

    def build():
        torch.manual_seed(0)
        policy = PolicyConfig(config=tiny_llama_config, lora=LoraConfig(r=2) if lora else None)
        sync = SyncReference(alpha=alpha, every_n_steps=2)
        return DPOModule(policy=policy, sync_reference=sync, optimizer=lambda g: torch.optim.AdamW(g, lr=1e-2))

    whole, first, second = build(), build(), build()
    batches = [pairs(range(4))]
    fit(whole, 5, batches)
    fit(first, stop, batches).save_checkpoint(tmp_path / "a.ckpt")
    fit(second, 5, batches, ckpt_path=tmp_path / "a.ckpt")
    assert fingerprint(second.policy) == fingerprint(whole.policy)
    assert second.reference.fingerprint() == whole.reference.fingerprint()
    assert whole.reference.fingerprint() != build().reference.fingerprint()


def test_the_reference_of_an_adapter_is_the_merged_mixture(tiny_llama_config, train):
    """A mixture of weights, which no mixture of an adapter's factors is."""
    torch.manual_seed(0)
    policy = PolicyConfig(config=tiny_llama_config, lora=LoraConfig(r=2))
    sync = SyncReference(alpha=0.5, every_n_steps=1)
    module = DPOModule(policy=policy, sync_reference=sync, optimizer=lambda g: torch.optim.AdamW(g, lr=5e-2))
    metrics = train(module, [pairs(range(4))]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
    layer = module.policy.base_model.model.model.layers[0].self_attn.q_proj
    base = module.reference.module.model.layers[0].self_attn.q_proj.weight.detach().clone()
    torch.testing.assert_close(base, layer.base_layer.weight, rtol=0, atol=0)
    module.reference.refresh(0.5)
    delta = layer.get_delta_weight("default").detach()
    assert delta.abs().max() > 0
    moved = module.reference.module.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(moved, base + 0.5 * delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 0.5, "loss": "ipo"}, "ld_alpha=0.5 weighs the tokens of sums, and loss='ipo' compares means"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5"),
        ({"wpo": True, "loss": "aot"}, "wpo=True weighs single pairs, and loss='aot' sorts them"),
        ({"cache_reference": True, "sync_reference": SyncReference()}, "cache_reference=True would keep what"),
        (
            {"sync_reference": {"every": 3}},
            r"sync_reference has no option 'every'; allowed are \['alpha', 'every_n_steps'",
        ),
        ({"sync_reference": {"alpha": 0.0}}, "sync_reference.alpha=0.0 never moves"),
        ({"sync_reference": {"every_n_steps": 0}}, "every_n_steps=0"),
        ({"sync_reference": SyncReference(), "reference": Plain()}, "refresh: Plain and the policy LlamaForCausalLM"),
        ({"loss": ["sigmoid", "sft"], "loss_weights": [1.0]}, "must be one weight for each of several losses"),
    ],
)
def test_what_contradicts_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
