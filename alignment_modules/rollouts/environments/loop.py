"""Episodes: the policy writes, its calls are answered, it writes on, until there is an answer or no room."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alignment_modules.policies.context import context_length
from alignment_modules.rollouts.codec import Codec, columns_of, real_tokens
from alignment_modules.rollouts.engines import Engine
from alignment_modules.rollouts.environments.formats import tool_format
from alignment_modules.rollouts.environments.options import ToolOptions
from alignment_modules.rollouts.environments.parsing import NoCalls, Parsed
from alignment_modules.rollouts.environments.results import Result
from alignment_modules.rollouts.environments.running import Job, Runner
from alignment_modules.rollouts.environments.tool_set import EnvironmentSet
from alignment_modules.rollouts.environments.turns import TurnRenderer
from alignment_modules.rollouts.environments.under_way import UnderWay
from alignment_modules.rollouts.limits import LIMITS
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions
from alignment_modules.rollouts.seeds import Seeds

MAX_TURNS = 8


class Episodes:
    """Has a policy act on environments: completions of several turns.

    All episodes of a batch take their turns together, those that ended stay out. A turn of the policy is drawn with
    numbers of its own, so that an episode can be repeated alone.

    Args:
        environments: What the policy acts on.
        codec: The tokenizer and its stop tokens.
        max_turns: Turns of the policy; what it calls in the last one is not run.
        max_tool_calls: Calls of an episode, those that could not be read included; the turn that would exceed them is
            the last. None: any number.
        options: How calls are read, run and answered.
    """

    def __init__(
        self,
        environments: EnvironmentSet,
        codec: Codec,
        *,
        max_turns: int = MAX_TURNS,
        max_tool_calls: int | None = None,
        options: ToolOptions | None = None,
    ) -> None:
        self.environments, self.codec = environments, codec
        self.max_turns, self.max_tool_calls = max_turns, max_tool_calls
        self.options = options or ToolOptions()
        self._renderer: TurnRenderer | None = None
        self._tokenizer: Any = None
        self._checked: set[tuple[Any, ...]] = set()
        self._runner: Runner | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without threads and what depends on the tokenizer, which are made anew."""
        return self.__dict__ | {"_renderer": None, "_tokenizer": None, "_checked": set(), "_runner": None}

    def describe(self) -> str:
        """The environments, tools and limits in words."""
        names = ", ".join(self.environments.names) or "none"
        tools = sorted({one["function"]["name"] for name in self._names for one in self.environments.schemas(name)})
        calls = "" if self.max_tool_calls is None else f", at most {self.max_tool_calls} calls"
        return f"{names}; tools {', '.join(tools) or 'none'}; at most {self.max_turns} turns{calls}"

    def check(self, batch: Mapping[str, Any]) -> None:
        """Checks that a batch has what its rows' environments ask for.

        Raises:
            ValueError: If it lacks prompts or a column, or a row names no environment.
        """
        if not isinstance(batch.get("prompt"), list):
            raise ValueError(
                "environments and tools need the rows' `prompt`, messages or text, which this batch lacks: its chat "
                f"template is rendered with the tools; columns: {', '.join(sorted(columns_of(batch))) or 'none'} "
                "(SFTDataModule hands on those that its carry names)"
            )
        self.environments.check_columns(columns_of(batch).keys())
        self._rows(batch)

    def prepare(self) -> TurnRenderer:
        """What renders turns, once the tokenizer is known; checks that its chat template can show what is there.

        Raises:
            ValueError: If there is no tokenizer, or its chat template cannot.
        """
        tokenizer = self.codec.require_tokenizer()
        if self._renderer is None or self._tokenizer is not tokenizer:
            called = any(self.environments.schemas(name) for name in self._names)
            format_ = tool_format(self.options.format, tokenizer) if called else NoCalls()
            self._renderer = TurnRenderer(self.codec, format_, max_result_length=self.options.max_result_length)
            self._tokenizer, self._checked = tokenizer, set()
        for name in self._names:
            if (name, *self.codec.stop_token_ids) not in self._checked:
                self._renderer.check(self.environments.schemas(name))
                self._checked.add((name, *self.codec.stop_token_ids))
        return self._renderer

    def prompts(self, batch: Mapping[str, Any], seeds: Seeds) -> list[tuple[list[int], list[str]]]:
        """The prompts of a batch as the policy reads them, with the tools and what environments say at the start.

        Args:
            batch: As in `run`.
            seeds: Of each prompt.

        Returns:
            Of each row the ids, and what failed in its environment.

        Raises:
            ValueError: As `run` does before anything is generated.
        """
        renderer, episodes = self.prepare(), list[UnderWay]()
        try:
            self._begin(episodes, batch, 1, seeds)
            ids = [_of_row(n, renderer.prompt, one.prompt, one.schemas) for n, one in enumerate(episodes)]
            return [(row, list(one.errors)) for row, one in zip(ids, episodes, strict=True)]
        finally:
            self._close(episodes)

    @torch.no_grad()
    def run(
        self,
        policy: nn.Module,
        engine: Engine,
        batch: Mapping[str, Any],
        parameters: SamplingParameters,
        *,
        num_samples: int = 1,
        seeds: Seeds,
    ) -> Completions:
        """Episodes of the rows of a batch.

        Args:
            policy: Who writes; it was pushed to the engine.
            engine: Has sessions.
            batch: Prompts with their columns.
            parameters: How turns are drawn; `max_completion_length` is that of all turns and results together.
            num_samples: Episodes of each prompt, which are neighbours.
            seeds: Of each prompt.

        Returns:
            Completions of all turns, with their `prompts` as they were rendered and `episodes`.

        Raises:
            ValueError: If a row names no environment, lacks a column, or its prompt leaves no room; or an environment
                tells two samples of a prompt different texts.
            EngineError: If the engine has no sessions.
            NonFiniteLogits: If the policy's logits are not finite.
        """
        renderer = self.prepare()
        stops = {*parameters.stop_token_ids, *self.codec.stop_token_ids}
        parameters = replace(
            parameters,
            stop_token_ids=tuple(sorted(stops)),
            stop_strings=[*parameters.stop_strings, *renderer.tool_format.stop_strings],
        )
        episodes: list[UnderWay] = []
        try:
            self._begin(episodes, batch, num_samples, seeds)
            prompts = self._prompts(renderer, episodes, batch, parameters, num_samples, context_length(policy))
            with engine.scope():
                session = engine.open(prompts, parameters, num_samples=num_samples, seeds=seeds)
                going, turn = episodes, session.turn
                while more := self._answer(renderer, going, turn, stops):
                    going = [episode for episode, _ in more]
                    rows, tokens = [one.row for one in going], [ids for _, ids in more]
                    turn = engine.extend(session, rows, tokens, limits=[one.room for one in going])
                whole = engine.close(session)
            self._judge(episodes)
        finally:
            self._close(episodes)
        truncated = torch.tensor([episode.stop_reason != "answer" for episode in episodes])
        return replace(whole, truncated=truncated, prompts=prompts, episodes=[one.finished() for one in episodes])

    @property
    def _names(self) -> Sequence[str | None]:
        return self.environments.names or (None,)

    @property
    def runner(self) -> Runner:
        """What runs tools and environments."""
        if self._runner is None:
            self._runner = Runner(self.options)
        return self._runner

    def _rows(self, batch: Mapping[str, Any]) -> list[tuple[dict[str, Any], str | None]]:
        """The columns of each row, and its environment."""
        columns = columns_of(batch)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [(row, _of_row(number, self.environments.for_row, row)) for number, row in enumerate(rows)]

    def _begin(self, episodes: list[UnderWay], batch: Mapping[str, Any], num_samples: int, seeds: Seeds) -> None:
        """Makes and resets the environments of all episodes, and adds what they say to the messages."""
        rows = self._rows(batch)
        episodes += [UnderWay(number, rows[number // num_samples][1]) for number in range(len(rows) * num_samples)]
        made = self.runner.outcomes(
            [[] if one.name is None else [Job(self.environments.make, {"name": one.name})] for one in episodes]
        )
        jobs: list[list[Job]] = []
        for one, outcomes in zip(episodes, made, strict=True):
            jobs.append([])
            prompt = one.row // num_samples
            if outcomes and outcomes[0].reason:
                one.fail("factory", outcomes[0].error)
            elif outcomes:
                one.environment = outcomes[0].value
                given = one.environment, rows[prompt][0], seeds.of_prompt(seeds.indices[prompt])
                arguments = _of_row(prompt, self.environments.reset_arguments, *given)
                jobs[-1].append(Job(one.environment.reset, arguments, owner=one.environment))
            if not one.errors:
                one.tools = self.environments.tools_of(one.name, one.environment)
            one.schemas = self.environments.schemas(one.name)
        texts: list[str | None] = [None] * len(episodes)
        for one, outcomes in zip(episodes, self.runner.outcomes(jobs), strict=True):
            if outcomes:
                one.took(outcomes[0])
                texts[one.row] = None if one.errors else outcomes[0].value
        for prompt, (row, name) in enumerate(rows):
            group = episodes[prompt * num_samples : (prompt + 1) * num_samples]
            said = [texts[one.row] for one in group if not one.errors]
            if any(text != said[0] for text in said):
                raise ValueError(
                    f"row {prompt} of a batch: reset of environment {name!r} told two samples of one prompt different "
                    f"texts, {said[0]!r} and {next(text for text in said if text != said[0])!r}: what it draws must "
                    "come from its parameter `seed` or the row's columns alone"
                )
            told = (said[0] if said else None) or ""
            messages = _of_row(prompt, _with_text, _messages(row["prompt"]), told)
            for one in group:
                one.prompt, one.told = messages, told

    def _prompts(
        self,
        renderer: TurnRenderer,
        episodes: Sequence[UnderWay],
        batch: Mapping[str, Any],
        parameters: SamplingParameters,
        num_samples: int,
        context: int | None,
    ) -> Prompts:
        """The rendered prompts, with what each leaves of the context as its limit."""
        firsts = episodes[::num_samples]
        ids = [_of_row(n, renderer.prompt, one.prompt, one.schemas, one.told) for n, one in enumerate(firsts)]
        own = batch.get(LIMITS) or [None] * len(ids)
        limits = [min(limit or parameters.max_completion_length, parameters.max_completion_length) for limit in own]
        for number, row in enumerate(ids):
            left = limits[number] if context is None else context - len(row)
            if left < 1:
                raise ValueError(
                    f"row {number} of a batch: its prompt has {len(row)} tokens with the tools, and the policy's "
                    f"context is {context}: no room is left to write"
                )
            for one in episodes[number * num_samples : (number + 1) * num_samples]:
                one.limit, one.by_context = min(limits[number], left), left < limits[number]
        return Prompts.from_rows(ids, batch["prompts"].device).limited([one.limit for one in firsts])

    def _answer(
        self, renderer: TurnRenderer, going: Sequence[UnderWay], turn: Completions, stops: Collection[int]
    ) -> list[tuple[UnderWay, list[int]]]:
        """Runs the calls of a turn.

        Returns:
            The episodes that go on, each with the tokens between this turn and the next.
        """
        asking: list[tuple[UnderWay, Parsed, bool]] = []
        written = zip(going, real_tokens(turn.ids, turn.mask), turn.truncated.tolist(), strict=True)
        for one, ids, truncated in written:
            one.turns, one.used = one.turns + 1, one.used + len(ids)
            parsed = renderer.read(ids)
            one.messages.append(renderer.message(parsed, first=_readable(one)))
            one.stop_reason = one.reason_to_end(
                parsed, truncated=truncated, max_turns=self.max_turns, max_tool_calls=self.max_tool_calls
            )
            if one.stop_reason is None:
                asking.append((one, parsed, ids[-1] in stops))
        found: list[tuple[UnderWay, list[int]]] = []
        results = self.runner.run([one.requests(parsed.calls) for one, parsed, _ in asking])
        for (one, parsed, stopped), answers in zip(asking, results, strict=True):
            every = [*answers, *(Result(f"Error: {error}", True, "malformed") for error in parsed.errors)]
            one.answered(parsed, every)
            named = [*one.messages[-1].get("tool_calls", []), *(None for _ in parsed.errors)]
            ids = renderer.appended(every, stopped=stopped, schemas=one.schemas, calls=named)
            if one.room <= len(ids):
                one.stop_reason = one.out_of_room
                continue
            one.messages += [renderer.answer(result, call) for result, call in zip(every, named, strict=True)]
            one.used, one.tool_tokens = one.used + len(ids), one.tool_tokens + len(ids)
            found.append((one, ids))
        return found

    def _judge(self, episodes: Sequence[UnderWay]) -> None:
        """Asks the environments for their rewards, and warns of those that failed."""
        jobs = [one.last_jobs() for one in episodes]
        outcomes = self.runner.outcomes([list(row.values()) for row in jobs])
        for one, names, found in zip(episodes, jobs, outcomes, strict=True):
            one.judged(dict(zip(names, found, strict=True)))
            if one.errors:
                one.unjudged(**self.environments.rewards(one.name))
        failed = [one for one in episodes if one.errors]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(episodes)} episodes are not judged, because their environment failed; the "
                f"first, of {failed[0].name!r}, in {failed[0].errors[0]}",
                stacklevel=3,
            )

    def _close(self, episodes: Sequence[UnderWay]) -> None:
        """Closes the environments that can be closed; what they raise is nobody's business any more."""
        methods = [getattr(one.environment, "close", None) for one in episodes]
        self.runner.outcomes([[Job(method)] if callable(method) else [] for method in methods])


def _readable(episode: UnderWay) -> int:
    """Calls so far that could be read: those that have a number."""
    return sum(made.call is not None for made in episode.calls)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as messages: text is one of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _with_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Messages with a text added to the last one of the user, on a line of its own."""
    if not text:
        return messages
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None or not isinstance(messages[place]["content"], str):
        raise ValueError("its prompt has no message of the user, of text, which the text of `reset` could be added to")
    content = "\n".join(filter(None, (messages[place]["content"], text)))
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


def _of_row(number: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function says of a row of a batch, whose number is told with what it refuses."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"row {number} of a batch: {error}") from error
