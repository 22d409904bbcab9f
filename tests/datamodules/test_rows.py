"""Rows of every kind of source: any stretch of them, in and out of order, and what tells one source from another."""

import json
import pickle
import time
import zlib

import numpy as np
import pytest

from datamodules.checksums import joined_crc32
from datamodules.rows.rows import RenamedRows
from datamodules.rows.sources import open_source
from datamodules.rows.splits import take_share
from datamodules.tables import RowChecksum, column_checksum, columns_checksum

ROWS = [{"prompt": f"p {i},\n{'é' * (i % 3)}", "answer": str(i)} for i in range(2500)]


def jsonl(path, rows=ROWS):
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return str(path)


def files(folder):
    half = folder / "half"
    half.mkdir()
    jsonl(half / "a.jsonl", ROWS[:700]), jsonl(half / "b.jsonl", ROWS[700:])
    return str(half)


def parquet(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=1100)
    return str(folder / "rows.parquet")


def csv(folder):
    import csv

    with (folder / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "answer"])
        for number, row in enumerate(ROWS):
            writer.writerow(row.values())
            if number % 100 == 0:
                file.write("\r\n")
    return str(folder / "rows.csv")


def dataset(folder):
    import datasets

    return datasets.Dataset.from_list(ROWS)


def saved(folder):
    dataset(folder).save_to_disk(folder / "saved")
    return str(folder / "saved")


SOURCES = {
    "list": lambda folder: ROWS,
    "jsonl": lambda folder: jsonl(folder / "rows.jsonl"),
    "json": lambda folder: (folder / "rows.json").write_text(json.dumps(ROWS)) and str(folder / "rows.json"),
    "folder": files,
    "parquet": parquet,
    "csv": csv,
    "dataset": dataset,
    "saved": saved,
}


@pytest.fixture(params=SOURCES)
def rows(request, tmp_path):
    return open_source(SOURCES[request.param](tmp_path), "train")


def test_any_stretch_of_rows(rows):
    assert list(rows) == ROWS
    for start, stop in ((0, 1), (699, 701), (1023, 2200), (1100, 1100), (2400, 2500)):
        assert list(rows.between(start, stop)) == ROWS[start:stop]
        assert [rows[index] for index in range(start, stop)] == ROWS[start:stop]
    renamed = RenamedRows(take_share(rows, 0.3, 0, "validation"), {"answer": "solution"})
    every = list(renamed)
    assert every == [renamed[index] for index in range(len(renamed))]
    assert list(renamed.between(17, 400)) == every[17:400]


def test_rows_outlive_pickling(rows):
    assert rows[2000] == ROWS[2000]
    again = pickle.loads(pickle.dumps(rows))
    assert again[2001] == ROWS[2001]
    assert again.identity() == rows.identity()


def test_identity_is_plain_and_stays(rows, tmp_path):
    json.dumps(rows.identity())
    share = take_share(rows, 0.3, 0, "train")
    others = [rows, share, take_share(rows, 0.3, 0, "validation"), take_share(rows, 0.3, 1, "train")]
    others.append(RenamedRows(rows, {"answer": "solution"}))
    assert len({json.dumps(other.identity()) for other in others}) == len(others)
    assert take_share(rows, 0.3, 0, "train").identity() == share.identity()


def test_text_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \rthree\n\nfour" + "é\n".encode() + b"five")
    rows = open_source(str(path), "train")
    assert [row["text"] for row in rows] == ["one", " two ", "three", "fouré", "five"]
    assert [rows[i]["text"] for i in (4, 2, 0)] == ["five", "three", "one"]


def test_a_changed_source_is_another(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl(path)
    before = open_source(str(path), "train").identity()
    time.sleep(0.01)
    jsonl(path)
    assert open_source(str(path), "train").identity() != before
    assert open_source([{"a": 1}], "train").identity() != open_source([{"a": 2}], "train").identity()
    assert open_source([{"a": 1}], "train").identity() == open_source([{"a": 1}], "test").identity()
    assert open_source([{"a": object()}], "train").identity() is None
    one, two = ({"a": np.float32(1)}, {"a": np.float64(1)})
    assert open_source([one], "train").identity() != open_source([two], "train").identity()


def test_a_dataset_is_known_by_what_it_gives(tmp_path):
    whole = dataset(tmp_path)
    identities = [
        open_source(found, "train").identity()
        for found in (whole, whole.select(range(100)), whole.shuffle(seed=0), whole.remove_columns("answer"))
    ]
    assert len({json.dumps(identity) for identity in identities}) == 4
    assert open_source(whole.select(range(100)), "train").identity() == identities[1]
    assert open_source(whole.with_format("numpy"), "train").identity() != identities[0]
    assert open_source(whole.with_transform(lambda rows: rows), "train").identity() is None


def test_a_file_that_was_cut_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = open_source(jsonl(path), "train")
    path.write_text("\n".join(path.read_text().splitlines()[:10]))
    with pytest.raises(ValueError, match=r"rows.jsonl:\d+: the file ends here"):
        list(rows)


def test_parquet_is_read_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = open_source(parquet(tmp_path), "train")
    assert (rows[2400], len(list(rows))) == (ROWS[2400], 2500)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_no_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"rows.parquet is not a readable Parquet file"):
        open_source(str(tmp_path / "rows.parquet"), "train")


def test_checksums_of_parts_are_that_of_the_whole():
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, second = (generator.bytes(int(generator.integers(0, 5000))) for _ in range(2))
        assert joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
    whole, parts = RowChecksum(), [RowChecksum(), RowChecksum()]
    for number, row in enumerate(ROWS):
        whole.add(row)
        parts[number > 900].add(row)
    parts[0].append(parts[1])
    assert (parts[0].value, parts[0].length) == (whole.value, whole.length)


def test_columns_have_the_checksum_of_their_json():
    columns = {"a": ["x", None, 3], 'b"é': [[1.5], {"k": "é"}, True]}
    expected = zlib.crc32(json.dumps(columns).encode(), 77)
    assert columns_checksum({name: column_checksum(values) for name, values in columns.items()}, 77) == expected
    assert column_checksum([{(1, 2): object()}]) is not None  # of objects only the type counts
    loop: list = []
    loop.append(loop)
    assert columns_checksum({"a": column_checksum(loop)}, 77) == 77
