"""Wrong input: one table. Each message names the split, the place, what was found and what is allowed."""

import pytest

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule

USER = {"role": "user", "content": "a"}
PAIR = {"prompt": "a", "completion": "b"}


def reach(data):
    data.setup("fit")
    return list(data.train_dataloader())


CASES = {
    "no known column": (
        lambda t: SFTDataModule(train=[{"foo": "a", "bar": "b"}], tokenizer=t),
        r"train: row 0 of .* has the columns \['bar', 'foo'\]; SFTDataModule needs \[prompt, completion\] or ",
    ),
    "a misspelt column": (
        lambda t: SFTDataModule(train=[{"prompt": "a", "completin": "b"}], tokenizer=t),
        r"has the columns \['completin', 'prompt'\].*; did you mean 'completion' by 'completin'\?; SFTDataModule needs",
    ),
    "another module's format": (
        lambda t: SFTDataModule(train=[{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer=t),
        "that is the format 'preference'; SFTDataModule needs",
    ),
    "pairs from plain demonstrations": (
        lambda t: PreferenceDataModule(train=[PAIR], tokenizer=t),
        r"PreferenceDataModule needs \[prompt, chosen, rejected\]",
    ),
    "a later row lacks a column": (
        lambda t: SFTDataModule(train=[PAIR, {"prompt": "a"}], tokenizer=t),
        r"train: row 1 of .*: needs column completion .* found \['prompt'\]",
    ),
    "a later row has another type": (
        lambda t: PretrainDataModule(train=[{"text": "a"}, {"text": 1}], tokenizer=t),
        "train: row 1 of .*: column text must be a string, found int: 1",
    ),
    "a conversation without a reply": (
        lambda t: SFTDataModule(train=[{"messages": [USER]}], tokenizer=t, chat_template="plain"),
        r"train: row 0 of .*: the conversation has no assistant message.*\['user'\]",
    ),
    "no chat template": (
        lambda t: SFTDataModule(train=[{"messages": [USER, {"role": "assistant", "content": "b"}]}], tokenizer=t),
        "train: row 0 of .*: the rows are conversations but the tokenizer has no chat_template",
    ),
    "an empty source": (lambda t: SFTDataModule(train=[], tokenizer=t), "train='the list given as train' has no rows"),
    "no source": (lambda t: SFTDataModule(tokenizer=t), "train=None; give SFTDataModule a source for train"),
    "all rows too long": (
        lambda t: SFTDataModule(train=[PAIR] * 2, tokenizer=t, max_length=2, overflow="drop"),
        "every row is longer than max_length=2 .the longest has 3 tokens., .* raise max_length or",
    ),
    "all prompts too long": (
        lambda t: PromptDataModule(train=[{"prompt": "abc"}], tokenizer=t, max_length=2, overflow="drop"),
        "every row is longer than max_length=2",
    ),
    "no target": (
        lambda t: PretrainDataModule(train=[{"text": ""}], tokenizer=t),
        "train: no row is left to use: rows 1, format text, dropped without target 1",
    ),
    "no preference": (
        lambda t: PreferenceDataModule(train=[{"prompt": "a", "chosen": "b", "rejected": "b"}], tokenizer=t),
        "no row is left to use: .*dropped identical 1",
    ),
    "an empty prompt": (
        lambda t: PromptDataModule(train=[{"prompt": ""}], tokenizer=t),
        "row 0 of .*: the prompt has no token",
    ),
    "a column that batches use": (
        lambda t: PromptDataModule(train=[{"prompt": "a", "index": 3}], tokenizer=t),
        r"has the columns \['index'\], which batches use themselves; rename them, as in columns=\{'index'",
    ),
    "a column to rename that is not there": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, columns={"question": "prompt"}),
        r"has no column \['question'\]; found \['completion', 'prompt'\]",
    ),
    "no tokenizer": (
        lambda t: SFTDataModule(train=[PAIR]),
        "tokenizer=None, and no source has a `tokenizer`",
    ),
    "no such tokenizer": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer="./none"),
        "tokenizer='./none': no such folder",
    ),
    "unknown policy": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, overflow="split"),
        "overflow='split'; allowed: 'truncate', 'drop', 'error'",
    ),
    "unknown target": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, loss_on="prompt"),
        "loss_on='prompt' must be 'completion' or 'last_turn' or 'all'",
    ),
    "a batch of none": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, batch_size=0),
        "batch_size=0 must be an integer from 1",
    ),
    "no length": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, max_length=1),
        "max_length=1 must be an integer from 2",
    ),
    "no such template": (
        lambda t: SFTDataModule(train=[PAIR], tokenizer=t, chat_template="none.jinja"),
        "chat_template='none.jinja': neither 'plain', nor a template, nor a file that exists",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(tokenizer, case):
    make, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        reach(make(tokenizer))


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no tokenizer \(tokenizer.json\); it holds \['config.json'\]"):
        reach(SFTDataModule(train=[PAIR], tokenizer=str(tmp_path)))


def test_tokenizer_without_end_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token, so a model could never learn to stop"):
        reach(SFTDataModule(train=[PAIR], tokenizer=tokenizer))
