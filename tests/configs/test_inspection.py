"""What an inspection makes of tokens and batches, in Python, and how it is laid out in a terminal."""

import io

import lightning as L
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch.utils.data import DataLoader

from alignment_modules.cli.inspection import inspect_datamodule
from alignment_modules.cli.inspection.findings import Token
from alignment_modules.cli.inspection.text import show
from alignment_modules.cli.inspection.tokens import readable
from alignment_modules.cli.inspection.words import bins
from datamodules import PreferenceDataModule, SFTDataModule


@pytest.fixture(scope="module")
def byte_level():
    """Every byte is a token of its own; id 0 is special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|im_end|>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


class Spaced:
    """A tokenizer that joins words by spaces, so that a token alone has none."""

    def decode(self, ids, **options):
        return " ".join(["a", "b", ""][i] for i in ids)


def texts(tokens):
    return [token.text for token in tokens]


class TestTokens:
    def test_characters_of_several_tokens_are_whole(self, byte_level):
        ids = byte_level("é\n🙂<|im_end|>x")["input_ids"]
        assert len(ids) == 9
        tokens = readable(byte_level, ids, [False] * 3 + [True] * 6)
        assert texts(tokens) == ["é", "\\n", "🙂", "<|im_end|>", "x"]
        assert [token.target for token in tokens] == [False, False, True, True, True]
        assert [token.special for token in tokens] == [False, False, False, True, False]

    def test_a_character_cut_in_the_middle_ends(self, byte_level):
        ids = byte_level("🙂")["input_ids"][:2]
        assert texts(readable(byte_level, ids, [True, True])) == ["\N{REPLACEMENT CHARACTER}"]
        assert len(readable(byte_level, ids, [False, True])) == 2

    def test_spaces_between_tokens_are_kept(self):
        assert texts(readable(Spaced(), [0, 1, 0], [False] * 3)) == ["a", " b", " a"]

    def test_a_token_without_text_is_shown_by_its_id(self):
        assert texts(readable(Spaced(), [2], [False])) == ["<id 2>"]

    def test_control_characters_are_written_out(self, byte_level):
        ids = byte_level("\x1b[2J\r\t")["input_ids"]
        assert "".join(texts(readable(byte_level, ids, [False] * len(ids)))) == "\\x1b[2J\\r\\t"

    def test_ids_where_there_is_no_tokenizer(self):
        assert readable(None, [7, 8], [False, True]) == (Token("7 "), Token("8 ", target=True))


@pytest.mark.parametrize("lengths", [(1,), (5, 5), tuple(range(1, 40)), (3, 70, 1024), (200, 201, 90_000), (0, 4)])
def test_bins_hold_every_length(lengths):
    found = bins(lengths)
    assert len(found) <= 10
    assert sum(count for _, count in found) == len(lengths)
    for label, count in found:
        first, _, last = label.replace(",", "").partition("-")
        held = [n for n in lengths if max(int(first), 1) <= max(n, 1) <= int(last or first)]
        assert count == len(held)


def test_a_data_module_in_python(byte_level):
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(10)]
    found = inspect_datamodule(
        SFTDataModule(train=rows, tokenizer=byte_level, batch_size=4, shuffle=False), byte_level, 2
    )
    assert ["".join(texts(row.passages[0].documents[0])) for row in found.rows] == [
        "0+1=1<|im_end|>",
        "1+1=2<|im_end|>",
    ]
    sizes = found.sizes
    assert (sizes.batches, sizes.rows, sizes.tokens, sizes.targets, sizes.padding) == (3, 10, 61, 21, 1)
    assert sizes.padding_share == pytest.approx(1 / 62)
    assert sizes.lengths == (6,) * 9 + (7,)
    assert found.reports["train"]["kept"] == 10
    assert found.plan is None


def test_weights_stand_beside_the_row(byte_level):
    rows = [{"prompt": "1", "completion": "23"}, {"prompt": "1", "completion": "2", "weight": 0.25}]
    module = SFTDataModule(train=rows, tokenizer=byte_level, shuffle=False)
    found = inspect_datamodule(module, byte_level, 2)
    weights = [row.columns["weights of targets"] for row in found.rows]
    assert weights == ["1 (3 tokens)", "0.25 (2 tokens)"]
    assert found.reports["train"]["weighted"] == 1


def test_lengths_of_pairs_are_those_of_the_longer_side(byte_level):
    rows = [{"prompt": "12", "chosen": "3", "rejected": "345"}]
    assert inspect_datamodule(PreferenceDataModule(train=rows, tokenizer=byte_level), byte_level).sizes.lengths == (6,)


class Own(L.LightningDataModule):
    """Somebody's batches, from a loader that does not tell its length."""

    def train_dataloader(self):
        return ({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, 2]])} for _ in range(150))


class Foreign(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"pixels": torch.zeros(2)}])


def test_batches_of_others():
    found = inspect_datamodule(Own(), None, 1)
    assert not found.sizes.complete
    assert (found.sizes.batches, found.sizes.targets, found.sizes.padding) == (100, 100, 0)
    with pytest.raises(ValueError, match=r"holds \['pixels'\]; none of these is a text"):
        inspect_datamodule(Foreign(), None)


def test_a_long_document_is_cut_in_the_terminal_and_says_so(byte_level):
    rows = [{"prompt": "", "completion": "first" + "a" * 990 + "last"}]
    found = inspect_datamodule(SFTDataModule(train=rows, tokenizer=byte_level), byte_level)
    stream = io.StringIO()
    show(found, Console(file=stream, width=80, color_system=None))
    text = stream.getvalue().replace("\n    ", "")
    assert "... 400 tokens not shown; --html shows all ..." in text
    assert "first" in text
    assert "last<|im_end|>]]" in text


@pytest.mark.parametrize("colour", [None, "truecolor"])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_layout(byte_level, width, colour):
    """Rows fit, special tokens are whole, and nothing of the text is lost or taken for markup."""
    words = "[bold]several[/bold] words " + "ohne" * 60 + " 日本語" * 20
    rows = [{"prompt": "Say it: ", "completion": words}]
    found = inspect_datamodule(SFTDataModule(train=rows, tokenizer=byte_level), byte_level)
    stream = io.StringIO()
    show(found, Console(file=stream, width=width, color_system=colour, force_terminal=colour is not None))
    plain = io.StringIO()
    show(found, Console(file=plain, width=width, color_system=None))
    lines = plain.getvalue().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("1."))
    shown = lines[start + 1 : lines.index("", start)]
    assert max(map(cell_len, shown)) <= width
    assert "".join(line[4:] for line in shown) == f"Say it: [[{words}<|im_end|>]]"
    assert any("<|im_end|>" in line for line in shown)
    assert ("\x1b[" in stream.getvalue()) == (colour is not None)
    assert "[[" not in stream.getvalue() or colour is None
