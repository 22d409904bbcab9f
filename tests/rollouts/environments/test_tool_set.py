"""Environments and tools are found and checked before anything is generated, and rows choose among them."""

import functools

import pytest

from alignment_modules.cli.errors import AlignArgumentParser
from alignment_modules.rollouts.environments import EnvironmentSet, Job, Request, Runner, ToolOptions
from alignment_modules.rollouts.environments.formats import Call
from alignment_modules.rollouts.environments.tool_set import Environments, Tools
from tests.rollouts.environments import things
from tests.rollouts.environments.things import Calculator, Counter

PATH = things.__name__
FROM_FIVE = {"class_path": f"{PATH}.Counter", "init_args": {"start": 5}}


@pytest.mark.parametrize("given", [Counter, f"{PATH}.Counter", {"class_path": f"{PATH}.Counter"}, {"Counter": Counter}])
def test_forms_of_one_environment(given):
    found = EnvironmentSet(given)
    assert found.names == ("Counter",)
    assert found.for_row({"goal": 3}) == "Counter"
    assert [schema["function"]["name"] for schema in found.schemas("Counter")] == ["add"]
    first, second = found.make("Counter"), found.make("Counter")
    assert type(first) is Counter
    assert first is not second


def test_arguments_of_a_class():
    assert EnvironmentSet(FROM_FIVE).make("Counter").start == 5
    assert EnvironmentSet({"five": FROM_FIVE, "none": Counter}).make("five").start == 5
    assert EnvironmentSet({"seven": functools.partial(Counter, start=7)}).make("seven").start == 7
    assert EnvironmentSet({"made": lambda: Counter(9)}).make("made").start == 9


def test_a_row_chooses():
    found = EnvironmentSet({"a": Counter, "b": FROM_FIVE})
    assert found.for_row({"environment": "b"}) == "b"
    assert found.for_row({"environment": "b", "source_name": "a"}) == "b"
    assert found.for_row({"environment": None, "source_name": "a"}) == "a"
    with pytest.raises(ValueError, match="environment='c' must be one of 'a', 'b'"):
        found.for_row({"environment": "c", "source_name": "a"})
    with pytest.raises(ValueError, match="environment=3 must be one of"):
        found.for_row({"environment": 3})
    with pytest.raises(ValueError, match="source_name='c' must be one of"):
        found.for_row({"source_name": "c"})
    with pytest.raises(ValueError, match=r"must name its environment in the column 'environment'.*columns: goal"):
        found.for_row({"goal": 3})


def test_an_unnamed_environment_does_not_read_the_column():
    assert EnvironmentSet(Counter).for_row({"environment": "Mars"}) == "Counter"


def test_an_episode_by_hand():
    found = EnvironmentSet(Counter, [things.double])
    environment = found.make("Counter")
    runner, row = Runner(ToolOptions(time_limit=5)), {"goal": 6, "answer": "6", "prompt": "?"}
    arguments = found.reset_arguments(environment, row, seed=11)
    assert arguments == {"goal": 6, "seed": 11}
    [[text]] = runner.outcomes([[Job(environment.reset, arguments, environment)]])
    tools = found.tools_of("Counter", environment)
    assert list(tools) == ["add", "double"]
    assert (tools["add"].owner, tools["double"].owner) == (environment, None)
    calls = [Call("add", {"number": 2}), Call("double", {"number": 2}), Call("add", {"number": 4})]
    [results] = runner.run([[Request(call, tools) for call in calls]])
    assert [result.text for result in results] == ["2", "4", "6"]
    assert (text.value, environment.get_reward(), environment.seed) == ("Count to 6.", 1.0, 11)
    other = found.make("Counter")
    assert found.tools_of("Counter", other)["add"].owner is other


def test_a_seed_of_the_row_counts():
    found = EnvironmentSet(Counter)
    assert found.reset_arguments(found.make("Counter"), {"goal": 1, "seed": 3}, seed=11)["seed"] == 3


def test_reset_may_take_the_whole_row():
    class Any:
        def reset(self, **row): ...

    found = EnvironmentSet(Any)
    assert found.reset_arguments(Any(), {"a": 1, "b": 2}, seed=11) == {"a": 1, "b": 2}
    assert found.schemas("Any") == []


def test_columns_are_checked_before_anything_is_generated():
    found = EnvironmentSet(Counter)
    found.check_columns(["goal", "prompt"])
    with pytest.raises(ValueError, match=r"reset of environment 'Counter' asks for 'goal'.*columns: answer, prompt"):
        found.check_columns(["prompt", "answer"])
    with pytest.raises(ValueError, match=r"reset of Counter asks for 'goal'.*columns: none"):
        found.reset_arguments(found.make("Counter"), {}, seed=0)
    several = EnvironmentSet({"a": Counter, "b": Counter})
    several.check_columns(["source_name"])
    with pytest.raises(ValueError, match="the environments a, b need the column 'environment'; columns: goal"):
        several.check_columns(["goal"])


def test_tools_alone():
    found = EnvironmentSet(tools=f"{PATH}.double")
    assert (found.names, found.for_row({})) == ((), None)
    assert list(found.tools_of(None)) == ["double"]
    assert len(found.schemas(None)) == 1


@pytest.mark.parametrize(
    "given", [Calculator, Calculator(), f"{PATH}.Calculator", {"class_path": f"{PATH}.Calculator"}]
)
def test_objects_whose_methods_are_tools(given):
    [tool] = EnvironmentSet(tools=[given]).tools_of(None).values()
    assert (tool.name, tool.owner, tool.call(a=1, b=2)) == ("plus", None, 3)


def test_probes_are_closed():
    made = []

    def make():
        made.append(Counter())
        return made[-1]

    EnvironmentSet(make)
    assert [one.closed for one in made] == [True, True]


def test_processes_need_import_paths():
    found = EnvironmentSet(Counter, [f"{PATH}.double"], in_process=False)
    assert found.tools_of("Counter", found.make("Counter"))["double"].path == f"{PATH}.double"
    for tool in (things.double, Calculator()):
        with pytest.raises(
            ValueError, match=r"tools\[0\]=.*must be an import path of a function with tool_options.in_pro"
        ):
            EnvironmentSet(tools=[tool], in_process=False)
    with pytest.raises(ValueError, match=r"tool_options.in_process=False without tools has no effect"):
        EnvironmentSet(Counter, in_process=False)


class NoReset:
    pass


class ResetByPosition:
    def reset(self, goal, /): ...


class RewardNeedsMore(Counter):
    def get_reward(self, more): ...


class RewardIsANumber(Counter):
    get_reward = 3


class NeedsArguments:
    def __init__(self, more): ...

    def reset(self): ...


class Unclosed(Counter):
    def close(self) -> None:
        self.server.stop()


class Fails:
    def __init__(self):
        raise OSError("no server")

    def reset(self): ...


class Untyped(Counter):
    def helper(self, number): ...


class Clashes(Counter):
    def double(self) -> int:
        """Doubles."""
        return 2


SHARED = Counter()
WRONG = {
    "nothing": (None, None, "environments=None and tools=None"),
    "no environments": ({}, None, "environments={} must name at least one"),
    "no tools": (None, [], r"tools=\[\] must hold at least one tool"),
    "a name that is no text": ({1: Counter}, None, "the name 1 must be a text"),
    "an instance": (SHARED, None, "environments=.*must be a factory of environments: give its class"),
    "a number": (3, None, "environments=3 must be a factory"),
    "a list": ([Counter], None, "environments=.*must be a factory"),
    "no path": ("Counter", None, "environments='Counter' must be an import path"),
    "no module": ("nosuch.Counter", None, "environments='nosuch.Counter': no module named 'nosuch'"),
    "no attribute": (f"{PATH}.Nosuch", None, "has no attribute 'Nosuch'"),
    "named, no attribute": ({"a": f"{PATH}.Nosuch"}, None, r"environments\['a'\]=.*has no attribute 'Nosuch'"),
    "the same object": (lambda: SHARED, None, "returns the same object twice"),
    "returns nothing": ({"a": lambda: None}, None, r"environments\['a'\] returns the same object twice"),
    "no reset": ({"a": NoReset}, None, r"environments\['a'\] \(NoReset\) has no method reset"),
    "reset by position": (ResetByPosition, None, "reset takes 'goal' by position only"),
    "reward needs more": (RewardNeedsMore, None, "RewardNeedsMore.get_reward must do without arguments"),
    "reward is a number": (RewardIsANumber, None, "RewardIsANumber.get_reward is no method"),
    "needs arguments": (NeedsArguments, None, "cannot be called so: missing a required argument: 'more'"),
    "cannot be closed": (
        Unclosed,
        None,
        "environments=Unclosed.close failed before any reset: AttributeError: .*server",
    ),
    "fails": ({"a": Fails}, None, r"environments\['a'\] could not be made: OSError: no server"),
    "untyped": (Untyped, None, "environments=Untyped.helper: argument 'number' has no type"),
    "unknown keys": ({"class_path": f"{PATH}.Counter", "args": {}}, None, "must be a class_path"),
    "unknown argument": ({"class_path": f"{PATH}.Counter", "init_args": {"stop": 1}}, None, "unexpected keyword"),
    "clash": (Clashes, [things.double], "Clashes.double and tools are of one name: 'double'"),
    "two tools": (None, [things.double, f"{PATH}.double"], r"tools\[1\].*two tools of the name 'double'"),
    "a tool that is a number": (None, [3], r"tools\[0\]=3 must be a function"),
    "a tool that is a list": (None, [[things.double]], r"tools\[0\]=.*must be a function"),
    "a tool without methods": (None, [NoReset()], r"tools\[0\]=.*has no public methods"),
    "a tool's path": (None, "double", r"tools\[0\]='double' must be an import path"),
    "a lambda": (None, [lambda: 1], r"tools\[0\]=.*has no name"),
}


@pytest.mark.parametrize(("environments", "tools", "told"), WRONG.values(), ids=WRONG)
def test_what_is_refused_at_the_start(environments, tools, told):
    with pytest.raises(ValueError, match=told):
        EnvironmentSet(environments, tools)


def test_a_factory_or_reset_that_fails_in_a_run_is_an_outcome():
    made = []

    def flaky():
        made.append(1)
        if len(made) > 2:
            raise OSError("gone")
        return Counter()

    def wrong(goal):
        raise ValueError("no such goal")

    found = EnvironmentSet({"flaky": flaky})
    jobs = [[Job(found.make, {"name": "flaky"})], [Job(wrong, {"goal": 1})], [Job(lambda: None)]]
    [[first], [second], [third]] = Runner().outcomes(jobs)
    assert (first.reason, first.error) == ("raised", "Error: OSError: gone")
    assert (second.reason, second.error) == ("raised", "Error: ValueError: no such goal")
    assert (third.reason, third.value) == ("", None)  # a reset without text


def plugged(
    environments: Environments | None = None, tools: Tools | None = None, tool_options: ToolOptions | None = None
):
    """What a module does with these options."""
    options = tool_options or ToolOptions()
    return EnvironmentSet(environments, tools, in_process=options.in_process), options


@pytest.mark.parametrize(
    ("given", "names", "tools"),
    [
        ({"environments": f"{PATH}.Counter"}, ("Counter",), ["add"]),
        ({"environments": FROM_FIVE}, ("Counter",), ["add"]),
        ({"environments": {"a": FROM_FIVE, "b": f"{PATH}.Counter"}}, ("a", "b"), ["add"]),
        ({"tools": [f"{PATH}.double"]}, (), ["double"]),
        ({"tools": f"{PATH}.double"}, (), ["double"]),
        ({"tools": [f"{PATH}.double", {"class_path": f"{PATH}.Calculator"}]}, (), ["double", "plus"]),
        ({"tools": [f"{PATH}.double"], "tool_options": {"format": "llama", "in_process": False}}, (), ["double"]),
        ({"environments": f"{PATH}.Counter", "tools": [f"{PATH}.double"]}, ("Counter",), ["add", "double"]),
    ],
)
def test_forms_in_a_configuration(given, names, tools):
    parser = AlignArgumentParser(prog="align fit")
    parser.add_function_arguments(plugged)
    made = parser.instantiate(parser.parse_object(given))
    found, options = plugged(made.environments, made.tools, made.tool_options)
    assert found.names == names
    assert [one["function"]["name"] for one in found.schemas(names[0] if names else None)] == tools
    assert options.format == given.get("tool_options", {}).get("format")
    if given.get("environments") in (FROM_FIVE, {"a": FROM_FIVE, "b": f"{PATH}.Counter"}):
        assert found.make(names[0]).start == 5
