import csv
import json
import logging

import pytest
from torch.utils.data import Dataset

from datamodules import PreferenceDataModule, PretrainDataModule, PromptDataModule, SFTDataModule, UnpairedDataModule
from datamodules.rows.rows import JsonlRows
from datamodules.rows.sources import check_sources, is_hub_id, open_source

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\n", "n": 2, "extra": [1]}]


class Own(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[index]


def jsonl(path, rows=ROWS, between="\n"):
    path.write_text(between.join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_jsonl_stays_on_disk(tmp_path):
    rows = open_source(str(jsonl(tmp_path / "a.jsonl", between="\n\n")), "train")
    assert isinstance(rows, JsonlRows)
    assert [rows[1], rows[0]] == ROWS[::-1]
    assert list(rows) == ROWS
    assert rows.where(1).endswith("a.jsonl:3")


@pytest.mark.parametrize("kind", ["json", "json lines", "parquet", "saved", "saved dict", "folder", "dataset", "list"])
def test_every_kind_of_source(tmp_path, kind):
    import datasets

    same = [{"prompt": "a", "n": "1"}, {"prompt": "b", "n": "2"}]
    table = datasets.Dataset.from_list(same)
    source = str(tmp_path / "data")
    if kind == "json":
        source += ".json"
        (tmp_path / "data.json").write_text(json.dumps(same, indent=1))
    elif kind == "json lines":
        source += ".json"
        jsonl(tmp_path / "data.json", same)
    elif kind == "parquet":
        source += ".parquet"
        table.to_parquet(source)
    elif kind == "saved":
        table.save_to_disk(source)
    elif kind == "saved dict":
        datasets.DatasetDict({"train": table.select([0]), "validation": table}).save_to_disk(source)
    elif kind == "folder":
        (tmp_path / "data").mkdir()
        jsonl(tmp_path / "data" / "0.jsonl", same[:1])
        jsonl(tmp_path / "data" / "1.jsonl", same[1:])
    elif kind == "dataset":
        source = table
    else:
        source = same
    rows = open_source(source, "validation")
    assert [rows[0], rows[1]] == list(rows) == same
    if kind == "saved dict":
        assert len(open_source(source, "train")) == 1
        assert len(open_source(source + ":validation", "train")) == 2
        with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
            open_source(source, "test")


def test_csv_values_stay_strings(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\n"1,0",007\n\nb,1.0\n')
    rows = open_source(str(tmp_path / "a.csv"), "train")
    assert list(rows) == [{"prompt": "1,0", "answer": "007"}, {"prompt": "b", "answer": "1.0"}]


def test_csv_takes_long_fields(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "a " * 100_000 + "\n")
    assert len(open_source(str(tmp_path / "a.csv"), "train")[0]["text"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t")])
def test_labels_of_tables_of_text(tmp_path, tokenizer, suffix, between):
    path = tmp_path / f"a{suffix}"
    rows = [("prompt", "completion", "label"), ("1", "2", "true"), ("1", "3", "False"), ("1", "4", "TRUE")]
    path.write_text("".join(between.join(row) + "\n" for row in rows))
    batch = next(iter(UnpairedDataModule(train=str(path), tokenizer=tokenizer, shuffle=False).train_dataloader()))
    assert batch["label"].tolist() == [True, False, True]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_lines_end_where_lines_end(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(f"\ufeffa\u2028b\x0cc\x85{end}d{end}{end}".encode())
    assert [row["text"] for row in open_source(str(tmp_path / "a.txt"), "train")] == ["a\u2028b\x0cc\x85", "d"]


def test_text_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(open_source(str(tmp_path / "a.txt"), "train")) == [{"text": "one"}, {"text": "two"}]


def test_torch_dataset():
    rows = open_source(Own(), "train")
    assert list(rows) == ROWS
    assert rows.where(1) == "row 1 of the Own given as train"


def test_hub_ids(tmp_path, monkeypatch):
    assert is_hub_id("owner/name")
    assert is_hub_id("owner/name@config:test")
    assert not is_hub_id("./name")
    assert not is_hub_id("data/rows.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert not is_hub_id("owner")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON: Expecting value at column 6"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 1', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: holds a JSON list; each line must hold one JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"\n", "a.jsonl' has no rows"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"a\.json:2: not valid JSON"),
        ("a.json", b"3", "holds a JSON int; a list of objects is needed"),
        ("a.json", b"[3]", "row 0 of .* is a int; every row must be a mapping"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2: the key 'a' stands twice in one object"),
        ("a.jsonl", b'{"a": NaN}\n', r"a\.jsonl:1: NaN is no JSON value"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: .*digits"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"}\n", r"a\.jsonl:1: the JSON is nested too deeply"),
        ("a.json", b'[{"a": 1},\n{"b": {"a": 1, "a": 2}}]', r"a\.json:2: the key 'a' stands twice in one object"),
        ("a.json", b'[{"a": 1},\n\n{"a": -Infinity}]', r"a\.json:3: -Infinity is no JSON value"),
        ("a.csv", b"a,b\n1,2\n1\n", r"a\.csv:3: 1 fields, the header has 2"),
        ("a.csv", b"a,b\n", "has no rows"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the header names \['a'\] more than once"),
        ("a.csv", b"a\ncaf\xe9\n", r"a\.csv:2: not UTF-8 text \(invalid continuation byte at byte 3\)"),
        ("a.tsv", b"\xef\xbb\xbfa\ncaf\xe9\n", r"a\.tsv:2: not UTF-8 text"),
        ("a.txt", b"b\n\ncaf\xe9\n", r"a\.txt:3: not UTF-8 text"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"a\.json:1: not UTF-8 text"),
        ("a.parquet", b"PAR1", "is not a readable Parquet file"),
        ("a.xlsx", b"", r"unknown kind of file '\.xlsx'; known: \.jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(tmp_path / name), "train"))


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match=r"train='./none.jsonl': no such file or folder"):
        open_source("./none.jsonl", "train")
    with pytest.raises(ValueError, match="train='nobody/nothing' is no file or folder here, and loading it as a hub"):
        open_source("nobody/nothing", "train")
    with pytest.raises(ValueError, match="train=generator cannot be used: a source needs __len__"):
        open_source((row for row in ROWS), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"hold data files of one kind .* found none"):
        open_source(str(tmp_path / "empty"), "train")
    with pytest.raises(ValueError, match="has no rows"):
        open_source([], "train")


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train-00000-of-00002", "my_dev_1", "Test")])
@pytest.mark.parametrize("below", ["", "data", "by split"])
def test_a_folder_gives_each_split_its_own_files(tmp_path, names, below):
    for name in names:
        folder = tmp_path / (name if below == "by split" else below)
        folder.mkdir(exist_ok=True)
        jsonl(folder / ("part.jsonl" if below == "by split" else f"{name}.jsonl"), [{"text": name}])
    for split, name in zip(("train", "validation", "test"), names, strict=True):
        assert [row["text"] for row in open_source(str(tmp_path), split)] == [name]
    assert [row["text"] for row in open_source(str(tmp_path), "predict")] == [names[2]]
    assert [row["text"] for row in open_source(f"{tmp_path}:dev", "train")] == [names[1]]


def test_a_folder_without_a_file_for_the_split(tmp_path, caplog):
    jsonl(tmp_path / "train.jsonl")
    jsonl(tmp_path / "more.jsonl")
    with pytest.raises(ValueError, match=r"no file for 'test'; by their names it has \{'train': \['train.jsonl'\]\}"):
        open_source(str(tmp_path), "test")
    open_source(str(tmp_path), "train")
    assert "left out, since their names name no split: ['more.jsonl']" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"n": "prompt"}, r"row 0 of .* already has a column 'prompt', which would be lost; rename it too"),
        ({"n": "m", "prompt": "m"}, "two columns would be called 'm'"),
    ],
)
def test_renaming_loses_no_column(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(train=[{"prompt": "a", "n": "b"}], tokenizer=tokenizer, columns=columns).setup("fit")


def test_columns_may_change_places(tokenizer):
    rows = [{"prompt": "a", "n": "b"}]
    data = PromptDataModule(train=rows, tokenizer=tokenizer, columns={"n": "prompt", "prompt": "n"})
    batch = next(iter(data.train_dataloader()))
    assert (batch["prompt"], batch["n"]) == (["b"], ["a"])


@pytest.mark.parametrize("module", [SFTDataModule, PretrainDataModule, PreferenceDataModule, PromptDataModule])
def test_a_share_of_the_training_rows_for_validation(tokenizer, module, caplog):
    rows = [{"text": f"{i} .", "prompt": f"{i} ", "completion": ".", "chosen": "a", "rejected": "b"} for i in range(40)]

    def texts(data, split):
        data.setup(split)
        loader = data.val_dataloader() if split == "validate" else data.train_dataloader()
        keys = ("prompts", "prompt_input_ids", "input_ids")
        ids = [row for batch in loader for row in batch[next(key for key in keys if key in batch)]]
        return {tokenizer.decode(row).split()[0] + tokenizer.decode(row).split()[1] for row in ids}

    options = {
        "tokenizer": tokenizer,
        "validation": 0.25,
        **({} if module is not PretrainDataModule else {"packing": False}),
    }
    with caplog.at_level(logging.INFO, logger="datamodules"):
        data = module(train=rows, **options)
        data.setup("fit")
    assert "validation: 10 of 40 rows of train" in caplog.text
    assert (data.reports["train"]["rows"], data.reports["validation"]["rows"]) == (30, 10)
    alone = module(train=rows, **options)
    alone.setup("validate")
    assert alone.reports["validation"] == data.reports["validation"]
    first, second = ([row["text"] for row in data.splits.rows(split)] for split in ("train", "validation"))
    assert sorted([*first, *second]) == sorted(row["text"] for row in rows)
    assert [row["text"] for row in alone.splits.rows("validation")] == second
    other = module(train=rows, **options, seed=1)
    assert [row["text"] for row in other.splits.rows("validation")] != second


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), 1, 0, True])
def test_what_is_no_share(tokenizer, share):
    with pytest.raises(ValueError, match=r"validation=.*; a share of the training rows must be between 0 and 1"):
        SFTDataModule(train=ROWS, validation=share, tokenizer=tokenizer)


def test_a_share_of_nothing(tokenizer):
    with pytest.raises(ValueError, match=r"validation=0\.5 is a share of the training rows, but train=None"):
        SFTDataModule(validation=0.5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="has 1 row, so there is none to split off"):
        SFTDataModule(train=ROWS[:1], validation=0.5, tokenizer=tokenizer).setup("fit")


def test_paths_are_looked_for_without_opening_them(tmp_path):
    jsonl(tmp_path / "here.jsonl")
    sources = {"train": str(tmp_path / "here.jsonl"), "validation": 0.1, "test": str(tmp_path / "gone.jsonl")}
    check_sources(sources, ("train", "validation"))
    with pytest.raises(ValueError, match=r"test='.*gone.jsonl': no such file or folder; .* holds \['here.jsonl'\]"):
        check_sources(sources, ("test",))
    for number in range(10):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(ValueError, match=r"did you mean 'here.jsonl'\?; .* holds \['0.txt'.*\] and 1 more$"):
        check_sources({"test": str(tmp_path / "hree.jsonl")}, ("test",))


def test_a_share_is_told_once(caplog, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 4
    data = SFTDataModule(train=rows, validation=0.5, tokenizer=tokenizer)
    with caplog.at_level("INFO"):
        data.setup("fit")
        data.first_prompts(1)
    assert caplog.text.count("by validation=0.5 and seed=0") == 2  # of train and of validation


def test_rows_for_validation_are_pointed_to(tmp_path, tokenizer, caplog):
    for name in ("train", "validation"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a", "completion": name}])
    with caplog.at_level(logging.INFO, logger="datamodules"):
        SFTDataModule(train=str(tmp_path), tokenizer=tokenizer).setup("fit")
    assert f"has rows for validation, too; validation='{tmp_path}' uses them" in caplog.text


def test_mostly_truncated_rows_are_a_warning(tokenizer, caplog):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (2, 20, 30)]
    SFTDataModule(train=rows, tokenizer=tokenizer, max_length=8).setup("fit")
    assert "2 of 3 rows are longer than max_length=8; max_length=32 holds" in caplog.text
