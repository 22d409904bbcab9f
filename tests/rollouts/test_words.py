"""Completions in words: tokens whose texts join to the completion, and the numbers beside them."""

import copy

import pytest
import torch

from alignment_modules import GRPOModule
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.words import pieces, token_columns


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer without merges: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture(scope="module")
def sentences():
    """A tokenizer of words that drops the space before a text's first word, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_character_comes_with_its_last_byte(byte_level):
    text = "aé€😀\n</s>"
    ids = byte_level(text)["input_ids"]
    found = pieces(Codec(byte_level), ids)
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "\n", "</s>"]
    assert "".join(pieces(Codec(byte_level), ids[:-3])) == byte_level.decode(ids[:-3])  # cut within a character


def test_spaces_stay(sentences):
    assert pieces(Codec(sentences), [0, 1, 2, 0]) == ["a", " b", "c", " a"]
    assert pieces(Codec(), [0, 1]) == []


def test_columns(sentences):
    ids, mask = torch.tensor([[0, 1, 2], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    own = torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    logps = torch.tensor([[-0.12345, float("nan"), -2.0], [-1.0, 0.0, 0.0]])
    found = token_columns(Codec(sentences), ids, mask, own, {"sampled_logps": logps, "old_logps": None})
    assert found["tokens"] == [["a", " b", "c"], ["b"]]
    assert found["own"] == [[1, 0, 1], [1]]
    assert found["sampled_logps"][1] == [-1.0]
    assert found["sampled_logps"][0] == pytest.approx([-0.123, float("nan"), -2.0], nan_ok=True)
    assert "old_logps" not in found
    assert "own" not in token_columns(Codec(sentences), ids, mask, mask, {})


def test_the_first_samples_of_a_rollout(tiny_llama, train, model_folder):
    messages = [{"role": "user", "content": "1"}]
    module = GRPOModule(
        policy={"path": model_folder},
        tokenizer=model_folder,
        rewards=lambda completions: [float(len(text)) for text in completions],
        num_generations=2,
        max_completion_length=4,
        num_iterations=2,
        beta=0.1,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    assert module.first_samples(3) == {}
    batch = {"prompts": torch.tensor([[5, 9], [5, 8]]), "prompt": [messages, "2"], "index": [4, 7]}
    train(module, [copy.deepcopy(batch) | {"prompt_attention_mask": torch.ones(2, 2).long()}])
    found = module.first_samples(3)
    assert {len(values) for values in found.values()} == {3}
    assert found["id"] == ["0/4/0", "0/4/1", "0/7/0"]
    assert found["messages"] == [messages, messages, None]
    for name in ("sampled_logps", "reference_logps"):
        assert [len(row) for row in found[name]] == [len(row) for row in found["tokens"]]
    assert "old_logps" not in found  # what the engine told serves
    for tokens, completion in zip(found["tokens"], found["completion"], strict=True):
        assert "".join(tokens).removesuffix("</s>") == completion
    assert "tokens" not in module.last_rollout
