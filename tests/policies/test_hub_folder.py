"""A folder as one finds it on the hub: Llama, byte-level BPE, a chat template that marks what to train on."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from alignment_modules.policies.export import export_policy
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.load import PolicyConfig, build_policy
from alignment_modules.policies.tokenizers import check_vocabulary, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|eot|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|eot|>", "<|pad|>", "<|user|>", "<|assistant|>"]
MESSAGES = [{"role": "user", "content": "Add 17 and 25, écrit."}, {"role": "assistant", "content": "It is 42."}]


@pytest.fixture
def hub_folder(tmp_path):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([f"Add {i} and {i + 8}. It is {2 * i + 8}, écrit." for i in range(60)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=384,  # padded, as real ones are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=[1, 2],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id = 3
    model.save_pretrained(tmp_path / "hub", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_load_forward_export_reload(hub_folder, tmp_path, dtype):
    assert len(list(hub_folder.glob("*.safetensors"))) > 1  # in shards
    tokenizer = load_tokenizer(str(hub_folder))
    policy = build_policy(PolicyConfig(path=str(hub_folder), dtype=dtype))
    assert policy.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    check_vocabulary(policy, tokenizer)

    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    trained = encoded["input_ids"][0][torch.as_tensor(encoded["assistant_masks"])[0].bool()]
    assert tokenizer.decode(trained) == "It is 42.<|eot|>"
    with torch.no_grad():
        wanted = policy.eval()(encoded["input_ids"]).logits
        stock = AutoModelForCausalLM.from_pretrained(hub_folder, dtype=policy.dtype)
        assert torch.equal(stock(encoded["input_ids"]).logits, wanted)

    folder = export_policy(policy, tmp_path / "export", tokenizer)
    model, again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == policy.dtype
    assert fingerprint(model) == fingerprint(policy)
    with torch.no_grad():
        assert torch.equal(model(encoded["input_ids"]).logits, wanted)
    assert again.apply_chat_template(MESSAGES, tokenize=False) == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert torch.equal(again.apply_chat_template(MESSAGES, return_tensors="pt")["input_ids"], encoded["input_ids"])
    assert (again.eos_token, again.pad_token, again.bos_token) == ("<|eot|>", "<|pad|>", "<|begin|>")
    assert sorted(model.generation_config.eos_token_id) == [1, 2]
    assert model.generation_config.pad_token_id == 3
    assert model.config.rope_parameters == policy.config.rope_parameters

    again_exported = export_policy(
        build_policy(PolicyConfig(path=str(folder), dtype="auto")), tmp_path / "twice", again
    )
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (again_exported / name).read_bytes() == (folder / name).read_bytes()
