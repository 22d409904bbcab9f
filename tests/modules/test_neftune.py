"""NEFTune: the noise against its formula, whatever the layout; where there is none; and that a resumed run draws it."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from alignment_modules import LoraConfig, PolicyConfig, PretrainModule, SFTModule
from alignment_modules.callbacks import ExactResume
from alignment_modules.policies.attention import plan_attention
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.lora import add_lora
from alignment_modules.policies.noise import find_embedding
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.reading import read
from alignment_modules.policies.segments import Segments
from datamodules import SFTDataModule
from tests.batches import supervised, weighted
from tests.models import MIXTRAL, Plain, adapted

ALPHA = 5.0


@pytest.fixture
def make(tiny_llama):
    def factory(policy=None, cls=SFTModule, **options):
        options.setdefault("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
        return cls(policy=copy.deepcopy(policy or tiny_llama), **({"neftune_alpha": ALPHA} | options))

    return factory


class Found(Plain):
    """A policy without transformers that says where its embeddings are."""

    def get_input_embeddings(self):
        return self.table


def packed(*lengths):
    """Documents in one row, padded; only their middle tokens are targets, so that the last ones are not computed."""
    ids = torch.randint(1, 39, (1, sum(lengths) + 3), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(3, dtype=torch.long)])[None]
    labels = torch.where((positions > 0) & (positions < min(lengths) - 2), ids, -100)
    mask = (torch.arange(ids.shape[1]) < sum(lengths)).long()[None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def rows_of(batch):
    """Ids and labels of each document."""
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][row][mask], batch["labels"][row][mask]
        positions = batch.get("position_ids")
        starts = [0] if positions is None else (positions[row][mask] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], labels[start:end]


def by_hand(policy, batch, seed, alpha=ALPHA):
    """The mean nll with noise, document by document; the numbers are drawn for the tokens that are computed."""
    documents = [(ids, labels) for ids, labels in rows_of(batch) if (labels[1:] != -100).any()]
    computed = [int((labels != -100).nonzero().max()) for _, labels in documents]
    torch.manual_seed(seed)
    embedding = policy.get_input_embeddings()
    draws = torch.empty(sum(computed), embedding.weight.shape[1]).uniform_(-1, 1).split(computed)
    found = []
    for (ids, labels), count, drawn in zip(documents, computed, draws, strict=True):
        scale = alpha / (len(ids) * drawn.shape[1]) ** 0.5
        logits = policy(inputs_embeds=(embedding(ids[:count]) + scale * drawn)[None]).logits[0]
        asked = labels[1 : count + 1] != -100
        found.append(F.cross_entropy(logits[asked], labels[1 : count + 1][asked], reduction="none"))
    return torch.cat(found).mean()


class Seed(L.Callback):
    """Seeds torch before every training batch."""

    def on_train_batch_start(self, *given):
        torch.manual_seed(11)


BATCHES = {"right": supervised(range(5), 2), "left": supervised(range(5), 3, "left"), "packed": packed(9, 5, 12)}


@pytest.mark.parametrize("attention", ["packed", "eager"])
@pytest.mark.parametrize("layout", BATCHES)
def test_loss_and_gradient_are_those_of_the_formula(make, train, tiny_llama, layout, attention):
    if attention == "eager":  # read in padded rows
        tiny_llama.set_attn_implementation("eager")
    plain, module = copy.deepcopy(tiny_llama), make(tiny_llama)
    expected = by_hand(plain, BATCHES[layout], 11)
    expected.backward()
    metrics = train(module, [BATCHES[layout]], callbacks=[Seed()]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(expected), abs=1e-5)
    assert float(metrics["train/loss"]) != pytest.approx(float(by_hand(plain, BATCHES[layout], 11, 0.0)), abs=1e-2)
    for (name, before), after in zip(plain.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-5, msg=name)


def noise_of(policy, batch, alpha=ALPHA):
    """What is added to the embeddings, `[tokens, d]` a document, at the tokens that are computed."""
    segments, seen = Segments.from_labels(**batch), []
    assert prepare(policy).packed
    handle = policy.model.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for options in ({"neftune_alpha": alpha}, {}):
            read(policy, segments, **options)
    handle.remove()
    noisy, clean = seen
    places = plan_attention(segments, policy.config.hidden_size).position
    return (noisy - clean)[0][places].split(segments.lengths)


def test_range_and_scale_of_each_document(tiny_llama):
    batch = packed(60, 20, 30)
    torch.manual_seed(0)
    for length, noise in zip((60, 20, 30), noise_of(tiny_llama, batch, 3.0), strict=True):
        bound = 3.0 / (length * 32) ** 0.5
        assert float(noise.abs().max()) <= bound * (1 + 1e-5)
        assert float(noise.abs().max()) > 0.98 * bound
        assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(float(noise.mean())) < 0.1 * bound
        assert len(noise) < length  # the rest is counted, and not computed


def test_the_layout_changes_no_noise(tiny_llama):
    """Rows apart, padded on either side, or documents in one row: the same draws for the same tokens."""
    losses = []
    for extra, side in ((0, "right"), (4, "right"), (2, "left")):
        torch.manual_seed(3)
        module = SFTModule(policy=copy.deepcopy(tiny_llama), neftune_alpha=ALPHA)
        module.train()
        losses.append(float(module.objective(supervised(range(4), extra, side)).total))
    batch, rows = supervised(range(4)), list(rows_of(supervised(range(4))))
    one = {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat([labels for _, labels in rows])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
    }
    assert one["input_ids"].numel() == batch["attention_mask"].sum()
    torch.manual_seed(3)
    losses.append(float(module.objective(one).total))
    assert losses == pytest.approx(losses[:1] * 4, abs=1e-4)


def test_no_noise_and_no_draw_outside_training(make, train, tiny_llama):
    batch, bare = BATCHES["packed"], make(neftune_alpha=None)
    module = make()
    for each in (module, bare):
        each.eval()
    state = torch.get_rng_state()
    assert torch.equal(module.objective(batch).total, bare.objective(batch).total)
    assert torch.equal(torch.get_rng_state(), state)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    values = []
    for each in (module, bare):
        trainer = train(each, [batch] * 2) if each is bare else L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )  # fmt: skip
        policy = copy.deepcopy(tiny_llama)
        each.policy.load_state_dict(policy.state_dict())
        values.append(trainer.validate(each, loader, verbose=False)[0]["val/loss"])
    assert values[0] == values[1]


def test_training_validates_without_noise(make, train):
    """Within `fit`, with a rate of 0: every validation sees the same policy, every training step other noise."""
    losses, validated = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *given):
            losses.append(float(trainer.callback_metrics["train/loss"]))

        def on_validation_end(self, trainer, module):
            validated.append(float(trainer.callback_metrics["val/loss"]))

    class Documents(L.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([BATCHES["right"]] * 2, batch_size=None)

        val_dataloader = train_dataloader

    module = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, Documents())
    assert len(set(validated)) == 1
    assert len(set(losses)) == 4
    module.eval()
    objective = module.objective(BATCHES["right"])
    assert validated[0] == pytest.approx(float(objective.total / objective.weight), abs=1e-6)


def test_nothing_is_left_behind(make, train, tmp_path):
    module = make()
    names = set(module.state_dict())
    train(module, [BATCHES["packed"]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.policy.modules())
    assert set(module.state_dict()) == names
    assert "neftune" not in (module.export(tmp_path / "export") / "config.json").read_text()

    class Fails(Exception):
        pass

    def fail(*given, **more):
        raise Fails

    module.policy.model.norm.forward = fail
    module.train()
    with pytest.raises(Fails):
        module.objective(BATCHES["right"])
    assert not module.policy.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("where", [
    {}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]},
], ids=["attention", "embedding", "saved"])  # fmt: skip
def test_adapters(tiny_llama_config, train, where):
    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(config=tiny_llama_config | {"tie_word_embeddings": False}), trainable=False)
    policy = add_lora(policy, LoraConfig(r=2, **where))

    def trained(alpha):
        optimizer = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}
        module = SFTModule(policy=copy.deepcopy(policy), neftune_alpha=alpha, **optimizer)
        held = {name: p.clone() for name, p in module.policy.named_parameters() if not p.requires_grad}
        train(module, [BATCHES["packed"]], callbacks=[Seed()])
        now = dict(module.policy.named_parameters())
        assert held
        assert all(torch.equal(value, now[name]) for name, value in held.items())
        return {name: p.detach() for name, p in now.items() if p.requires_grad}

    noisy, again, bare = trained(ALPHA), trained(ALPHA), trained(None)
    assert all(torch.equal(value, again[name]) for name, value in noisy.items())
    assert any(not torch.equal(value, bare[name]) for name, value in noisy.items())


def test_a_policy_of_ones_own_that_names_its_embeddings(make):
    torch.manual_seed(0)
    policy, batch = Found(), supervised(range(3))
    module = make(policy)
    module.train()
    torch.manual_seed(11)
    found = float(module.objective(batch).total)
    documents = list(rows_of(batch))
    torch.manual_seed(11)
    draws = torch.empty(sum(len(ids) - 1 for ids, _ in documents), 16).uniform_(-1, 1)
    expected = 0.0
    for (ids, labels), drawn in zip(documents, draws.split([len(ids) - 1 for ids, _ in documents]), strict=True):
        states = policy.table(ids[:-1]) + ALPHA / (len(ids) * 16) ** 0.5 * drawn
        states = states + states.cumsum(0) / torch.arange(1, len(ids))[:, None]
        expected += float(F.cross_entropy(policy.head(states), labels[1:], reduction="sum", ignore_index=-100).detach())
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_other_sizes_are_refused(make, alpha):
    with pytest.raises(ValueError, match=f"neftune_alpha={alpha}"):
        make(neftune_alpha=alpha)


def test_policies_without_embeddings_are_refused(make, tiny_llama):
    with pytest.raises(ValueError, match=r"Plain has no get_input_embeddings\(\)"):
        make(Plain())
    make(Plain(), neftune_alpha=None)
    with pytest.raises(ValueError, match="not compiled"):
        SFTModule(policy=torch.compile(tiny_llama, backend="eager"), neftune_alpha=ALPHA)
    assert find_embedding(adapted(tiny_llama)).weight.shape == (40, 32)


def test_embeddings_that_are_not_read_are_refused(make):
    class Elsewhere(Found):
        def get_input_embeddings(self):
            return nn.Embedding(40, 16)

    module = make(Elsewhere())
    module.train()
    with pytest.raises(ValueError, match="read the input embeddings 0 times"):
        module.objective(supervised(range(3)))


def test_recomputed_activations_change_no_noise(make, update, assert_same):
    def checkpointed(**more):
        module = make(**more)
        module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    batch = BATCHES["packed"]
    first, second = (update(factory, [batch], callbacks=[Seed()]) for factory in (make, checkpointed))
    assert_same(first, second)


def test_with_weights(make, train, tiny_llama):
    batch = weighted(range(4))
    batch["loss_weights"] = torch.where(batch["labels"] != -100, 2.0, torch.nan)
    bare = {key: value for key, value in batch.items() if key != "loss_weights"}
    losses = [train(make(), [b], callbacks=[Seed()]).callback_metrics["train/loss"] for b in (batch, bare)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)


def test_experts_are_counted_with_the_noise_that_trains_them(train, monkeypatch):
    from alignment_modules.paradigms import sft
    from alignment_modules.training import balancing

    counted, trained = [], []

    def watch(into):
        def reading(*given, **options):
            into.append(read(*given, **options))
            return into[-1]

        return reading

    monkeypatch.setattr(balancing, "read", watch(counted))
    monkeypatch.setattr(sft, "read", watch(trained))
    torch.manual_seed(0)
    module = SFTModule(policy=PolicyConfig(config=MIXTRAL), neftune_alpha=ALPHA, micro_batch_size=3)
    train(module, [supervised(range(8))])
    assert len(counted) == len(trained) == 3
    for before, after in zip(counted, trained, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.router_logits, after.router_logits, strict=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_draws_the_same(model_folder, tmp_path, packing, lora):
    """A run that is stopped within an epoch and within its noise ends where the whole one does, bit for bit."""
    rows = [{"prompt": f"{n}+{n}=", "completion": str(n + n)} for n in range(16)]

    def fit(cls=PretrainModule if packing else SFTModule, resume=None, alpha=ALPHA, seed=0, **options):
        data = SFTDataModule(train=rows, tokenizer=model_folder, batch_size=2, packing=packing, max_length=16)
        policy = PolicyConfig(path=model_folder, lora=LoraConfig(r=2) if lora else None)
        torch.manual_seed(seed)
        module = cls(policy=policy, neftune_alpha=alpha, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01))
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver, ExactResume(seed=3)], accumulate_grad_batches=2, max_steps=5, max_epochs=-1,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume)
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    whole = fit()
    resumed = fit(resume=tmp_path / "step=3.ckpt", seed=1)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    bare = fit(alpha=None)
    assert any(not torch.equal(value, bare[name]) for name, value in whole.items())
