"""Distillation: its loss row by row, one teacher and several, what is compared and what is refused."""

import copy
import math
from typing import ClassVar

import lightning as L
import pytest
import torch

from alignment_modules import DistillationModule, PolicyConfig
from alignment_modules.functional import distribution_divergence
from alignment_modules.policies.segments import Segments
from alignment_modules.rollouts import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.seeds import Seeds
from datamodules import SFTDataModule
from tests.batches import supervised
from tests.models import adapted, other_than


@pytest.fixture
def make(tiny_llama):
    def factory(policy=None, **options):
        options.setdefault("optimizer", lambda groups: torch.optim.SGD(groups, lr=0.1))
        options.setdefault("teacher", other_than(tiny_llama))
        return DistillationModule(policy=copy.deepcopy(policy or tiny_llama), **options)

    return factory


def by_hand(policy, teachers, batch, **options):
    """Divergences of all supervised tokens, row by row in float64; `teachers` holds one a row."""
    found = []
    for row, teacher in enumerate(teachers):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        ours, theirs = (model(ids[None]).logits[0, :-1].double() for model in (policy, teacher))
        asked = labels[1:] != -100
        found.append(distribution_divergence(ours[asked], theirs[asked].detach(), **options))
    return found


@pytest.mark.parametrize("options", [
    {}, {"divergence": "forward"}, {"divergence": "jsd", "jsd_beta": 0.2, "temperature": 2.0},
])  # fmt: skip
def test_loss_and_gradient_are_the_mean_divergence(make, train, tiny_llama, options):
    teacher, batch, model = other_than(tiny_llama), supervised(range(5), 2, "left"), copy.deepcopy(tiny_llama)
    plain = {"kind": options.get("divergence", "reverse")} | {k: v for k, v in options.items() if k != "divergence"}
    values = torch.cat(by_hand(model, [teacher] * 5, batch, **plain))
    values.mean().backward()
    module = make(teacher=copy.deepcopy(teacher), **options)
    metrics = train(module, [batch]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(values.mean()), abs=1e-6)
    for (name, before), after in zip(model.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-6, msg=name)
    for before, after in zip(teacher.parameters(), module.teacher.module.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_student_that_is_its_teacher_stays(make, train, tiny_llama):
    module = make(teacher=copy.deepcopy(tiny_llama))
    metrics = train(module, [supervised(range(4))]).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(0, abs=1e-7)
    for before, after in zip(tiny_llama.parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_logged_beside_the_loss(make, train, tiny_llama):
    batch, model = supervised(range(4)), tiny_llama
    logps, hits, entropies = [], [], []
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        full = model(ids[None]).logits[0, :-1].double().log_softmax(-1)[labels[1:] != -100]
        targets = labels[1:][labels[1:] != -100]
        logps.append(full.gather(1, targets[:, None])[:, 0])
        hits.append((full.argmax(-1) == targets).double())
        entropies.append(-(full.exp() * full).sum(-1))
    metrics = train(make(), [batch]).callback_metrics
    assert float(metrics["train/nll_loss"]) == pytest.approx(-float(torch.cat(logps).mean()), abs=1e-5)
    assert float(metrics["train/mean_token_accuracy"]) == pytest.approx(float(torch.cat(hits).mean()), abs=1e-6)
    assert float(metrics["train/entropy"]) == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-5)


class TestSeveral:
    @pytest.fixture
    def teachers(self, tiny_llama):
        flatter = copy.deepcopy(tiny_llama)
        with torch.no_grad():
            flatter.lm_head.weight.mul_(0.5)
        return {"math": other_than(tiny_llama), "code": flatter}

    def test_each_row_learns_from_the_one_it_names(self, make, train, tiny_llama, teachers):
        batch = supervised(range(5)) | {"teacher": ["math", "code", "code", "math", "code"]}
        model = copy.deepcopy(tiny_llama)
        rows = by_hand(model, [teachers[name] for name in batch["teacher"]], batch)
        torch.cat(rows).mean().backward()
        module = make(teacher=copy.deepcopy(teachers))
        metrics = train(module, [batch]).callback_metrics
        assert float(metrics["train/loss"]) == pytest.approx(float(torch.cat(rows).mean()), abs=1e-6)
        for name in teachers:
            own = torch.cat([row for row, whose in zip(rows, batch["teacher"], strict=True) if whose == name])
            assert float(metrics[f"train/divergence/{name}"]) == pytest.approx(float(own.mean()), abs=1e-6)
        for before, after in zip(model.parameters(), module.policy.parameters(), strict=True):
            torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=0, atol=1e-6)

    def test_one_that_no_row_names(self, make, train, tiny_llama, teachers):
        batch = supervised(range(3))
        one = train(make(teacher=copy.deepcopy(teachers["code"])), [batch])
        two = train(make(teacher=copy.deepcopy(teachers)), [batch | {"teacher": ["code"] * 3}])
        assert float(two.callback_metrics["train/loss"]) == float(one.callback_metrics["train/loss"])
        for left, right in zip(
            one.lightning_module.policy.parameters(), two.lightning_module.policy.parameters(), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-8)

    def test_split_into_micro_batches(self, make, update, teachers):
        names = ["math", "code", "code", "math", "code", "math", "math", "code"]

        def part(rows):
            return supervised(rows) | {"teacher": [names[row] for row in rows]}

        def module(**options):
            return make(teacher=copy.deepcopy(teachers), **options)

        whole = update(module, [part(range(8))])
        split = update(module, [part([0]), part([1, 2, 3, 4, 5]), part([6, 7])])
        for name, change in whole.items():
            torch.testing.assert_close(split[name], change, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("teacher", "message"), [
        (None, "must hold `teacher`, a name for each row.*carry"),
        (["math", "art"], "row 1 of a batch has teacher='art'; allowed: 'math', 'code'"),
        (["math"], "`teacher` has 1 names for 2 rows"),
    ])  # fmt: skip
    def test_rows_must_name_one(self, make, train, teachers, teacher, message):
        batch = supervised(range(2)) | ({} if teacher is None else {"teacher": teacher})
        with pytest.raises(ValueError, match=message):
            train(make(teacher=teachers), [batch])

    @pytest.mark.parametrize(("teacher", "message"), [
        ({}, "names no teacher"), (None, "teacher=None: give a folder"), ({"a.b": "x"}, "teacher='a.b'"),
    ])  # fmt: skip
    def test_names_must_be_names(self, make, teacher, message):
        with pytest.raises(ValueError, match=message):
            make(teacher=teacher)


@pytest.mark.parametrize("options", [{"jsd_beta": 0.0}, {"jsd_beta": 1.0}, {"divergence": "js"}, {"temperature": 0.0}])
def test_options_out_of_range(make, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        make(**options)


def test_a_policy_with_adapters(make, train, tiny_llama):
    module = make(adapted(tiny_llama))
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    train(module, [supervised(range(4))])
    moved = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


class TestVocabularies:
    def test_another_tokenizer_is_refused(self, make, train, write_model, tmp_path):
        write_model(tmp_path / "ours", list("0123456789+="))
        write_model(tmp_path / "theirs", list("9876543210+="))
        module = DistillationModule(
            policy=str(tmp_path / "ours"), teacher=str(tmp_path / "theirs"), tokenizer=str(tmp_path / "ours")
        )
        with pytest.raises(ValueError, match="has another tokenizer than the policy: the policy's gives '0' the id"):
            train(module, [supervised(range(2))])

    def test_heads_of_two_sizes(self, write_model, tmp_path, train):
        characters = list("0123456789+=abcdefghijklmnopqrstuvwxyz")
        write_model(tmp_path / "ours", characters)
        write_model(tmp_path / "padded", vocabulary=64)
        model = {"policy": str(tmp_path / "ours"), "teacher": PolicyConfig(path=str(tmp_path / "padded"))}
        with pytest.raises(ValueError, match="teacher has 64 ids and the policy 41, and no tokenizer is known"):
            train(DistillationModule(**model), [supervised(range(2))])
        module = DistillationModule(**model, tokenizer=str(tmp_path / "ours"))
        train(module, [supervised(range(2))])
        assert module._compared == {"": 41}

    def test_a_head_too_small_for_the_tokenizer(self, write_model, tmp_path, train):
        write_model(tmp_path / "ours", list("0123456789+=abcdefghijklmnopqrstuvwxyz"))
        write_model(tmp_path / "small", vocabulary=10)
        module = DistillationModule(
            policy=str(tmp_path / "ours"), teacher=str(tmp_path / "small"), tokenizer=str(tmp_path / "ours")
        )
        with pytest.raises(ValueError, match=r"has 41 ids .*embeddings for 10"):
            train(module, [supervised(range(2))])


def test_a_checkpoint_of_several_teachers_by_path(write_model, tmp_path, train):
    """Teachers are named in the checkpoint, not held; another teacher is noticed."""
    for number, name in enumerate(("policy", "a", "b")):
        write_model(tmp_path / name, vocabulary=40, seed=number)
    given = {"a": str(tmp_path / "a"), "b": PolicyConfig(path=str(tmp_path / "b"))}
    batch = supervised(range(4)) | {"teacher": ["a", "b", "b", "a"]}
    trainer = train(DistillationModule(policy=str(tmp_path / "policy"), teacher=given), [batch])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all(key.startswith("policy.") for key in saved["state_dict"])
    again = DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu")
    assert sorted(again.teacher) == ["a", "b"]
    one = again.objective(batch).total
    two = trainer.lightning_module.objective(batch).total
    assert float(one) == pytest.approx(float(two), abs=1e-6)


def test_several_teachers_share_the_prompts_of_given_segments(make, tiny_llama):
    """Segments that a batch brings are read as they are, by each teacher for its own rows."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(1, 40, (n, 5), generator=generator) for n in (2, 4))
    masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    segments = Segments.from_prompts(prompts, masks[0], completions, masks[1])
    batch = {"input_ids": completions, "labels": completions, "segments": segments}
    teacher = other_than(tiny_llama)
    expected = make(teacher=copy.deepcopy(teacher)).objective(batch)
    several = make(teacher={"a": copy.deepcopy(teacher), "b": copy.deepcopy(teacher)})
    found = several.objective(batch | {"teacher": ["a", "b", "b", "b"]})
    torch.testing.assert_close(found.total, expected.total)
    assert found.weight == expected.weight


def test_a_teacher_with_the_same_added_tokens(write_model, tmp_path, train):
    folder, tokens = write_model(tmp_path / "base", "abc"), ["<t>"]
    policy = PolicyConfig(path=folder, added_tokens=tokens)
    tokenizer = SFTDataModule(tokenizer=folder, added_tokens=tokens).tokenizer
    batch = {name: torch.tensor([[3, 6, 4]]) for name in ("input_ids", "labels")}
    module = DistillationModule(policy=policy, teacher=policy, tokenizer=tokenizer)
    assert train(module, [batch]).callback_metrics["train/loss"] == 0
    with pytest.raises(ValueError, match=r"has 7 ids .* but the teacher LlamaForCausalLM"):
        train(DistillationModule(policy=policy, teacher=folder, tokenizer=tokenizer), [batch])


def test_an_option_without_effect(make):
    with pytest.raises(ValueError, match=r"jsd_beta=0\.3 is of divergence='jsd', got divergence='forward'"):
        make(divergence="forward", jsd_beta=0.3)


class TestOwnRows:
    """What the student writes itself is what it is compared on."""

    OWN: ClassVar = {"max_completion_length": 6, "temperature": 1.4}

    def by_hand(self, module, model, teacher, rows, starts, step=0):
        """The mean divergence at temperature 1.4 of rows that are continued from `starts`."""
        prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
        parameters = SamplingParameters(**self.OWN, stop_token_ids=module.codec.stop_token_ids)
        module.engine.push(model)
        seeds = Seeds(list(range(len(rows))), 3, step)
        written = module.engine.generate(
            Prompts.from_rows([row.tolist() for row in prompts], torch.device("cpu")), parameters, seeds=seeds
        )
        found = []
        for prompt, ids, mask in zip(prompts, written.ids, written.mask, strict=True):
            whole = torch.cat([prompt, ids[mask]])
            ours, theirs = (one(whole[None]).logits[0, len(prompt) - 1 : -1].double() for one in (model, teacher))
            found.append(distribution_divergence(ours, theirs.detach(), temperature=1.4))
        return torch.cat(found)

    @pytest.mark.parametrize("prompts_alone", [False, True])
    def test_loss_and_gradient(self, make, train, tiny_llama, prompts_alone):
        teacher, model, batch = other_than(tiny_llama), copy.deepcopy(tiny_llama), supervised(range(5), 2, "left")
        rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        if prompts_alone:
            prompt = torch.stack([row[:2] for row in rows])
            batch = {"prompts": prompt, "prompt_attention_mask": torch.ones_like(prompt), "index": list(range(5))}
        module = make(teacher=copy.deepcopy(teacher), on_policy_share=1.0, seed=3, **self.OWN)
        for step in range(2):
            values = self.by_hand(module, model, teacher, rows, [2] * 5, step)
            model.zero_grad()
            values.mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        metrics = train(module, [batch, batch]).callback_metrics
        assert float(metrics["train/loss"]) == pytest.approx(float(values.mean()), abs=1e-6)
        for after, expected in zip(module.policy.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
        assert module.count_tokens(batch)["tokens"] == len(values) + 10

    def test_a_share_of_the_rows(self, make):
        module = make(on_policy_share=0.3, seed=3, **self.OWN)
        batch = {"input_ids": torch.arange(8, 14).repeat(400, 1), "labels": torch.full((400, 6), -100)}
        batch["labels"][:, 4:] = batch["input_ids"][:, 4:]
        batch["labels"][7] = -100  # nothing is asked for there
        written, logged = module.own_rows.write(module.policy, module.engine, module.codec, batch, 0)
        given = batch["input_ids"], batch["labels"]
        kept = (written["attention_mask"].sum(dim=1) == 6) & (written["input_ids"][:, :6] == given[0]).all(dim=1)
        assert 0.2 < 1 - float(kept.double().mean()) < 0.4
        assert torch.equal(written["labels"][kept][:, :6], given[1][kept])
        assert kept[7]
        assert (written["input_ids"][:, :4] == given[0][:, :4]).all()
        assert (written["labels"][:, :4] == -100).all()
        assert logged["completions/clipped_ratio"].weight == float((~kept).sum())
        given_alone = {name: value[7:8] for name, value in batch.items()}
        _, nothing = module.own_rows.write(module.policy, module.engine, module.codec, given_alone, 0)
        assert nothing.keys() == logged.keys()  # which all processes add up together
        assert nothing["completions/mean_length"].weight == 0
        assert float(nothing["completions/min_length"].total) == math.inf
        assert float(nothing["completions/max_terminated_length"].total) == -math.inf
        other, _ = module.own_rows.write(module.policy, module.engine, module.codec, batch, 1)
        assert not torch.equal(other["input_ids"], written["input_ids"])

    def test_the_first_token_is_always_given(self, make):
        module = make(on_policy_share=1.0, **self.OWN)
        ids = torch.arange(8, 12)[None]
        written, _ = module.own_rows.write(
            module.policy, module.engine, module.codec, {"input_ids": ids, "labels": ids}, 0
        )
        assert written["input_ids"][0, 0] == 8
        assert written["labels"][0, 0] == -100

    def test_validation_takes_the_rows_as_they_are(self, make, tiny_llama):
        teacher, batch = other_than(tiny_llama), supervised(range(5))
        loader = torch.utils.data.DataLoader([batch], batch_size=None)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        found = trainer.validate(make(teacher=teacher, on_policy_share=1.0, **self.OWN), loader, verbose=False)[0]
        values = torch.cat(by_hand(tiny_llama, [teacher] * 5, batch, temperature=1.4))
        assert found["val/loss"] == pytest.approx(float(values.mean()), abs=1e-6)

    @pytest.mark.parametrize(("share", "batch", "message"), [
        (0.5, {"prompts": torch.ones(2, 2), "prompt_attention_mask": torch.ones(2, 2)}, "holds prompts alone"),
        (1.0, {"prompts": torch.ones(2, 2)}, "lacks prompt_attention_mask"),
        (1.0, supervised(range(2)) | {"position_ids": torch.ones(2, 2)}, "'position_ids', so its rows are packed"),
        (1.0, supervised(range(2)) | {"loss_weights": torch.ones(2, 2)}, "'loss_weights', so its given tokens"),
        (1.0, {"input_ids": torch.ones(2, 2)}, "this one lacks labels"),
    ])  # fmt: skip
    def test_batches_that_are_refused(self, make, train, share, batch, message):
        with pytest.raises(ValueError, match=message):
            train(make(on_policy_share=share), [batch])

    @pytest.mark.parametrize("options", [{"max_completion_length": 8}, {"seed": 1}])
    def test_options_of_samples_that_are_not_drawn(self, make, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is of the policy's own samples"):
            make(**options)

    def test_says_so(self, make):
        assert "own in 25% of the rows, at most 256 tokens" in make(on_policy_share=0.25).describe()["samples"]
