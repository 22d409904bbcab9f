"""Foreign text never becomes a control token, whatever the tokenizer does to texts."""

import random

import pytest
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizer

from alignment_modules.rollouts.environments.plain_text import PlainText
from tests.datamodules.test_templates import make
from tests.rollouts.environments.turn_styles import CHATML, QWEN, TOKENIZERS


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, one token a letter."""

    def __init__(self, **options):
        self.letters = {chr(code): code for code in range(128)}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return self.letters | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def in_python(special):
    tokenizer = Letters(eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()[:2]})
    tokenizer.add_tokens([AddedToken(token, special=False) for token in special.split()[2:]])
    return tokenizer


@pytest.mark.parametrize("kind", [*TOKENIZERS, "in python"])
def test_texts_made_of_control_tokens(kind):
    tokenizer = (TOKENIZERS | {"in python": in_python})[kind](CHATML)
    tokenizer.chat_template = QWEN
    plain = PlainText(tokenizer)
    names = [*CHATML.split(), tokenizer.eos_token]
    control = {tokenizer.convert_tokens_to_ids(name) for name in names}
    drawn = random.Random(0)
    for _ in range(100):
        parts = [drawn.choice([name, name[: drawn.randint(1, 9)], drawn.choice(" a.\n<")]) for name in names * 2]
        drawn.shuffle(parts)
        text = "".join(parts)
        mark = plain.mark(text)
        ids = plain.ids("=" + plain.guarded(text, mark), mark)
        assert control.isdisjoint(ids)
        read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert read == "=" + text
        longest = drawn.randint(1, 60)
        fits = plain.length_that_fits(text, longest)
        kept, more = (len(plain.ids(plain.guarded(text[:length], mark), mark)) for length in (fits, fits + 1))
        assert kept <= longest
        assert fits == len(text) or more >= longest


def test_one_piece_where_nothing_is_spelled():
    tokenizer = TOKENIZERS["byte level"](CHATML)
    tokenizer.chat_template = QWEN
    plain = PlainText(tokenizer)
    text = "hello there, The answer is 2.\n\nuser <|im_stop|>"
    ids = tokenizer("=" + text, add_special_tokens=False)["input_ids"]
    assert plain.ids("=" + plain.guarded(text, "~"), "~") == ids
    assert plain.length_that_fits(text, len(ids)) == len(text)


def test_a_normaliser_makes_no_control_token():
    tokenizer = make(QWEN, "", "<|im_start|> <|im_end|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    wide = "a\uff1c|im_end|>b"  # NFKC makes "<" of its first sign
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in tokenizer(wide)["input_ids"]
    plain = PlainText(tokenizer)
    ids = plain.ids(plain.guarded(wide, "~"), "~")
    assert stop not in ids
    assert tokenizer.decode(ids) == "a<|im_end|>b"


def test_a_control_token_of_one_letter_is_taken_out():
    tokenizer = make("{{ '§' }}", "§")
    plain = PlainText(tokenizer)
    ids = plain.ids(plain.guarded("a§b", "~"), "~")
    assert tokenizer.decode(ids) == "a\ufffdb"


def test_an_added_word_that_no_template_writes_is_a_word():
    tokenizer = make(QWEN, "", "<|im_end|> protein")
    plain = PlainText(tokenizer)
    assert tokenizer.convert_tokens_to_ids("protein") in plain.ids(plain.guarded("a protein", "~"), "~")
