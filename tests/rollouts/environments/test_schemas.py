"""What may be a tool, and which arguments it takes."""

import enum
from typing import Any, Literal

import pytest
import torch

from alignment_modules.rollouts.environments.schemas import ArgumentError, methods_of, tool_of


class Colour(enum.Enum):
    RED = 1


def everything(
    number: int,
    share: float = 0.0,
    name: str = "",
    on: bool = False,
    rows: list[int] | None = None,
    box: dict[str, float] | None = None,
    pair: tuple[int, str] = (0, ""),
    unit: Literal["C", "F"] = "C",
    either: int | str = 0,
    mixed: list[int] | str = "",
    whatever: Any = None,
):
    """Takes everything.

    Args:
        number: A number.
        share: A share.
        name: A name.
        on: Whether.
        rows: Rows.
        box: A box.
        pair: Two.
        unit: A unit.
        either: Either.
        mixed: Mixed.
        whatever: Whatever.
    """


TOOL = tool_of(everything, "tools[0]")


def test_the_schema_is_that_of_transformers():
    function = TOOL.schema["function"]
    assert (TOOL.name, function["description"]) == ("everything", "Takes everything.")
    assert function["parameters"]["required"] == ["number"]
    assert function["parameters"]["properties"]["rows"]["items"] == {"type": "integer"}


@pytest.mark.parametrize(
    "given",
    [
        {"number": 3, "share": 2, "name": "x", "on": True},
        {"number": -1, "rows": [1, 2], "box": {"a": 1.5}, "pair": [1, "x"]},
        {"number": 0, "rows": None, "unit": "F", "either": "x", "mixed": [1], "whatever": {"a": [None]}},
        {"number": 0, "either": 3, "mixed": "x", "rows": [], "box": {}},
    ],
)
def test_arguments_that_fit_are_left_alone(given):
    assert TOOL.check(given) == given
    assert [type(value) for value in TOOL.check(given).values()] == [type(value) for value in given.values()]


def test_a_number_without_a_fraction_is_an_integer():
    found = TOOL.check({"number": 3.0, "rows": [1.0], "share": 2.0})
    assert found == {"number": 3, "rows": [1], "share": 2.0}
    assert type(found["number"]) is int
    assert type(found["rows"][0]) is int
    assert type(found["share"]) is float


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "everything misses number; usage: everything(number: integer, [share: number]"),
        ({"number": 1, "nosuch": 2}, "everything takes no nosuch; usage"),
        ({"numbr": 1}, "everything misses number and takes no numbr; usage"),
        ([1], "must be an object, not [1]"),
        ({"number": "3"}, "number='3' of everything must be integer; usage"),
        ({"number": True}, "number=True of everything must be integer"),
        ({"number": 1.5}, "number=1.5 of everything must be integer"),
        ({"number": float("inf")}, "number=inf"),
        ({"number": None}, "number=None"),
        ({"number": 1, "share": True}, "share=True of everything must be number"),
        ({"number": 1, "on": 1}, "on=1 of everything must be boolean"),
        ({"number": 1, "name": 1}, "name=1 of everything must be string"),
        ({"number": 1, "name": None}, "name=None of everything must be string"),
        ({"number": 1, "rows": ["1"]}, "must be array of integer or null"),
        ({"number": 1, "rows": {"a": 1}}, "must be array of integer or null"),
        ({"number": 1, "box": {"a": "1"}}, "must be object or null"),
        ({"number": 1, "pair": [1]}, "must be array of 2 (integer, string)"),
        ({"number": 1, "pair": ["1", 1]}, "must be array of 2 (integer, string)"),
        ({"number": 1, "unit": "K"}, 'unit=\'K\' of everything must be "C" or "F"'),
        ({"number": 1, "either": [1]}, "must be integer or string"),
        ({"number": 1, "mixed": ["a"]}, "must be array of integer or string"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    with pytest.raises(ArgumentError) as caught:
        TOOL.check(given)
    assert told in str(caught.value)


def test_arguments_that_are_text():
    texts = {"number": "3", "share": " 0.5", "name": "3", "on": "True", "rows": "[1, 2]", "box": '{"a": 1}'}
    expected = {"number": 3, "share": 0.5, "name": "3", "on": True, "rows": [1, 2], "box": {"a": 1}}
    assert TOOL.check(texts, as_text=True) == expected
    more = {"number": "3", "unit": "F", "either": "x", "mixed": "[1", "whatever": "[1]", "pair": '[1, "x"]'}
    expected = {"number": 3, "unit": "F", "either": "x", "mixed": "[1", "whatever": [1], "pair": [1, "x"]}
    assert TOOL.check(more, as_text=True) == expected
    assert TOOL.check({"number": "3", "rows": "None"}, as_text=True) == {"number": 3, "rows": None}
    for wrong in ({"number": "three"}, {"number": "NaN"}, {"number": "1.5"}, {"number": "3", "unit": "f"}):
        with pytest.raises(ArgumentError, match="must be"):
            TOOL.check(wrong, as_text=True)


def no_documentation(number: int): ...


def no_type(number):
    """No type.

    Args:
        number: A number.
    """


def no_line(number: int):
    """Says nothing of the number."""


def an_enum(colour: list[Colour]):
    """Takes an Enum.

    Args:
        colour: A colour.
    """


def an_object(colour: Colour | object):
    """Takes an object.

    Args:
        colour: A colour.
    """


def a_class(thing: pytest.Item):
    """Takes an object.

    Args:
        thing: A thing.
    """


def a_tensor(tensor: torch.Tensor):
    """Takes a tensor.

    Args:
        tensor: A tensor.
    """


def anything(**more: int):
    """Takes anything."""


def by_position(number: int, /):
    """By position.

    Args:
        number: A number.
    """


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (no_documentation, "no docstring"),
        (no_type, "argument 'number' has no type"),
        (no_line, "no description for the argument 'number'"),
        (an_enum, "argument 'colour' is an Enum"),
        (an_object, "argument 'colour' is an Enum"),
        (a_class, "Couldn't convert the type hint"),
        (a_tensor, "argument 'tensor' is of type 'audio'"),
        (anything, "takes **more: int: calls give their arguments by name"),
        (by_position, "takes number: int: calls give their arguments by name"),
        (lambda: 1, "has no name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_tool(function, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tool_of(function, "tools[2]")
    assert str(caught.value).startswith("tools[2]")
    assert told in str(caught.value)


class Base:
    shared = [1]

    def __init__(self):
        self.callback = print

    def reset(self, anything): ...

    def get_reward(self): ...

    def turn_rewards(self): ...

    def close(self): ...

    def _hidden(self, number): ...

    @property
    def state(self):
        raise AssertionError("a property is not looked at")

    def first(self) -> int:
        """First."""
        return 1

    @staticmethod
    def second() -> int:
        """Second."""
        return 2


class Derived(Base):
    @classmethod
    def third(cls) -> int:
        """Third."""
        return 3

    def first(self) -> int:
        """Another first."""
        return 4


def test_public_methods_are_tools():
    thing = Derived()
    tools = methods_of(thing, "environments['x']", owner=thing)
    assert [(tool.name, tool.call(), tool.owner is thing) for tool in tools] == [
        ("first", 4, True),
        ("second", 2, True),
        ("third", 3, True),
    ]
    assert tools[0].schema["function"]["description"] == "Another first."


def test_a_public_method_that_is_no_tool_is_named():
    class Wrong(Base):
        def helper(self, number): ...

    with pytest.raises(ValueError, match=r"^environments\['x'\].helper: argument 'number' has no type"):
        methods_of(Wrong(), "environments['x']")
