"""A tokenizer that fits the tiny Llama, and folders in Hugging Face format."""

import pytest


@pytest.fixture
def tokenizer():
    """Words w0 .. w29 and three special tokens at ids 30 (end), 31 (padding) and 32 (end of turn)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(30)}
    core = Tokenizer(WordLevel({**vocabulary, "<end>": 30, "<pad>": 31, "<turn>": 32}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=["<turn>"],
        chat_template="{% for message in messages %}{{ message['content'] }} <turn>{% endfor %}",
    )


@pytest.fixture
def llama_folder(tiny_llama, tokenizer, tmp_path):
    """The tiny Llama with its tokenizer in a folder, written by transformers alone."""
    folder = tmp_path / "llama"
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
