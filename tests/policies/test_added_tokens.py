"""Tokens added to a base model: their rows, what trains them, and what is exported."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment_modules import LoraConfig, PolicyConfig, SFTModule
from alignment_modules.cli import main
from alignment_modules.policies.adapters import adapter_is_identity, adapter_off, merged_state
from alignment_modules.policies.added_tokens import token_ids
from alignment_modules.policies.export import check_export, export_policy
from alignment_modules.policies.frozen import Frozen
from alignment_modules.policies.load import build_policy, check_vocabulary
from alignment_modules.policies.probing import prepare
from alignment_modules.rollouts.decoders.select import select_decoder
from datamodules import SFTDataModule

CHAT = ["<|im_start|>", "<|im_end|>"]
LORA = LoraConfig(r=2)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, write_model, tmp_path):
    characters = [*map(chr, range(32, 127)), "\n"]
    return write_model(tmp_path / "base", characters, tie_word_embeddings=request.param, initializer_range=0.3)


@pytest.fixture
def chat_rows(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(8)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    return str(path)


def matrices(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def ids_of(tokenizer, names=CHAT):
    return [tokenizer.get_vocab()[name] for name in names]


def test_new_rows_are_the_mean_of_the_old_ones(folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    policy = build_policy(PolicyConfig(path=folder, added_tokens=CHAT))
    size = len(AutoTokenizer.from_pretrained(folder))
    assert policy.config.vocab_size == size + 2
    assert token_ids(policy) == {CHAT[0]: size, CHAT[1]: size + 1}
    for before, after in zip(matrices(base), matrices(policy), strict=True):
        assert torch.equal(after[:size], before)
        assert torch.allclose(after[size:], before.mean(0).expand(2, -1), atol=1e-7)
    assert (matrices(policy)[0] is matrices(policy)[1]) == policy.config.tie_word_embeddings
    again = build_policy(PolicyConfig(path=folder, added_tokens=CHAT))
    assert all(torch.equal(a, b) for a, b in zip(matrices(again), matrices(policy), strict=True))


def test_rows_of_a_padded_vocabulary_are_used_before_more_are_made(write_model, tmp_path):
    path = write_model(tmp_path / "padded", "abc", vocabulary=64)
    base, policy = AutoModelForCausalLM.from_pretrained(path), build_policy(PolicyConfig(path=path, added_tokens=CHAT))
    before, after = matrices(base)[0], matrices(policy)[0]
    assert len(after) == 64
    assert torch.allclose(after[6:8], before[:6].mean(0).expand(2, -1), atol=1e-7)
    assert torch.equal(after[8:], before[8:])


def test_a_token_that_is_known_keeps_its_row(folder):
    policy = build_policy(PolicyConfig(path=folder, added_tokens=["</s>", "a"]))
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(matrices(base), matrices(policy), strict=True))
    assert token_ids(policy) == {"</s>": 2, "a": 3 + ord("a") - 32}


def tuned(folder, **options):
    """A policy with trained adapters and rows, and the ids of the rows."""
    torch.manual_seed(1)
    policy = build_policy(PolicyConfig(path=folder, added_tokens=CHAT, lora=LORA, **options))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy, list(token_ids(policy).values())


def test_under_lora_only_adapters_and_rows_are_trained(folder):
    policy = build_policy(PolicyConfig(path=folder, added_tokens=CHAT, lora=LORA))
    assert adapter_is_identity(policy)
    rows = {name: p for name, p in policy.named_parameters() if p.requires_grad and "lora_" not in name}
    assert all("trainable_tokens_delta" in name and p.shape == (2, 16) for name, p in rows.items())
    assert len(rows) == (1 if policy.get_base_model().config.tie_word_embeddings else 2)
    assert not adapter_is_identity(tuned(folder)[0])


def test_the_gradient_of_the_rows_is_that_of_whole_matrices(folder, train):
    """Packed reading and the chunked head against the plain forward of a merged copy, whose matrices are trained."""
    policy, ids = tuned(folder, dtype="float64")
    assert prepare(policy).hidden_states
    base, state = merged_state(policy)
    plain = AutoModelForCausalLM.from_config(base.config).double()
    plain.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, len(state["model.embed_tokens.weight"]), (3, 7), generator=generator)
    tokens[:, 2], tokens[:, 5] = ids[0], ids[1]
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    loss = plain(**batch).loss
    loss.backward()
    module = SFTModule(policy=policy, max_grad_norm=None, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    found = {name: p for name, p in policy.named_parameters() if "trainable_tokens_delta" in name}
    before = {name: p.detach().clone() for name, p in found.items()}
    trainer = train(module, [batch])
    assert trainer.callback_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in found.items():
        end = plain.get_input_embeddings() if "embed_tokens" in name else plain.get_output_embeddings()
        assert torch.allclose(before[name] - parameter, end.weight.grad[ids], atol=1e-12)


def test_adapters_off_is_the_base_with_mean_rows(folder):
    policy, ids = tuned(folder)
    start = build_policy(PolicyConfig(path=folder, added_tokens=CHAT)).eval()
    tokens = torch.tensor([[5, ids[0], 8, ids[1]]])
    policy.eval()
    with torch.no_grad():
        on = policy(tokens).logits
        with adapter_off(policy):
            assert torch.allclose(policy(tokens).logits, start(tokens).logits, atol=1e-6)
        assert torch.equal(policy(tokens).logits, on)


def test_an_export_is_what_was_trained(folder, tmp_path):
    policy, ids = tuned(folder)
    data = SFTDataModule(tokenizer=folder, added_tokens=CHAT)
    export_policy(policy, tmp_path / "export", data.tokenizer)
    model, tokenizer = (kind.from_pretrained(tmp_path / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert ids_of(tokenizer) == ids
    assert tokenizer.decode([ids[0], *tokenizer("a").input_ids], skip_special_tokens=True) == "a"
    assert model.config.tie_word_embeddings == policy.get_base_model().config.tie_word_embeddings
    tokens = torch.tensor([[5, ids[0], 8, ids[1]]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(tokens).logits, policy.eval()(tokens).logits, atol=1e-5)
    again = build_policy(PolicyConfig(path=str(tmp_path / "export"), added_tokens=CHAT))
    assert len(matrices(again)[0]) == len(matrices(model)[0])


def test_rows_on_disk_can_be_exported_alone(folder, tmp_path):
    merged = tmp_path / "merged"
    export_policy(
        build_policy(PolicyConfig(path=folder, added_tokens=CHAT)),
        merged,
        SFTDataModule(tokenizer=folder, added_tokens=CHAT).tokenizer,
    )
    policy, ids = tuned(str(merged))
    export_policy(policy, tmp_path / "adapter", lora="adapter")
    again = build_policy(PolicyConfig(path=str(tmp_path / "adapter")))
    tokens = torch.tensor([[5, ids[0], 8, ids[1]]])
    with torch.no_grad():
        assert torch.allclose(again.eval()(tokens).logits, policy.eval()(tokens).logits, atol=1e-5)
    with pytest.raises(ValueError, match=r"got tokens by policy\.added_tokens"):
        export_policy(tuned(folder)[0], tmp_path / "alone", lora="adapter")


def test_a_quantized_base_must_have_the_rows(folder, tmp_path):
    options = {"added_tokens": CHAT, "quantization": "8bit", "lora": LORA}
    with pytest.raises(ValueError, match=r"added_tokens=.* with policy\.quantization"):
        build_policy(PolicyConfig(path=folder, **options))
    tokenizer = SFTDataModule(tokenizer=folder, added_tokens=CHAT).tokenizer
    export_policy(build_policy(PolicyConfig(path=folder, added_tokens=CHAT)), tmp_path / "whole", tokenizer)
    policy = build_policy(PolicyConfig(path=str(tmp_path / "whole"), **options))
    assert any("trainable_tokens_delta" in name for name, p in policy.named_parameters() if p.requires_grad)
    check_export(policy, tmp_path / "new", lora="adapter")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    merged = build_policy(str(export_policy(policy, tmp_path / "new", tokenizer)))
    tokens = torch.tensor([[5, len(tokenizer) - 1, 8]])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, policy(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rollouts_are_drawn_by_the_fast_decoder(folder):
    policy, _ = tuned(folder)
    assert select_decoder(policy.eval(), 16).__name__ == "FastDecoder"


def test_the_data_must_know_the_tokens(folder):
    policy = build_policy(PolicyConfig(path=folder, added_tokens=CHAT))
    with pytest.raises(ValueError, match="the data's tokenizer does not know it"):
        check_vocabulary(policy, SFTDataModule(tokenizer=folder).tokenizer)
    with pytest.raises(ValueError, match="gives it the id 100"):
        check_vocabulary(policy, SFTDataModule(tokenizer=folder, added_tokens=CHAT[::-1]).tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"added_tokens": ["x", "x"]}, "named twice"),
        ({"added_tokens": [" "]}, "blank"),
        ({"added_tokens": ["<t>"], "lora": LoraConfig(modules_to_save=["embed_tokens"])}, "modules_to_save names"),
        ({"added_tokens": ["<t>"], "lora": LoraConfig(target_modules=["lm_head", "q_proj"])}, "target_modules names"),
        (
            {"added_tokens": ["<t>"], "lora": LoraConfig(target_modules=".*embed_tokens")},
            "lora.target_modules='.*embed",
        ),
    ],
)
def test_what_contradicts_is_refused(write_model, tmp_path, options, message):
    path = write_model(tmp_path / "base", "abc", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=message):
        build_policy(PolicyConfig(path=path, **options))
    with pytest.raises(ValueError, match="needs 'path'"):
        build_policy(PolicyConfig(config={"model_type": "llama"}, added_tokens=["<t>"]))


def test_a_run_teaches_a_base_model_to_chat(folder, chat_rows, tmp_path, monkeypatch):
    """The command line gives the data the policy's tokens; killed and resumed, the rows go on as they were."""
    monkeypatch.chdir(tmp_path)
    options = ["--model", "SFTModule", "--model.policy.path", folder, "--model.policy.added_tokens", json.dumps(CHAT)]
    options += ["--model.policy.lora.r", "2", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.01"]
    options += ["--data", "SFTDataModule", "--data.train", chat_rows, "--data.chat_template", "chatml.jinja"]
    options += ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.logger", "false"]
    main(["fit", *options, "--trainer.max_steps", "4", "--trainer.default_root_dir", "whole"])
    main(["fit", *options, "--trainer.max_steps", "2", "--trainer.default_root_dir", "half"])
    main(["fit", *options, "--trainer.max_steps", "4", "--trainer.default_root_dir", "half", "--ckpt_path", "last"])
    whole, half = (AutoModelForCausalLM.from_pretrained(f"{name}/export") for name in ("whole", "half"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained("whole/export")
    ids = ids_of(tokenizer)
    start = build_policy(PolicyConfig(path=folder, added_tokens=CHAT))
    for before, after in zip(matrices(start), matrices(whole), strict=True):
        assert torch.equal(before[: ids[0]], after[: ids[0]])
        assert all((before[i] - after[i]).abs().max() > 0.01 for i in ids)
    generation = json.loads((tmp_path / "whole" / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, ids[1]]
    main(["export", "whole", "again"])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "export" / "model.safetensors"
    ).read_bytes()


def test_a_reference_takes_over_trained_rows(folder):
    policy, ids = tuned(folder)
    base, state = merged_state(policy)
    reference = AutoModelForCausalLM.from_config(base.config)
    reference.load_state_dict(state)
    frozen = Frozen(reference, of=policy, saved=True)
    start = {name: value.clone() for name, value in frozen.module.named_parameters()}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    frozen.refresh(1.0)
    for name, value in frozen.module.named_parameters():
        moved = (value - start[name]).abs().amax(dim=-1).gt(0.5).nonzero().flatten().tolist()
        assert moved == (ids if "embed_tokens" in name or "lm_head" in name else [])
