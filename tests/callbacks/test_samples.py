"""Samples as rows and as a page: what is embedded, which steps stay, and tables for other loggers."""

import inspect
import json
import re

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from alignment_modules.callbacks import SampleTable
from alignment_modules.callbacks.samples import Page, read_rows, write_page
from alignment_modules.callbacks.samples.tables import log_samples, text_table

EVIL = "</script><script>document.title='ran'</script><!--\u2028&amp;<img src=x onerror=alert(1)>"


def row(step=1, prompt=0, sample=0, **more):
    return {"step": step, "id": f"{step - 1}/{prompt}/{sample}", "prompt": "1+1=", "completion": "2"} | more


def embedded(path, name="rows"):
    """What a page's script element holds."""
    return re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', path.read_text(), re.DOTALL)[1]


def steps(path):
    return sorted({row["step"] for row in json.loads(embedded(path))})


def test_nothing_that_is_written_can_leave_its_element(tmp_path):
    path = tmp_path / "deep" / "page.html"
    write_page([row(completion=EVIL, tokens=[EVIL], **{"<b>": EVIL})], path, title=EVIL)
    text = path.read_text()
    assert text.count("<script") == 4
    assert "<img" not in text
    assert "\u2028" not in text
    (found,) = json.loads(embedded(path))
    assert found["completion"] == found["<b>"] == EVIL
    assert json.loads(embedded(path, "lists")) == {"tokens": [EVIL]}
    assert json.loads(embedded(path, "about"))["title"] == EVIL
    assert "default-src 'none'" in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3\.org)", text)


def test_lists_stand_apart_from_rows_and_are_counted(tmp_path):
    write_page([row(tokens=["a", "b"], sampled_logps=[-1.0, float("nan")]), row(sample=1)], tmp_path / "a.html")
    with_tokens, without = json.loads(embedded(tmp_path / "a.html"))
    assert with_tokens["tokens"] == 2
    assert "tokens" not in without
    assert embedded(tmp_path / "a.html", "lists").split("\n") == [
        '{"tokens": ["a", "b"], "sampled_logps": [-1.0, null]}',
        "{}",
    ]
    assert json.loads(embedded(tmp_path / "a.html", "about"))["lists"] == ["sampled_logps", "tokens"]


def test_steps_that_lie_closest_to_others_are_left_out(tmp_path):
    page = Page(max_rows=8)
    for step in range(1, 10):
        page.add([row(step, sample=sample) for sample in range(2)])
        page.write(tmp_path / "a.html")
    assert steps(tmp_path / "a.html") == [1, 5, 8, 9]
    assert json.loads(embedded(tmp_path / "a.html", "about"))["thinned"] is True
    write_page([row(3, sample=sample) for sample in range(20)], tmp_path / "b.html", max_rows=8)
    assert len(json.loads(embedded(tmp_path / "b.html"))) == 20  # the newest step is whole
    with pytest.raises(ValueError, match="max_rows=0 must be an integer from 1"):
        Page(0)


def test_large_rows_are_thinned_too(tmp_path, monkeypatch):
    monkeypatch.setattr("alignment_modules.callbacks.samples.page._MAX_CHARACTERS", 5000)
    write_page([row(step, completion="x" * 1000) for step in range(1, 10)], tmp_path / "a.html")
    assert 1 < len(steps(tmp_path / "a.html")) < 5


def test_a_row_takes_the_place_of_an_earlier_one_with_its_id(tmp_path):
    write_page([row(reward=0.0), row(reward=1.0)], tmp_path / "a.html")
    assert [found["reward"] for found in json.loads(embedded(tmp_path / "a.html"))] == [1.0]


def test_a_failed_write_leaves_the_former_page(tmp_path):
    write_page([row()], tmp_path / "a.html")
    (tmp_path / ".a.html.part").mkdir()
    with pytest.raises(OSError, match=r"cannot write '.*a.html'"):
        write_page([row(2)], tmp_path / "a.html")
    assert steps(tmp_path / "a.html") == [1]


def test_rows_are_read_and_mistakes_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one\u2028line"}\n{"a": 2}\n{"a"', encoding="utf-8")
    assert read_rows(path) == [{"a": "one\u2028line"}, {"a": 2}]
    path.write_text('{"a": 1}\nnone\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: not valid JSON: .*each line must hold one sample"):
        read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"a.jsonl:1: holds a JSON list"):
        read_rows(path)


ROWS = [
    {"id": "0/0/0", "prompt": "a", "completion": "x\ny", "reward": 1.0, "advantage": float("nan"), "tokens": ["x"]},
    {"id": "0/0/1", "prompt": "a", "completion": "|z", "reward": 0.0, "advantage": -1.0, "tokens": ["|", "z"]},
]


def test_weights_and_biases_gets_a_table(monkeypatch):
    calls = []

    class Fake(WandbLogger):
        def __init__(self):
            pass

        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
            calls.append((key, columns, data, step))

    assert list(inspect.signature(WandbLogger.log_table).parameters) == list(
        inspect.signature(Fake.log_table).parameters
    )
    log_samples(Fake(), ROWS, 7, 100)
    columns = ["id", "prompt", "completion", "reward", "advantage"]
    data = [["0/0/0", "a", "x\ny", 1.0, None], ["0/0/1", "a", "|z", 0.0, -1.0]]
    assert calls == [("samples", columns, data, 7)]


def test_mlflow_gets_a_table():
    calls = []

    class Client:
        def log_table(self, run_id, data, artifact_file):
            calls.append((run_id, data, artifact_file))

    class Fake(MLFlowLogger):
        experiment, run_id = Client(), "run"

        def __init__(self):
            pass

    log_samples(Fake(), ROWS, 7, 100)
    table = {
        "step": [7, 7],
        "id": ["0/0/0", "0/0/1"],
        "prompt": ["a", "a"],
        "completion": ["x\ny", "|z"],
        "reward": [1.0, 0.0],
        "advantage": [None, -1.0],
    }
    assert calls == [("run", table, "samples.json")]


def test_a_run_writes_the_page_and_a_resumed_run_goes_on_with_it(tmp_path, boring, make_trainer, loader):
    trainer = make_trainer(SampleTable(every_n_steps=3, rows=2))
    trainer.fit(boring(), loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert steps(tmp_path / "samples.html") == [1, 3, 6]
    with open(tmp_path / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "compl')  # killed while it wrote
    resumed = make_trainer(SampleTable(every_n_steps=3, rows=2), max_epochs=2)
    resumed.fit(boring(), loader, ckpt_path=tmp_path / "end.ckpt")
    assert steps(tmp_path / "samples.html") == [1, 3, 6, 9, 12]
    assert sorted({found["step"] for found in read_rows(tmp_path / "samples.jsonl")}) == [1, 3, 6, 9, 12]


def test_a_file_that_holds_something_else_is_said_and_kept(tmp_path, boring, make_trainer, loader):
    (tmp_path / "samples.jsonl").write_text("notes\n")
    with pytest.warns(UserWarning, match=r"lacks those of earlier steps: .*samples.jsonl:1: not valid JSON"):
        make_trainer(SampleTable()).fit(boring(), loader)
    assert (tmp_path / "samples.jsonl").read_text().startswith("notes\n")
    assert steps(tmp_path / "samples.html") == [1]


def test_switches(tmp_path, boring, make_trainer, loader):
    logger = TensorBoardLogger(tmp_path / "curves")
    make_trainer(SampleTable(enabled=False), logger=logger).fit(boring(), loader)
    assert not list(tmp_path.glob("samples.*"))
    make_trainer(SampleTable(page=False, path=str(tmp_path / "mine.jsonl"))).fit(boring(), loader)
    assert [path.name for path in tmp_path.glob("mine.*")] == ["mine.jsonl"]


def test_an_episode_is_a_cell_of_the_text_table():
    called = {"function": {"name": "add", "arguments": {"a": "x|y"}}}
    episode = [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [called]},
        {"role": "tool", "name": "add", "content": "Error: <b>no</b>\x1b\u202e\nmore", "failed": "raised"},
        {"role": "assistant", "content": "2"},
    ]
    more = {"stop_reason": "answer", "turns": 2, "tool_calls": 1}
    lines = text_table([row(episode=episode, completion="raw", **more), row(completion="raw", **more)], 120).split("\n")
    assert lines[0] == "| id | stop&#95;reason | turns | tool&#95;calls | completion |"
    failed = "⇐ failed (raised) Error: &lt;b&gt;no&lt;/b&gt;&#92;x1b&#92;u202e…"
    told = f'Let me see.<br>⇒ add {{"a": "x&#124;y"}}<br>{failed}<br>2'
    assert lines[2] == f"| 0/0/0 | answer | 2 | 1 | {told} |"
    assert lines[3].endswith("| raw |")
