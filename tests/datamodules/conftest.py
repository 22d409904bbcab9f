"""Small tokenizers made here, and chat templates of each kind."""

import pytest

SPECIAL = ["<eos>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = "0123456789+=abcdefghijklmnopqrstuvwxyz \n:,.?<>/#"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _marked(reply):
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}"
        + reply
        + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TEMPLATES = {
    "boundaries": CHATML,
    "markers": _marked("{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"),
    "markers without stop": _marked("{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"),
    # As reasoning models do: the last reply gets an empty thought, which earlier replies lose again.
    "rewrites history": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "no stop": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "empty marker": CHATML + "{% generation %}{% endgeneration %}",
}


def build_tokenizer(template=None, pad=None, bos=False):
    """One token a character; ids below 5 are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token=pad,
        bos_token="<bos>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


@pytest.fixture
def templates():
    return TEMPLATES


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def read():
    """Text of the ids, without spaces between characters."""

    def text(tokenizer, ids):
        return "".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))

    return text
