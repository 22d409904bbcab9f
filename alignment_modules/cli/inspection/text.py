"""An inspection in a terminal: in colour where it has some, else with the targets in double brackets."""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from alignment_modules.cli.inspection.findings import Inspection, Passage, Row, Token
from alignment_modules.cli.inspection.words import Fact, Section, columns, judgement, measure, sections

PLAIN_WIDTH = 100
"""Columns of a line where there is no terminal to ask."""
_MOST = 600  # tokens shown of a document; of a longer one the first and the last
_BAR = 40
_STYLES = {  # by target and special
    (False, False): "",
    (False, True): "cyan",
    (True, False): "bold green",
    (True, True): "bold green underline",
}


def show(found: Inspection, console: Console | None = None) -> None:
    """Prints what was found.

    Args:
        found: The inspection.
        console: Where; None: standard output.
    """
    console = console or _console()
    coloured = console.color_system is not None
    _rule(console, found.title)
    if found.rows:
        scored = any(passage.targets for row in found.rows for passage in row.passages)
        _print(console, Text("The first rows of training, as the model sees them"))
        _print(console, _legend(coloured, scored))
    for number, row in enumerate(found.rows, start=1):
        console.print()
        _print(console, Text.assemble((f"{number}. {row.title}".rstrip(), "bold"), _unnamed(row)))
        _print_row(console, row, coloured)
    for section in sections(found):
        console.print()
        _print_section(console, section)


def _console() -> Console:
    stream: Any = sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # no text of the data may end the command
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def _rule(console: Console, title: str) -> None:
    _print(console, Text(title, "bold"))
    _print(console, Text("=" * min(cell_len(title), console.width)))


def _legend(coloured: bool, scored: bool) -> Text:
    if not coloured:
        return Text(
            "Targets (what is scored) stand in [[double brackets]]"
            if scored
            else "The model writes what follows; nothing of a prompt is scored"
        )
    parts = [("special token", (False, True))]
    parts += [("target (what is scored)", (True, False)), ("special target", (True, True))] if scored else []
    return Text("  ").join(Text(name, _STYLES[kind]) for name, kind in parts)


def _unnamed(row: Row) -> Text:
    """The length of a row that is one passage, for the line above it."""
    return Text("".join(f" {measure(passage)}" for passage in row.passages if not passage.name), "dim")


def _print_row(console: Console, row: Row, coloured: bool) -> None:
    for passage in row.passages:
        if passage.name:
            _print(console, Text(f"  {measure(passage)}", "dim"))
        for line in _lines(passage, max(console.width - 4, 8), coloured):
            _print(console, Text("    ") + line)
    if row.columns:
        _print_facts(console, columns(row))
    if row.judged:
        _print_facts(console, [judgement(judged) for judged in row.judged])


def _lines(passage: Passage, width: int, coloured: bool) -> Iterator[Text]:
    several = len(passage.documents) > 1
    for number, document in enumerate(passage.documents, start=1):
        if several:
            yield Text(f"--- document {number} of {len(passage.documents)}", "dim")
        head, tail = document, tuple[Token, ...]()
        if len(document) > _MOST:
            head, tail = document[: _MOST // 2], document[-_MOST // 2 :]
        yield from _wrapped(head, width, coloured)
        if tail:
            yield Text(f"... {len(document) - _MOST:,} tokens not shown; --html shows all ...", "dim")
            yield from _wrapped(tail, width, coloured)


def _wrapped(tokens: tuple[Token, ...], width: int, coloured: bool) -> Iterator[Text]:
    """Lines that break between words, and behind a newline; a word is broken only where it is longer than a line."""
    line = Text()
    for word in _words(tokens, marked=not coloured):
        if line and line.cell_len + word.cell_len > width:
            yield line
            line = Text()
        while word.cell_len > width:
            first = chop_cells(word.plain, width)[0]
            yield word[: len(first)]
            word = word[len(first) :]
        line += word
        if line.plain.endswith("\\n"):
            yield line
            line = Text()
    if line:
        yield line


def _words(tokens: tuple[Token, ...], *, marked: bool) -> Iterator[Text]:
    """Tokens that are one word, together; a special token stands by itself."""
    word, before = Text(), Token("", special=True)
    for token, after in zip(tokens, (*tokens[1:], Token("")), strict=True):
        text = token.text
        if word and (before.special or token.special or text[:1] == " " or before.text[-1:] == " "):
            yield word
            word = Text()
        if marked and token.target:
            text = "[[" * (not before.target) + text + "]]" * (not after.target)
        word += Text(text, _STYLES[token.target, token.special])
        before = token
        if token.text.endswith("\\n"):
            yield word
            word = Text()
    if word:
        yield word


def _print_section(console: Console, section: Section) -> None:
    _print(console, Text(section.title, "bold"))
    if section.facts:
        _print_facts(console, section.facts)
    if section.bars:
        most, full = max(count for _, count in section.bars), "\N{FULL BLOCK}" if _draws(console) else "#"
        wide = max(len(label) for label, _ in section.bars)
        for label, count in section.bars:
            length = -(-count * _BAR // most)
            _print(console, Text(f"  {label:>{wide}} ") + Text(full * length, "blue") + Text(f" {count:,}"))
    for line in textwrap.wrap(section.note, console.width - 2):
        _print(console, Text(f"  {line}", "dim"))


def _draws(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _print_facts(console: Console, facts: Sequence[Fact]) -> None:
    """Names, values and notes below each other; a note that is longer than the line goes on below itself."""
    names = max(cell_len(fact.name) for fact in facts)
    values = max(cell_len(fact.value) for fact in facts)
    numbers = all(fact.value[:1].isdigit() for fact in facts)
    for fact in facts:
        gap = " " * (values - cell_len(fact.value))
        value = f"{gap}{fact.value}" if numbers else f"{fact.value}{gap}"
        lead = f"  {fact.name}{' ' * (names - cell_len(fact.name))}  "
        indent = " " * min(cell_len(lead + value) + 2, console.width // 2)
        notes = textwrap.wrap(fact.note, max(console.width - len(indent), 20)) or [""]
        first = Text(lead) + Text(value, "bold yellow" if fact.warns else "bold") + Text(f"  {notes[0]}", "dim")
        first.rstrip()
        _print(console, first)
        for note in notes[1:]:
            _print(console, Text(indent + note, "dim"))


def _print(console: Console, text: Text) -> None:
    """A line as it is: wrapped by nobody."""
    console.print(text, soft_wrap=True)
