import pytest
import torch
from torch import nn

from alignment_modules.policies import scoring
from alignment_modules.policies.probing import prepare
from alignment_modules.policies.scoring import score
from alignment_modules.policies.segments import Segments
from tests.policies.naive import (
    GRADIENT,
    LOGPS,
    MODELS,
    PACKED,
    VOCABULARY,
    Plain,
    Wrong,
    assert_same_gradients,
    build,
    gradients,
    labels_batch,
    naive_labels,
    naive_prompts,
    prompts_batch,
)


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_every_gradient_equal_the_naive_computation(name):
    policy, batch = build(name), prompts_batch()
    expected, expected_entropy, expected_correct = naive_prompts(policy, batch)
    atol = 1e-10 if name in {"gpt2", "falcon"} else GRADIENT
    expected_gradients = gradients(policy, expected)
    assert prepare(policy).packed == (name in PACKED)
    assert prepare(policy).hidden_states

    scores = score(policy, Segments.from_prompts(**batch), ask=("entropy", "accuracy"))
    torch.testing.assert_close(scores.token_logps, expected, rtol=0, atol=LOGPS.get(name, 1e-11))
    torch.testing.assert_close(scores.entropy, expected_entropy, rtol=0, atol=LOGPS.get(name, 1e-11))
    assert torch.equal(scores.correct, expected_correct)
    assert_same_gradients(gradients(policy, scores.token_logps), expected_gradients, atol)

    ids, labels, mask = labels_batch()
    expected = naive_labels(policy, ids, labels, mask)
    expected_gradients = gradients(policy, expected)
    found = score(policy, Segments.from_labels(ids, labels, mask)).token_logps
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGPS.get(name, 1e-11))
    assert_same_gradients(gradients(policy, found), expected_gradients, atol)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_float32_agrees_to_a_hundred_thousandth(name):
    policy, batch = build(name, torch.float32), prompts_batch()
    expected = naive_prompts(policy, batch)[0]
    expected_gradients = gradients(policy, expected)
    found = score(policy, Segments.from_prompts(**batch)).token_logps
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    assert_same_gradients(gradients(policy, found), expected_gradients, 1e-5 * float(scale.clamp_min(1)))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_padded_transformers_forward_gives_the_same(name):
    policy = build(name, torch.float32)
    ids, labels, mask = labels_batch(side="left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    log_p = policy(ids, attention_mask=mask.long(), position_ids=positions).logits[:, :-1].log_softmax(-1)
    first = mask.int().argmax(1, keepdim=True) == torch.arange(ids.shape[1])[None]
    wanted = torch.where(mask & ~first, labels, -100)[:, 1:]
    expected = torch.where(wanted == -100, 0.0, log_p.gather(2, wanted.clamp_min(0)[..., None])[..., 0])
    scores = score(policy, Segments.from_labels(ids, labels, mask))
    torch.testing.assert_close(scores.token_logps[:, 1:], expected, rtol=0, atol=1e-5)
    assert torch.equal(scores.mask[:, 1:], wanted != -100)


@pytest.mark.parametrize("returns", ["tensor", "object"])
def test_a_plain_module(returns):
    policy, batch = Plain(returns).double(), prompts_batch()
    expected = naive_prompts(policy, batch, temperature=0.7)
    expected_gradients = gradients(policy, expected[0])
    scores = score(policy, Segments.from_prompts(**batch), temperature=0.7, ask=("entropy", "accuracy"))
    torch.testing.assert_close(scores.token_logps, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.entropy, expected[1], rtol=0, atol=1e-12)
    assert torch.equal(scores.correct, expected[2])
    assert_same_gradients(gradients(policy, scores.token_logps), expected_gradients, 1e-12)
    assert not prepare(policy).packed


def test_a_module_that_gives_no_logits_is_named():
    segments = Segments.from_prompts(**prompts_batch())
    with pytest.raises(ValueError, match=r"policy Wrong gave logits of shape .* expected logits"):
        score(Wrong(), segments)
    with pytest.raises(ValueError, match=r"temperature.* must be a finite number > 0"):
        score(Plain(), segments, temperature=0)


def lora(model, targets, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_lora(targets):
    policy = lora(build("llama", tie_word_embeddings=False), targets)
    batch = prompts_batch()
    expected = naive_prompts(policy, batch)[0]
    expected_gradients = gradients(policy, expected)
    segments = Segments.from_prompts(**batch)
    found = score(policy, segments).token_logps
    assert prepare(policy).packed
    assert prepare(policy).hidden_states == (targets == "all-linear")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert_same_gradients(gradients(policy, found), expected_gradients, GRADIENT)
    with policy.disable_adapter(), torch.no_grad():
        reference = score(policy, segments).token_logps
        torch.testing.assert_close(reference, naive_prompts(policy, batch)[0], rtol=0, atol=1e-11)
    assert (reference - found).abs().max() > 1e-3


def test_prompt_tuning_is_padded():
    from peft import PromptTuningConfig, get_peft_model

    policy = get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).double()
    batch = prompts_batch()
    policy.eval()
    found = score(policy, Segments.from_prompts(**batch)).token_logps
    full = torch.cat(
        (batch["prompt_ids"][1][batch["prompt_mask"][1]], batch["completion_ids"][2][batch["completion_mask"][2]])
    )
    log_p = policy(full[None]).logits[0, 3:-1].log_softmax(-1)
    count = int(batch["completion_mask"][2].sum())
    expected = log_p.gather(1, full[1:, None])[-count:, 0]
    torch.testing.assert_close(found[2][batch["completion_mask"][2]], expected, rtol=0, atol=1e-11)
    assert not prepare(policy).packed


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_sharing_a_prompt_changes_no_gradient(samples):
    policy, batch = build("llama"), prompts_batch(prompts=2, samples=samples, empty=False)
    shared = score(policy, Segments.from_prompts(**batch)).token_logps
    alone = {
        "prompt_ids": batch["prompt_ids"].repeat_interleave(samples, 0),
        "prompt_mask": batch["prompt_mask"].repeat_interleave(samples, 0),
    }
    single = score(policy, Segments.from_prompts(**{**batch, **alone})).token_logps
    torch.testing.assert_close(shared, single, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(policy, shared), gradients(policy, single), GRADIENT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_order_padding_amount_and_split_change_nothing(side):
    policy = build("llama")
    ids, labels, mask = labels_batch(rows=6, side=side)
    whole = score(policy, Segments.from_labels(ids, labels, mask)).token_logps
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = score(policy, Segments.from_labels(ids[order], labels[order], mask[order])).token_logps
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-12)
    pad = (4, 0) if side == "left" else (0, 4)
    wide = [nn.functional.pad(part, pad, value=fill) for part, fill in ((ids, 7), (labels, 3), (mask, False))]
    widened = score(policy, Segments.from_labels(*wide)).token_logps
    torch.testing.assert_close(widened.sum(1), whole.sum(1), rtol=0, atol=1e-12)
    parts = [score(policy, Segments.from_labels(ids[i : i + 2], labels[i : i + 2], mask[i : i + 2])) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat([part.token_logps for part in parts]), whole, rtol=0, atol=1e-12)


def test_packed_documents_see_nothing_of_each_other():
    policy = build("llama")
    ids = torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    before = score(policy, Segments.from_labels(ids, ids, position_ids=position_ids)).token_logps
    for start, end in ((0, 5), (5, 9), (9, 12)):
        alone = score(policy, Segments.from_labels(ids[:, start:end], ids[:, start:end])).token_logps
        torch.testing.assert_close(before[:, start:end], alone, rtol=0, atol=1e-12)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCABULARY
    after = score(policy, Segments.from_labels(changed, changed, position_ids=position_ids)).token_logps
    assert torch.equal(after[:, 5:], before[:, 5:])
    assert not torch.equal(after[:, 2:5], before[:, 2:5])
    assert (before[0, [0, 5, 9]] == 0).all()  # a document's first token has nothing before it


@pytest.mark.parametrize("name", ["llama", "falcon", "plain"])
@pytest.mark.parametrize("empty", ["rows", "batch", "targets"])
def test_nothing_to_score_is_zero_and_still_reaches_every_parameter(name, empty):
    policy = Plain() if name == "plain" else build(name)
    batch = prompts_batch()
    if empty == "batch":
        batch = {key: value[:0] for key, value in batch.items()}
    elif empty == "rows":
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    else:
        batch["target_mask"] = torch.zeros_like(batch["completion_mask"])
    scores = score(policy, Segments.from_prompts(**batch), ask=("entropy", "accuracy"))
    assert scores.token_logps.shape == batch["completion_ids"].shape
    assert (scores.token_logps == 0).all()
    assert not scores.mask.any()
    scores.token_logps.sum().backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None, key
        assert (parameter.grad == 0).all(), key


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_capped_logits(temperature):
    for name in ("llama", "gemma2"):
        policy, batch = build(name), prompts_batch()
        expected = naive_prompts(policy, batch, temperature)
        scores = score(policy, Segments.from_prompts(**batch), temperature=temperature, ask=("entropy",))
        torch.testing.assert_close(scores.token_logps, expected[0], rtol=0, atol=LOGPS.get(name, 1e-11))
        torch.testing.assert_close(scores.entropy, expected[1], rtol=0, atol=LOGPS.get(name, 1e-11))


def test_entropy_is_differentiable():
    policy, batch = build("llama"), prompts_batch()
    expected = gradients(policy, naive_prompts(policy, batch)[1])
    found = gradients(policy, score(policy, Segments.from_prompts(**batch), ask=("entropy",)).entropy)
    assert_same_gradients(found, expected, GRADIENT)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_takes_the_same_path(use_reentrant):
    policy, segments = build("llama"), Segments.from_prompts(**prompts_batch())
    plain = score(policy, segments).token_logps
    expected = gradients(policy, plain)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    policy.enable_input_require_grads()
    policy.train()
    found = score(policy, segments).token_logps
    with torch.no_grad():
        policy(torch.randint(VOCABULARY, (2, 4)))  # whatever runs before the backward pass must not matter
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(policy, found), expected, GRADIENT)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_autocast(name):
    policy, batch = build(name, torch.float32), prompts_batch()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(policy, Segments.from_prompts(**batch))
    assert scores.token_logps.dtype == torch.float32
    torch.testing.assert_close(scores.token_logps, naive_prompts(policy, batch)[0], rtol=0.05, atol=0.1)
    scores.token_logps.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_bfloat16_weights():
    policy = build("llama", torch.bfloat16)
    scores = score(policy, Segments.from_prompts(**prompts_batch()))
    assert prepare(policy).packed
    assert scores.token_logps.dtype == torch.float32
    assert scores.token_logps.isfinite().all()


def test_frozen_parts_get_no_gradient_and_the_rest_the_same():
    policy, batch = build("llama"), prompts_batch()
    policy.model.embed_tokens.weight.requires_grad_(False)
    policy.model.layers[0].requires_grad_(False)
    expected = gradients(policy, naive_prompts(policy, batch)[0])
    found = gradients(policy, score(policy, Segments.from_prompts(**batch)).token_logps)
    assert "model.embed_tokens.weight" not in found
    assert_same_gradients(found, expected, GRADIENT)


def test_logits_of_all_positions_are_never_built(monkeypatch):
    policy, batch = build("llama"), prompts_batch()
    segments = Segments.from_prompts(**batch)
    prepare(policy)
    rows = []
    original = scoring.linear_token_scores
    monkeypatch.setattr(
        scoring, "linear_token_scores", lambda hidden, *a, **k: rows.append(len(hidden)) or original(hidden, *a, **k)
    )
    monkeypatch.setattr(policy.lm_head, "forward", lambda _: pytest.fail("the head was called on all positions"))
    score(policy, segments)
    assert rows == [len(segments.target_ids)]
    assert rows[0] < segments.tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_feed_forward_block_sees_the_predicting_tokens_alone(checkpointing):
    policy, batch = build("llama"), prompts_batch()
    segments = Segments.from_prompts(**batch)
    assert prepare(policy).trims_last_layer
    assert len(segments.source.unique()) < 0.9 * segments.tokens
    if checkpointing:  # its second forward pass would not know
        policy.gradient_checkpointing_enable()
        policy.train()
    seen = []
    for layer in policy.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    score(policy, segments)
    row = seen[0]
    assert row >= segments.tokens
    assert seen[1] == (row if checkpointing else len(segments.source.unique()))
    assert not policy.model.layers[-1].mlp._forward_hooks
    assert not policy.model.layers[-1].mlp._forward_pre_hooks


def test_a_last_block_that_mixes_tokens_is_not_trimmed(monkeypatch):
    policy, batch = build("llama"), prompts_batch()
    block = policy.model.layers[-1].mlp
    original = block.forward
    # The same for every token of the row, so that packing is not what it breaks.
    monkeypatch.setattr(block, "forward", lambda hidden: original(hidden) + 0.1 * (hidden.shape[1] > 3))
    assert not prepare(policy).trims_last_layer
    score(policy, Segments.from_prompts(**batch))


def test_a_head_that_is_not_linear_sees_the_predicting_tokens_alone():
    policy = lora(build("llama", tie_word_embeddings=False), ["lm_head"])
    segments = Segments.from_prompts(**prompts_batch())
    prepare(policy)
    shapes = []
    policy.get_base_model().lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    score(policy, segments)
    assert shapes == [(1, len(segments.target_ids), VOCABULARY)]


def test_inference_mode_and_then_training_on_the_same_segments():
    policy = build("llama")
    segments = Segments.from_prompts(**prompts_batch())
    with torch.inference_mode():
        first = score(policy, segments).token_logps
    second = score(policy, segments).token_logps
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    second.sum().backward()
