"""Weighted tokens: the weighted mean by brute force in float64, what is counted, and what is refused."""

import copy

import pytest
import torch

from alignment_modules import DistillationModule, PolicyConfig, SFTModule
from alignment_modules.functional import distribution_divergence
from datamodules import SFTDataModule
from tests.batches import supervised, weighted
from tests.models import MIXTRAL, other_than


@pytest.fixture
def make(tiny_llama):
    def factory(policy=None, cls=SFTModule, **options):
        options.setdefault("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
        return cls(policy=copy.deepcopy(policy or tiny_llama), **options)

    return factory


def documents(batch):
    """Ids, targets (-100: none) and weights of each document, without padding."""
    positions = batch.get("position_ids")
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids, labels, weights = (batch[key][row][mask] for key in ("input_ids", "labels", "loss_weights"))
        starts = [0] if positions is None else (positions[row][mask] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], labels[start:end], weights[start:end]


def by_hand(policy, batches, loss="nll", label_smoothing=0.0, z_loss=0.0):
    """`sum(w * loss) / sum(w)`, each document by itself."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for batch in batches:
        for ids, labels, weights in documents(batch):
            logits = policy(ids[None]).logits[0].double()
            for place in range(1, len(ids)):
                if labels[place] == -100:
                    continue
                logps = logits[place - 1].log_softmax(-1)
                value = -logps[labels[place]]
                value = value * value.detach().neg().exp() if loss == "dft" else value
                value = (1 - label_smoothing) * value - label_smoothing * logps.mean()
                value = value + z_loss * logits[place - 1].logsumexp(-1) ** 2
                total, weight = total + float(weights[place]) * value, weight + float(weights[place])
    return total / weight


def packed():
    """Two documents in one row and one in another, with weights of single tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 39, (2, 9), generator=generator)
    labels = torch.where(torch.rand(2, 9, generator=generator) < 0.7, ids, -100)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    return {
        "input_ids": ids,
        "labels": labels.where(mask.bool(), -100),
        "attention_mask": mask,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 0]]),
        "loss_weights": torch.rand(2, 9, generator=generator) * 5,
    }


@pytest.mark.parametrize("options", [{}, {"loss": "dft"}, {"label_smoothing": 0.2, "z_loss": 0.05}])
def test_loss_and_gradient_of_a_step_are_the_weighted_mean(make, train, tiny_llama, options):
    model = tiny_llama.double()
    batches = [packed(), weighted((0, 3)), weighted((1, 2, 4), 2, "left")]
    expected = by_hand(copy.deepcopy(model), batches, **options)
    plain = copy.deepcopy(model)
    by_hand(plain, batches, **options).backward()
    module = make(model, **options)
    metrics = train(module, copy.deepcopy(batches), accumulate_grad_batches=3, precision="64-true").callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-6)
    for (name, before), after in zip(plain.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_distillation_takes_the_weighted_mean(make, train, tiny_llama, kind):
    teachers = {"a": other_than(tiny_llama), "b": copy.deepcopy(tiny_llama)}
    with torch.no_grad():
        teachers["b"].lm_head.weight.mul_(0.5)
    batch, names = weighted(range(5)), ["a", "b", "b", "a", "b"]
    plain, sums, weights = copy.deepcopy(tiny_llama), {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for name, (ids, labels, own) in zip(names, documents(batch), strict=True):
        ours, theirs = (model(ids[None]).logits[0, :-1].double() for model in (plain, teachers[name]))
        asked, own = labels[1:] != -100, own[1:].double()
        values = distribution_divergence(ours[asked], theirs[asked].detach(), kind=kind)
        sums[name], weights[name] = sums[name] + (own[asked] * values).sum(), weights[name] + float(own[asked].sum())
    expected = sum(sums.values()) / sum(weights.values())
    expected.backward()
    module = make(cls=DistillationModule, teacher=copy.deepcopy(teachers), divergence=kind)
    metrics = train(module, [batch | {"teacher": names}]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(expected), abs=1e-6)
    for name in teachers:
        own = float(sums[name]) / weights[name]
        assert float(metrics[f"train/divergence/{name}"]) == pytest.approx(own, abs=1e-6)
    for (name, before), after in zip(plain.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-6, msg=name)


def test_only_ratios_count_and_ones_change_no_bit(make, update, assert_same):
    batch = weighted(range(6))
    assert_same(update(make, [batch]), update(make, [batch | {"loss_weights": 7 * batch["loss_weights"]}]))
    bare = supervised(range(6))
    ones = update(make, [bare | {"loss_weights": torch.ones(bare["labels"].shape)}])
    assert all(torch.equal(value, ones[name]) for name, value in update(make, [bare]).items())


@pytest.mark.parametrize("cls", [SFTModule, DistillationModule])
def test_logged_with_weights_and_without(make, train, tiny_llama, cls):
    """`loss` is the weighted mean, also in validation; the rest counts supervised tokens alike."""
    more = {"teacher": other_than(tiny_llama)} if cls is DistillationModule else {}
    batch, bare = weighted(range(6)), supervised(range(6))
    batch["loss_weights"] = batch["loss_weights"].clamp(min=0.01)
    weighed, alike = (train(make(cls=cls, **copy.deepcopy(more)), [b]).callback_metrics for b in (batch, bare))
    for name in ("entropy", "mean_token_accuracy", *(["nll_loss"] if more else [])):
        assert float(weighed[f"train/{name}"]) == pytest.approx(float(alike[f"train/{name}"]), abs=1e-6)
    assert float(weighed["train/loss"]) != pytest.approx(float(alike["train/loss"]), abs=1e-3)
    if cls is SFTModule:
        module = make(tiny_llama, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        trainer = train(module, [batch])
        halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
        [found] = trainer.validate(module, torch.utils.data.DataLoader(halves, batch_size=None), verbose=False)
        assert found["val/loss"] == pytest.approx(float(by_hand(tiny_llama, [batch])), abs=1e-5)


@pytest.mark.parametrize("cls", [SFTModule, DistillationModule])
def test_a_step_without_weight_is_one_without_targets(make, train, tiny_llama, cls):
    def weights_after(nothing):
        more = {"teacher": other_than(tiny_llama)} if cls is DistillationModule else {}
        module = make(cls=cls, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5), **more)
        metrics = train(module, [weighted(range(4)), nothing, weighted(range(4, 8))]).callback_metrics
        return module.policy.state_dict(), metrics

    bare = weighted(range(4)) | {"labels": torch.full_like(weighted(range(4))["labels"], -100)}
    (first, metrics), (second, _) = (
        weights_after(nothing) for nothing in (weighted(range(4)) | {"loss_weights": torch.zeros(4, 12)}, bare)
    )
    assert float(metrics["train/steps_without_targets"]) == 1
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), float("-inf")])
def test_wrong_weights_are_refused_where_they_count(make, train, weight, experts):
    policy = PolicyConfig(config=MIXTRAL) if experts else None
    batch = supervised(range(3))
    weights = torch.ones(batch["labels"].shape)
    weights[batch["labels"] == -100] = weight  # of no meaning
    train(make(policy), [batch | {"loss_weights": weights}])
    weights[1, 4] = weight
    module = make(policy)
    with pytest.raises(
        ValueError, match=r"loss_weights is -?\w.* at row 1, column 4 of a batch; a weight must be a fin"
    ):
        train(module, [batch | {"loss_weights": weights}])
    with pytest.raises(ValueError, match="at row 1, column 4"):
        module.objective(batch | {"loss_weights": weights})


def test_weights_of_another_shape_are_refused(make, train):
    batch = supervised(range(3))
    for shape in ((3,), (3, 11), (2, 12)):
        with pytest.raises(ValueError, match=r"loss_weights has shape"):
            train(make(), [batch | {"loss_weights": torch.ones(shape)}])


def test_experts_count_the_weights_before_they_divide(update, assert_same):
    torch.manual_seed(0)
    policy = SFTModule(policy=PolicyConfig(config=MIXTRAL)).policy

    def make(**options):
        return SFTModule(policy=copy.deepcopy(policy), max_grad_norm=None, **options)

    whole = update(make, [weighted(range(8))])
    for size in (1, 3):
        assert_same(whole, update(lambda size=size, **more: make(micro_batch_size=size, **more), [weighted(range(8))]))


@pytest.mark.parametrize("cls", [SFTModule, DistillationModule])
def test_rows_give_one_gradient_packed_or_not(make, update, assert_same, model_folder, cls):
    """From rows of data to the update: replies and rows with weights, on a folder with a tokenizer."""
    rows = [
        {
            "messages": [
                *({"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": "no", "weight": n / 4}),
                *({"role": "user", "content": "so"}, {"role": "assistant", "content": f"{n + 1}"}),
            ]
        }
        | ({"weight": 0.5} if n % 2 else {})
        for n in range(6)
    ]

    def factory(**more):
        teacher = {"teacher": PolicyConfig(path=model_folder)} if cls is DistillationModule else {}
        module = cls(policy=PolicyConfig(path=model_folder), **teacher, **more)
        with torch.no_grad():
            module.policy.model.norm.weight.mul_(1.5)
        return module

    def batches(weights=True, **options):
        kept = [row if weights else {"messages": row["messages"]} for row in rows]
        module = SFTDataModule(train=kept, tokenizer=model_folder, shuffle=False, **options)
        return list(module.train_dataloader())

    whole = update(factory, batches())
    assert_same(whole, update(factory, batches(batch_size=2)))
    assert_same(whole, update(factory, batches(packing=True, max_length=60, batch_size=1)))
    with pytest.raises(AssertionError):
        assert_same(whole, update(factory, batches(weights=False)))
