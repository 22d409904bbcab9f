"""A tiny model's folder, rows for every paradigm, and `align` inside the test's process and folder."""

import json
import os
import sys

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SUMS = [(a, b) for a in range(6) for b in range(4)]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in SUMS]
ROWS = {
    "pretrain": [{"text": f"{a}+{b}={a + b}"} for a, b in SUMS],
    "sft": [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]}
        for a, b in SUMS
    ],
    "reward": PAIRS,
    "dpo": PAIRS,
    "kto": [{"prompt": f"{a}+{b}=", "completion": f"{a + b + a % 2}", "label": a % 2 == 0} for a, b in SUMS],
    "grpo": [{"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": f"{a + b}"} for a, b in SUMS],
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A two-layer Llama with a character tokenizer and a chat template, as `save_pretrained` leaves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *"0123456789+=- "])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """One JSONL file a paradigm: `data["sft"]` and so on."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ROWS}


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    """Runs `align` in this process, in a folder of its own (`align.folder`), and leaves the process as it was."""
    import torch

    from alignment_modules.cli import run_cli

    folder = tmp_path_factory.mktemp("run")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", ["align"])
            environment = dict(os.environ)
            try:
                return run_cli([str(argument) for argument in arguments])
            finally:
                if torch.distributed.is_initialized():  # a later run must not take itself for one of many
                    torch.distributed.destroy_process_group()
                os.environ.clear()
                os.environ.update(environment)

    run.folder = folder
    return run
