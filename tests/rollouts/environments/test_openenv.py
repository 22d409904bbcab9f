"""Environments of an OpenEnv server: the tool that its action becomes, an episode, and every way in which it fails."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("websockets")  # a development dependency

from alignment_modules.rollouts.environments import Call, EnvironmentSet, Job, Request, Runner, ToolOptions
from alignment_modules.rollouts.environments.openenv import OpenEnvEnvironment, OpenEnvError
from tests.rollouts.environments.openenv_server import serving

PATH = "alignment_modules.rollouts.environments.openenv.OpenEnvEnvironment"


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


@pytest.fixture
def url(server):
    return server[0]


@pytest.fixture
def make(url):
    made = []

    def factory(**options):
        made.append(OpenEnvEnvironment(url, **({"time_limit": 1.0} | options)))
        return made[-1]

    yield factory
    for one in made:
        one.close()


def test_the_action_is_a_tool_with_its_fields(url):
    found = EnvironmentSet({"game": {"class_path": PATH, "init_args": {"url": url, "tool": "guess"}}})
    [schema] = found.schemas("game")
    function = schema["function"]
    assert (function["name"], function["description"]) == ("guess", "A guess.")
    assert set(function["parameters"]["properties"]) == {"guess", "mood", "notes"}
    assert function["parameters"]["required"] == ["guess"]
    properties = function["parameters"]["properties"]
    assert properties["guess"] == {"type": "integer", "description": "The number - a whole one"}
    assert properties["mood"]["enum"] == ["sure", "unsure"]
    assert properties["mood"]["nullable"]
    assert properties["notes"] == {"type": "array", "items": {"type": "string"}, "description": "notes"}


def test_episodes_side_by_side_through_the_runner(url, server):
    found, runner = EnvironmentSet({"game": {"class_path": PATH, "init_args": {"url": url}}}), Runner(ToolOptions())
    games = [found.make("game") for _ in range(3)]
    row = {"number": 4, "prompt": "Which?", "thing": object()}
    texts = [game.reset(**found.reset_arguments(game, row, seed=3)) for game in games]
    assert texts == ["guess ['number', 'seed']"] * 3
    tools = [found.tools_of("game", game) for game in games]
    turns = [[Call("step", {"guess": 4})], [Call("step", {"guess": 1}), Call("step", {"guess": 4})], []]
    results = runner.run([[Request(call, own) for call in turn] for turn, own in zip(turns, tools, strict=True)])
    assert [[result.text for result in turn] for turn in results] == [["right"], ["wrong", "right"], []]
    rewards = runner.outcomes([[Job(game.get_reward)] for game in games])
    assert [one.value for [one] in rewards] == [1.0, 0.75, 0.0]
    assert max(server[1]) >= 3  # a session each
    for game in games:
        game.close()
    deadline = time.monotonic() + 5
    while server[1][-1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server[1][-1] == 0


def test_the_seed_and_a_new_episode(make):
    game = make()
    for seed in (13, 2**33 + 5):
        game.reset(seed=seed)
        assert game.step(guess=seed % 2**31 % 10) == "right"
        assert game.get_reward() == 1.0
        with pytest.raises(ValueError, match="the episode is over"):
            game.step(guess=1)
        assert game.get_reward() == 1.0


def test_an_action_that_is_refused_is_a_failed_call(make):
    game = make()
    game.reset(seed=3)
    with pytest.raises(ValueError, match=r"Invalid message \(guess: bad\)"):
        game.step(guess=-1)
    assert game.step(guess=3) == "right"
    assert game.get_reward() == 1.0


@pytest.mark.parametrize(
    ("guess", "words"),
    [
        (-2, "answered step with"),
        (-3, "gave what is no observation"),
        (-4, "gave what is no observation"),
        (-5, "failed at step: JSONDecodeError"),
        (-6, "failed at step: TypeError"),
        (-7, "gave the reward inf"),
        (-8, "gave no answer to step within time_limit=0.5 seconds"),
        (-9, "failed at step: ConnectionClosed"),
    ],
)
def test_a_server_that_fails_leaves_no_reward(make, guess, words):
    game = make(time_limit=0.5)
    game.reset(seed=3)
    with pytest.raises(OpenEnvError, match=words):
        game.step(guess=guess)
    for ask in (game.get_reward, lambda: game.step(guess=3)):
        with pytest.raises(OpenEnvError, match=words):
            ask()
    game.reset(seed=3)  # an episode later all is well
    assert game.step(guess=3) == "right"
    assert game.get_reward() == 1.0


def test_a_server_that_is_gone():
    with serving() as (url, _):
        game = OpenEnvEnvironment(url, time_limit=0.5)
    with pytest.raises(OpenEnvError, match="failed at reset: ConnectionRefusedError"):
        game.reset(seed=0)
    with pytest.raises(OpenEnvError, match="failed at reset"):
        game.get_reward()
    with pytest.raises(OpenEnvError, match="gives no schema of its action"):
        OpenEnvEnvironment(url, tool="other", time_limit=0.5)
    with pytest.raises(ValueError, match="could not be made: OpenEnvError"):
        EnvironmentSet({"game": {"class_path": PATH, "init_args": {"url": url, "tool": "another"}}})


def test_what_is_shown(make):
    game = make(observation_field="text")
    assert game.reset(seed=3).startswith("guess")
    game = make(observation_field="nosuch")
    with pytest.raises(OpenEnvError, match="gave no observation_field='nosuch'"):
        game.reset(seed=3)


@pytest.mark.parametrize(
    "options", [{"url": "localhost"}, {"tool": "reset"}, {"tool": "a b"}, {"tool": "_x"}, {"time_limit": 0}]
)
def test_refuses(url, options):
    with pytest.raises(ValueError, match=re.escape(next(iter(options)))):
        OpenEnvEnvironment(**({"url": url} | options))


SERVER = """
import sys
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field
import uvicorn

class Guess(Action):
    guess: int = Field(description="The number")

class Seen(Observation):
    text: str = ""

class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    def reset(self, seed=None, episode_id=None, number=0, **more):
        self.number, self.steps = number, 0
        return Seen(text=f"seed {seed}")
    def step(self, action, timeout_s=None, **more):
        self.steps += 1
        if action.guess < 0:
            raise ValueError("no such number")
        right = action.guess == self.number
        return Seen(text="right" if right else "wrong", reward=1.0 if right else -0.25, done=right)
    @property
    def state(self):
        return State(step_count=self.steps)

app = create_fastapi_app(Game, Guess, Seen, max_concurrent_envs=4)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("openenv") is None and "OPENENV_PYTHON" not in os.environ,
    reason="openenv-core is missing (or OPENENV_PYTHON, an interpreter that has it)",
)
def test_the_packages_own_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    (tmp_path / "server.py").write_text(SERVER)
    python = os.environ.get("OPENENV_PYTHON", sys.executable)
    command = [python, str(tmp_path / "server.py"), str(port)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            game, other = _wait_for(url, process), OpenEnvEnvironment(url)
            assert game.reset(seed=3, number=5) == other.reset(seed=3, number=6) == "seed 3"
            assert [game.step(guess=6), other.step(guess=6)] == ["wrong", "right"]
            with pytest.raises(ValueError, match="no such number"):
                game.step(guess=-1)
            with pytest.raises(ValueError, match=r"Invalid message \(guess: "):
                game.step(guess="x")
            assert game.step(guess=5) == "right"
            assert [game.get_reward(), other.get_reward()] == [0.75, 1.0]
            game.close()
            other.close()
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def _wait_for(url, process):
    deadline = time.monotonic() + 120
    while True:
        try:
            return OpenEnvEnvironment(url)
        except OpenEnvError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
