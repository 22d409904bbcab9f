"""Text while it is written: whole characters alone, all of them, and none twice."""

import pytest
import torch

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.streaming import TextStream


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, decoded as byte-level tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize("text", ["plain", "é漢🙂 ok\n", "broken \N{REPLACEMENT CHARACTER} here", ""])
def test_pieces_are_whole_characters(byte_tokenizer, text):
    pieces = []
    ids = [*byte_tokenizer(text)["input_ids"], byte_tokenizer.eos_token_id]
    stream = TextStream(Codec(byte_tokenizer), pieces.append)
    for time in range(len(ids)):
        stream(torch.tensor(ids[: time + 1])[:, None])
    assert stream.finish() == text == "".join(pieces) == stream.shown
    assert all(pieces)
    assert len(pieces) == len(text) or "\N{REPLACEMENT CHARACTER}" in text


def test_what_is_unfinished_at_the_end_is_shown(byte_tokenizer):
    pieces = []
    stream = TextStream(Codec(byte_tokenizer), pieces.append)
    ids = byte_tokenizer("a漢")["input_ids"][:-1]
    for time in range(len(ids)):
        stream(torch.tensor(ids[: time + 1])[:, None])
    assert pieces == ["a"]
    assert stream.finish() == "a\N{REPLACEMENT CHARACTER}"
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_nothing_was_written(byte_tokenizer):
    assert TextStream(Codec(byte_tokenizer), pytest.fail).finish() == ""
