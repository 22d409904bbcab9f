"""The reward model: its loss, that no split or padding changes a step, its head, and what it refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignment_modules import DPOModule, LoraConfig, PolicyConfig, RewardModule, SFTModule, create_module
from alignment_modules.functional.statistics import Statistic
from alignment_modules.policies.load import build_policy
from alignment_modules.training.meters import Meters


def pairs(count=4, seed=0, margin=False, side="right"):
    generator = torch.Generator().manual_seed(seed)
    batch = {"index": list(range(count))}
    for name, width in (("prompt", 3), ("chosen", 5), ("rejected", 7)):
        lengths = torch.randint(1, width + 1, (count, 1), generator=generator)
        column = torch.arange(width)[None]
        mask = column < lengths if side == "right" else column >= width - lengths
        batch[f"{name}_input_ids"] = torch.randint(1, 40, (count, width), generator=generator)
        batch[f"{name}_attention_mask"] = mask.long()
    if margin:
        batch["margin"] = torch.rand(count, generator=generator)
    return batch


def rows_of(batch, side):
    for row in range(len(batch["index"])):
        parts = (
            batch[f"{part}_input_ids"][row][batch[f"{part}_attention_mask"][row] != 0] for part in ("prompt", side)
        )
        yield torch.cat(list(parts))


def rewards_by_hand(policy, batch):
    """[pairs, 2] from transformers' own forward pass of each row alone."""
    sides = [[policy(row[None]).logits[0, 0] for row in rows_of(batch, side)] for side in ("chosen", "rejected")]
    return torch.stack([torch.stack(side) for side in sides], dim=1)


@pytest.fixture
def classifier(tiny_llama_config):
    torch.manual_seed(0)
    return build_policy(PolicyConfig(config=tiny_llama_config, head="scalar")).eval()


@pytest.fixture
def make(classifier):
    def factory(**options):
        defaults = {"policy": copy.deepcopy(classifier), "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}
        return RewardModule(**(defaults | options))

    return factory


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"center_coef": 0.1}])
def test_loss_and_gradient_are_those_of_plain_rows(make, update, assert_same, classifier, side, options):
    batch = pairs(margin=True, side=side)
    batch["prompt_attention_mask"][1] = 0  # an empty prompt is valid
    rewards = rewards_by_hand(classifier, batch)
    difference = rewards[:, 0] - rewards[:, 1] - batch["margin"]
    losses = -F.logsigmoid(difference) + options.get("center_coef", 0.0) * rewards.sum(1).square()
    losses.mean().backward()
    expected = {f"policy.{name}": -p.grad for name, p in classifier.named_parameters()}
    found = update(lambda **o: make(**o, **options), [batch])
    assert_same(found, expected)


def test_gradient_does_not_depend_on_split_padding_or_an_empty_row(make, update, assert_same):
    batch = pairs(margin=True)
    whole = update(make, [batch])
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    assert_same(update(make, parts), whole)
    wide = {
        key: F.pad(value, (2, 3)) if torch.is_tensor(value) and value.dim() == 2 else value
        for key, value in batch.items()
    }
    assert_same(update(make, [wide]), whole)
    more = {
        key: torch.cat([value, value[:1]]) if torch.is_tensor(value) else [*value, 4] for key, value in batch.items()
    }
    more["rejected_attention_mask"][4] = 0
    assert_same(update(make, [more]), whole)


def test_metrics_are_those_of_all_pairs_however_they_are_split(make, train, classifier):
    batch = pairs(16, margin=True)
    batch["chosen_attention_mask"][3] = 0  # counts in nothing
    kept = [row for row in range(16) if row != 3]
    rewards = rewards_by_hand(
        classifier, {k: v if k == "index" else v[kept] for k, v in batch.items()} | {"index": kept}
    )
    difference = (rewards[:, 0] - rewards[:, 1]).double()
    confidence, right = difference.abs().sigmoid(), (difference > 0).double()
    error = 0.0
    for start in range(10):
        inside = (confidence >= 0.5 + start / 20) & (confidence < 0.5 + (start + 1) / 20)
        error += float((right - confidence)[inside].sum().abs()) / len(kept)
    expected = {
        "rewards/accuracies": right.mean(),
        "rewards/margins": difference.mean(),
        "rewards/mean": rewards.mean(),
        "rewards/min": rewards.min(),
        "rewards/max": rewards.max(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/calibration_error": error,
    }
    for size in (16, 5):
        parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, 16, size)]
        frozen = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        metrics = train(frozen, parts, accumulate_grad_batches=len(parts)).callback_metrics
        for name, value in expected.items():
            assert float(metrics[f"train/{name}"]) == pytest.approx(float(value), abs=1e-5), name
    assert error > 0.01


def test_gaps_cancel_within_a_bin_and_not_across():
    one, other = Meters(), Meters()
    one.update({"gap": Statistic(torch.tensor([1.0, -2.0]), 4.0, "gap")})
    one.update({"gap": Statistic(torch.tensor([-3.0, 1.0]), 1.0, "gap")})
    assert one.compute(lambda values, how: values) == {"gap": (2.0 + 1.0) / 5.0}
    other.load_state_dict(one.state_dict(), torch.device("cpu"))
    assert other.compute(lambda values, how: 2 * values) == {"gap": 3.0 / 5.0}
    other.reset()
    other.update({"gap": Statistic(torch.zeros(2), 0.0, "gap")})
    assert other.compute(lambda values, how: values) == {}


def test_equal_sides_give_ln_2_and_learning_raises_the_margin(make, train):
    same = pairs()
    for part in ("input_ids", "attention_mask"):
        same[f"rejected_{part}"] = same[f"chosen_{part}"]
    assert float(train(make(), [same]).callback_metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-7)
    metrics = train(make(), [pairs()] * 12).callback_metrics
    assert metrics["train/rewards/accuracies"] == 1
    assert metrics["train/loss"] < 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapters_and_the_head_alone(tiny_llama_config, train, checkpointing):
    torch.manual_seed(0)
    config = PolicyConfig(
        config=tiny_llama_config, head="scalar", lora=LoraConfig(r=2), gradient_checkpointing=checkpointing
    )
    module = RewardModule(policy=config, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("score.modules_to_save.default.weight") for name in names)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    train(module, [pairs()] * 2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names


@pytest.mark.parametrize("as_object", [False, True])
def test_a_plain_module_that_gives_one_number_for_a_token(train, as_object):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.mixer = nn.Embedding(40, 12), nn.GRU(12, 12, batch_first=True)
            self.head = nn.Linear(12, 1)

        def forward(self, input_ids):
            values = self.head(self.mixer(self.embedding(input_ids))[0])
            return type("Output", (), {"logits": values})() if as_object else values

    policy, batch = Plain(), pairs()
    plain = lambda row: policy(row[None]).logits if as_object else policy(row[None])  # noqa: E731
    sides = [torch.stack([plain(row)[0, -1, 0] for row in rows_of(batch, side)]) for side in ("chosen", "rejected")]
    expected = -F.logsigmoid(sides[0] - sides[1]).mean()
    module = RewardModule(policy=policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    assert float(train(module, [batch]).callback_metrics["train/loss"]) == pytest.approx(float(expected), abs=1e-6)


def test_a_fresh_head_comes_from_the_global_seed_and_a_trained_one_is_kept(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "lm")
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        module = create_module("reward", policy=str(tmp_path / "lm"))
        assert [name for name in module.state_dict() if "score" in name] == ["policy.score.weight"]
        assert module.policy.score.weight.shape == (1, 32)
        heads.append(module.policy.score.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.5 < float(heads[0].std()) * 33**0.5 < 1.5
    assert torch.equal(module.policy.model.embed_tokens.weight, tiny_llama.model.embed_tokens.weight)
    module.policy.save_pretrained(tmp_path / "classifier")
    for dtype in ("float32", "bfloat16"):
        again = build_policy(PolicyConfig(path=str(tmp_path / "classifier"), head="scalar", dtype=dtype))
        assert torch.equal(again.score.weight, heads[2].to(getattr(torch, dtype)))


def test_what_it_does_not_write_is_refused(make):
    import lightning as L

    with pytest.raises(ValueError, match=r"evaluation=.* is not allowed: RewardModule writes nothing"):
        make(evaluation={"num_samples": 2})
    prompts = {"prompts": torch.ones(2, 3).long(), "prompt_attention_mask": torch.ones(2, 3).long()}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = torch.utils.data.DataLoader([prompts], batch_size=None)
    with pytest.raises(ValueError, match=r"a batch for RewardModule must hold prompt_input_ids, .* lacks"):
        trainer.test(make(), loader)
    (found,) = trainer.test(make(), torch.utils.data.DataLoader([pairs()], batch_size=None), verbose=False)
    assert "test/rewards/accuracies" in found


def test_wrong_heads_are_refused_by_name(tiny_llama, tiny_llama_config, classifier, train, tmp_path):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    scalar = PolicyConfig(config=tiny_llama_config, head="scalar")
    for kind in (SFTModule, DPOModule):
        with pytest.raises(ValueError, match=r"policy.head='scalar': 'lm' is needed here"):
            kind(policy=scalar)
        with pytest.raises(ValueError, match="LlamaForSequenceClassification has no language-modelling head"):
            kind(policy=classifier)
    with pytest.raises(ValueError, match=r"policy.head='lm': 'scalar' is needed here"):
        RewardModule(policy=PolicyConfig(config=tiny_llama_config))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no scalar head"):
        RewardModule(policy=tiny_llama)
    with pytest.raises(ValueError, match=r"policy.head='value'"):
        build_policy(PolicyConfig(config=tiny_llama_config, head="value"))
    with pytest.raises(ValueError, match="center_coef=-1"):
        RewardModule(policy=classifier, center_coef=-1)
    three = AutoModelForSequenceClassification.from_config(LlamaConfig(**tiny_llama_config, num_labels=3))
    three.save_pretrained(tmp_path)
    for policy in (three, str(tmp_path)):
        with pytest.raises(ValueError, match="LlamaForSequenceClassification gives 3 numbers for a text"):
            RewardModule(policy=policy)
    with pytest.raises(ValueError, match="its model is a sequence classifier"):
        SFTModule(policy=str(tmp_path))
    wide = nn.Sequential(nn.Embedding(40, 3))
    with pytest.raises(ValueError, match="policy Sequential gives 3 numbers for a token; a reward is one"):
        train(RewardModule(policy=wide), [pairs()])
