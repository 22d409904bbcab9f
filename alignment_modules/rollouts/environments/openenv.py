"""Environments that an OpenEnv server runs."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any
from urllib.parse import urlsplit

from alignment_modules.functional.http import RequestError, check_url, fetch, short
from alignment_modules.functional.ranges import Positive, check_options
from alignment_modules.rollouts.environments.openenv_actions import action_tool
from alignment_modules.rollouts.environments.schemas import RESERVED

_MOST_BYTES = 16 * 2**20
_CLASSES: dict[tuple[type, str, str, str], type] = {}
# What a server says of an action that the policy should not have taken: a failed call, not a failed environment.
_REFUSALS = ("VALIDATION_ERROR", "EXECUTION_ERROR")


class OpenEnvError(RuntimeError):
    """The server of an environment is gone, late, or answers what is no answer; the message names it."""


class OpenEnvEnvironment:
    """An environment of an OpenEnv server: its action is a tool with the action's fields as arguments.

    Every object has a session of its own (the WebSocket `/ws`), from `reset` to `close`, so the server must allow as
    many as there are completions in a batch (`max_concurrent_envs`). Of the HTTP routes only `/schema` is used: to
    `/reset` and `/step` servers answer with a new environment each time.

    The reward of an episode is the sum of what its steps gave. An action that the server refuses is a failed call;
    after any other failure the episode has no reward.

    Args:
        url: Address of the server, such as "http://localhost:8000".
        tool: What the policy calls the action.
        description: What it reads of the tool; None: what the action's schema says.
        observation_field: The field of an observation that is shown; None: its only field that is text, else all as
            JSON.
        time_limit: Seconds for an answer of the server.

    Raises:
        ImportError: The package websockets is missing.
        OpenEnvError: The server gives no schema of its action.
        ValueError: `url` or `tool` is malformed, or a field of the action has a name that no argument can have.
    """

    def __new__(
        cls,
        url: str,
        *,
        tool: str = "step",
        description: str | None = None,
        observation_field: str | None = None,
        time_limit: Positive = 10.0,
    ) -> OpenEnvEnvironment:
        """One of a class that has the tool."""
        check_options(cls.__new__, locals())
        check_url(url)
        if not tool.isidentifier() or tool.startswith("_") or tool in RESERVED:
            raise ValueError(f"tool={tool!r} must be a name that a tool can have")
        return object.__new__(_with_tool(cls, url.rstrip("/"), tool, description or "", time_limit))

    def __init__(
        self,
        url: str,
        *,
        tool: str = "step",
        description: str | None = None,
        observation_field: str | None = None,
        time_limit: Positive = 10.0,
    ) -> None:
        self._url, self._field, self._time_limit = url.rstrip("/"), observation_field, time_limit
        self._session = contextlib.ExitStack()
        self._connection: Any = None
        self._rewards: list[float] = []
        self._done, self._failure = False, ""

    def reset(self, seed: int, **row: Any) -> str:
        """Begins an episode.

        Args:
            seed: The same for all samples of a prompt.
            **row: The row's columns, but for the prompt; the server takes those that its own `reset` asks for.

        Returns:
            The first observation, as text.

        Raises:
            OpenEnvError: The server does not answer, or with what is no observation.
        """
        self.close()
        self._rewards, self._done, self._failure = [], False, ""
        columns = {name: value for name, value in row.items() if name != "prompt" and _is_json(value)}
        return self._observed(self._ask("reset", {**columns, "seed": seed % 2**31}), counted=False)

    def get_reward(self) -> float:
        """The sum of what the steps gave.

        Raises:
            OpenEnvError: The server failed in this episode.
        """
        if self._failure:
            raise OpenEnvError(self._failure)
        return math.fsum(self._rewards)

    def close(self) -> None:
        """Ends the session, if there is one."""
        self._connection = None
        self._session.close()

    def _act(self, action: dict[str, Any]) -> str:
        """What the tool does."""
        if self._failure:
            raise OpenEnvError(self._failure)
        if self._done:
            raise ValueError("the episode is over: no more actions")
        return self._observed(self._ask("step", action))

    def _ask(self, kind: str, data: dict[str, Any]) -> Any:
        """The data of the answer to a message; what fails is remembered."""
        try:
            if self._connection is None:
                self._connection = self._session.enter_context(_connection(self._url, self._time_limit))
            self._connection.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(self._connection.recv(timeout=self._time_limit))
            data = answer["data"]
            code = data.get("code") if answer["type"] == "error" else None
        except TimeoutError:
            raise self._failed(f"gave no answer to {kind} within time_limit={self._time_limit:g} seconds") from None
        except Exception as error:  # a closed connection, no JSON, or JSON of another form
            raise self._failed(f"failed at {kind}: {type(error).__name__}: {error}") from error
        if code in _REFUSALS and kind == "step":
            raise ValueError(f"{data.get('message')}{_details(data)}")
        if answer["type"] != "observation":
            raise self._failed(f"answered {kind} with {short(answer)}")
        return data

    def _observed(self, data: Any, *, counted: bool = True) -> str:
        """The observation as text; its reward is added."""
        try:
            observation, reward = data["observation"], data.get("reward")
            reward = 0.0 if reward is None else float(reward)
            self._done = bool(data.get("done"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._failed(f"gave what is no observation: {short(data)}") from None
        if not math.isfinite(reward):
            raise self._failed(f"gave the reward {reward}")
        if counted:
            self._rewards.append(reward)
        return self._text(observation)

    def _text(self, observation: Any) -> str:
        if self._field is not None:
            if not isinstance(observation, dict) or self._field not in observation:
                raise self._failed(f"gave no observation_field={self._field!r} in {short(observation)}")
            observation = observation[self._field]
        elif isinstance(observation, dict):
            texts = [value for value in observation.values() if isinstance(value, str)]
            observation = texts[0] if len(texts) == len(observation) == 1 else observation
        return observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)

    def _failed(self, what: str) -> OpenEnvError:
        self._failure = f"the OpenEnv server {self._url} {what}"
        with contextlib.suppress(Exception):
            self.close()  # a late answer must not be taken for that of the next message
        return OpenEnvError(self._failure)


def _with_tool(
    cls: type[OpenEnvEnvironment], url: str, tool: str, description: str, time_limit: float
) -> type[OpenEnvEnvironment]:
    """A class of environments whose action is a method, as the server describes it when it is first asked."""
    key = (cls, url, tool, description)
    if key not in _CLASSES:
        _CLASSES[key] = _made_with_tool(*key, time_limit)
    return _CLASSES[key]


def _made_with_tool(
    cls: type[OpenEnvEnvironment], url: str, tool: str, description: str, time_limit: float
) -> type[OpenEnvEnvironment]:
    try:
        import websockets.sync.client  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"OpenEnvEnvironment needs the package websockets ({error}): pip install 'alignment-modules[openenv]'"
        ) from error
    try:
        schema = json.loads(fetch(f"{url}/schema", timeout=time_limit))["action"]
    except (RequestError, ValueError, KeyError, TypeError) as error:
        raise OpenEnvError(f"the OpenEnv server {url} gives no schema of its action: {error}") from error
    method = action_tool(schema, cls._act, name=tool, description=description)
    return type(cls.__name__, (cls,), {tool: method, "__doc__": cls.__doc__, "__module__": cls.__module__})


def _connection(url: str, time_limit: float) -> Any:
    from websockets.sync.client import connect

    parts = urlsplit(url)
    near = parts.hostname in ("localhost", "127.0.0.1", "::1")
    address = parts._replace(scheme="wss" if parts.scheme == "https" else "ws", path=f"{parts.path}/ws").geturl()
    options = {"open_timeout": time_limit, "close_timeout": 1.0, "max_size": _MOST_BYTES}
    return connect(address, proxy=None if near else True, **options)


def _details(data: dict[str, Any]) -> str:
    """Which fields of an action were wrong, and how."""
    errors = data.get("errors")
    if not isinstance(errors, list):
        return ""
    told = [f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in errors if isinstance(one, dict)]
    return f" ({'; '.join(told)})"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
