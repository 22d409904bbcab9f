"""Weights of replies and rows: what they become in a batch, what is refused, and that nothing is there without them."""

import json
import math

import numpy as np
import pytest
import torch

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule

USER, OTHER = {"role": "user", "content": "ab"}, {"role": "user", "content": "cd"}


def reply(text, **marks):
    return {"role": "assistant", "content": text, **marks}


def only(module):
    [batch] = list(module.train_dataloader())
    return batch


def seen(tokenizer, batch, row=0):
    """Supervised tokens of a row with their weights, as `(text, weight)`."""
    labels, weights = batch["labels"][row], batch["loss_weights"][row]
    assert not weights[labels == -100].any()
    learnt = labels != -100
    return list(zip(tokenizer.convert_ids_to_tokens(labels[learnt].tolist()), weights[learnt].tolist(), strict=True))


@pytest.mark.parametrize("template", ["boundaries", "markers"])
@pytest.mark.parametrize("row", [{}, {"weight": 2}, {"weight": None}])
def test_each_reply_has_its_weight_times_that_of_the_row(make_tokenizer, template, row):
    tokenizer = make_tokenizer(template)
    messages = [
        USER,
        reply("e", weight=0.25),
        OTHER,
        reply("f"),
        USER,
        reply("g", weight=3),
        OTHER,
        reply("h", weight=0),
    ]
    batch = only(SFTDataModule(train=[{"messages": messages} | row], tokenizer=tokenizer))
    factor = row.get("weight") or 1
    expected = [
        (name, weight * factor) for text, weight in (("e", 0.25), ("f", 1), ("g", 3)) for name in (text, "<|im_end|>")
    ]
    assert seen(tokenizer, batch) == expected
    assert batch["loss_weights"].dtype == torch.float32
    assert batch["loss_weights"].shape == batch["labels"].shape


@pytest.mark.parametrize("one", [1, 1.0, True, np.float32(1), torch.tensor(1.0)])
def test_without_weights_a_batch_has_none(make_tokenizer, one):
    rows = [{"messages": [USER, reply("e", weight=one)], "weight": one}, {"messages": [USER, reply("f", train=True)]}]
    module = SFTDataModule(train=rows, tokenizer=make_tokenizer("boundaries"))
    assert set(only(module)) == {"input_ids", "labels", "attention_mask"}
    assert "weighted" not in module.reports["train"]


def test_rows_beside_a_weighted_one_weigh_one(tokenizer):
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "abcd", "completion": "e", "weight": np.float64(0.5)}]
    module = SFTDataModule(train=rows, tokenizer=tokenizer, shuffle=False)
    batch = only(module)
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]
    assert module.reports["train"]["weighted"] == 1


def test_packed_and_cut_weights_stay_with_their_tokens(make_tokenizer):
    tokenizer = make_tokenizer("boundaries")
    rows = [
        {"messages": [USER, reply("e" * (1 + n), weight=0.5 + n), OTHER, reply("f" * n)], "weight": 1 + n}
        for n in range(6)
    ]
    for packing, length in ((True, 64), (True, 24), (False, 20)):
        module = SFTDataModule(train=rows, tokenizer=tokenizer, packing=packing, max_length=length, batch_size=6)
        batch, weights = only(module), {}
        for row in range(len(batch["labels"])):
            ids = batch["input_ids"][row]
            starts = (ids == tokenizer.convert_tokens_to_ids("<|im_start|>")).cumsum(0)
            for place in (batch["labels"][row] != -100).nonzero().flatten().tolist():
                turn = ids[starts == starts[place]]
                text = "".join(tokenizer.convert_ids_to_tokens(turn.tolist()))
                weights.setdefault(text.split("\n")[1].removesuffix("<|im_end|>"), set()).add(
                    float(batch["loss_weights"][row, place])
                )
        for n in range(6):
            assert weights.get("e" * (1 + n), {(0.5 + n) * (1 + n)}) == {(0.5 + n) * (1 + n)}
            assert weights.get("f" * n, {1 + n}) >= {1 + n}
        assert len(weights) == 12 if length == 64 else len(weights) > 4


def test_the_last_turn_keeps_its_own_weight(make_tokenizer):
    tokenizer = make_tokenizer("boundaries")
    rows = [{"messages": [USER, reply("e", weight=0.25), OTHER, reply("f", weight=4)]}]
    assert seen(tokenizer, only(SFTDataModule(train=rows, tokenizer=tokenizer, loss_on="last_turn"))) == [
        ("f", 4), ("<|im_end|>", 4),
    ]  # fmt: skip


def test_documents_have_the_weight_of_their_row_in_every_piece(tokenizer):
    rows = [{"text": "abcdefgh", "weight": 0.5}, {"text": "xyz"}]
    for packing in (False, True):
        module = PretrainDataModule(train=rows, tokenizer=tokenizer, max_length=4, packing=packing, shuffle=False)
        batch = only(module)
        letters = tokenizer.convert_ids_to_tokens(batch["input_ids"].flatten().tolist())
        found = dict(zip(letters, batch["loss_weights"].flatten().tolist(), strict=True))
        # the pieces are abcd, efg and h with its end; the first token of each is no target
        assert [found[letter] for letter in "abcdefghxyz"] == [0, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0, 0, 1, 1]


def test_a_row_of_weight_zero_is_dropped_and_counted(tokenizer):
    rows = [{"prompt": "a", "completion": "b", "weight": 0}, {"prompt": "c", "completion": "d"}]
    module = SFTDataModule(train=rows, tokenizer=tokenizer)
    batch = only(module)
    assert len(batch["labels"]) == 1
    assert "loss_weights" not in batch
    assert module.reports["train"]["dropped_without_target"] == 1


@pytest.mark.parametrize("weight", [-0.5, -1, math.nan, math.inf, 1e39, "0.5", [1.0], {}])
def test_other_weights_are_refused_by_row(make_tokenizer, tmp_path, weight):
    tokenizer = make_tokenizer("boundaries")
    good = {"messages": [USER, reply("e")]}
    rows = [good, {"messages": [USER, reply("e", weight=weight)]}]
    with pytest.raises(ValueError, match=r"train: row 1 of .*: column messages: message 1 has weight=.* finite number"):
        SFTDataModule(train=rows, tokenizer=tokenizer).setup("fit")
    for cls in (SFTDataModule, PretrainDataModule):
        with pytest.raises(
            ValueError, match=r"train: row 1 of .*: column weight must be a finite number of at least 0"
        ):
            cls(train=[good, good | {"weight": weight}], tokenizer=tokenizer).setup("fit")
    if weight == -0.5:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [good, good | {"weight": weight}])))
        with pytest.raises(ValueError, match=r"rows.jsonl:2: column weight must be .*found -0.5; rename"):
            SFTDataModule(train=str(tmp_path / "rows.jsonl"), tokenizer=tokenizer).setup("fit")


def test_weights_that_multiply_to_no_number_are_refused(make_tokenizer):
    rows = [{"messages": [USER, reply("e", weight=1e30)], "weight": 1e30}]
    with pytest.raises(ValueError, match=r"train: row 0 of .*weight times that of a message is no finite number"):
        SFTDataModule(train=rows, tokenizer=make_tokenizer("boundaries")).setup("fit")


def test_a_weighted_reply_is_refused_where_all_is_learnt_alike(make_tokenizer):
    tokenizer = make_tokenizer("boundaries")
    row = {"messages": [USER, reply("e", weight=0.5)]}
    for module in (SFTDataModule(train=[row], loss_on="all", tokenizer=tokenizer),
                   PretrainDataModule(train=[row], tokenizer=tokenizer)):  # fmt: skip
        with pytest.raises(ValueError, match=r"row 0 of .*has a weight, but here every token is learnt alike"):
            module.setup("fit")
    pair = {"prompt": [USER], "chosen": [reply("e", weight=0.5)], "rejected": [reply("f")]}
    with pytest.raises(
        ValueError, match=r"column chosen has a message that has the weight 0.5, but all of it is judged"
    ):
        PreferenceDataModule(train=[pair], tokenizer=tokenizer).setup("fit")
    with pytest.raises(ValueError, match="only an assistant's messages are learnt"):
        SFTDataModule(train=[{"messages": [{**USER, "weight": 0.5}, reply("e")]}], tokenizer=tokenizer).setup("fit")


def test_elsewhere_weight_is_a_column_like_any_other(tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "answer": "b", "weight": "heavy"}
    assert "loss_weights" not in only(PreferenceDataModule(train=[row], tokenizer=tokenizer))
    module = PromptDataModule(train=[{"prompt": "a", "weight": "heavy"}], tokenizer=tokenizer)
    assert only(module)["weight"] == ["heavy"]


def test_a_renamed_column_is_the_weight(tokenizer):
    row = {"prompt": "a", "completion": "b", "quality": 0.5, "weight": "heavy"}
    names = {"quality": "weight", "weight": "kind"}
    batch = only(SFTDataModule(train=[row], tokenizer=tokenizer, columns=names))
    assert batch["loss_weights"].tolist() == [[0, 0.5, 0.5]]


def test_the_fingerprint_sees_the_weights(tokenizer):
    def fingerprint(*weights, **options):
        rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in weights]
        module = SFTDataModule(train=rows, tokenizer=tokenizer, **options)
        return module.train_dataloader().dataset.fingerprint

    found = [fingerprint(*weights, packing=packing) for packing in (False, True)
             for weights in ((1, 1), (0.5, 1), (1, 0.5), (0.5, 0.5))]  # fmt: skip
    assert len(set(found)) == 8
    assert fingerprint(0.5, 1) == fingerprint(0.5, None)


def test_validation_and_carried_columns_have_weights_beside_them(tokenizer):
    rows = [{"prompt": "a", "completion": "b", "weight": 0.5, "teacher": "x"}]
    module = SFTDataModule(train=rows, validation=rows, tokenizer=tokenizer, carry=["teacher"])
    module.setup("fit")
    loader = module.val_dataloader()
    for batch in (only(module), next(iter(loader[0] if isinstance(loader, list) else loader))):
        assert batch["loss_weights"].tolist() == [[0, 0.5, 0.5]]
        assert batch["teacher"] == ["x"]
