"""What a terminal shows while rows are tokenised: how many are done, how fast, and what is lost so far."""

import pytest

from datamodules import CacheOptions, SFTDataModule


class Bar:
    """Stands in for tqdm's bar."""

    made: list = []

    def __init__(self, **options):
        self.options, self.done, self.postfix, self.closed = options, [], None, False
        self.made.append(self)

    def update(self, rows):
        self.done.append(rows)

    def set_postfix(self, values, refresh):
        self.postfix = dict(values)

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr("datamodules.progress.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


ROWS = [{"prompt": "a" * (1 + 9 * (i % 3 == 0)), "completion": "b"} for i in range(2000)]


def test_rows_done_and_lost(bars, tokenizer):
    SFTDataModule(train=ROWS, tokenizer=tokenizer, max_length=8, overflow="drop").setup("fit")
    (bar,) = bars
    assert (bar.options["desc"], bar.options["total"], bar.options["unit"]) == ("tokenising train", 2000, " rows")
    assert bar.options["disable"] is None  # shown where the output is a terminal
    assert bar.done == [1024, 976]
    assert bar.postfix == {"dropped_too_long": 667}
    assert bar.closed


def test_parts_show_no_bars_of_their_own(bars, tokenizer, tmp_path):
    cache = CacheOptions(folder=str(tmp_path), least_rows=1, num_proc=1)
    data = SFTDataModule(train=ROWS, tokenizer=tokenizer, max_length=8, overflow="drop", cache=cache)
    data.prepare_data()
    data.setup("fit")
    (shown,) = [bar for bar in bars if bar.options["disable"] is None]
    assert sum(shown.done) == 2000
    assert shown.postfix == {"dropped_too_long": 667}
