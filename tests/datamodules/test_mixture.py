"""A mixture's batches against those of its sources, its options, and what it says when they do not fit together."""

import itertools
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from datamodules import (
    CacheOptions,
    MixtureDataModule,
    MixtureSource,
    PreferenceDataModule,
    PretrainDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from datamodules.tasks import AdditionPrompts

SUMS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(10)]
WORDS = [{"question": f"say {word}:", "completion": word} for word in ("ab", "cd", "efg", "h")]
PAIRS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(10)]
ROWS = {
    SFTDataModule: SUMS,
    PretrainDataModule: [{"text": f"{i}+1={i + 1}"} for i in range(10)],
    PreferenceDataModule: PAIRS,
    UnpairedDataModule: PAIRS,
    PromptDataModule: SUMS,
}


def batches(data, epochs=1):
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        yield from loader


def equal(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def two(tokenizer, first=None, second=None, cls=PromptDataModule, rows=(SUMS, WORDS), **options):
    """A mixture of two sources; `first` and `second` are options of theirs."""
    parts = {
        name: MixtureSource(cls(train=own), **(more or {}))
        for name, own, more in zip(("sums", "words"), rows, (first, second), strict=True)
    }
    return MixtureDataModule(**{"sources": parts, "tokenizer": tokenizer, "batch_size": 4, **options})


@pytest.mark.parametrize("replaced", [{}, {"shuffle": False, "drop_last": True}])
@pytest.mark.parametrize("cls", ROWS)
def test_one_source_gives_its_own_batches(tokenizer, cls, replaced):
    options = {"tokenizer": tokenizer, "batch_size": 3, "seed": 5, **replaced}
    plain = cls(train=ROWS[cls], max_length=16, **options)
    mixed = MixtureDataModule(sources={"only": cls(train=ROWS[cls], max_length=16)}, **options)
    for one, other in zip(batches(plain, 3), batches(mixed, 3), strict=True):
        assert set(other.pop("source_name")) == {"only"}
        assert one.keys() == other.keys()
        assert all(equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("cls", ROWS)
def test_two_halves_hold_the_rows_of_the_whole(tokenizer, cls):
    """Once an epoch each, every batch half and half."""

    def rows(batch):
        keys = [key for key in batch if key.endswith(("ids", "prompts"))]
        masks = [
            batch.get(key.replace("input_ids", "attention_mask").replace("prompts", "prompt_attention_mask"))
            for key in keys
        ]
        return sorted(
            tuple(tuple(ids[n][mask[n].bool()].tolist()) for ids, mask in zip(map(batch.get, keys), masks, strict=True))
            for n in range(len(batch[keys[0]]))
        )

    more = {"packing": False} if cls is PretrainDataModule else {}
    plain = cls(train=ROWS[cls], tokenizer=tokenizer, **more)
    halves = {"first": cls(train=ROWS[cls][:5], **more), "second": cls(train=ROWS[cls][5:], **more)}
    mixed = MixtureDataModule(sources=halves, tokenizer=tokenizer, batch_size=2)
    found = list(batches(mixed))
    assert sorted(row for batch in found for row in rows(batch)) == sorted(
        row for batch in batches(plain) for row in rows(batch)
    )
    assert all(set(batch["source_name"]) == {"first", "second"} for batch in found)


def test_batches_say_what_their_sources_ask_for(tokenizer):
    asked = {"loss_weight": 0.5, "rewards": ["right", "short"], "max_completion_length": 7}
    data = two(tokenizer, {"weight": 3}, {"weight": 1, **asked})
    for batch in batches(data):
        for number, name in enumerate(batch["source_name"]):
            words = name == "words"
            assert batch["source_weights"][number] == (0.5 if words else 1.0)
            assert batch["completion_limits"][number] == (7 if words else None)
            assert batch["reward_names"][number] == (("right", "short") if words else None)
            assert (batch["question"][number] is not None) == words
        assert batch["source_weights"].dtype == torch.float32
    first = next(batches(two(tokenizer)))
    assert not {"source_weights", "completion_limits", "reward_names"} & first.keys()


@pytest.mark.parametrize(
    ("first", "second", "options", "expected", "rows"),
    [
        ({"weight": 3}, {"weight": 1}, {}, 0.75, 14),
        ({}, {}, {}, 10 / 14, 14),
        ({"epochs": 1}, {"epochs": 2.5}, {}, 0.5, 20),
        ({}, {"epochs": 5}, {}, 10 / 30, 30),
        ({}, {}, {"temperature": 2}, 10**0.5 / (10**0.5 + 2), 14),
        ({}, {}, {"temperature": 1}, 10 / 14, 14),
    ],
)
def test_shares_and_the_length_of_an_epoch(tokenizer, first, second, options, expected, rows):
    data, seen, total = two(tokenizer, first, second, **options), 0, 0
    for batch in batches(data, 30):
        seen, total = seen + batch["source_name"].count("sums"), total + len(batch["source_name"])
        assert abs(seen - expected * total) < 1
    assert total == 30 * rows


def test_index_is_one_number_a_row(tokenizer):
    data = two(tokenizer, cls=UnpairedDataModule, rows=(PAIRS, PAIRS[:4]))
    index = [number for batch in batches(data) for number in batch["index"]]
    assert sorted(index) == list(range(20 + 8))
    names = {
        number: name
        for batch in batches(data)
        for number, name in zip(batch["index"], batch["source_name"], strict=True)
    }
    assert all((number < 20) == (name == "sums") for number, name in names.items())


def test_packed_and_single_rows_stand_in_one_batch(tokenizer):
    """And weighted ones beside others: the latter get the positions and weights that they have without."""
    weighted = [row | {"weight": 0.5} for row in SUMS]
    packed = SFTDataModule(train=weighted, packing=True, max_length=20)
    data = MixtureDataModule(sources={"packed": packed, "single": SFTDataModule(train=WORDS)}, tokenizer=tokenizer)
    most = {"packed": 0, "single": 0}
    for batch in batches(data):
        for number, name in enumerate(batch["source_name"]):
            kept = batch["attention_mask"][number].bool()
            learnt = batch["labels"][number][kept] != -100
            assert torch.equal(batch["loss_weights"][number][kept], learnt.float() * (0.5 if name == "packed" else 1))
            starts = (batch["position_ids"][number][kept] == 0).sum()
            most[name] = max(most[name], int(starts))
            if name == "single":
                assert batch["position_ids"][number][kept].tolist() == list(range(int(kept.sum())))
    assert most == {"packed": 3, "single": 1}


def test_a_loss_mask_that_one_source_lacks(make_tokenizer):
    call = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    said = [{"role": "user", "content": "x"}]
    masked = [{"prompt": said, "chosen": call, "rejected": call[:1]}]
    data = two(make_tokenizer("boundaries"), cls=PreferenceDataModule, rows=(PAIRS, masked))
    for batch in batches(data):
        for number, name in enumerate(batch["source_name"]):
            mask, real = batch["chosen_loss_mask"][number], batch["chosen_attention_mask"][number]
            assert torch.equal(mask, real) == (name == "sums")


def test_a_margin_that_one_source_lacks_is_refused(tokenizer):
    rows = (PAIRS, [row | {"margin": 1.0} for row in PAIRS])
    with pytest.raises(ValueError, match=r"source 'sums' has no margin, and source 'words' has one; give all rows"):
        next(batches(two(tokenizer, cls=PreferenceDataModule, rows=rows)))


def test_columns_that_are_carried(tokenizer):
    teachers = [row | {"teacher": "a"} for row in SUMS]
    sources = {"sums": SFTDataModule(train=teachers, carry=["teacher"]), "words": SFTDataModule(train=WORDS)}
    for batch in batches(MixtureDataModule(sources=sources, tokenizer=tokenizer)):
        expected = ["a" if name == "sums" else None for name in batch["source_name"]]
        assert batch["teacher"] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_any_batch(tokenizer, workers):
    def make(**options):
        return two(tokenizer, {"weight": 2}, {"weight": 3}, num_workers=workers, **options).train_dataloader()

    whole = make()
    whole.sampler.set_epoch(2)
    iterator = iter(whole)
    first = [next(iterator), next(iterator)]
    state, rest = whole.state_dict(), list(iterator)
    assert len(first + rest) == 4
    fresh = make()
    fresh.load_state_dict(state)
    fresh.sampler.set_epoch(2)
    again = list(fresh)
    assert len(again) == len(rest)
    for one, other in zip(rest, again, strict=True):
        assert all(equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("first", "rows", "name"),
    [
        ({"weight": 3}, (SUMS, WORDS), "shares was"),
        ({"weight": 2}, (SUMS[:9], WORDS), "num_rows was 14"),
        ({"weight": 2}, (SUMS, [*WORDS[:3], {"question": "say h:", "completion": "i"}]), "fingerprint was"),
    ],
)
def test_another_mixture_is_refused(tokenizer, first, rows, name):
    state = two(tokenizer, {"weight": 2}, {"weight": 3}).train_dataloader().state_dict()
    other = two(tokenizer, first, {"weight": 3}, rows=rows).train_dataloader()
    with pytest.raises(ValueError, match=f"cannot resume the training data: {name}"):
        other.load_state_dict(state)


def test_a_loader_a_source_in_validation_and_test(tokenizer):
    sources = {
        "sums": PromptDataModule(train=SUMS, validation=0.2, test=SUMS[:3]),
        "words": PromptDataModule(train=WORDS, validation=WORDS[:2], predict=WORDS),
        "more": PromptDataModule(validation=SUMS[:1]),
    }
    data = MixtureDataModule(sources=sources, tokenizer=tokenizer)
    data.setup("fit")
    found = [[name for batch in loader for name in batch["source_name"]] for loader in data.val_dataloader()]
    assert found == [["sums"] * 2, ["words"] * 2, ["more"]]
    index = [number for loader in data.val_dataloader() for batch in loader for number in batch["index"]]
    assert sorted(index) == list(range(5))
    assert [batch["source_name"] for batch in data.test_dataloader()] == [["sums"] * 3]
    assert [batch["source_name"] for batch in data.predict_dataloader()] == [["words"] * 4]
    assert {name for batch in batches(data) for name in batch["source_name"]} == {"sums", "words"}
    assert data.reports["train"]["rows"] == 8 + 4
    assert data.reports["train/sums"]["rows"] == 8
    assert data.reports["validation"]["kept"] == 5


def test_without_validation_rows_there_is_no_validation_loop(tokenizer):
    from lightning.pytorch.utilities.model_helpers import is_overridden

    with_rows = MixtureDataModule(sources={"a": PromptDataModule(train=SUMS, validation=0.5)}, tokenizer=tokenizer)
    assert is_overridden("val_dataloader", with_rows)
    assert not is_overridden("val_dataloader", two(tokenizer))
    with pytest.raises(ValueError, match="test=None; give MixtureDataModule a source for test"):
        two(tokenizer).test_dataloader()


def test_the_first_prompts_are_of_all_sources(tokenizer):
    sources = {name: PromptDataModule(validation=rows) for name, rows in (("sums", SUMS), ("words", WORDS))}
    first = MixtureDataModule(sources=sources, tokenizer=tokenizer).first_prompts(5)
    assert first["source_name"] == ["sums"] * 3 + ["words"] * 2
    assert len(set(first["index"])) == 5
    assert two(tokenizer).first_prompts(5) is None


def test_one_tokenizer_with_the_templates_of_the_sources(make_tokenizer, templates, read):
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    plain = make_tokenizer()
    shared = {name: SFTDataModule(train=chats, chat_template=templates["boundaries"]) for name in ("one", "two")}
    data = MixtureDataModule(sources=shared, tokenizer=plain)
    assert data.tokenizer.chat_template == templates["boundaries"]
    assert data.stop_token_ids == (0, 4)
    apart = {
        "one": SFTDataModule(train=chats, chat_template=templates["boundaries"]),
        "two": SFTDataModule(train=SUMS),
    }
    data = MixtureDataModule(sources=apart, tokenizer=plain)
    assert data.tokenizer is plain
    assert data.stop_token_ids == (0, 4)
    text = {
        name: read(plain, ids[mask.bool()])
        for batch in batches(data)
        for name, ids, mask in zip(batch["source_name"], batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert text["one"].startswith("<|im_start|>user")
    assert "<|im_start|>" not in text["two"]


def test_a_tokenizer_of_a_source_is_that_of_all_or_refused(make_tokenizer):
    one, same, other = make_tokenizer(), make_tokenizer("boundaries"), make_tokenizer(bos=True)
    sources = {"a": SFTDataModule(train=SUMS, tokenizer=one), "b": SFTDataModule(train=WORDS)}
    assert MixtureDataModule(sources=sources).tokenizer is one
    sources["b"] = SFTDataModule(train=WORDS, tokenizer=same)
    assert MixtureDataModule(sources=sources).stop_token_ids == (0,)
    sources["b"] = SFTDataModule(train=WORDS, tokenizer=other)
    with pytest.raises(ValueError, match="source 'b' has another tokenizer"):
        MixtureDataModule(sources=sources).setup("fit")
    with pytest.raises(ValueError, match="source 'b' has another tokenizer"):
        MixtureDataModule(sources=sources, tokenizer=one).setup("fit")

    def tasks():
        rows = {f"digits-{n}": AdditionPrompts(split="train", size=2, digits=n, chat=False) for n in (1, 2)}
        return {name: PromptDataModule(train=own) for name, own in rows.items()}

    assert len(next(batches(MixtureDataModule(sources=tasks())))["source_name"]) == 4
    assert MixtureDataModule(sources=tasks(), tokenizer=one).tokenizer is one
    with pytest.raises(ValueError, match="tokenizer=None"):
        MixtureDataModule(sources={"a": SFTDataModule(train=SUMS)}).setup("fit")


def test_an_error_names_its_source(tokenizer):
    data = two(tokenizer, cls=SFTDataModule, rows=(SUMS, [*WORDS, {"question": "a", "completion": None}]))
    with pytest.raises(ValueError, match=r"^source 'words': train: row 4"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"^source 'words': train='nowhere.jsonl': no such file"):
        two(tokenizer, rows=(SUMS, "nowhere.jsonl")).setup("fit")


@pytest.mark.parametrize("name", ["source_name", "source_weights", "completion_limits", "reward_names"])
def test_a_column_of_a_name_that_batches_use_is_refused(tokenizer, name):
    rows = [row | {name: 1} for row in SUMS]
    with pytest.raises(ValueError, match=rf"source 'sums': train: .* has the columns \['{name}'\], which batches use"):
        two(tokenizer, rows=(rows, WORDS)).setup("fit")
    with pytest.raises(ValueError, match=rf"carry=.*batches use \['{name}'\]"):
        SFTDataModule(train=rows, carry=[name])


def test_what_is_logged(tokenizer, caplog):
    with caplog.at_level("INFO", logger="datamodules"):
        two(tokenizer, {"weight": 1}, {"weight": 1}).setup("fit")
    assert "a mixture, 14 rows an epoch: sums 50.0%" in caplog.text
    assert "words 50.0% of the rows (1.75 passes an epoch)" in caplog.text


def test_ranks_deal_the_batches_of_one_process(tokenizer):
    """Two ranks with half the batch size together give the batches of one process."""
    from types import SimpleNamespace

    def rows(size, replicas, rank):
        data = two(tokenizer, {"weight": 2}, {"weight": 1}, batch_size=size)
        progress = SimpleNamespace(current=SimpleNamespace(ready=0, processed=0))
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank},
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            progress_bar_callback=None,
            overfit_batches=0,
        )
        return [batch["index"] for batch in batches(data, 2)]

    one, halves = rows(4, 1, 0), [rows(2, 2, rank) for rank in range(2)]
    for whole, first, second in zip(one, *halves, strict=True):
        assert whole == [n for pair in itertools.zip_longest(first, second) for n in pair if n is not None]


@pytest.mark.parametrize("cls", ROWS)
def test_tables_on_disk_give_the_same_batches(tokenizer, tmp_path, cls):
    def make(cache):
        halves = {"first": cls(train=files[0], cache=cache), "second": cls(train=files[1], cache=cache)}
        return MixtureDataModule(sources=halves, tokenizer=tokenizer, batch_size=3)

    files = [str(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    for file, rows in zip(files, (ROWS[cls][:6], ROWS[cls][6:]), strict=True):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cached, kept = CacheOptions(folder=str(tmp_path / "cache"), least_rows=1, num_proc=1), make(None)
    for data in (make(cached), make(cached)):
        data.prepare_data()
        data.setup("fit")
        assert data.train_dataloader().state_dict() == kept.train_dataloader().state_dict()
        for one, other in zip(batches(data), batches(kept), strict=True):
            assert one.keys() == other.keys()
            assert all(equal(value, other[key]) for key, value in one.items())
    assert len(list((tmp_path / "cache").rglob("*"))) > 1


def test_the_page_says_what_works(tokenizer):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("\n## Mixtures\n")[1].split("\n## ")[0]
    [code] = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    found = {}
    exec(code.replace('"my-model"', "tokenizer"), {"tokenizer": tokenizer}, found)
    shares = [
        batch["source_name"].count("sums") / 8 for batch in batches(found["data"]) if len(batch["source_name"]) == 8
    ]
    assert set(shares) == {0.75}
    table = page.split("| option of a source |")[1].split("\n\n")[0]
    told = {line.split("`")[1] for line in table.splitlines()[2:]}
    assert told == {field.name for field in fields(MixtureSource)}
