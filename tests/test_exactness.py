"""The gradient of an optimizer step does not depend on how its rows are cut, padded, ordered, packed or shared."""

import copy

import pytest
import torch
import torch.nn.functional as F

from alignment_modules import DPOModule, GRPOModule, PretrainModule, SFTModule
from alignment_modules.functional import preference_loss
from alignment_modules.policies.scoring import score


def never_called(completions):
    raise AssertionError("the batch brings its own rewards")


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 40, (length,), generator=generator) for length in (5, 9, 3, 12, 7, 4, 10, 6)]


def sft_batch(rows, prompt=2, width=None, side="right"):
    """Pads rows to `width`; the first `prompt` tokens are not supervised."""
    width = width or max(map(len, rows))
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        gap = (0, width - len(row)) if side == "right" else (width - len(row), 0)
        labels = row.clone()
        labels[:prompt] = -100
        batch["input_ids"].append(F.pad(row, gap, value=39))
        batch["labels"].append(F.pad(labels, gap, value=-100))
        batch["attention_mask"].append(F.pad(torch.ones_like(row), gap))
    return {key: torch.stack(value) for key, value in batch.items()}


def preference_batch(rows, indices, width=None, side="right"):
    def padded(values):
        size = width or max(map(len, values))
        gaps = [(0, size - len(v)) if side == "right" else (size - len(v), 0) for v in values]
        return torch.stack([F.pad(v, g, value=39) for v, g in zip(values, gaps, strict=True)]), torch.stack(
            [F.pad(torch.ones_like(v), g) for v, g in zip(values, gaps, strict=True)]
        )

    batch = {}
    for name, values in (
        ("prompt", [rows[i][:2] for i in indices]),
        ("chosen", [rows[i][2:] for i in indices]),
        ("rejected", [rows[(i + 3) % len(rows)][1:] for i in indices]),
    ):
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = padded(values)
    return batch


def rollout_batch(prompts, group=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(prompts) * group
    lengths = torch.randint(1, width + 1, (count,), generator=generator)
    size = max(map(len, prompts))
    return {
        "prompts": torch.stack([F.pad(p, (size - len(p), 0)) for p in prompts]),
        "prompt_attention_mask": torch.stack([F.pad(torch.ones_like(p), (size - len(p), 0)) for p in prompts]),
        "responses": torch.randint(1, 40, (count, width), generator=generator),
        "response_mask": torch.arange(width)[None] < lengths[:, None],
        "rewards": torch.randint(0, 2, (count,), generator=generator).float()
        + torch.arange(count).remainder(group).eq(0) * 0.5,
        "old_logprobs": -3.5 + torch.rand(count, width, generator=generator),
    }


@pytest.fixture
def make(tiny_llama):
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def factory(cls, **options):
        if cls is GRPOModule:
            options = {
                "rewards": never_called,
                "num_generations": 4,
                "max_completion_length": 8,
                "max_grad_norm": None,
            } | options
        if cls is DPOModule or options.get("beta"):
            options = {"reference": copy.deepcopy(reference)} | options
        return lambda **more: cls(policy=copy.deepcopy(tiny_llama), **options, **more)

    return factory


class TestSFT:
    @pytest.mark.parametrize("cls", [SFTModule, PretrainModule])
    @pytest.mark.parametrize("cuts", [[4, 4], [1, 7], [3, 3, 2], [1] * 8])
    def test_split(self, update, assert_same, make, sequences, cls, cuts):
        whole = update(make(cls), [sft_batch(sequences)])
        parts = torch.arange(8).split(cuts)
        assert_same(whole, update(make(cls), [sft_batch([sequences[i] for i in part]) for part in parts]))

    def test_short_last_window(self, update, assert_same, make, sequences):
        whole = update(make(SFTModule), [sft_batch(sequences)])
        halves = [sft_batch(sequences[:5]), sft_batch(sequences[5:])]
        assert_same(whole, update(make(SFTModule), halves, accumulate_grad_batches=4))

    def test_padding_and_order(self, update, assert_same, make, sequences):
        whole = update(make(SFTModule), [sft_batch(sequences)])
        assert_same(whole, update(make(SFTModule), [sft_batch(sequences, width=20)]))
        assert_same(whole, update(make(SFTModule), [sft_batch(sequences, width=15, side="left")]))
        assert_same(whole, update(make(SFTModule), [sft_batch(sequences[::-1])]))

    def test_packing(self, update, assert_same, make, sequences):
        whole = update(make(SFTModule), [sft_batch(sequences, prompt=0)])
        packed = {
            "input_ids": torch.cat(sequences)[None],
            "labels": torch.cat(sequences)[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in sequences])[None],
        }
        assert_same(whole, update(make(SFTModule), [packed]))

    def test_rows_and_micro_batches_without_a_target_add_nothing(self, update, assert_same, make, sequences):
        whole = update(make(SFTModule), [sft_batch(sequences)])
        nothing = sft_batch(sequences[:2], prompt=99)
        assert_same(whole, update(make(SFTModule), [sft_batch(sequences), nothing]))
        mixed = sft_batch([*sequences, sequences[0]])
        mixed["labels"][-1] = -100
        assert_same(whole, update(make(SFTModule), [mixed]))

    def test_a_targetless_micro_batch_adds_nothing(self, update, assert_same, make, sequences):
        batch, targetless = sft_batch(sequences), sft_batch(sequences, prompt=99)
        assert_same(update(make(SFTModule), [batch]), update(make(SFTModule), [targetless, batch, targetless]))

    def test_equals_plain_cross_entropy(self, update, assert_same, make, tiny_llama, sequences):
        batch = sft_batch(sequences)
        logits = tiny_llama(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        expected = {f"policy.{name}": -p.grad for name, p in tiny_llama.named_parameters()}
        assert_same(expected, update(make(SFTModule), [batch]))


class TestDPO:
    @pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm", "apo_zero"])
    def test_split_padding_and_order(self, update, assert_same, make, sequences, loss):
        module = make(DPOModule, loss=loss, beta=0.5)
        whole = update(module, [preference_batch(sequences, range(8))])
        assert_same(
            whole, update(module, [preference_batch(sequences, part) for part in ([0], [1, 2, 3, 4, 5], [6, 7])])
        )
        assert_same(whole, update(module, [preference_batch(sequences, range(8), width=16, side="left")]))
        assert_same(whole, update(module, [preference_batch(sequences, [5, 1, 7, 0, 2, 6, 3, 4])]))

    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
    def test_sorted_over_the_whole_step(self, update, assert_same, make, sequences, loss):
        """Any micro-batches, padding and order give the gradient of the loss over all pairs."""
        batch = preference_batch(sequences, range(8))
        options = {"loss": loss, "beta": 0.5, "max_grad_norm": None, "label_smoothing": 0.1}
        module = make(DPOModule, **options)(optimizer=torch.optim.SGD)
        logps, reference = (
            score(model, module.segments(batch)).token_logps.sum(dim=1).view(-1, 2)
            for model in (module.policy, module.reference.module)
        )
        losses = preference_loss(
            *logps.unbind(1), *reference.detach().unbind(1), loss=loss, beta=0.5, label_smoothing=0.1
        )
        losses.mean().backward()
        expected = {f"policy.{name}": -p.grad for name, p in module.policy.named_parameters()}
        for size in (None, 1, 3, 8, 20):
            assert_same(expected, update(make(DPOModule, micro_batch_size=size, **options), [batch]))
        moved = preference_batch(sequences, [5, 1, 7, 0, 2, 6, 3, 4], width=16, side="left")
        assert_same(expected, update(make(DPOModule, micro_batch_size=3, **options), [moved]))
        empty = {name: torch.cat([value[:2], value[4:5], value[2:]]) for name, value in batch.items()}
        empty["rejected_attention_mask"][2] = 0
        assert_same(expected, update(make(DPOModule, micro_batch_size=2, **options), [empty]))

    def test_shared_prompt_equals_separate_rows(self, update, assert_same, make, tiny_llama, sequences):
        """The naive computation: chosen and rejected as two padded rows, log-softmax over every position."""
        batch = preference_batch(sequences, range(8))
        module = make(DPOModule, beta=0.5)(optimizer=torch.optim.SGD)

        def logps(model, side):
            total = []
            for i in range(8):
                prompt = batch["prompt_input_ids"][i][batch["prompt_attention_mask"][i].bool()]
                completion = batch[f"{side}_input_ids"][i][batch[f"{side}_attention_mask"][i].bool()]
                logits = model(torch.cat([prompt, completion])[None]).logits[0]
                steps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])
                total.append(steps.sum())
            return torch.stack(total)

        margin = logps(tiny_llama, "chosen") - logps(tiny_llama, "rejected")
        with torch.no_grad():
            reference_margin = logps(module.reference.module, "chosen") - logps(module.reference.module, "rejected")
        margin = margin - reference_margin
        (-F.logsigmoid(0.5 * margin)).mean().backward()
        expected = {f"policy.{name}": -p.grad for name, p in tiny_llama.named_parameters()}
        assert_same(expected, update(make(DPOModule, beta=0.5), [batch]))


class TestCheckpointing:
    @pytest.mark.parametrize("cls", [SFTModule, DPOModule, GRPOModule])
    def test_recomputed_activations_change_nothing(self, update, assert_same, make, sequences, cls):
        """Long prompts and short completions: the last layer would otherwise leave tokens out."""
        batches = {
            SFTModule: lambda: sft_batch(sequences, prompt=6),
            DPOModule: lambda: preference_batch(sequences, range(8)),
            GRPOModule: lambda: rollout_batch([row[:5] for row in sequences[:4]], width=3),
        }
        options = {"epsilon": 0.5} if cls is GRPOModule else {}
        factory = make(cls, **options)

        def checkpointed(**more):
            module = factory(**more)
            module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return module

        assert_same(update(factory, [batches[cls]()]), update(checkpointed, [batches[cls]()]))


class TestGRPO:
    @pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "cispo"])
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_micro_batches_padding_and_order(self, update, assert_same, make, sequences, loss, beta):
        prompts = [row[:3] for row in sequences[:4]]
        batch = rollout_batch(prompts)
        options = {"loss": loss, "beta": beta, "epsilon": 0.5}
        whole = update(make(GRPOModule, **options), [batch])
        for size in (1, 2, 3, 4, 8, 9):
            assert_same(whole, update(make(GRPOModule, micro_batch_size=size, **options), [batch]))
        wider = {
            key: F.pad(value, (0, 5)) if key in ("responses", "response_mask", "old_logprobs") else value
            for key, value in batch.items()
        }
        assert_same(whole, update(make(GRPOModule, **options), [wider]))
        order = torch.tensor([2, 0, 3, 1])
        rows = (order[:, None] * 4 + torch.arange(4)).flatten()
        shuffled = {key: value[order] if key.startswith("prompt") else value[rows] for key, value in batch.items()}
        assert_same(whole, update(make(GRPOModule, **options), [shuffled]))

    def test_groups_without_signal_change_only_the_normaliser(self, update, assert_same, make, sequences):
        batch = rollout_batch([row[:3] for row in sequences[:2]])
        flat = rollout_batch([row[:3] for row in sequences[:4]])
        for key, value in batch.items():
            flat[key][: len(value)] = value
        flat["rewards"][8:] = 0.3
        options = {"loss": "dapo", "epsilon": 0.5}
        small, large = update(make(GRPOModule, **options), [batch]), update(make(GRPOModule, **options), [flat])
        share = float(batch["response_mask"].sum() / flat["response_mask"].sum())
        assert_same({name: value * share for name, value in small.items()}, large)
