"""A judge behind an OpenAI-compatible HTTP route: it reads a completion and answers with a score."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from alignment_modules.functional.http import RequestError, check_url, fetch, short
from alignment_modules.functional.ranges import Count, Finite, Natural, NonNegative, Positive, Range, check_options
from alignment_modules.rewards.patient import PatientReward
from alignment_modules.rewards.protocol import FinalRewardError

QUESTION = """Rate how good the reply to the request is, from 0 (useless) to 10 (perfect).

Request:
{prompt}

Reply:
{completion}

End your answer with one line: Score: N"""

SCORE = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"


class ChatJudge:
    """Asks a chat model for a score of each completion, `POST URL/chat/completions`.

    Requests are made in threads, again where they fail for a while (a busy server, no connection, no score in the
    answer), and each only once: what was answered is kept, in a file where one is given. The score is the last match of
    `pattern` in the answer, moved from `lowest`..`highest` to 0..1.

    Args:
        url: Of the API, such as "http://localhost:8000/v1".
        model_name: The model's name there.
        question: What is asked. `{prompt}` and `{completion}` stand for the texts, any other name for that column of
            the data, such as `{answer}`; literal braces are doubled.
        system: A system message; None: none.
        pattern: Regular expression with one group, the number.
        lowest: The score that becomes 0.
        highest: The score that becomes 1.
        temperature: Of the judge's answer.
        max_tokens: Longest answer in tokens.
        api_key_env: Name of the environment variable that holds the key; None: no key is sent. The key itself is in no
            message, file or configuration.
        retries: How often a request that failed is made again.
        timeout: Seconds that one request may take.
        max_workers: Requests at the same time.
        cache: A file (JSON lines) that keeps scores over runs; None: they are kept as long as this object.
        on_failure: What a request that fails for good means: "raise" ends the run; "none" counts its completion as not
            judged, with a warning.

    Raises:
        ValueError: If an option has a value that is not allowed, or the environment variable is not set.
    """

    name = "judge"

    def __init__(
        self,
        url: str,
        model_name: str,
        question: str = QUESTION,
        system: str | None = None,
        pattern: str = SCORE,
        lowest: Finite = 0.0,
        highest: Finite = 10.0,
        temperature: NonNegative = 0.0,
        max_tokens: Count = 512,
        api_key_env: str | None = None,
        retries: Natural = 4,
        timeout: Positive = 60.0,
        max_workers: Annotated[int, Range(1, 1024)] = 16,
        cache: str | None = None,
        on_failure: Literal["raise", "none"] = "raise",
    ) -> None:
        check_options(ChatJudge.__init__, locals())
        check_url(url)
        if highest <= lowest:
            raise ValueError(f"highest={highest:g} must be above lowest={lowest:g}")
        self.pattern, self.fields = _compiled(pattern), _fields(question)
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"api_key_env={api_key_env!r}: this environment variable is not set")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model_name, self.question, self.system = model_name, question, system
        self.lowest, self.highest, self.temperature, self.max_tokens = lowest, highest, temperature, max_tokens
        self.api_key_env, self.timeout = api_key_env, timeout
        self.required_columns = tuple(field for field in self.fields if field not in ("prompt", "completion"))
        self.cache = None if cache is None else Path(cache).expanduser()
        self.scores = {} if self.cache is None else _read(self.cache)
        self.patient = PatientReward(self.judge, retries, 2 * timeout, max_workers, 1, on_failure)

    def __call__(self, completions: list[str], prompts: list[Any], **columns: list[Any]) -> list[float]:
        """One score from 0 to 1 a completion; NaN where there was no answer and `on_failure` is "none".

        Raises:
            RewardError: If a request fails for good and `on_failure` is "raise".
        """
        requests = [
            self.body(prompt, completion, {name: columns[name][row] for name in self.required_columns})
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        new = [request for request in dict.fromkeys(requests) if self._key(request) not in self.scores]
        found = dict(zip(new, self.patient(requests=new), strict=True))  # what failed is asked again next time
        return [self.scores.get(self._key(request), found.get(request, float("nan"))) for request in requests]

    def body(self, prompt: Any, completion: str, columns: dict[str, Any]) -> str:
        """The request as JSON text.

        Args:
            prompt: Text, or a list of messages.
            completion: Text.
            columns: The question's other fields.
        """
        text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        asked = self.question.format(prompt=text, completion=completion, **columns)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": asked})
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return json.dumps({"model": self.model_name, "messages": messages, **options}, sort_keys=True)

    def judge(self, requests: list[str]) -> list[float]:
        """Makes requests, one after another, and keeps their scores."""
        scores = []
        for request in requests:
            score = self.score(self._answer(request))
            self.scores[self._key(request)] = score
            if self.cache is not None:
                line = json.dumps({"request": self._key(request), "score": score}) + "\n"
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with open(self.cache, "a", encoding="utf-8") as file:  # one short write, so that processes may share it
                    file.write(line)
            scores.append(score)
        return scores

    def score(self, answer: str) -> float:
        """The number in an answer, from 0 to 1.

        Raises:
            ValueError: If there is none, or it is outside the scale.
        """
        found = self.pattern.findall(answer)
        if not found:
            raise ValueError(f"no score that matches pattern={self.pattern.pattern!r} in the answer {short(answer)}")
        number = float(found[-1])
        if not self.lowest <= number <= self.highest:
            raise ValueError(f"score {number:g} is not from {self.lowest:g} to {self.highest:g}: {short(answer)}")
        return (number - self.lowest) / (self.highest - self.lowest)

    def _answer(self, request: str) -> str:
        """What the judge says.

        Raises:
            FinalRewardError: If asking again would not help.
            OSError: If there is no answer now.
            ValueError: If the answer is no chat completion.
        """
        headers = {}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        try:
            text = fetch(self.url, request.encode(), timeout=self.timeout, headers=headers)
        except RequestError as error:
            if error.passing:
                raise
            raise FinalRewardError(str(error)) from None
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{self.url} answered with no chat completion: {short(text)}") from None

    def _key(self, request: str) -> str:
        scale = f"{self.url}\n{self.pattern.pattern}\n{self.lowest}\n{self.highest}\n{request}"
        return hashlib.sha256(scale.encode()).hexdigest()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"pattern={pattern!r} has {compiled.groups} groups; it must have one, around the number")
    return compiled


def _fields(question: str) -> list[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(question) if name is not None]
    except ValueError as error:
        raise ValueError(f"question={short(question)}: {error}; literal braces are doubled") from error
    if "completion" not in fields or not all(name.isidentifier() for name in fields):
        raise ValueError(
            f"question={short(question)} has the fields {fields}; it must have {{completion}}, and names of columns"
        )
    return list(dict.fromkeys(fields))


def _read(file: Path) -> dict[str, float]:
    """The scores in a file; a line that was cut short is left out."""
    scores: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            scores[row["request"]] = float(row["score"])
        except (ValueError, LookupError, TypeError):
            continue
    return scores
