"""Episodes as rows: what people see of them, and that fine-tuning reads the rows again, call by call."""

import json
import math

import pytest

from alignment_modules.callbacks.jsonl import to_json_line
from alignment_modules.rollouts.environments import Call, CallMade, Episode, Result
from alignment_modules.rollouts.environments.showing import episode_columns, episode_row

SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
PROMPT = [{"role": "user", "content": "1+1?"}]


def called(number, arguments):
    function = {"name": "add", "arguments": arguments}
    call = {"id": f"call{number:05d}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def answered(number, text):
    return {"role": "tool", "name": "add", "tool_call_id": f"call{number:05d}", "content": text}


@pytest.fixture
def episode():
    """Of a call that went well, one that failed, one that could not be read, and an answer."""
    messages = [
        called(0, {"a": 1}), answered(0, "2"), called(1, {"a": 2}), answered(1, "Error: no answer"),
        {"role": "assistant", "content": "hm"}, {"role": "tool", "content": "Error: it is no JSON"},
        {"role": "assistant", "content": "2"},
    ]  # fmt: skip
    calls = [
        CallMade(0, Call("add", {"a": 1}), Result("2")),
        CallMade(1, Call("add", {"a": 2}), Result("Error: no answer", True, "time_limit")),
        CallMade(2, None, Result("Error: it is no JSON", True, "malformed")),
    ]
    return Episode("adding", PROMPT, messages, turns=4, calls=calls, stop_reason="answer", reward=0.5)


def test_a_row_says_what_was_said_and_how_it_went(episode):
    row = episode_row(episode, [SCHEMA])
    assert row["messages"] == PROMPT + episode.messages
    assert row["tools"] == [SCHEMA]
    numbers = {name: row[name] for name in ("turns", "tool_calls", "tool_failures", "environment_reward")}
    assert numbers == {"turns": 4, "tool_calls": 3, "tool_failures": 2, "environment_reward": 0.5}
    assert row["stop_reason"] == "answer"
    assert not {"turn_rewards", "environment_errors"} & row.keys()


def test_what_failed_is_no_number_and_has_a_reason():
    failed = Episode(
        "adding", PROMPT, [], 1, [], "length", reward=math.nan, turn_rewards=[math.nan], errors=["get_reward: late"]
    )
    row = json.loads(to_json_line(episode_row(failed, [])))
    assert row["environment_reward"] is None
    assert row["turn_rewards"] == [None]
    assert row["environment_errors"] == ["get_reward: late"]


def test_columns_mark_the_results_of_calls_that_failed(episode):
    other = Episode(None, PROMPT, [{"role": "assistant", "content": "2"}], 1, [], "length")
    columns = episode_columns([episode, other])
    assert {len(values) for values in columns.values()} == {2}
    assert columns["messages"] == [PROMPT, PROMPT]
    assert [message.get("failed") for message in columns["episode"][0]] == [
        None, None, None, "time_limit", None, "malformed", None,
    ]  # fmt: skip
    assert all("failed" not in message for message in episode.messages), "an episode stays as it is"
    assert columns["stop_reason"] == ["answer", "length"]
    assert not {"messages", "episode"} & episode_columns([episode], whole=False).keys()
