"""Samples as one HTML file, which needs nothing else: neither network nor server nor another file."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from alignment_modules.callbacks.jsonl import naming, to_json_line
from alignment_modules.functional.ranges import Count, check_options

_MAX_CHARACTERS = 32_000_000  # of a page's rows: what a browser still opens within a second
# Lists with an entry a token; the page reads a sample's when it is looked at.
_LISTS = ("tokens", "own", "advantages", "sampled_logps", "old_logps", "reference_logps")
# What could end the element that holds the rows, or a line of a script.
_ESCAPES = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"})


class Page:
    """The rows of a page, as the text that it holds; steps are thinned where there are too many.

    Args:
        max_rows: Most rows. Above it whole steps are left out, those that lie closest to others, but never the newest;
            the same is done where the rows have more than 32 million characters.

    Raises:
        ValueError: If `max_rows` is no positive integer.
    """

    def __init__(self, max_rows: Count = 2000) -> None:
        check_options(Page.__init__, locals())
        self.max_rows = max_rows
        self._steps: dict[int, dict[str, tuple[str, str]]] = {}  # a row as the page holds it: itself, and its lists
        self._lists: set[str] = set()
        self._thinned = False

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows; one with the `step` and `id` of an earlier row takes its place.

        Args:
            rows: As `SampleTable` writes them to its JSONL file. `step` is an integer; a row without an `id` gets its
                number in the step.
        """
        for row in rows:
            step = int(row.get("step", 0))
            entries = self._steps.setdefault(step, {})
            name = str(row.get("id", len(entries)))
            lists = {key: row[key] for key in _LISTS if row.get(key)}
            own = {key: value for key, value in row.items() if key not in _LISTS}
            counted = {"tokens": len(lists["tokens"])} if "tokens" in lists else {}
            entries[name] = (_embedded({**own, **counted, "step": step, "id": name}), _embedded(lists))
            self._lists |= lists.keys()
        sizes = {
            step: (len(entries), sum(len(row) + len(lists) for row, lists in entries.values()))
            for step, entries in self._steps.items()
        }
        count, characters = (sum(column) for column in zip((0, 0), *sizes.values(), strict=True))
        while len(self._steps) > 1 and (count > self.max_rows or characters > _MAX_CHARACTERS):
            step = _least_missed(sorted(self._steps))
            del self._steps[step]
            count, characters = count - sizes[step][0], characters - sizes[step][1]
            self._thinned = True

    def write(self, path: str | Path, title: str = "Samples") -> None:
        """Writes the page; whoever opens it meanwhile sees the former one, whole.

        Args:
            path: The HTML file; its folder is made.
            title: What the page is called.

        Raises:
            OSError: If it cannot be written; the message names the file.
        """
        path = Path(path)
        entries = [entry for step in sorted(self._steps) for entry in self._steps[step].values()]
        rows, lists = ",\n".join(row for row, _ in entries), "\n".join(lists for _, lists in entries)
        about = _embedded({"title": title, "thinned": self._thinned, "lists": sorted(self._lists)})
        first, second, third, last = _template()
        part = path.with_name(f".{path.name}.part")
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(f"{first}{about}{second}[{rows}]{third}{lists}{last}", encoding="utf-8")
            part.replace(path)


def write_page(
    rows: Iterable[Mapping[str, Any]], path: str | Path, *, title: str = "Samples", max_rows: Count = 2000
) -> None:
    """Writes a page of samples, such as from a run's JSONL file: `write_page(read_rows("samples.jsonl"), "a.html")`.

    Args:
        rows: Dictionaries with `step`, `id` ("step/prompt/sample"), `prompt` or `messages`, `completion`, and as far as
            there are: `reward`, `advantage`, `truncated`, `expected`, rewards by name, and per-token lists `tokens`,
            `own`, `advantages`, `sampled_logps`, `old_logps`, `reference_logps`. Other keys are shown as they are.
        path: The HTML file.
        title: What the page is called.
        max_rows: Most rows; `Page` says which are left out.

    Raises:
        OSError: If it cannot be written; the message names the file.
        ValueError: If `max_rows` is no positive integer.
    """
    page = Page(max_rows)
    page.add(rows)
    page.write(path, title)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of samples; a last line without its line break, as a killed run leaves it, is not one.

    Args:
        path: The file.

    Raises:
        ValueError: If another line is no JSON object; the message names file and line.
        OSError: If it cannot be read.
    """
    rows = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        lines = list(file)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}; each line must hold one sample") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: holds a JSON {type(row).__name__}; each line must hold one sample")
        rows.append(row)
    return rows


def _least_missed(steps: list[int]) -> int:
    """Of ascending steps the one between the closest neighbours; of two the first."""
    inner = range(1, len(steps) - 1)
    return steps[min(inner, key=lambda at: steps[at + 1] - steps[at - 1], default=0)]


def _embedded(values: Mapping[str, Any]) -> str:
    """JSON in one line that may stand in a script element: no letter of it can end the element."""
    return to_json_line(dict(values)).rstrip("\n").translate(_ESCAPES)


@functools.cache
def _template() -> tuple[str, ...]:
    """The page's parts around its data, with a policy that runs its own script and style and nothing else."""
    folder = resources.files(__package__)
    files = ("page.html", "page.css", "data.js", "view.js")
    text, style, data, view = (folder.joinpath(name).read_text("utf-8") for name in files)
    for name, body in (("STYLE", style), ("SCRIPT", data + view)):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        text = text.replace(f"{name}_HASH", f"sha256-{digest}").replace(f"{name}_TEXT", body)
    return tuple(re.split("ABOUT_JSON|ROWS_JSON|LISTS_JSON", text))
