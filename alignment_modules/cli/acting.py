"""A policy in a chat that calls tools: turn by turn, as in a run, until there is an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from alignment_modules.cli.conversation import Message, with_added
from alignment_modules.cli.loaded_policy import LoadedPolicy
from alignment_modules.cli.screen import Shown
from alignment_modules.cli.tools import Actions
from alignment_modules.rollouts.environments import (
    Job,
    Outcome,
    Parsed,
    Request,
    Result,
    Runner,
    ToolFormat,
    TurnRenderer,
    tool_format,
)
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.seeds import Seeds

_MARGIN = 24  # characters that may be the beginning of a call's mark
_INTERRUPTED = Result("Error: interrupted by the user", True, "died")


@dataclass
class Answered:
    """What followed a message of the user.

    Attributes:
        added: What the environment added to it.
        messages: The policy's turns and the results of its calls.
        remarks: How it ended, where that is not by an answer, and the environment's reward so far.
    """

    added: str = ""
    messages: list[Message] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class Acting:
    """One policy's side of a chat with tools; its environment is made anew where the conversation begins.

    Args:
        loaded: The policy.
        actions: What it may call.

    Raises:
        ValueError: If its chat template cannot show tools, or the row names no environment.
    """

    def __init__(self, loaded: LoadedPolicy, actions: Actions) -> None:
        self.loaded, self.actions = loaded, actions
        self.name = actions.environments.for_row(actions.row)
        self.schemas = actions.environments.schemas(self.name)
        self.format = tool_format(actions.options.format, loaded.codec.tokenizer)
        self.renderer = TurnRenderer(loaded.codec, self.format, max_result_length=actions.options.max_result_length)
        self.renderer.check(self.schemas)
        self.runner = Runner(actions.options)
        self.environment: Any = None

    def answer(
        self, before: list[Message], user: str, parameters: SamplingParameters, seeds: Seeds, show: Shown
    ) -> Answered:
        """Answers a message: turn by turn, until the policy calls nothing or has reached a limit.

        Args:
            before: The conversation before it.
            user: The message.
            parameters: How to draw; the longest completion is that of all turns and results together.
            seeds: Of one prompt; each turn draws numbers of its own.
            show: Gets the text, the calls and the results.

        Raises:
            ValueError: If the environment cannot begin, or the template refuses the conversation.
        """
        begins = not any(message["role"] == "user" for message in before)
        found = Answered(self._begin(seeds.seed) if begins else "")
        asked = {"role": "user", "content": with_added(user, found.added)}
        context = self.renderer.prompt([*before, asked], self.schemas, told=found.added)
        try:
            self._turns(found, context, parameters, seeds, show)
        except KeyboardInterrupt:
            found.remarks.append("interrupted")
        if (reward := self._reward()) is not None:
            found.remarks.append(f"reward {reward}")
        return found

    def _turns(
        self, found: Answered, context: list[int], parameters: SamplingParameters, seeds: Seeds, show: Shown
    ) -> None:
        room, calls = parameters.max_completion_length, 0
        strings = [*parameters.stop_strings, *self.format.stop_strings]
        stops = self.loaded.codec.stop_token_ids
        parameters = replace(parameters, stop_strings=strings, stop_token_ids=stops)
        for turn in range(self.actions.max_turns):
            held = _Held(self.format, show)
            given = replace(parameters, max_completion_length=room)
            ids, how = self.loaded.write_ids(context, given, replace(seeds, draw=turn), held)
            parsed = self.renderer.read(ids)
            held.finish(shown=not parsed.calls or bool(parsed.errors))
            found.messages.append(self.renderer.message(parsed, first=calls))
            asked = len(parsed.calls) + len(parsed.errors)
            if how != "stopped" or not asked:
                found.remarks += [] if how == "stopped" else [how]
                return
            for call in parsed.calls:
                show.block("call", f"{call.name} {json.dumps(call.arguments, ensure_ascii=False, default=str)}")
            if refused := self._refused(turn + 1, calls + asked):
                found.remarks.append(f"{refused} is reached: what it calls now is not run")
                return
            results = self._run(parsed, found, show)
            between = self.renderer.appended(results, stopped=ids[-1] in stops, schemas=self.schemas)
            context, room, calls = [*context, *ids, *between], room - len(ids) - len(between), calls + asked
            if room < 1:
                found.remarks.append("cut")
                return

    def _refused(self, turns: int, calls: int) -> str:
        """The limit that the calls of a turn would exceed; empty: none."""
        limit = self.actions.max_tool_calls
        if turns >= self.actions.max_turns:
            return f"max_turns={self.actions.max_turns}"
        return f"max_tool_calls={limit}" if limit is not None and calls > limit else ""

    def _run(self, parsed: Parsed, found: Answered, show: Shown) -> list[Result]:
        """Runs the calls of a turn, shows what came of them, and adds that to the messages; Ctrl-C ends them.

        Raises:
            KeyboardInterrupt: If the user ended them; the messages then say so.
        """
        tools = self.actions.environments.tools_of(self.name, self.environment)
        interrupted = False
        try:
            [results] = self.runner.run([[Request(call, tools) for call in parsed.calls]])
        except KeyboardInterrupt:
            interrupted, results = True, [_INTERRUPTED] * len(parsed.calls)
        results += [Result(f"Error: {error}", True, "malformed") for error in parsed.errors]
        called = [*found.messages[-1].get("tool_calls", []), *(None for _ in parsed.errors)]
        found.messages += [self.renderer.answer(one, call) for one, call in zip(results, called, strict=True)]
        for result in results:
            show.block(f"failed: {result.reason}" if result.failed else "result", result.text, failed=result.failed)
        if interrupted:
            raise KeyboardInterrupt
        return results

    def _begin(self, seed: int) -> str:
        """Makes the environment anew; what its `reset` says."""
        environments = self.actions.environments
        if self.name is None:
            return ""
        self.environment = self._done(Job(environments.make, {"name": self.name})).value
        arguments = environments.reset_arguments(self.environment, self.actions.row, seed)
        said = self._done(Job(self.environment.reset, arguments, owner=self.environment)).value
        if said is not None and not isinstance(said, str):
            raise ValueError(f"environment {self.name!r}: reset returned {said!r}, which is neither text nor None")
        return said or ""

    def _done(self, job: Job) -> Outcome:
        [[outcome]] = self.runner.outcomes([[job]])
        if outcome.reason:
            raise ValueError(f"environment {self.name!r} cannot begin: {outcome.error}")
        return outcome

    def _reward(self) -> str | None:
        """What the environment says of it so far; None: it has no `get_reward`."""
        method = getattr(self.environment, "get_reward", None)
        if not callable(method):
            return None
        [[outcome]] = self.runner.outcomes([[Job(method, owner=self.environment)]])
        return outcome.error if outcome.reason else str(outcome.value)


class _Held:
    """Hands text on until a call begins, and keeps the rest: calls are shown as blocks."""

    def __init__(self, form: ToolFormat, show: Callable[[str], None]) -> None:
        self.form, self.show = form, show
        self.text, self.shown = "", 0

    def __call__(self, piece: str) -> None:
        self.text += piece
        parsed = self.form.parse(self.text)
        if not (parsed.calls or parsed.errors or self.text.lstrip().startswith("{")):
            mark = self.text.rfind("<", max(len(self.text) - _MARGIN, 0))
            self._hand_on(mark if mark >= 0 else len(self.text))

    def finish(self, *, shown: bool) -> None:
        """Ends a turn.

        Args:
            shown: Whether what was kept is to be seen as it was written.
        """
        if shown:
            self._hand_on(len(self.text))

    def _hand_on(self, end: int) -> None:
        if end > self.shown:
            self.show(self.text[self.shown : end])
            self.shown = end
