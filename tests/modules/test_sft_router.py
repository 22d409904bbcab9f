"""SFT of a mixture of experts: nll and load balancing against plain PyTorch, whatever the split."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from alignment_modules import DPOModule, LoraConfig, PolicyConfig, PretrainModule, SFTModule
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.policies.modes import disable_dropout
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.reading import read
from alignment_modules.policies.router import Router, find_router
from tests.batches import supervised
from tests.models import MIXTRAL

COEFFICIENT = MIXTRAL["router_aux_loss_coef"]
QWEN = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"} | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
    "num_hidden_layers": 3,
}
ROWS = list(range(8))


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def experts(request):
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=MIXTRAL if request.param == "mixtral" else QWEN), trainable=False)


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=MIXTRAL), trainable=False)


def make(policy, cls=SFTModule, **fixed):
    def factory(**options):
        return cls(policy=copy.deepcopy(policy), **({"max_grad_norm": None} | fixed | options))

    return factory


def computed(model, batch):
    """Nll and router logits of every row, by itself, without padding and without the last token."""
    nll, routed = [], []
    for ids, labels, mask in zip(*(batch[key] for key in ("input_ids", "labels", "attention_mask")), strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        output = model(ids[None, :-1], use_cache=False)
        nll.append(F.cross_entropy(output.logits[0], labels[1:], reduction="none")[labels[1:] != -100])
        routed.append(torch.stack([layer.view(-1, layer.shape[-1]) for layer in output.router_logits]))
    return torch.cat(nll), torch.cat(routed, dim=1)


def brute(model, batch):
    """The step's loss and router loss, the latter by transformers' own function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    nll, routed = computed(model, batch)
    router = load_balancing_loss_func(tuple(routed), routed.shape[-1], model.config.num_experts_per_tok)
    return nll.mean() + COEFFICIENT * router, router


def gradient(model, batch):
    loss, _ = brute(model, batch)
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {f"policy.{name}": -g for name, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("size", [None, 3, 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradient_are_those_of_the_whole_step(experts, update, train, assert_same, size, side):
    batch = supervised(ROWS, extra=2, side=side)
    expected = gradient(experts.eval(), batch)
    assert_same(update(make(experts, micro_batch_size=size), [batch]), expected)
    still = make(experts, micro_batch_size=size)(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    metrics = train(still, [batch]).callback_metrics
    loss, router = (float(value.detach()) for value in brute(experts, batch))
    assert float(metrics["train/loss"]) == pytest.approx(loss, abs=1e-5)
    assert float(metrics["train/router_loss"]) == pytest.approx(router, abs=1e-5)


def test_the_router_is_what_makes_the_difference(mixtral, update, assert_same):
    """Without the term the gradient is another; a mean of micro-batches' losses would be another, too."""
    batch = supervised(ROWS)
    exact = update(make(mixtral, micro_batch_size=4), [batch])
    without = copy.deepcopy(mixtral)
    without.config.output_router_logits = False
    means = [gradient(mixtral.eval(), supervised(rows)) for rows in (ROWS[:4], ROWS[4:])]
    mean = {key: (means[0][key] + means[1][key]) / 2 for key in means[0]}
    for other in (update(lambda **o: SFTModule(policy=copy.deepcopy(without), **o), [batch]), mean):
        with pytest.raises(AssertionError):
            assert_same(exact, other, 1e-4)


def test_packed_documents(mixtral, update, assert_same):
    """A row of two documents is two rows."""
    apart = supervised([0, 1])
    ids = [row[mask.bool()] for row, mask in zip(apart["input_ids"], apart["attention_mask"], strict=True)]
    labels = [row[mask.bool()] for row, mask in zip(apart["labels"], apart["attention_mask"], strict=True)]
    positions = torch.cat([torch.arange(len(row)) for row in ids])
    packed = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "position_ids": positions[None]}
    assert_same(update(make(mixtral, PretrainModule), [packed]), gradient(mixtral.eval(), apart))


@pytest.mark.parametrize("size", [None, 3])
def test_gradient_checkpointing_counts_once(mixtral, update, assert_same, size):
    batch = supervised(ROWS)
    again = copy.deepcopy(mixtral)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    assert again.train().is_gradient_checkpointing
    assert_same(update(make(again, micro_batch_size=size), [batch]), gradient(mixtral.eval(), batch))


def test_only_who_wants_the_router_computes_all_of_the_last_layer(mixtral):
    """What balances sees every computed token in each layer; scoring alone still spares the last layer some."""
    assert prepare(mixtral).trims_last_layer
    batch = supervised(ROWS)
    segments = SFTModule(policy=mixtral).segments(batch)
    seen = []
    mixtral.model.layers[-1].mlp.gate.register_forward_hook(lambda _, __, out: seen.append(len(out[0])))
    routed = read(mixtral, segments, routers=True).router_logits
    assert [len(layer) for layer in routed] == [segments.tokens] * 2
    assert read(mixtral, segments).router_logits == ()
    assert seen[1] == len(segments.target_ids) < segments.tokens <= seen[0]


def test_adapters(mixtral, update, assert_same):
    torch.manual_seed(1)
    adapted = add_lora(mixtral, LoraConfig(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    batch = supervised(ROWS)
    expected = gradient(adapted.eval(), batch)
    assert_same(update(make(adapted, micro_batch_size=3), [batch]), expected)


def test_a_policy_read_in_padded_rows(mixtral, update, assert_same):
    batch = supervised(ROWS, extra=1)
    expected = gradient(mixtral.eval(), batch)
    mixtral.set_attn_implementation("eager")
    assert_same(update(make(mixtral, micro_batch_size=3), [batch]), expected)


def test_counting_draws_the_dropout_of_training(mixtral, train):
    """The shares are those of the forward passes that learn: their mean is the loss that transformers would give."""
    mixtral.config.attention_dropout = 0.5
    for layer in mixtral.model.layers:
        layer.self_attn.attention_dropout = 0.5
    seen, shares = [], []
    module = make(mixtral, micro_batch_size=3)(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    for layer in module.policy.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append((torch.is_grad_enabled(), out[0])))
    balance = module.balance
    original = balance.add
    balance.add = lambda objective, reading, given: (shares.append(given), original(objective, reading, given))[1]
    torch.manual_seed(3)
    train(module, [supervised(ROWS)])
    counted, learnt = ([x.detach() for enabled, x in seen if enabled is which] for which in (False, True))
    assert len(counted) == len(learnt) == 6  # three pieces of two layers
    for one, other in zip(counted, learnt, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(given, shares[0]) for given in shares)
    module.eval().objective(supervised(ROWS[:3]))
    assert not torch.allclose(counted[1], seen[-1][1], atol=1e-2)  # there was dropout to draw


def test_an_indifferent_router_starts_at_top_k(experts, train):
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "gate.weight" in name or "lm_head" in name or "embed_tokens" in name:
                parameter.zero_()
    metrics = train(make(experts)(), [supervised(ROWS)]).callback_metrics
    top_k = experts.config.num_experts_per_tok
    assert float(metrics["train/router_loss"]) == pytest.approx(top_k, rel=1e-6)
    nll = float(torch.tensor(40.0).log())
    assert float(metrics["train/loss"]) == pytest.approx(nll + COEFFICIENT * top_k, rel=1e-6)


def test_validation_has_the_loss_of_its_batches(mixtral):
    import lightning as L

    batch = supervised(ROWS)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    [metrics] = trainer.validate(make(mixtral)(), loader, verbose=False)
    loss, router = (float(value.detach()) for value in brute(mixtral.eval(), batch))
    assert metrics["val/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["val/router_loss"] == pytest.approx(router, abs=1e-5)


def test_a_piece_without_a_target_counts_nothing(mixtral, update, assert_same):
    empty = supervised([7])
    empty["labels"][:] = -100
    batch = supervised([0, 1, 2])
    both = {
        key: torch.cat([F.pad(batch[key], (0, 3)), F.pad(empty[key], (0, 6))[:, :12]])
        for key in ("input_ids", "labels", "attention_mask")
    }
    both["labels"][:, 9:] = -100
    assert_same(update(make(mixtral, micro_batch_size=1), [both]), gradient(mixtral.eval(), batch))


def test_who_takes_the_steps(mixtral, tiny_llama, train):
    balanced, dense = make(mixtral)(), SFTModule(policy=tiny_llama)
    assert (balanced.automatic_optimization, dense.automatic_optimization) == (False, True)
    said = balanced.describe()["router loss"]
    assert "2 experts a token with weight 0.25" in said
    assert "router loss" not in dense.describe()
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2.*SFTModule.*micro_batch_size"):
        train(balanced, [supervised(ROWS)], accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"gradient_clip_val=1.0.*SFTModule.*max_grad_norm"):
        train(balanced, [supervised(ROWS)], gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"micro_batch_size=2 is not allowed with this SFTModule"):
        train(SFTModule(policy=tiny_llama, micro_batch_size=2), [supervised(ROWS)])
    metrics = train(dense, [supervised(ROWS)]).callback_metrics
    assert "train/router_loss" not in metrics


@pytest.mark.parametrize("change", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_what_asks_for_nothing_is_left_alone(change):
    torch.manual_seed(0)
    module = SFTModule(policy=PolicyConfig(config=MIXTRAL | change))
    assert module.automatic_optimization
    assert module.balance is None


def test_only_who_adds_the_loss_is_quiet(mixtral, caplog):
    with caplog.at_level(logging.WARNING, "alignment_modules"):
        SFTModule(policy=mixtral)
        assert not caplog.records
        DPOModule(policy=mixtral)
    assert "without the auxiliary loss" in caplog.records[0].getMessage()


def test_another_formula_is_found_out_and_said(mixtral, caplog):
    """The loss of a model whose own is not this one stays out, and the warning says so."""
    assert find_router(mixtral) == Router(2, COEFFICIENT)
    mixtral.num_experts = 5
    original = mixtral.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.aux_loss = output.aux_loss * 1.01
        return output

    mixtral.forward = forward
    assert find_router(mixtral) is None
    with caplog.at_level(logging.WARNING, "alignment_modules"):
        assert SFTModule(policy=mixtral).automatic_optimization
    assert "router_aux_loss_coef=0.25" in caplog.records[0].getMessage()


def test_dropout_off_and_checkpointing_still_record(mixtral, update, assert_same):
    """A policy without dropout whose layers are checkpointed gives its router's logits with their gradient."""
    batch = supervised(ROWS)
    again = copy.deepcopy(mixtral)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    disable_dropout(again.train())
    assert_same(update(make(again, micro_batch_size=4), [batch]), gradient(mixtral.eval(), batch))


def test_weights_of_rows_are_of_the_likelihood_alone(mixtral, update, assert_same):
    """The router balances all tokens, whatever their rows weigh; a source's loss is its likelihood."""
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5] * 2)
    batch = supervised(ROWS) | {"source_weights": weights, "source_name": ["math", "code"] * 4}
    rows = [supervised([row]) for row in ROWS]
    sums = torch.stack([computed(mixtral, row)[0].sum() for row in rows])
    counts = torch.tensor([len(computed(mixtral, row)[0]) for row in rows])
    router = brute(mixtral, supervised(ROWS))[1]
    loss = (sums * weights).sum() / (counts * weights).sum() + COEFFICIENT * router
    wanted = torch.autograd.grad(loss, [p for _, p in mixtral.named_parameters()], materialize_grads=True)
    names = [f"policy.{name}" for name, _ in mixtral.named_parameters()]
    expected = {name: -g for name, g in zip(names, wanted, strict=True)}
    for size in (None, 3):
        assert_same(expected, update(make(mixtral, micro_batch_size=size), [batch]))


def test_a_source_is_told_of_without_the_router(mixtral, train):
    batch = supervised(ROWS) | {"source_weights": torch.full((8,), 0.5), "source_name": ["math", "code"] * 4}
    metrics = train(make(mixtral)(), [batch]).callback_metrics
    for source, rows in (("math", ROWS[::2]), ("code", ROWS[1::2])):
        alone = computed(mixtral, supervised(rows))[0].mean()
        assert float(metrics[f"train/{source}/loss"]) == pytest.approx(float(alone), rel=1e-5)
    wanted = brute(mixtral, supervised(ROWS))[0]
    assert float(metrics["train/loss"]) == pytest.approx(float(wanted), rel=1e-5)
