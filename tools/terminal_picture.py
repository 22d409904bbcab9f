"""A terminal session as a picture: text with ANSI colours from standard input, an SVG file without fonts of others.

script -qec "align inspect ..." /dev/null | python tools/terminal_picture.py docs/inspect.svg --title "align inspect"
"""

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

# rich's own format fetches a font from the network; here the reader's is taken.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; \
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def picture(text: str, title: str, width: int) -> str:
    """The picture of a session.

    Args:
        text: What was shown, with its colours.
        title: Of the window.
        width: Columns.
    """
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for line in text.replace("\r\n", "\n").rstrip("\n").split("\n"):
        console.print(Text.from_ansi(line), overflow="fold")
    return console.export_svg(title=title, code_format=SVG, unique_id="session")


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--title", default="")
    parser.add_argument("--width", type=int, default=88)
    given = parser.parse_args()
    given.file.write_text(picture(sys.stdin.read(), given.title, given.width), encoding="utf-8")


if __name__ == "__main__":
    main()
