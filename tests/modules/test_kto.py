"""KTO: the step's divergence from mismatched pairs, gradients under any split, first losses, metrics, LoRA."""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignment_modules import KTOModule, LoraConfig, PolicyConfig
from alignment_modules.policies.fingerprints import fingerprint


def completions(count=7, seed=0, repeated=True):
    """Left-padded prompts, of which rows 1 and 2 have the same, and right-padded completions."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"index": list(range(10, 10 + count)), "label": torch.arange(count) % 3 != 1}
    for name, width in (("prompt", 3), ("completion", 6)):
        batch[f"{name}_input_ids"] = torch.randint(1, 40, (count, width), generator=generator)
        lengths = torch.randint(1, width + 1, (count, 1), generator=generator)
        exists = torch.arange(width)[None] < lengths
        batch[f"{name}_attention_mask"] = (exists.flip(1) if name == "prompt" else exists).long()
    if repeated and count > 2:
        for name in ("prompt_input_ids", "prompt_attention_mask"):
            batch[name][2] = batch[name][1]
    return batch


def rows_of(batch, rows):
    return {k: [v[r] for r in rows] if isinstance(v, list) else v[torch.tensor(rows)] for k, v in batch.items()}


@pytest.fixture
def other(tiny_llama):
    """A reference far enough away that the divergence is not held at 0."""
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return reference


@pytest.fixture
def make(tiny_llama, other):
    def factory(**options):
        defaults = {
            "policy": copy.deepcopy(tiny_llama),
            "reference": copy.deepcopy(other),
            "beta": 0.3,
            "max_grad_norm": None,
            "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5),
        }
        return KTOModule(**(defaults | options))

    return factory


def change(make, update, batch, **options):
    return update(lambda **more: make(**options, **more), [batch])


def log_ratio(policy, reference, prompt, completion):
    """Of one completion, by a plain forward pass."""
    ids = torch.cat([prompt, completion])[None]
    found = []
    for model in (policy, reference):
        steps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(steps.gather(1, completion[:, None]).double().sum())
    return found[0] - found[1].detach()


def by_hand(policy, reference, batch, partners, beta=0.3, weights=(1.0, 1.0)):
    """`z` and the mean loss, row by row."""
    prompts, answers = (
        [ids[mask.bool()] for ids, mask in zip(batch[f"{n}_input_ids"], batch[f"{n}_attention_mask"], strict=True)]
        for n in ("prompt", "completion")
    )
    with torch.no_grad():
        apart = [log_ratio(policy, reference, prompts[i], answers[j]) for i, j in enumerate(partners)]
    z = torch.stack(apart).mean().clamp(min=0)
    losses = []
    for prompt, answer, good in zip(prompts, answers, batch["label"], strict=True):
        r = log_ratio(policy, reference, prompt, answer)
        losses.append(
            weights[0] * torch.sigmoid(-beta * (r - z)) if good else weights[1] * torch.sigmoid(beta * (r - z))
        )
    return z, torch.stack(losses).mean()


PARTNERS = [6, 0, 0, 2, 3, 4, 5]  # row 2 has the prompt of row 1


def test_equals_the_formula(make, update, assert_same, tiny_llama, other, train):
    batch = completions()
    z, loss = by_hand(tiny_llama, other, batch, PARTNERS, weights=(1.3, 0.7))
    assert z > 0.1
    loss.backward()
    expected = {f"policy.{name}": -p.grad for name, p in tiny_llama.named_parameters()}
    tiny_llama.zero_grad()
    options = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    assert_same(expected, change(make, update, batch, **options))
    metrics = train(make(**options), [batch]).callback_metrics
    assert float(metrics["train/kl"]) == pytest.approx(float(z), abs=1e-5)
    assert float(metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_split_padding_and_order(make, update, assert_same, loss):
    batch = completions()
    whole = change(make, update, batch, loss=loss)
    for size in (1, 2, 3, 7, 9):
        assert_same(whole, change(make, update, batch, loss=loss, micro_batch_size=size))
    wider = {k: F.pad(v, (2, 4)) if k not in ("index", "label") else v for k, v in batch.items()}
    assert_same(whole, change(make, update, wider, loss=loss, micro_batch_size=3))
    shuffled = rows_of(batch, [4, 0, 6, 2, 5, 1, 3])
    assert_same(whole, change(make, update, shuffled, loss=loss, micro_batch_size=2))


def test_without_an_index_rows_stand_as_they_come(make, update, assert_same):
    batch = completions()
    plain = {k: v for k, v in batch.items() if k != "index"}
    assert_same(change(make, update, batch), change(make, update, plain, micro_batch_size=2))


def test_metrics_do_not_depend_on_the_split(make, train):
    one, many = (train(make(micro_batch_size=size), [completions()]).callback_metrics for size in (None, 2))
    names = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
    for name in ("loss", "kl", "rewards/margins", *names):
        assert float(one[f"train/{name}"]) == pytest.approx(float(many[f"train/{name}"]), abs=1e-5), name
    margin = one["train/rewards/chosen"] - one["train/rewards/rejected"]
    assert float(one["train/rewards/margins"]) == pytest.approx(float(margin), abs=1e-6)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_first_loss_is_one_half(train, tiny_llama, loss):
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    module = KTOModule(policy=tiny_llama, loss=loss, micro_batch_size=2)
    before = fingerprint(module.reference.module)
    metrics = train(module, [completions()]).callback_metrics
    assert float(metrics["train/loss"]) == 0.5
    assert float(metrics["train/rewards/margins"]) == 0
    assert ("train/kl" in metrics) == (loss == "kto")
    assert float(metrics.get("train/kl", 0.0)) == 0
    assert fingerprint(module.reference.module) == before
    assert fingerprint(module.policy) != before


def test_apo_reads_nothing_twice(make, train):
    module, calls = make(loss="apo_zero_unpaired"), []
    module.policy.register_forward_hook(lambda *_: calls.append(1))
    module.policy.model.register_forward_hook(lambda *_: calls.append(1))
    train(module, [completions()])
    kto = make()
    twice = []
    kto.policy.model.register_forward_hook(lambda *_: twice.append(1))
    train(kto, [completions()])
    assert len(twice) == len(calls) + 1


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind(make, train, label):
    batch = completions()
    batch["label"][:] = label
    metrics = train(make(), [batch] * 4).callback_metrics
    side, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"train/rewards/{side}" in metrics
    assert f"train/rewards/{absent}" not in metrics
    assert "train/rewards/margins" not in metrics


def test_learning_raises_the_margin(make, train):
    metrics = train(make(reference=None, beta=0.5), [completions()] * 20).callback_metrics
    assert metrics["train/rewards/margins"] > 0
    assert metrics["train/loss"] < 0.5


@pytest.mark.parametrize("column", ["attention_mask", "loss_mask"])
def test_an_empty_completion_adds_nothing(make, update, assert_same, column):
    batch = completions()
    longer = rows_of(batch, [0, 1, 2, 3, 4, 5, 6, 4])
    longer["index"][-1] = 13  # in the middle
    longer.setdefault("completion_loss_mask", longer["completion_attention_mask"].clone())
    longer[f"completion_{column}"][-1] = 0
    longer["completion_loss_mask"][-1] = 0
    whole = change(make, update, batch)
    for size in (None, 1, 3):
        assert_same(whole, change(make, update, longer, micro_batch_size=size))


def test_only_what_the_policy_wrote_counts(make, update, assert_same, train):
    batch = completions()
    batch["completion_attention_mask"][:] = 1
    mask = batch["completion_attention_mask"].clone()
    mask[:, 2:4] = 0
    masked = batch | {"completion_loss_mask": mask}
    plain, partial = (train(make(), [data]).callback_metrics for data in (batch, masked))
    assert float(plain["train/logps/chosen"]) < float(partial["train/logps/chosen"])
    assert float(plain["train/kl"]) != float(partial["train/kl"])
    assert_same(change(make, update, masked), change(make, update, masked, micro_batch_size=2))


def test_one_prompt_alone_is_refused(make, train):
    batch = completions()
    for name in ("prompt_input_ids", "prompt_attention_mask"):
        batch[name][:] = batch[name][:1]
    with pytest.raises(
        ValueError, match=r"loss='kto' needs completions of other prompts, but all 7 rows .* larger batch_size"
    ):
        train(make(), [batch])
    with pytest.raises(ValueError, match="all 1 rows of this optimizer step"):
        train(make(), [completions(count=1)])
    train(make(loss="apo_zero_unpaired"), [batch])


def test_validation_takes_each_batch_by_itself(make, tiny_llama, other):
    batches = [completions(), completions(count=1)]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = trainer.validate(make(), torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    z, _ = by_hand(tiny_llama, other, batches[0], PARTNERS)
    assert metrics["val/kl"] == pytest.approx(float(z) * 7 / 8, abs=1e-5)


def test_lora_reference_is_the_adapter_switched_off(train, tiny_llama_config):
    torch.manual_seed(0)
    policy = PolicyConfig(config=tiny_llama_config, lora=LoraConfig(r=4, dropout=0.3))
    module = KTOModule(policy=policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), micro_batch_size=3)
    assert module.reference.module is None
    assert float(train(module, [completions()]).callback_metrics["train/loss"]) == 0.5
    assert train(module, [completions()] * 8).callback_metrics["train/loss"] < 0.5


def test_plain_module_without_transformers(train):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
            self.mixer = nn.GRU(16, 16, batch_first=True)

        def forward(self, input_ids):
            return self.head(self.mixer(self.embedding(input_ids))[0])

    module = KTOModule(policy=Model(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    assert float(train(module, [completions()]).callback_metrics["train/loss"]) == pytest.approx(0.5, abs=1e-7)


def test_mismatched_pairs_fit_a_model_with_learned_positions(train):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    batch = completions(count=2)
    batch["prompt_input_ids"] = F.pad(batch["prompt_input_ids"], (3, 0), value=1)
    batch["prompt_attention_mask"] = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    batch["completion_attention_mask"] = torch.tensor([[1] * 2 + [0] * 4, [1] * 6])
    metrics = train(KTOModule(policy=policy), [batch]).callback_metrics
    assert math.isfinite(float(metrics["train/kl"]))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"beta": 0.0}, "beta"), ({"loss": "dpo"}, "'dpo'"), ({"desirable_weight": -1.0}, "desirable_weight")],
)
def test_refuses(make, options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


def test_a_foreign_batch_is_refused(make, train):
    batch = {name: value for name, value in completions().items() if name != "label"}
    with pytest.raises(ValueError, match=r"a batch for KTOModule must hold .*lacks label"):
        train(make(), [batch])
