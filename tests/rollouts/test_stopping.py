import pytest
import torch

from alignment_modules.rollouts.stopping import StopStrings, stop_table


class Letters:
    """Token ids are texts of a table."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens=False):
        assert not skip_special_tokens
        return "".join(self.texts[token] for token in ids)


def test_a_stop_string_over_several_tokens_completes_with_its_last():
    stop = StopStrings(("END", "!!"), Letters("x", "E", "ND", "!", "D", "N"))
    history = torch.tensor([[0, 1, 2], [1, 5, 4], [3, 0, 3], [0, 3, 3], [1, 0, 2]])
    assert stop.completed(history[:, :2]) == [False, False, False, False, False]
    assert stop.completed(history) == [True, True, False, True, False]


def test_a_token_may_hold_more_than_the_stop_string():
    stop = StopStrings(("\n",), Letters("a", "b\nc"))
    assert stop.completed(torch.tensor([[1, 0]])[:, :1]) == [True]
    assert stop.completed(torch.tensor([[0, 1]])) == [True]


def test_empty_tokens_do_not_hide_a_stop_string():
    stop = StopStrings(("ab",), Letters("a", "", "b"))
    assert stop.completed(torch.tensor([[0, 1, 1, 2]])) == [True]


def test_whole_completions_end_with_a_stop_string_or_do_not():
    stop = StopStrings(("END", "a"), Letters("x", "E", "ND", "D", "a\n", "b"))
    assert stop.ends([0, 1, 2])
    assert stop.ends([1, 2, 1, 2])
    assert stop.ends([4])
    assert not stop.ends([1, 2, 0])
    assert not stop.ends([1, 2, 3])  # the last token could end one, but ends none
    assert not stop.ends([4, 5])
    assert not stop.ends([])


def test_stop_strings_need_a_tokenizer_and_text():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        StopStrings(("x",), None)
    with pytest.raises(ValueError, match="empty string"):
        StopStrings(("x", ""), Letters())


def test_stop_table():
    assert stop_table((1, 3), 5, torch.device("cpu")).tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match=r"\[5, -1\] are outside the policy's vocabulary of 5"):
        stop_table((1, 5, -1), 5, torch.device("cpu"))
