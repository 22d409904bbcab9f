"""What a chat template writes is read back as the same calls; what a policy writes wrongly is told, never raised."""

import json
import random

import pytest

from alignment_modules.rollouts.environments import Call, Parsed, detect, tool_format
from alignment_modules.rollouts.environments.formats import FORMATS, FunctionFormat
from alignment_modules.rollouts.environments.parsing import MAX_DEPTH
from alignment_modules.rollouts.environments.schemas import tool_of
from tests.rollouts.environments import chat_templates
from tests.rollouts.environments.chat_templates import Renderer

TEMPLATES = {"HERMES": "json_tags", "QWEN3": "json_tags", "LLAMA": "llama", "QWEN_XML": "qwen_xml"}
ARGUMENTS = {
    "plain": {"city": "Bern", "days": 3},
    "empty": {},
    "nested": {"where": {"lat": 1.5, "tags": ["a", None, True]}, "n": -1},
    "quotes": {"code": 'say("}") # {"name": "x", "parameters": {}}\n\\n', "other": "ü💡 \t"},
    "marks": {"text": "</tool_call> <tool_call> <function=x> </function> <think> <|eot_id|>"},
}


def search(where: dict, city: str = "", days: int = 0, n: int = 0, code: str = "", other: str = "", text: str = ""):
    """Searches.

    Args:
        where: Where.
        city: The city.
        days: How many.
        n: A number.
        code: Code.
        other: Text.
        text: Text.
    """


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_round_trip(template, arguments):
    given = ARGUMENTS[arguments]
    text = Renderer(getattr(chat_templates, template)).turn([("search", given)])
    parsed = FORMATS[TEMPLATES[template]].parse(text)
    assert not parsed.errors
    [call] = parsed.calls
    assert call.name == "search"
    if call.as_text:  # there the tool's schema tells text from numbers
        found = tool_of(search, "search").check({"where": "{}"} | call.arguments, as_text=True)
        assert found == {"where": {}} | given
    else:
        assert call.arguments == given


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "LLAMA"])
def test_several_calls_and_the_text_before_them(template):
    calls = [("a", {"x": "1"}), ("b", {}), ("a", {"x": "2"})]
    text = Renderer(getattr(chat_templates, template)).turn(calls, "Let me look.")
    parsed = FORMATS[TEMPLATES[template]].parse(text)
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert parsed.content.endswith("Let me look.")
    assert not parsed.errors


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_format_is_found_by_the_template(template):
    assert detect(Renderer(getattr(chat_templates, template))) is FORMATS[TEMPLATES[template]]


def test_a_template_that_takes_arguments_as_text():
    assert detect(Renderer(chat_templates.JSON_TEXT)) is FORMATS["json_tags"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("MISTRAL", "in no known form"),
        ("NO_TOOLS", "in no known form"),
        ("REFUSES", "cannot write calls of tools: no tools"),
        (None, "has no chat template"),
    ],
)
def test_a_template_without_a_known_form_is_refused(template, told):
    with pytest.raises(ValueError, match=told) as caught:
        detect(Renderer(template and getattr(chat_templates, template)))
    assert "give tool_options.format: 'json_tags', 'llama', 'qwen_xml', a function" in str(caught.value)


GOOD = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
F = Call("f", {"x": 1})
JSON_TAGS = {
    "none": ("Just 4.", [], [], "Just 4."),
    "spaces stay in an answer": ("  4 \n", [], [], "  4 \n"),
    "text around": (f"before {GOOD} between {GOOD} behind", [F, F], [], "before\nbetween\nbehind"),
    "no JSON": ("<tool_call>f(1)</tool_call> done", [], ["its JSON cannot be read: Expecting value"], "done"),
    "not finished": ('<tool_call>{"name": "f", "arguments": {"x"', [], ["not finished: </tool_call> is missing"], ""),
    "no end tag": ('<tool_call>{"name": "f", "arguments": {}}', [], ["not finished"], ""),
    "one good, one not finished": (f"{GOOD}<tool_call>", [F], ["not finished"], ""),
    "nested": (f"<tool_call>{GOOD}</tool_call> text", [], ["a call stands within a call"], "text"),
    "nested behind": (f'<tool_call>{{"name": "f", "arguments": {{}}}} {GOOD}</tool_call>', [], ["within a call"], ""),
    "more behind the JSON": (
        '<tool_call>{"name": "f", "arguments": {}} x</tool_call>',
        [],
        ["must follow its JSON"],
        "",
    ),
    "bad, then good": (f"<tool_call>nope</tool_call>{GOOD}", [F], ["cannot be read"], ""),
    "a list": ("<tool_call>[1]</tool_call>", [], ['must be an object with "name" and "arguments"'], ""),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', [], ['must have a text "name"'], ""),
    "name is a number": ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', [], ['must have a text "name"'], ""),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [], ["the call of 'f' has no \"arguments\""], ""),
    "arguments are a list": ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [], ["must be an object"], ""),
    "NaN": ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', [], ["NaN is no JSON"], ""),
    "half a pair": ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', [], ["surrogate"], ""),
    "deep": (f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * 99}{"]" * 99}}}}}</tool_call>', [], ["deep"], ""),
    "very deep": (f"<tool_call>{'[' * 99999}</tool_call>", [], ["more than 64 levels"], ""),
    "long number": (f'<tool_call>{{"name": "f", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>', [], ["read"], ""),
    "in a thought": (f"<think>maybe {GOOD}</think> 4", [], [], f"<think>maybe {GOOD}</think> 4"),
    "behind a thought": (f"<think>so</think>{GOOD}", [F], [], "<think>so</think>"),
    "behind a thought of the prompt": (f"{GOOD}? yes</think>{GOOD}", [F], [], f"{GOOD}? yes</think>"),
    "a thought without end": (f"<think>{GOOD}", [], [], f"<think>{GOOD}"),
    "only an end tag": ("</tool_call>", [], [], "</tool_call>"),
}
LLAMA = {
    "one": ('{"name": "f", "parameters": {"x": 1}}', [F], [], ""),
    "tagged": ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', [F], [], ""),
    "tagged behind text": ('Look: <|python_tag|>{"name": "f", "parameters": {"x": 1}}', [F], [], "Look:"),
    "several": ('{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 1}}', [F, F], [], ""),
    "text behind": ('{"name": "f", "parameters": {"x": 1}} so', [F], [], "so"),
    "behind text": ('I say {"name": "f", "parameters": {}}', [], [], 'I say {"name": "f", "parameters": {}}'),
    "another object": ('{"answer": 4}', [], [], '{"answer": 4}'),
    "tagged nonsense": ("<|python_tag|>f(1)", [], ["its JSON cannot be read"], ""),
    "not finished": ('{"name": "f", "parameters": {"x"', [], ["its JSON cannot be read"], ""),
    "nested": ('{"name": "f", "parameters": {"name": "g", "parameters": {}}}', None, [], ""),
    "no name": ('{"parameters": {}}', [], ['must have a text "name"'], ""),
    "behind a thought": (
        '<think>{"name": "g", "parameters": {}}</think>\n{"name": "f", "parameters": {"x": 1}}',
        [F],
        [],
        None,
    ),
}
G = Call("f", {"x": "1"}, as_text=True)
XML = "<function=f>\n<parameter=x>\n1\n</parameter>\n</function>"
QWEN = {
    "one": (f"<tool_call>\n{XML}\n</tool_call>", [G], [], ""),
    "bare": (f"a {XML} b", [G], [], "a\nb"),
    "none": ("x < 3", [], [], "x < 3"),
    "lines stay": (
        "<function=f><parameter=x>\n\n a\n\n</parameter></function>",
        [Call("f", {"x": "\n a\n"}, True)],
        [],
        "",
    ),
    "no parameter": ("<function=f>\n</function>", [Call("f", {}, True)], [], ""),
    "no name": ("<function=>\n</function> b", [], ["names no tool"], "b"),
    "not finished": ("<tool_call>\n<function=f>\n<parameter=x>\n1", [], ["not finished"], ""),
    "tag alone": ('<tool_call>{"name": "f"}</tool_call>', [], ["<function=...> must follow"], ""),
    "twice": ("<function=f><parameter=x>1</parameter><parameter=x>2</parameter></function>", [], ["'x' twice"], ""),
    "nested": (f"<tool_call><function=g>{XML}</function></tool_call> b", [], ["a call stands within it"], "b"),
    "then good": (f"<tool_call>nope</tool_call>\n<tool_call>{XML}</tool_call>", [G], ["must follow"], ""),
}
CASES = [
    (name, case, *expected)
    for name, cases in (("json_tags", JSON_TAGS), ("llama", LLAMA), ("qwen_xml", QWEN))
    for case, expected in cases.items()
]


@pytest.mark.parametrize(
    ("name", "case", "text", "calls", "errors", "content"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_what_stands_in_a_turn(name, case, text, calls, errors, content):
    parsed = FORMATS[name].parse(text)
    if calls is not None:
        assert parsed.calls == calls
    assert len(parsed.errors) == len(errors), parsed
    for error, told in zip(parsed.errors, errors, strict=True):
        assert told in error
    if content is not None:
        assert parsed.content == content


@pytest.mark.parametrize("name", FORMATS)
def test_no_text_raises_and_none_takes_long(name):
    pieces = [GOOD, XML, "<tool_call>", "</tool_call>", "<function=", ">", "{", "}", '"name":', "<think>", "</think>"]
    pieces += [
        "<|python_tag|>",
        '{"name": "f", "parameters": {}}',
        "\x00",
        "\ud800",
        "[" * 70,
        "<parameter=x>",
        "</function>",
    ]
    generator = random.Random(0)
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randrange(12)))
        parsed = FORMATS[name].parse(text)
        assert all(json.dumps(call.arguments) for call in parsed.calls)
    FORMATS[name].parse("<tool_call>" * 3000)
    FORMATS[name].parse("<function=f><parameter=x>" * 1000)


@pytest.mark.parametrize("more", [0, 1])
def test_depth_that_is_allowed(more):
    depth = MAX_DEPTH - 3 + more  # the call, its arguments, and the number
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * depth}1{"]" * depth}}}}}</tool_call>'
    assert len(FORMATS["json_tags"].parse(text).calls) == 1 - more


def two_words(text):
    name, number = text.split()
    return [{"name": name, "arguments": {"number": int(number)}}]


def test_a_users_function():
    for given in (two_words, f"{__name__}.two_words", FunctionFormat(two_words)):
        found = tool_format(given)
        assert found.parse("double 4") == Parsed([Call("double", {"number": 4})], [], "")
        assert found.parse("double four").errors == ["invalid literal for int() with base 10: 'four'"]
        assert found.stop_strings == ()


@pytest.mark.parametrize("returned", [None, "f", [3], [{"name": "f"}], {"name": "f", "arguments": {}}])
def test_a_users_function_that_returns_no_calls(returned):
    def parse(text):
        return returned

    with pytest.raises(TypeError, match="parse returned"):
        FunctionFormat(parse).parse("")


@pytest.mark.parametrize("given", ["nosuch", 3, [], "json-tags"])
def test_no_such_format(given):
    with pytest.raises(ValueError, match=r"must be 'json_tags', 'llama', 'qwen_xml', a function") as caught:
        tool_format(given)
    assert repr(given) in str(caught.value)


def test_a_format_of_ones_own_needs_stop_strings():
    class Own:
        stop_strings = "</call>"

        def parse(self, text):
            return Parsed([], [], text)

    with pytest.raises(ValueError, match="stop_strings='</call>' must be a tuple of texts"):
        tool_format(Own())
    Own.stop_strings = ("</call>",)
    assert tool_format(Own).stop_strings == ("</call>",)
