"""Sequence-classification models as rewards, against transformers called by hand on one row at a time."""

import json
import logging

import pytest
import torch

from alignment_modules.rewards import RewardError, RewardSet, SequenceClassifier

ALPHABET = "abcdefghijklmnopqrstuvwxyz .:"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '.' }}{% endfor %}"


def write_model(folder, *, labels=1, pad="<pad>", template=None, positions=64, seed=0):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token=pad)
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        num_labels=labels,
        pad_token_id=None if pad is None else 0,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def by_hand(model, tokenizer, texts):
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0] for text in texts]


PROMPTS = ["say hi", "count to ten please", "q"]
COMPLETIONS = ["hi", "one two three four", "a b c"]


@pytest.mark.parametrize("pad", ["<pad>", None])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_the_models_whatever_the_batch(tmp_path, batch_size, pad):
    model, tokenizer = write_model(tmp_path / "judge", pad=pad)
    reward = SequenceClassifier(str(tmp_path / "judge"), batch_size=batch_size)
    expected = [
        logits.item() for logits in by_hand(model, tokenizer, map("".join, zip(PROMPTS, COMPLETIONS, strict=True)))
    ]
    assert reward(completions=COMPLETIONS, prompts=PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 3
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_chat_template_and_messages(tmp_path):
    model, tokenizer = write_model(tmp_path / "judge", template=TEMPLATE)
    reward = SequenceClassifier(str(tmp_path / "judge"))
    (expected,) = by_hand(model, tokenizer, ["u:say hi.a:hi."])
    assert reward(completions=["hi"], prompts=["say hi"]) == pytest.approx([expected.item()], abs=1e-5)
    plain = SequenceClassifier(str(tmp_path / "judge"), use_chat_template=False)
    (expected,) = by_hand(model, tokenizer, ["say hihi"])
    assert plain(completions=["hi"], prompts=["say hi"]) == pytest.approx([expected.item()], abs=1e-5)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say hi"}]
    (expected,) = by_hand(model, tokenizer, ["s:be kind.u:say hi.a:hi."])
    columned = SequenceClassifier(str(tmp_path / "judge"), prompt_column="chat")
    assert columned(completions=["hi"], chat=[messages]) == pytest.approx([expected.item()], abs=1e-5)
    assert len(messages) == 2


def test_several_outputs_need_a_label(tmp_path):
    model, tokenizer = write_model(tmp_path / "judge", labels=3)
    path = str(tmp_path / "judge")
    (logits,) = by_hand(model, tokenizer, ["say hihi"])
    for label in (2, "LABEL_2"):
        reward = SequenceClassifier(path, label=label)
        assert reward(completions=["hi"], prompts=["say hi"]) == pytest.approx([logits.softmax(-1)[2].item()], abs=1e-5)
    for label in (None, 3, -1, "good"):
        with pytest.raises(ValueError, match=rf"label={label!r}: .* has 3 outputs; give one of \['LABEL_0'"):
            SequenceClassifier(path, label=label)


def test_a_long_input_loses_its_beginning_and_says_so_once(tmp_path, caplog):
    model, tokenizer = write_model(tmp_path / "judge", positions=8)
    reward = SequenceClassifier(str(tmp_path / "judge"))
    (expected,) = by_hand(model, tokenizer, ["efghijkl"])
    with caplog.at_level(logging.WARNING):
        scores = reward(completions=["ijkl"] * 2, prompts=["abcdefgh"] * 2)
    assert scores == pytest.approx([expected.item()] * 2, abs=1e-5)
    assert [record.getMessage() for record in caplog.records].count(
        "judge: an input of 12 tokens is cut to its last 8"
    ) == 1


def test_by_path_inside_a_reward_set(tmp_path):
    write_model(tmp_path / "judge")
    rewards = RewardSet([str(tmp_path / "judge"), "alignment_modules.rewards.ExactMatch"]).to("cpu")
    table = rewards(prompts=["p"], completions=["x", "y"], columns={"answer": ["x"]})
    assert table.names == ("judge", "exact_match")
    assert table.values.isfinite().all()


CODE = """
from pathlib import Path
import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-judge"


class OwnJudge(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(16, 1, bias=False)
        self.post_init()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_in_a_folder_runs_only_when_it_is_trusted(tmp_path, monkeypatch, part):
    folder, marker = tmp_path / "judge", tmp_path / "ran"
    write_model(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    file = folder / {"model": "config.json", "tokenizer": "tokenizer_config.json"}[part]
    config = json.loads(file.read_text())
    if part == "model":
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnJudge"}
        config |= {"model_type": "own-judge", "architectures": ["OwnJudge"], "auto_map": names}
    else:
        config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr("signal.alarm", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(ValueError, match=r"judge' needs code that comes with it .* set trust_remote_code=true"):
        SequenceClassifier(str(folder))
    assert not marker.exists()
    SequenceClassifier(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_mistakes_are_named(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    write_model(tmp_path / "judge")
    path = str(tmp_path / "judge")
    (tmp_path / "empty").mkdir()
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    write_model(tmp_path / "mute")
    for file in (tmp_path / "mute").glob("token*"):
        file.unlink()
    cases = [
        (lambda: SequenceClassifier(str(tmp_path / "nowhere")), r"nowhere' is no folder, and no hub id"),
        (lambda: RewardSet(["some/model"]), r"path='some/model' is no folder, and no hub id"),
        (lambda: SequenceClassifier(str(tmp_path / "empty")), r"empty' holds no config.json"),
        (lambda: SequenceClassifier(str(tmp_path / "policy")), r"is not a trained .* it lacks score.weight"),
        (lambda: SequenceClassifier(str(tmp_path / "mute")), r"mute' holds no loadable tokenizer"),
        (lambda: SequenceClassifier(path, batch_size=0), r"batch_size=0 must be an integer from 1"),
        (lambda: SequenceClassifier(path, max_length=0), r"max_length=0 must be an integer from 1"),
        (lambda: SequenceClassifier(path, dtype="int8"), r"dtype='int8' must be one of"),
        (lambda: SequenceClassifier(path, use_chat_template=True), r"use_chat_template=True, but .* no chat template"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(RewardError, match="prompts are needed"):
        SequenceClassifier(path)(completions=["a"])
    with pytest.raises(RewardError, match=r"prompt_column='chat' is not in the data; found: answer"):
        SequenceClassifier(path, prompt_column="chat")(completions=["a"], answer=["b"])
