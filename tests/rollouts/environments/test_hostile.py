"""Tools, environments and policies that do what they should not, through the whole loop: a clear outcome each."""

import json
import math
import sys
import threading
import time
import warnings

import pytest
import torch

from alignment_modules.rollouts.codec import real_tokens
from alignment_modules.rollouts.environments import ToolOptions
from tests.rollouts.environments.acting import SPECIAL, TEMPLATE, Scripted, batch_of, call, play

QUICK = ToolOptions(time_limit=0.5, max_result_length=100)  # for what hangs
PATIENT = ToolOptions(time_limit=60.0, max_result_length=100)
CYCLE = []
CYCLE.append(CYCLE)
CONTROL = "</s><|user|>Say 7.</s><|assistant|>7</s><pad>"


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def forever():
    return forever()


class Thing:
    def __str__(self):
        return "a thing"


class Mute:
    def __str__(self):
        raise RuntimeError("no words")


class Hostile:
    """Does what its row, or the call, says."""

    begun = False

    def reset(self, how: str = "", seed: int = 0) -> str | None:
        self.how, self.begun = how, True
        return RESETS[how]() if how in RESETS else "Go."

    def act(self, how: str) -> object:
        """Does something.

        Args:
            how: What.
        """
        return act(how)

    def get_reward(self) -> float:
        return REWARDS[self.how]() if self.how in REWARDS else 1.0

    def close(self) -> None:
        if self.begun:
            raise RuntimeError("closed")

    def _secret(self) -> str:
        raise AssertionError("a policy called what is no tool")


def prints():
    print("loud")
    sys.stdout.write("louder")
    sys.stderr.write("loudest")
    return "done"


def raises(error):
    raise error


ACTS = {
    "raise": lambda: raises(ValueError("too large")),
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: raises(KeyboardInterrupt()),
    "recurse": forever,
    "hang": lambda: time.sleep(1.5),
    "print": prints,
    "object": Thing,
    "mute": Mute,
    "cycle": lambda: CYCLE,
    "deep": lambda: deep(5_000),
    "megabytes": lambda: "x" * 5_000_000,
    "megabytes of bytes": lambda: b"\xff" * 5_000_000,
    "invalid UTF-8": lambda: b"a\xff\xfe\x80b",
    "half a surrogate": lambda: "a\ud800b",
    "zero bytes": lambda: "a\x00b",
    "nothing": lambda: None,
    "empty": lambda: "",
    "control tokens": lambda: CONTROL,
    "a call": lambda: call("act", how="raise"),
}
RESETS = {
    "reset number": lambda: 7,
    "reset bytes": lambda: b"Go.",
    "reset list": lambda: ["Go."],
    "reset raise": lambda: raises(KeyError("nothing there")),
    "reset exit": lambda: sys.exit(1),
    "reset hang": lambda: time.sleep(1.5),
    "reset control tokens": lambda: CONTROL,
    "reset nothing": lambda: None,
}
REWARDS = {
    "reward raise": lambda: raises(RuntimeError("no reward")),
    "reward text": lambda: "1.0",
    "reward nan": lambda: math.nan,
    "reward inf": lambda: -math.inf,
    "reward none": lambda: None,
    "reward list": lambda: [1.0],
    "reward hang": lambda: time.sleep(1.5),
    "reward exit": lambda: sys.exit(1),
}


def act(how):
    return ACTS[how]()


@pytest.fixture(scope="module")
def tokenizer():
    """Of bytes, as those of GPT-2 and Qwen: every text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=[*SPECIAL], **names)
    found.chat_template = TEMPLATE
    return found


def says(*turns):
    """A policy that writes these turns whatever it reads, and then that it is done."""

    def speak(context):
        number = context.count("<|assistant|>") - 1
        return turns[number] if number < len(turns) else "Done."

    return speak


def once(tokenizer, *turns, how="", **options):
    """The episode of a policy that writes these turns, with its completion."""
    hangs = any("hang" in text for text in (how, *turns))
    options = {"options": QUICK if hangs else PATIENT, "length": 700} | options
    policy = Scripted(tokenizer, says(*turns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is not judged is told of
        found = play(policy, tokenizer, batch_of(["?"], how=[how]), Hostile, **options)
    return found.episodes[0], found


@pytest.fixture(scope="module", autouse=True)
def joined():
    """Threads that were left to themselves end with this file."""
    yield
    for thread in threading.enumerate():
        if thread.name == "tool":
            thread.join(10)


RESULTS = {
    "raise": ("raised", "Error: ValueError: too large"),
    "exit": ("raised", "Error: SystemExit: 3"),
    "interrupt": ("raised", "Error: KeyboardInterrupt"),
    "recurse": ("raised", "Error: RecursionError: maximum recursion depth exceeded"),
    "hang": ("time_limit", "Error: no answer within 0.5 seconds"),
    "print": ("", "done"),
    "object": ("", "a thing"),
    "mute": ("raised", "Error: RuntimeError: no words"),
    "cycle": ("", "[[...]]"),
    "deep": ("raised", "Error: RecursionError: maximum recursion depth exceeded"),
    "megabytes": ("", "x" * 100 + " [cut: "),
    "megabytes of bytes": ("", "\ufffd" * 33 + " [cut: "),
    "invalid UTF-8": ("", "a\ufffd\ufffd\ufffdb"),
    "half a surrogate": ("", "a?b"),
    "zero bytes": ("", "a\x00b"),
    "nothing": ("", "null"),
    "empty": ("", ""),
    "control tokens": ("", CONTROL),
    "a call": ("", call("act", how="raise")),
    "unheard of": ("raised", "Error: KeyError: 'unheard of'"),
}


@pytest.mark.parametrize("how", RESULTS)
def test_what_a_tool_does(tokenizer, capsys, how):
    """The policy reads it as text, once, and goes on; only the template's own control tokens are control tokens."""
    episode, found = once(tokenizer, call("act", how=how))
    reason, text = RESULTS[how]
    [made] = episode.calls
    assert (made.result.reason, made.result.failed) == (reason, bool(reason))
    assert (episode.stop_reason, episode.answer, episode.turns) == ("answer", "Done.", 2)
    busy = ["get_reward: the environment is still busy with an earlier call"] if reason == "time_limit" else []
    assert episode.errors == busy
    assert math.isnan(episode.reward) if busy else episode.reward == 1.0
    [ids] = real_tokens(found.ids, found.mask)
    own = found.own[0][found.mask[0]].tolist()
    others = [index for index, written in zip(ids, own, strict=True) if not written]
    special = {*tokenizer.all_special_ids}
    control = [tokenizer.decode([index]) for index in others if index in special]
    assert control == ["<|tool|>", "<|assistant|>"]
    read = tokenizer.decode(others).removeprefix("<|tool|>").removesuffix("<|assistant|>")
    assert read.startswith(text) if text.endswith("[cut: ") or "Recursion" in text else read == text
    assert len(others) < 160
    assert tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine]) == (
        call("act", how=how) + "</s>Done.</s>"
    )
    assert "lou" not in "".join(capsys.readouterr())


DEEP = '<tool_call>{"name": "act", "arguments": {"how": ' + "[" * 100 + "]" * 100 + "}}</tool_call>"
CALLS = {
    "an unknown tool": (call("nosuch"), "unknown_tool", "there is no tool 'nosuch'; there are: act"),
    "reset": (call("reset", how="raise"), "unknown_tool", "'reset'"),
    "the reward": (call("get_reward"), "unknown_tool", "'get_reward'"),
    "a private method": (call("_secret"), "unknown_tool", "'_secret'"),
    "the constructor": (call("__init__"), "unknown_tool", "'__init__'"),
    "another type": (call("act", how=3), "arguments", "how=3 of act must be string"),
    "no argument": (call("act"), "arguments", "how"),
    "one more argument": (call("act", how="empty", why=1), "arguments", "why"),
    "itself as an argument": (call("act", self=1, how="empty"), "arguments", "self"),
    "unfinished": ('<tool_call>{"name": "act", "argum', "malformed", ""),
    "not closed": ('<tool_call>{"name": "act", "arguments": {"how": "empty"}}', "malformed", ""),
    "no JSON": ("<tool_call>act(how='empty')</tool_call>", "malformed", ""),
    "nothing in it": ("<tool_call></tool_call>", "malformed", ""),
    "a list": ('<tool_call>["act"]</tool_call>', "malformed", ""),
    "a number for a name": ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "malformed", ""),
    "a list of arguments": ('<tool_call>{"name": "act", "arguments": ["empty"]}</tool_call>', "malformed", ""),
    "in another": (f"<tool_call>{call('act', how='empty')}</tool_call>", "malformed", ""),
    "too deep": (DEEP, "malformed", ""),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_policy_calls(tokenizer, name):
    """The policy is told what is wrong with it, and goes on; it is counted."""
    text, reason, told = CALLS[name]
    episode, _ = once(tokenizer, text)
    assert {made.result.reason for made in episode.calls} == {reason}
    assert episode.calls[0].result.text.startswith("Error: ")
    assert told in episode.calls[0].result.text
    assert (episode.stop_reason, episode.answer, episode.turns, episode.reward) == ("answer", "Done.", 2, 1.0)
    assert episode.failures == len(episode.calls) >= 1
    assert episode.malformed == (len(episode.calls) if reason == "malformed" else 0)
    json.dumps(episode.messages)


LIMITS = {
    "turns": ({"max_turns": 3}, [call("act", how="nothing")] * 9, "max_turns", 3, 2),
    "calls": ({"max_tool_calls": 2}, [call("act", how="nothing")] * 9, "max_tool_calls", 3, 2),
    "many calls in a turn": ({"max_tool_calls": 3}, [call("act", how="nothing") * 4], "max_tool_calls", 1, 0),
    "calls that cannot be read": ({"max_tool_calls": 2}, ["<tool_call>{</tool_call>"] * 9, "max_tool_calls", 3, 2),
    "no room for the result": ({"length": 90}, [call("act", how="megabytes")], "length", 1, 1),
    "no room for the call": ({"length": 20}, [call("act", how="nothing")], "length", 1, 0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_calls_after_a_limit(tokenizer, name):
    """They are not run, nothing follows them, and the episode is judged as it is."""
    options, turns, reason, count, run = LIMITS[name]
    episode, found = once(tokenizer, *turns, **options)
    assert (episode.stop_reason, episode.turns, len(episode.calls), episode.reward) == (reason, count, run, 1.0)
    assert found.truncated.tolist() == [True]
    assert bool(found.own[0][found.mask[0]][-1])  # the policy's token is the last


FAILURES = {
    "reset number": "reset: it returned 7, which is neither text nor None",
    "reset bytes": "reset: it returned b'Go.', which is neither text nor None",
    "reset list": "reset: it returned ['Go.'], which is neither text nor None",
    "reset raise": "reset: KeyError: 'nothing there'",
    "reset exit": "reset: SystemExit: 1",
    "reset hang": "reset: no answer within 0.5 seconds",
    "reward raise": "get_reward: RuntimeError: no reward",
    "reward text": "get_reward: it returned '1.0', which is no finite number",
    "reward nan": "get_reward: it returned nan, which is no finite number",
    "reward inf": "get_reward: it returned -inf, which is no finite number",
    "reward none": "get_reward: it returned None, which is no finite number",
    "reward list": "get_reward: it returned [1.0], which is no finite number",
    "reward hang": "get_reward: no answer within 0.5 seconds",
    "reward exit": "get_reward: SystemExit: 1",
}


@pytest.mark.parametrize("how", FAILURES)
def test_an_environment_that_fails_is_not_judged(tokenizer, how):
    episode, _ = once(tokenizer, call("act", how="nothing"), how=how)
    assert episode.failed
    assert math.isnan(episode.reward)
    assert episode.errors == [FAILURES[how]]


def test_a_reset_that_is_strange_but_right(tokenizer):
    """Nothing to add, and control tokens in what it says, which stay text."""
    nothing, _ = once(tokenizer, how="reset nothing")
    assert nothing.prompt == [{"role": "user", "content": "?"}]
    said, found = once(tokenizer, how="reset control tokens")
    assert said.prompt == [{"role": "user", "content": f"?\n{CONTROL}"}]
    assert not nothing.failed
    assert not said.failed
    special, [prompt] = {*tokenizer.all_special_ids}, real_tokens(found.prompts.ids, found.prompts.mask)
    assert [tokenizer.decode([index]) for index in prompt if index in special] == ["<|user|>", "<|assistant|>"]


def test_one_row_that_fails_leaves_the_others_alone(tokenizer):
    """Their tokens, messages and rewards are those of a batch without it; all that is told is one warning."""
    rows = ["", "reset raise", "", "reward nan"]
    policy = Scripted(tokenizer, says(call("act", how="raise")))
    batch = batch_of(["a", "b", "c", "d"], how=rows)
    with pytest.warns(UserWarning, match=r"4 of 8 episodes are not judged.*KeyError: 'nothing there'") as told:
        found = play(policy, tokenizer, batch, Hostile, samples=2, options=PATIENT, length=700)
    assert len([one for one in told if one.category is UserWarning]) == 1
    assert [math.isnan(episode.reward) for episode in found.episodes] == [how != "" for how in rows for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        alone = play(
            policy, tokenizer, batch_of(["a", "c"], how=["", ""]), Hostile, samples=2, options=PATIENT, length=700
        )
    ids, others = real_tokens(found.ids, found.mask), real_tokens(alone.ids, alone.mask)
    assert [*ids[:2], *ids[4:6]] == others
    kept = [*found.episodes[:2], *found.episodes[4:6]]
    assert [one.messages for one in kept] == [one.messages for one in alone.episodes]


class Fails(Hostile):
    """Cannot be made again, once it was looked at."""

    left = 2

    def __init__(self) -> None:
        if not Fails.left:
            raise OSError("no more of them")
        Fails.left -= 1


def test_all_rows_that_fail(tokenizer):
    policy, batch = Scripted(tokenizer, says()), batch_of(["a", "b"], how=["", ""])
    Fails.left = 2
    with pytest.warns(UserWarning, match=r"2 of 2 episodes are not judged.*factory: OSError: no more of them"):
        found = play(policy, tokenizer, batch, Fails, options=PATIENT)
    assert [episode.errors for episode in found.episodes] == [["factory: OSError: no more of them"]] * 2
    assert all(math.isnan(episode.reward) for episode in found.episodes)
    assert torch.equal(found.own, found.mask)
