"""A griffe extension: examples in docstrings, `>>>` and what they print, are shown as code wherever they stand."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(?P<indent>[ ]*)>>> .*(?:\n[ ]*\S.*)*", flags=re.MULTILINE)


def fenced(text: str) -> str:
    """The text of a docstring, its examples in fences; an example ends at an empty line."""
    return EXAMPLE.sub(lambda match: f"{match['indent']}```pycon\n{match[0]}\n{match['indent']}```", text)


class Doctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that is read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
