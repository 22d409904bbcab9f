import itertools
import json
import logging
import re

import numpy as np
import pytest
import torch

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule
from datamodules.batching import Ragged, cut_left, cut_row, pack, pad


def test_pad_both_sides():
    arrays = [np.array([1, 2, 3]), np.array([1])]
    values, mask = pad(arrays, 1)
    assert values.tolist() == [[1, 2, 3], [1, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    values, mask = pad(arrays, 9, side="left")
    assert values.tolist() == [[1, 2, 3], [9, 9, 1]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="side='up'"):
        pad(arrays, 0, side="up")


def test_ragged():
    ragged = Ragged([np.array([1, 2]), np.array([], dtype=int), np.array([3])])
    assert [ragged[i].tolist() for i in range(len(ragged))] == [[1, 2], [], [3]]
    assert ragged.values.dtype == np.int32
    assert ragged.checksum() != Ragged([np.array([1]), np.array([2]), np.array([3])]).checksum()


@pytest.mark.parametrize("seed", range(3))
def test_pack_keeps_every_document_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, size=200)
    rows = pack(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(200))
    fills = [int(lengths[row].sum()) for row in rows]
    assert max(fills) <= 32
    assert sum(fills) / (32 * len(rows)) > 0.9
    with pytest.raises(ValueError, match="40 tokens does not fit into a row of 32"):
        pack([40], 32)


def test_cuts():
    bos = np.array([7])
    assert cut_left(np.array([7, 1, 2, 3]), 2, bos).tolist() == [7, 3]
    assert cut_left(np.array([1, 2, 3]), 2, bos).tolist() == [2, 3]
    ids, mask = cut_row(np.arange(10), np.arange(10) >= 6, 6, bos)
    assert ids.tolist() == [3, 4, 5, 6, 7, 8]  # the prompt keeps half of the length, the rest is the completion's
    assert mask.tolist() == [False] * 3 + [True] * 3


def unpack(batch):
    """Documents of a packed batch, told apart by position_ids that restart."""
    documents = []
    for ids, positions, mask, labels in zip(
        batch["input_ids"], batch["position_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        size = int(mask.sum())
        starts = [*torch.nonzero(positions[:size] == 0).flatten().tolist(), size]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[start] == -100  # nothing before it in its document
            assert torch.equal(labels[start + 1 : end], ids[start + 1 : end])
            documents.append(tuple(ids[start:end].tolist()))
    return documents


def test_packing_loses_no_token_and_keeps_documents_apart(tokenizer):
    texts = ["".join(np.random.default_rng(i).choice(list("abcdef"), size=3 + 7 * i)) for i in range(12)]
    data = PretrainDataModule(train=[{"text": t} for t in texts], tokenizer=tokenizer, max_length=32, batch_size=3)
    found = [d for batch in data.train_dataloader() for d in unpack(batch)]
    pieces = []
    for text in texts:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
        cuts = list(range(0, len(ids), 32))
        if len(ids) % 32 == 1 and len(ids) > 1:
            cuts[-1] -= 1
        pieces += [tuple(ids[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    assert sorted(found) == sorted(pieces)
    report = data.reports["train"]
    assert report["tokens"] == sum(map(len, pieces)) == sum(len(t) + 1 for t in texts)
    assert report["targets"] == report["tokens"] - report["kept"]
    assert max(map(len, found)) <= 32


def test_packed_demonstrations_keep_their_targets(tokenizer):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    plain = SFTDataModule(train=rows, tokenizer=tokenizer, batch_size=20)
    packed = SFTDataModule(train=rows, tokenizer=tokenizer, batch_size=20, packing=True, max_length=24)
    count = [int((next(iter(d.train_dataloader()))["labels"] != -100).sum()) for d in (plain, packed)]
    assert count[0] == count[1] == plain.reports["train"]["targets"]
    assert len(packed.train_dataloader().dataset) < 20


def test_pad_and_end_token_may_be_the_same(make_tokenizer):
    for pad_token in (None, "<eos>"):
        rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1234", "completion": "5678"}]
        data = SFTDataModule(train=rows, tokenizer=make_tokenizer(pad=pad_token), shuffle=False)
        batch = next(iter(data.train_dataloader()))
        assert batch["attention_mask"].sum(1).tolist() == [3, 9]
        assert batch["labels"][0].tolist() == [-100, 7, 0, *[-100] * 6]
        assert batch["labels"][1, -1] == 0


def test_first_token_stays_when_a_prompt_is_cut(make_tokenizer, read):
    tokenizer = make_tokenizer(bos=True)
    data = PromptDataModule(train=[{"prompt": "abcdef"}], tokenizer=tokenizer, max_length=4)
    batch = next(iter(data.train_dataloader()))
    assert read(tokenizer, batch["prompts"][0]) == "<bos>def"
    rows = [{"prompt": "ab", "completion": "c"}]
    batch = next(iter(SFTDataModule(train=rows, tokenizer=tokenizer).train_dataloader()))
    assert read(tokenizer, batch["input_ids"][0]) == "<bos>abc<eos>"


def test_a_merge_across_prompt_and_completion_is_taken_apart():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "1", "=", "2", "=2"])}
    backend = Tokenizer(models.BPE(vocabulary, [("=", "2")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("1=2")["input_ids"] == [1, 4]
    data = SFTDataModule(train=[{"prompt": "1=", "completion": "2"}], tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 0]]


LONG = [{"prompt": "aaaa", "completion": "bb"}, {"prompt": "a" * 10, "completion": "b" * 10}]


def test_overflow_truncates(tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="datamodules"):
        data = SFTDataModule(train=LONG, tokenizer=tokenizer, max_length=12, shuffle=False)
        data.setup("fit")
        data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["attention_mask"].sum(1).tolist() == [7, 12]
    assert (batch["labels"][1] != -100).sum() == 6
    assert len([r for r in caplog.records if "truncated 1" in r.getMessage()]) == 1  # said once


def test_overflow_drops(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        data = SFTDataModule(train=LONG, tokenizer=tokenizer, max_length=12, overflow="drop")
        assert len(data.train_dataloader()) == 1
    assert data.reports["train"]["dropped_too_long"] == 1
    assert "dropped too long 1" in caplog.text


def test_overflow_is_an_error(tokenizer):
    data = SFTDataModule(train=LONG, tokenizer=tokenizer, max_length=12, overflow="error")
    with pytest.raises(ValueError, match=r"row 1 .* has 21 tokens, max_length=12"):
        data.setup("fit")


def test_preference_pairs_fit(tokenizer):
    rows = [
        {"prompt": "a" * 10, "chosen": "b" * 3, "rejected": "c" * 20},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    data = PreferenceDataModule(train=rows, tokenizer=tokenizer, max_length=12, shuffle=False)
    batch = next(iter(data.train_dataloader()))
    assert batch["prompt_attention_mask"].sum(1).tolist() == [6, 1]
    assert batch["prompt_attention_mask"][1].tolist() == [0, 0, 0, 0, 0, 1]  # prompts on the right edge
    assert batch["chosen_attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["rejected_attention_mask"].sum(1).tolist() == [6, 2]
    assert batch["chosen_input_ids"][0, 3] == 0  # whole, so it ends with the stop token
    assert batch["rejected_input_ids"][0, 5] != 0  # cut, so it does not
    assert batch["index"] == [0, 1]


def test_preference_counts(tokenizer):
    rows = [
        {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 1]},
        {"prompt": "a", "completions": ["b", "b"], "rewards": [0, 1]},
        {"prompt": "a", "completions": ["b", "c", "d"], "rewards": [0.5, 2, -1]},
    ]
    data = PreferenceDataModule(train=rows, tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert batch["index"] == [2]
    assert tokenizer.convert_ids_to_tokens(batch["chosen_input_ids"][0].tolist()) == ["c", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(batch["rejected_input_ids"][0].tolist()) == ["d", "<eos>"]
    assert (data.reports["train"]["ties"], data.reports["train"]["dropped_identical"]) == (1, 1)


def test_a_pair_of_several_turns_is_scored_on_the_replies(make_tokenizer, read):
    tokenizer = make_tokenizer("boundaries")

    def side(first, last):
        said = [("assistant", first), ("user", "why?"), ("assistant", last)]
        return [{"role": role, "content": content} for role, content in said]

    prompt = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": prompt, "chosen": side("yes", "so"), "rejected": side("no", "because")},
        {"prompt": prompt, "chosen": "ab", "rejected": "c"},
    ]
    texts = {}
    for length in (200, 52):
        data = PreferenceDataModule(train=rows, tokenizer=tokenizer, shuffle=False, max_length=length)
        batch = next(iter(data.train_dataloader()))
        for name in ("chosen", "rejected"):
            ids, there, scored = (batch[f"{name}_{key}"] for key in ("input_ids", "attention_mask", "loss_mask"))
            assert scored.dtype == there.dtype
            assert scored.shape == there.shape
            assert not (scored > there).any()
            texts[length, name] = [read(tokenizer, row[mask.bool()]) for row, mask in zip(ids, scored, strict=True)]
    assert texts[200, "chosen"] == texts[52, "chosen"] == ["yes<|im_end|>so<|im_end|>", "ab<|im_end|>"]
    assert texts[200, "rejected"] == ["no<|im_end|>because<|im_end|>", "c<|im_end|>"]
    assert texts[52, "rejected"][0].startswith("no<|im_end|>")
    assert texts[52, "rejected"][0] != texts[200, "rejected"][0]
    other = PreferenceDataModule(train=rows[1:], tokenizer=tokenizer)
    assert not any("loss_mask" in key for key in next(iter(other.train_dataloader())))


@pytest.mark.parametrize("kind", [int, float, np.float32, torch.tensor])
def test_margins(tokenizer, kind):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * (1 + n % 2), "margin": kind(n)} for n in range(4)]
    rows[1]["rejected"] = "b"  # dropped, and its margin with it
    data = PreferenceDataModule(train=rows, tokenizer=tokenizer, batch_size=2, shuffle=False)
    batches = list(data.train_dataloader())
    assert [batch["index"] for batch in batches] == [[0, 2], [3]]
    assert [batch["margin"].tolist() for batch in batches] == [[0.0, 2.0], [3.0]]
    assert batches[0]["margin"].dtype == torch.float32
    plain = [{key: value for key, value in row.items() if key != "margin"} for row in rows]
    other = PreferenceDataModule(train=plain, tokenizer=tokenizer, shuffle=False)
    assert "margin" not in next(iter(other.train_dataloader()))
    assert other.train_dataloader().dataset.fingerprint != data.train_dataloader().dataset.fingerprint


def test_labels_of_pairs(tokenizer):
    labels = [0.25, True, 0, 1.0]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "label": label} for label in labels]
    batch = next(iter(PreferenceDataModule(train=rows, tokenizer=tokenizer, shuffle=False).train_dataloader()))
    assert batch["label"].tolist() == [0.25, 1.0, 0.0, 1.0]
    assert batch["label"].dtype == torch.float32


@pytest.mark.parametrize("label", [1.5, -1, "good"])
def test_labels_of_pairs_are_probabilities(tokenizer, label):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "label": label}]
    with pytest.raises(ValueError, match=r"row 0 of .* train: column label must be the probability that the chosen"):
        PreferenceDataModule(train=rows, tokenizer=tokenizer).setup("fit")


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ([1, "two"], "{}:2: column margin must be a finite number, found 'two'; rename"),
        ([1, True], "{}:2: column margin must be a finite number, found True"),
        ([1, 1e39], "{}:2: column margin must be a finite number, found 1e+39"),
        ([None, 1], "{}:2: has a margin, and the first row has none; give all rows a margin, or none"),
        ([1, None], "{}:2: has no margin, and the first row has one; give all rows a margin, or none"),
    ],
)
def test_margins_that_cannot_be_used(tokenizer, tmp_path, margins, said):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin} for margin in margins]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=re.escape(f"train: {said.format(path)}")):
        PreferenceDataModule(train=str(path), tokenizer=tokenizer).setup("fit")


def test_prompt_columns(tokenizer):
    rows = [{"prompt": "12", "answer": 3}, {"prompt": "1", "answer": 4, "level": "x"}]
    data = PromptDataModule(train=rows, validation=rows, predict=rows, tokenizer=tokenizer, shuffle=False)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        assert batch["prompts"].tolist() == [[6, 7], [0, 6]]
        assert batch["prompt_attention_mask"].tolist() == [[1, 1], [0, 1]]
        assert (batch["index"], batch["answer"], batch["level"]) == ([0, 1], [3, 4], [None, "x"])
        assert batch["prompt"] == [row["prompt"] for row in rows]


USER, REPLY = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "ab", "completion": "c"}, "ab"),
        ({"messages": [USER, REPLY], "prompt": "other"}, [USER]),
        ({"prompt": [USER]}, [USER]),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "d"}]}, [USER]),
        ({"prompt": "ab", "completions": ["c", "d"], "rewards": [1, 1]}, "ab"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_prompts_as_they_are(make_tokenizer, row, prompt, workers):
    """Beside the ids stands the prompt itself, whole where the ids are cut."""
    tokenizer = make_tokenizer("boundaries")
    data = PromptDataModule(train=[row], tokenizer=tokenizer, max_length=2, num_workers=workers)
    assert next(iter(data.train_dataloader()))["prompt"] == [prompt]


def test_a_plain_prompt_as_chat(make_tokenizer):
    data = PromptDataModule(train=[{"prompt": "ab"}], tokenizer=make_tokenizer("boundaries"), as_chat=True)
    assert next(iter(data.train_dataloader()))["prompt"] == [[USER]]


class TestCarry:
    ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1), "teacher": f"t{i % 3}", "n": [i]} for i in range(20)]

    def test_columns_stay_with_their_rows(self, tokenizer):
        data = SFTDataModule(train=self.ROWS, tokenizer=tokenizer, batch_size=8, carry=["teacher", "n"])
        plain = SFTDataModule(train=self.ROWS, tokenizer=tokenizer, batch_size=8)
        seen = []
        for batch, bare in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
            assert all(torch.equal(batch[key], bare[key]) for key in bare)
            for ids, mask, teacher, (n,) in zip(
                batch["input_ids"], batch["attention_mask"], batch["teacher"], batch["n"], strict=True
            ):
                text = tokenizer.decode(ids[mask.bool()].tolist(), skip_special_tokens=True)
                assert text.replace(" ", "") == f"{n}+1={n + 1}"
                assert teacher == f"t{n % 3}"
                seen.append(n)
        assert sorted(seen) == list(range(20))

    def test_other_values_are_another_data_set(self, tokenizer):
        marks = [
            SFTDataModule(train=rows, tokenizer=tokenizer, carry=["teacher"]).train_dataloader().dataset.fingerprint
            for rows in (self.ROWS, self.ROWS, [*self.ROWS[:-1], self.ROWS[-1] | {"teacher": "t0"}])
        ]
        assert marks[0] == marks[1] != marks[2]

    def test_a_row_that_is_left_out_takes_its_value_along(self, tokenizer):
        rows = [self.ROWS[0], {"prompt": "1" * 50, "completion": "2", "teacher": "long"}, self.ROWS[1]]
        data = SFTDataModule(
            train=rows, tokenizer=tokenizer, carry=["teacher"], max_length=16, overflow="drop", shuffle=False
        )
        assert next(iter(data.train_dataloader()))["teacher"] == ["t0", "t1"]

    def test_a_row_without_the_column(self, tokenizer):
        rows = [*self.ROWS[:2], {"prompt": "1+1=", "completion": "2"}]
        with pytest.raises(ValueError, match=r"row 2 .*has no 'teacher', which carry="):
            SFTDataModule(train=rows, tokenizer=tokenizer, carry=["teacher"]).train_dataloader()

    @pytest.mark.parametrize(("options", "message"), [
        ({"carry": ["teacher"], "packing": True}, "carry=.* with packing=True"),
        ({"carry": ["labels"]}, r"batches use \['labels'\] themselves"),
    ])  # fmt: skip
    def test_refused(self, tokenizer, options, message):
        with pytest.raises(ValueError, match=message):
            SFTDataModule(train=self.ROWS, tokenizer=tokenizer, **options)
