import numpy as np
import pytest

from tests.datamodules.alone import Chat

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
]


def supervised(tokenizer, read, ids, mask):
    """Each run of supervised tokens as text."""
    runs, current = [], []
    for token, on in zip(ids, mask, strict=True):
        if on:
            current.append(token)
        elif current:
            runs.append(read(tokenizer, current))
            current = []
    return [*runs, read(tokenizer, current)] if current else runs


@pytest.mark.parametrize("template", ["boundaries", "markers", "markers without stop", "empty marker"])
def test_every_reply_and_its_stop_token_is_supervised(make_tokenizer, read, template):
    tokenizer = make_tokenizer(template)
    ids, mask = Chat(tokenizer).encode(CONVERSATION)
    assert supervised(tokenizer, read, ids, mask) == ["yo<|im_end|>", "2<|im_end|>"]
    assert read(tokenizer, ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    )


@pytest.mark.parametrize("template", ["boundaries", "markers", "markers without stop", "rewrites history"])
def test_last_turn_only(make_tokenizer, read, template):
    tokenizer = make_tokenizer(template)
    ids, mask = Chat(tokenizer).encode(CONVERSATION, last_only=True)
    thought = "<think></think>" if template == "rewrites history" else ""
    assert supervised(tokenizer, read, ids, mask) == [f"{thought}2<|im_end|>"]


def test_template_that_rewrites_history_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match=r"rewrites history.*message 1.*last_turn"):
        Chat(make_tokenizer("rewrites history")).encode(CONVERSATION)


def test_stop_token_is_appended_where_the_template_has_none(make_tokenizer, read):
    tokenizer = make_tokenizer("no stop")
    ids, mask = Chat(tokenizer).encode(CONVERSATION)
    assert supervised(tokenizer, read, ids, mask) == ["yo\n", "2\n<eos>"]


def test_an_unknown_token_is_no_stop_token(make_tokenizer, read):
    tokenizer = make_tokenizer("no stop")
    ids, mask = Chat(tokenizer).encode([CONVERSATION[0], {"role": "assistant", "content": "%"}])
    assert supervised(tokenizer, read, ids, mask) == ["<unk>\n<eos>"]


def test_only_the_completion_of_a_conversational_prompt(make_tokenizer, read):
    for template in ("boundaries", "markers"):
        tokenizer = make_tokenizer(template)
        ids, mask = Chat(tokenizer).encode(CONVERSATION, first=2)
        assert supervised(tokenizer, read, ids, mask) == ["2<|im_end|>"]
        prompt, completion, _ = Chat(tokenizer).encode_completion(CONVERSATION[:3], CONVERSATION[3:])
        assert read(tokenizer, completion) == "2<|im_end|>"
        np.testing.assert_array_equal(prompt, Chat(tokenizer).encode_prompt(CONVERSATION[:3]))


def test_prefilled_reply_is_left_open(make_tokenizer, read):
    tokenizer = make_tokenizer("boundaries")
    assert read(tokenizer, Chat(tokenizer).encode_prompt(CONVERSATION)).endswith("<|im_start|>assistant\n2")


def test_trailing_user_turn_is_cut(make_tokenizer, read):
    tokenizer = make_tokenizer("boundaries")
    ids, mask = Chat(tokenizer).encode(CONVERSATION[:3])
    assert read(tokenizer, ids).endswith("yo<|im_end|>")
    assert mask[-1]


def test_refusals(make_tokenizer):
    with pytest.raises(ValueError, match="no chat_template; give chat_template='plain'"):
        Chat(make_tokenizer())
    chat = Chat(make_tokenizer("boundaries"))
    with pytest.raises(ValueError, match="no assistant message"):
        chat.encode(CONVERSATION[:1])
    with pytest.raises(ValueError, match="starts with an assistant"):
        chat.encode(CONVERSATION[1:])
    with pytest.raises(ValueError, match="must start with an assistant message, found 'user'"):
        chat.encode_completion(CONVERSATION[:2], CONVERSATION[2:])
    tokenizer = make_tokenizer("boundaries")
    tokenizer.chat_template = "{{ raise_exception('no way') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation with the roles \['user', 'assistant'"):
        Chat(tokenizer).encode(CONVERSATION)


def test_stop_token_ids(make_tokenizer):
    assert Chat(make_tokenizer("boundaries")).stop_token_ids() == (0, 4)
    assert Chat(make_tokenizer("no stop")).stop_token_ids() == (0,)


def test_a_token_across_the_boundary_is_taken_apart(read):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", *"uaiqx:\n ", ": ", ": q"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "q")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "qi"}]
    assert ": q" in tokenizer.tokenize(chat.renderer.render(messages))
    ids, mask = chat.encode(messages)
    assert read(tokenizer, ids[mask]) == "qi<eos>"
    assert read(tokenizer, ids[~mask]) == "u: x<eos>\na: "
    np.testing.assert_array_equal(ids[~mask], chat.encode_prompt(messages[:1]))
