"""DPO: the reference, the first loss, checkpoints, the cache and LoRA."""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignment_modules import DPOModule, LoraConfig, PolicyConfig, SFTModule
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.scoring import score


def pairs(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = {"index": list(range(count))}
    for name, width in (("prompt", 3), ("chosen", 5), ("rejected", 7)):
        batch[f"{name}_input_ids"] = torch.randint(1, 40, (count, width), generator=generator)
        lengths = torch.randint(1, width + 1, (count, 1), generator=generator)
        batch[f"{name}_attention_mask"] = (torch.arange(width)[None] < lengths).long()
    return batch


@pytest.fixture
def make(tiny_llama):
    def factory(**options):
        defaults = {"policy": copy.deepcopy(tiny_llama), "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5)}
        return DPOModule(**(defaults | options))

    return factory


def test_first_loss_is_exactly_ln_2(make, train, tiny_llama):
    policy = copy.deepcopy(tiny_llama)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5  # must not make policy and reference differ
    metrics = train(make(policy=policy), [pairs()]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-7)
    assert float(metrics["train/rewards/margins"]) == 0
    assert float(metrics["train/rewards/accuracies"]) == 0


def test_learning_raises_the_margin(make, train):
    metrics = train(make(), [pairs()] * 12).callback_metrics
    assert metrics["train/rewards/accuracies"] == 1
    assert metrics["train/rewards/margins"] > 0
    assert metrics["train/loss"] < math.log(2)


def test_reference_is_frozen_for_ever(make, train):
    module = make()
    before = module.reference.fingerprint()
    trainer = train(module, [pairs()] * 3)
    assert module.reference.fingerprint() == before
    assert fingerprint(module.policy) != before
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any(id(p) in trained or p.requires_grad for p in module.reference.parameters())
    module.eval().train()
    assert not any(child.training for child in module.reference.modules())


def test_reference_shares_nothing_with_the_policy(make):
    module = make()
    mine = {p.data_ptr() for p in module.policy.parameters()}
    assert not mine & {p.data_ptr() for p in module.reference.parameters()}


def test_state_dict_drops_exactly_the_reference_and_stays_strict(make):
    module = make()
    state = module.state_dict()
    assert state
    assert all(key.startswith("policy.") for key in state)
    make().load_state_dict(state)
    renamed = {key.replace("layers.0", "layer.0"): value for key, value in state.items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict(renamed)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

    assert not any("reference" in key for key in Holder().state_dict())


def test_checkpoint_without_reference_resumes(make, train, tmp_path):
    trainer = train(make(), [pairs()] * 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not any("reference" in key for key in held["state_dict"])
    module = make()
    initial = module.reference.fingerprint()

    resumed = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    resumed.fit(module, torch.utils.data.DataLoader([pairs()] * 2, batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 4
    assert module.reference.fingerprint() == initial


@pytest.mark.parametrize("kind", ["paradigm", "reference"])
def test_foreign_checkpoints_are_refused(make, train, tmp_path, tiny_llama, kind):
    train(make(), [pairs()]).save_checkpoint(tmp_path / "a.ckpt")
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    module = SFTModule(policy=other) if kind == "paradigm" else make(reference=other)
    loader = torch.utils.data.DataLoader([pairs()], batch_size=None)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=kind):
        trainer.fit(module, loader, ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_is_evaluated_whatever_the_reference(make, train, tmp_path, tiny_llama):
    trained = make()
    train(trained, [pairs()]).save_checkpoint(tmp_path / "a.ckpt")
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    loaded = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", policy=copy.deepcopy(other))
    assert fingerprint(loaded.policy) == fingerprint(trained.policy)
    module, trainer = make(policy=other), L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(module, torch.utils.data.DataLoader([pairs()], batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert fingerprint(module.policy) == fingerprint(trained.policy)


def test_cached_reference_gives_the_same_losses(make, train, monkeypatch):
    batches = [pairs(seed=0), pairs(seed=0)]
    plain = train(make(), batches, max_epochs=2).callback_metrics
    module = make(cache_reference=True)
    calls = []
    original = module.reference.module.forward
    module.reference.module.forward = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    cached = train(module, batches, max_epochs=2).callback_metrics
    assert float(cached["train/loss"]) == pytest.approx(float(plain["train/loss"]), abs=1e-6)
    assert len(module.reference._scores) == 4
    assert len(calls) == 1


def test_the_cache_knows_pairs_by_their_tokens(make, train):
    """Rows of another split, or of a loader without `index`, are never taken for those of this one."""
    module = make(cache_reference=True, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    data = [{key: value for key, value in pairs(seed=seed).items() if key != "index"} for seed in (0, 1)]
    loaders = [torch.utils.data.DataLoader([batch], batch_size=None) for batch in data]
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, *loaders)
    for name in ("train/loss", "val/loss"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(math.log(2), abs=1e-6)
    assert len(module.reference._scores) == 8


def test_other_divergences_have_their_own_loss(make, train):
    plain, js = (train(make(f_divergence=name, loss="sigmoid"), [pairs()] * 3) for name in ("reverse_kl", "js"))
    assert plain.callback_metrics["train/loss"] != js.callback_metrics["train/loss"]
    with pytest.raises(ValueError, match="f_divergence"):
        make(f_divergence="js", loss="apo_zero")
    with pytest.raises(ValueError, match="discopop_tau"):
        make(discopop_tau=0.0)


def test_lora_reference_is_the_adapter_switched_off(train, tiny_llama_config):
    torch.manual_seed(0)
    policy = PolicyConfig(config=tiny_llama_config, lora=LoraConfig(r=4, dropout=0.3))
    module = DPOModule(policy=policy, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    assert module.reference.module is None
    metrics = train(module, [pairs()]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-7)
    assert train(module, [pairs()] * 8).callback_metrics["train/loss"] < math.log(2)


def test_label_smoothing_is_conservative_dpo(make, train):
    """The second step's loss, against the formula on the logged log-probabilities."""
    module = make(label_smoothing=0.2, beta=0.5)
    margins = []
    original = module.objective

    def spy(batch):
        with torch.no_grad():
            segments = batch.get("segments") or module.segments(batch)
            log_ratios = module.compared(score(module.policy, segments)) - module.reference_logps(batch, segments)
        objective = original(batch)
        margins.append((float(objective.total), 0.5 * (log_ratios[:, 0] - log_ratios[:, 1])))
        return objective

    module.objective = spy
    train(module, [pairs()] * 2)
    total, margin = margins[1]
    expected = (-0.8 * F.logsigmoid(margin) - 0.2 * F.logsigmoid(-margin)).sum()
    assert total == pytest.approx(float(expected), abs=1e-5)
    assert float(margin.abs().max()) > 1e-3


def test_a_pair_without_a_completion_is_not_counted(make, train):
    batch = pairs()
    whole = train(make(beta=0.5), [{k: v[:3] for k, v in batch.items()}] * 3).callback_metrics
    batch["rejected_attention_mask"][3] = 0
    assert train(make(beta=0.5), [batch] * 3).callback_metrics["train/loss"] == pytest.approx(
        float(whole["train/loss"]), abs=1e-6
    )


def test_plain_module_without_transformers(train):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
            self.mixer = nn.GRU(16, 16, batch_first=True)

        def forward(self, input_ids):
            return self.head(self.mixer(self.embedding(input_ids))[0])

    module = DPOModule(policy=Model(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    metrics = train(module, [pairs()]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"loss": "dpo"}, "'dpo'"),
        ({"label_smoothing": 0.6}, "label_smoothing"),
        ({"nll_coef": -1.0}, "nll_coef"),
    ],
)
def test_refuses(make, options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sigmoid"])
def test_an_empty_pair_adds_nothing(make, update, assert_same, tiny_llama, loss):
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.3)
    batch = pairs()
    longer = {key: torch.cat([value, value[:1]]) for key, value in batch.items() if key != "index"}
    longer["chosen_attention_mask"][-1] = 0

    def build(**options):
        return make(loss=loss, beta=0.5, reference=copy.deepcopy(reference), **options)

    assert_same(update(build, [batch]), update(build, [longer]))


def turns_of_a_user(batch):
    """Loss masks that leave out what a user said in the middle of each completion."""
    masks = {f"{name}_loss_mask": batch[f"{name}_attention_mask"].clone() for name in ("chosen", "rejected")}
    masks["chosen_loss_mask"][:, 1:3] = 0
    masks["rejected_loss_mask"][:, 2:4] = 0
    return batch | masks


@pytest.fixture
def long_pairs():
    batch = pairs()
    for name in ("chosen", "rejected"):
        batch[f"{name}_attention_mask"] = torch.ones_like(batch[f"{name}_attention_mask"])
    return batch


@pytest.mark.parametrize("options", [{}, {"loss": "ipo"}, {"loss": "sigmoid_norm"}, {"nll_coef": 0.5}])
def test_only_what_the_policy_wrote_counts(make, train, tiny_llama, long_pairs, options):
    """Against sums over plain forward passes of whole rows."""
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.3)
    batch = turns_of_a_user(long_pairs)
    module = make(beta=0.5, reference=copy.deepcopy(reference), optimizer=lambda p: torch.optim.SGD(p, lr=0), **options)
    metrics = train(module, [copy.deepcopy(batch)]).callback_metrics
    sums, lengths = {}, {}
    for side in ("chosen", "rejected"):
        mask = batch[f"{side}_loss_mask"]
        lengths[side] = mask.sum(dim=1)
        for who, model in (("policy", tiny_llama), ("reference", reference)):
            rows = []
            for row in range(4):
                prompt = batch["prompt_input_ids"][row][batch["prompt_attention_mask"][row].bool()]
                ids = torch.cat([prompt, batch[f"{side}_input_ids"][row]])
                logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                rows.append((logps[len(prompt) - 1 :] * mask[row]).sum())
            sums[who, side] = torch.stack(rows).detach()
    ratios = {side: sums["policy", side] - sums["reference", side] for side in ("chosen", "rejected")}
    mean = {side: ratios[side] / lengths[side] for side in ratios}
    expected = {
        "ipo": (mean["chosen"] - mean["rejected"] - 1.0) ** 2,
        "sigmoid_norm": -F.logsigmoid(0.5 * (mean["chosen"] - mean["rejected"])),
        "sigmoid": -F.logsigmoid(0.5 * (ratios["chosen"] - ratios["rejected"])),
    }[options.get("loss", "sigmoid")]
    expected = expected - options.get("nll_coef", 0.0) * sums["policy", "chosen"] / lengths["chosen"]
    assert float(metrics["train/logps/chosen"]) == pytest.approx(float(sums["policy", "chosen"].mean()), abs=1e-4)
    assert float(metrics["train/logps/rejected"]) == pytest.approx(float(sums["policy", "rejected"].mean()), abs=1e-4)
    assert float(metrics["train/loss"]) == pytest.approx(float(expected.mean()), abs=1e-4)


def test_means_over_tokens_leave_out_what_the_policy_did_not_write(make, train, long_pairs):
    """Accuracy and entropy of the scored tokens; the number of tokens is that of all."""
    off = {"optimizer": lambda p: torch.optim.SGD(p, lr=0)}
    plain = train(make(**off), [copy.deepcopy(long_pairs)]).callback_metrics
    masked = train(make(**off), [turns_of_a_user(copy.deepcopy(long_pairs))]).callback_metrics
    assert float(masked["train/entropy"]) != float(plain["train/entropy"])
    assert float(masked["train/num_tokens"]) == float(plain["train/num_tokens"])
    ones = {f"{name}_loss_mask": torch.ones_like(long_pairs[f"{name}_attention_mask"]) for name in ("chosen",)}
    same = train(make(**off), [copy.deepcopy(long_pairs) | ones]).callback_metrics
    assert {k: float(v) for k, v in same.items()} == {k: float(v) for k, v in plain.items()}


def test_a_loss_mask_beyond_the_tokens_is_refused(make, train):
    batch = pairs()
    batch["rejected_loss_mask"] = torch.ones_like(batch["rejected_attention_mask"])
    batch["rejected_attention_mask"][2, 4:] = 0
    batch["rejected_loss_mask"][:2] = batch["rejected_loss_mask"][3:] = 0
    batch["rejected_attention_mask"][2, :4] = 1
    with pytest.raises(ValueError, match="rejected_loss_mask marks token 4 of row 2, which does not exist"):
        train(make(), [batch])


def test_the_cache_tells_loss_masks_apart(make, train, long_pairs):
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0), "cache_reference": True}
    module = make(**still)
    train(module, [copy.deepcopy(long_pairs), turns_of_a_user(copy.deepcopy(long_pairs))])
    assert len(module.reference._scores) == 8
    metrics = train(module, [turns_of_a_user(copy.deepcopy(long_pairs))]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("change", ["load_state_dict", "data", "replaced"])
def test_the_cache_ends_with_the_references_weights(make, train, tiny_llama, change):
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)

    def second_loss(cache):
        module = make(beta=0.5, cache_reference=cache, optimizer=lambda p: torch.optim.SGD(p, lr=0))
        train(module, [pairs()])
        if change == "load_state_dict":
            module.reference.module.load_state_dict(other.state_dict())
        elif change == "data":  # as a callback does that moves the reference after the policy
            for mine, new in zip(module.reference.parameters(), other.parameters(), strict=True):
                mine.data.mul_(0.0).add_(new.data)
        else:
            module.reference.module = copy.deepcopy(other)
        return float(train(module, [pairs()]).callback_metrics["train/loss"])

    expected = second_loss(False)
    assert abs(expected - math.log(2)) > 1e-3
    assert second_loss(True) == pytest.approx(expected, abs=1e-7)


class Unigram(nn.Module):
    """The same distribution at every position: a completion's probability is that of its tokens in any order."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_tokens_keep_the_sign_of_a_small_margin(train, seed):
    """Chosen and rejected differ in one token of 8,192; summed in float32 their order decides who is better."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, generator=generator)
    logits[1] = logits[0] + 1e-5  # token 1 is the better one of two
    chosen = torch.randint(16, (12, 8192), generator=generator)
    chosen[:, -1] = 1
    rejected = torch.cat([chosen[:, :-1], torch.zeros(12, 1, dtype=torch.int64)], dim=1)
    rejected = rejected[:, torch.randperm(8192, generator=generator)]
    batch = {"prompt_input_ids": torch.zeros(12, 1, dtype=torch.int64), "chosen_input_ids": chosen}
    batch["rejected_input_ids"] = rejected
    batch |= {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in batch.items()}
    module = DPOModule(policy=Unigram(logits), reference=Unigram(torch.zeros(16)))
    metrics = train(module, [batch]).callback_metrics
    assert metrics["train/rewards/accuracies"] == 1
    logps = logits.log_softmax(-1)[chosen].double().sum(dim=1)
    assert float(metrics["train/logps/chosen"]) == pytest.approx(float(logps.mean()), rel=1e-7)
    gain = 0.1 * float(logits.log_softmax(-1)[1].double() - logits.log_softmax(-1)[0].double())
    assert float(metrics["train/rewards/margins"]) == pytest.approx(gain, rel=0.2)  # of one float32 token
