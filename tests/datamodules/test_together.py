"""Tokenising many rows at once: few calls, and each row's ids are those that it has alone."""

import random

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from datamodules.rows.formats import Example
from datamodules.text import tokens
from datamodules.text.encoding import Encoder
from datamodules.text.pieces import Pieces
from datamodules.text.together import Ids, Reading, together
from tests.datamodules.corpus import STYLES, TOKENIZERS, Rows
from tests.datamodules.test_templates import make

# Two of one beginning, one within another, one that eats spaces, one that is a word, one read behind normalising.
ODD = [
    AddedToken("<|a|>", special=True, normalized=False),
    AddedToken("<|a|>x", special=True, normalized=False),
    AddedToken("[", normalized=False),
    AddedToken("[[", normalized=False),
    AddedToken("<|l|>", lstrip=True, normalized=False),
    AddedToken("<|r|>", rstrip=True, normalized=False),
    AddedToken("<|n|>", normalized=True),
    AddedToken("word", single_word=True, normalized=False),
    AddedToken("e[", normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
]
PARTS = [*map(str, ODD), *["", "a", "2", "é", "\n", "The", "</s>", "<eos>", "words"], " ", "  ", "\n\n"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd tokens"])
def test_pieces_have_the_ids_of_whole_texts(name, odd):
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
    )
    tokenizer.add_tokens(ODD if odd else ODD[-2:])
    tokenizer.chat_template = "".join(map(str, ODD))
    texts = ["", *("".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(600))]
    pieces = Pieces(tokenizer)
    assert any(len(list(pieces._pieces(text))) > 3 for text in texts)
    for found, wanted in zip(pieces.ids(texts), tokens.tokenise(tokenizer, texts), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_tokens_that_may_be_read_otherwise_cut_no_text():
    tokenizer = make("".join(map(str, ODD)))
    tokenizer.add_tokens(ODD)
    assert set(Pieces(tokenizer)._cuts) == {"<eos>", "<|a|>x", "e[", "<|im_start|>", "<|im_end|>"}
    tokenizer = make("<|im_start|> <|im_end|>", "<|im_start|> <|im_end|>")
    assert Pieces(tokenizer)._cuts == ["<eos>", "<|im_start|>", "<|im_end|>"]
    tokenizer.split_special_tokens = True
    assert Pieces(tokenizer)._cuts == []


class Counting:
    """Counts calls and texts of `tokenise`."""

    def __init__(self, monkeypatch, *modules):
        self.calls, self.texts, own = 0, 0, tokens.tokenise

        def tokenise(tokenizer, texts):
            self.calls += bool(texts)
            self.texts += len(texts)
            return own(tokenizer, texts)

        for module in modules:
            monkeypatch.setattr(f"datamodules.text.{module}.tokenise", tokenise)


def test_completions_that_need_a_call_of_their_own_share_it(monkeypatch):
    """Prompts end with a blank that the completion's first token takes: one call for all such completions."""
    rows = [Example(prompt=f"the answer {i}: ", chosen=f"The {i}", rejected=f"there {i}") for i in range(50)]
    encoder = Encoder(TOKENIZERS["byte level"]())
    counted = Counting(monkeypatch, "encoding")
    found = encoder.completions(rows, ("chosen", "rejected"))
    assert (counted.calls, counted.texts) == (2, 50 + 100 + 100)  # prompts once, whole texts, completions alone
    for row, sides in zip(rows, found, strict=True):
        for side, (prompt, completion, mask) in zip(("chosen", "rejected"), sides, strict=True):
            assert encoder.tokenizer.decode(prompt) == row.prompt
            assert encoder.tokenizer.decode(completion) == getattr(row, side) + "<eos>"
            assert mask.all()


@pytest.mark.parametrize("style", ["chatml", "markers"])
def test_a_conversation_is_tokenised_once(monkeypatch, style):
    """Not once for each reply; and what pairs have in common once for both."""
    template, special, plain, eos, *_ = STYLES[style]
    encoder = Encoder(make(template, special or plain, "", eos))
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}" * 20} for i in range(8)]
    counted = Counting(monkeypatch, "pieces")
    encoder.supervised([Example(messages=turns)], "completion")
    assert counted.texts <= 20  # 8 turns, what stands between them, the header
    before = counted.texts
    pair = Example(prompt=turns[:7], chosen=turns[7:], rejected=[{"role": "assistant", "content": "no"}])
    encoder.completions([pair], ("chosen", "rejected"))
    assert counted.texts - before <= 13


def test_a_way_gets_its_own_answers():
    tokenizer = make(None)

    def way(text, rounds):
        found = text
        for _ in range(rounds):
            (ids,) = yield Ids((found,))
            (again,) = yield Reading((ids,))
            assert again == found
            found += text
        return found

    assert together(tokenizer, [way(t, n) for t, n in (("a", 3), ("b", 0), ("a", 1), ("c", 2))]) == [
        "aaaa", "b", "aa", "ccc",
    ]  # fmt: skip
    assert together(tokenizer, []) == []


class Other(PreTrainedTokenizerFast):
    """Adds a token of its own whenever it is called."""

    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        return {"input_ids": [[*ids, 7] for ids in found["input_ids"]]}


def test_a_tokenizer_with_calls_of_its_own_is_called():
    plain = make(None)
    other = Other(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>")
    (found,) = tokens.tokenise(other, ["ab"])
    assert found.tolist() == [*plain("ab", add_special_tokens=False)["input_ids"], 7]


def test_a_tokenizer_left_with_padding_or_truncation_gives_whole_texts():
    texts = [row["text"] for row in Rows(0).rows("text", 20)]
    tokenizer = make(None)
    wanted = [ids.tolist() for ids in tokens.tokenise(tokenizer, texts)]
    tokenizer(texts, padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert [ids.tolist() for ids in tokens.tokenise(tokenizer, texts)] == wanted
