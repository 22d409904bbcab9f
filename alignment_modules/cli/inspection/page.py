"""An inspection as one page of HTML that needs nothing else: no script, no font, no other file."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from alignment_modules.cli.inspection.findings import Inspection, Row, Token
from alignment_modules.cli.inspection.words import Fact, Section, columns, judgement, measure, sections

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f8; padding: .7rem; margin: .2rem 0 .6rem; }
pre, .bar { font: 13px/1.6 ui-monospace, monospace; }
hr { border: 0; border-top: 1px dashed #999; }
.target { background: #c9efd0; }
.special { color: #0b6e99; font-weight: 600; }
.quiet { color: #666; }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
.bar span { display: inline-block; height: .8em; background: #6a9fd4; margin-right: .5em; }
.warns b { background: #ffe9a8; }
.problem { color: #a00; }
"""


def write_page(found: Inspection, path: Path) -> None:
    """Writes the page.

    Args:
        found: The inspection.
        path: The file; one that is there is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    path.write_text("\n".join(_page(found)), encoding="utf-8", errors="backslashreplace")


def _page(found: Inspection) -> Iterator[str]:
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(found.title)}</title>'
    yield f"<style>{_STYLE}</style></head><body><h1>{escape(found.title)}</h1>"
    for problem in found.problems:
        yield f'<p class="problem">{escape(problem)}</p>'
    if found.rows:
        yield "<h2>Rows, as the model sees them</h2>"
        yield '<p><span class="target">Targets (what is scored)</span>, <span class="special">special tokens</span>'
    for number, row in enumerate(found.rows, start=1):
        yield from _row(number, row)
    for section in sections(found):
        yield from _section(section)
    yield "</body></html>\n"


def _row(number: int, row: Row) -> Iterator[str]:
    yield f"<h3>{escape(f'{number}. {row.title}'.removesuffix('. '))}</h3>"
    for passage in row.passages:
        yield f'<div class="quiet">{escape(measure(passage))}</div>'
        yield f"<pre>{'<hr>'.join(''.join(map(_token, document)) for document in passage.documents)}</pre>"
    if row.columns:
        yield _table(columns(row))
    if row.judged:
        yield _table([judgement(judged) for judged in row.judged])


def _token(token: Token) -> str:
    classes = " ".join(name for name, on in (("target", token.target), ("special", token.special)) if on)
    text = escape(token.text) + "\n" * token.text.endswith("\\n")
    return f'<span class="{classes}">{text}</span>' if classes else text


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    if section.facts:
        yield _table(section.facts)
    most = max((count for _, count in section.bars), default=1)
    if section.bars:
        rows = (
            f'<tr><td>{label}</td><td><span style="width: {30 * count / most:.1f}rem"></span>{count:,}</td></tr>'
            for label, count in section.bars
        )
        yield f'<table class="bar">{"".join(rows)}</table>'
    if section.note:
        yield f'<p class="quiet">{escape(section.note)}</p>'


def _table(facts: Sequence[Fact]) -> str:
    rows = (
        f"<tr{' class=warns' * fact.warns}><td>{escape(fact.name)}</td><td><b>{escape(fact.value)}</b></td>"
        f'<td class="quiet">{escape(fact.note)}</td></tr>'
        for fact in facts
    )
    return f"<table>{''.join(rows)}</table>"
