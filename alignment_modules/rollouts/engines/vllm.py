"""Completions of a vLLM server, over its public HTTP routes."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from alignment_modules.functional.http import RequestError
from alignment_modules.functional.ranges import Natural, Positive, Range, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.functional.waiting import tell
from alignment_modules.policies.adapters import has_adapter
from alignment_modules.policies.export import export_policy
from alignment_modules.rollouts.codec import Codec, rank_and_world_size, real_tokens
from alignment_modules.rollouts.engines.answers import Answer, completions_of, read_answer, sampling_params
from alignment_modules.rollouts.engines.probe import PROBE_PARAMETERS, probe_difference, probe_prompt
from alignment_modules.rollouts.engines.protocol import Engine, EngineError
from alignment_modules.rollouts.engines.pushed import check_pushable, name_of
from alignment_modules.rollouts.engines.server import VLLMServer
from alignment_modules.rollouts.engines.session import Turns, rows_of
from alignment_modules.rollouts.parameters import SamplingOptions, SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import Completions
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings

_log = logging.getLogger(__name__)


class VLLMEngine(Engine):
    """Samples with a vLLM server that runs in an environment of its own, over HTTP.

    Tokens go out and come back as ids, each sample with a seed of its own. What the policy weighs is written to a
    folder that the server reads: all of it, or of a LoRA policy the adapter, under a new name each time. The name is a
    hash of the weights, so that nothing is sent twice, a server that was restarted gets the weights again, and answers
    of other weights are found out. After every push the log-probabilities of a fixed probe are compared with the
    policy's. The first process pushes; each asks for its own completions.

    The server: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`, with
    `--return-sampling-mask` where top_k is used, and for LoRA `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora`.

    Args:
        url: The server's address, such as "http://localhost:8000".
        folder: Where weights are written, a folder of this run's own that the server sees under the same path.
        update: How the server takes all weights: "reload" (its workers read the folder), or "transfer" (start, update
            and finish of a weight transfer, for a server whose backend for these takes a path).
        lora: What is pushed of a LoRA policy: the "adapter", or "merge", all weights with the adapter in them.
        probe_tolerance: Largest mean difference in nats of the probe's log-probabilities, server's and policy's.
        timeout: Seconds that one request may take; a completion and an exchange of weights are one each.
        retries: How often a request without an answer is made again.
        max_concurrency: Completions asked for at the same time.
        sleeps: Whether the server gives its accelerator's memory back between rollouts (`--enable-sleep-mode`); of a
            run in one process.
        api_key_env: Name of the environment variable that holds the server's key; None: no key is sent.

    Raises:
        ValueError: If an option has a value that is not allowed, or the environment variable is not set.
    """

    correction: str | None = "mis"

    def __init__(
        self,
        url: str,
        folder: str,
        *,
        update: Literal["reload", "transfer"] = "reload",
        lora: Literal["adapter", "merge"] = "adapter",
        probe_tolerance: Positive = 0.1,
        timeout: Positive = 600.0,
        retries: Natural = 6,
        max_concurrency: Annotated[int, Range(1, 4096)] = 256,
        sleeps: bool = False,
        api_key_env: str | None = None,
    ) -> None:
        check_options(VLLMEngine.__init__, locals())
        self.server = VLLMServer(url, timeout=timeout, retries=retries, api_key_env=api_key_env)
        self.folder = Path(folder).expanduser().resolve()
        self.update, self.lora, self.probe_tolerance = update, lora, probe_tolerance
        self.max_concurrency, self.sleeps = max_concurrency, sleeps
        self.codec: Codec | None = None
        self.policy: nn.Module | None = None
        self._name = self._delivered = self._base = ""
        self._version = 0
        self._asleep = sleeps  # as a former run may have left it
        self._run, self._asked = uuid.uuid4().hex[:8], 0
        self._statistics: dict[str, Statistic] = {}

    def check(self, option: str, sampling: SamplingOptions) -> None:
        """Refuses filters whose sets vLLM does not return.

        Raises:
            ValueError: If top_p or min_p filter without top_k.
        """
        if (sampling.top_p < 1 or sampling.min_p) and not sampling.top_k:
            name = "top_p" if sampling.top_p < 1 else "min_p"
            raise ValueError(
                f"{option}{name}={getattr(sampling, name):g} needs {option}top_k with VLLMEngine: a server returns "
                "what a filter kept, which the policy is scored over, only where top_k bounds it"
            )

    def push(self, policy: nn.Module) -> None:
        """Makes `policy`, as it is now, what the server samples from; nothing is sent where it does so already.

        Raises:
            ValueError: If the policy cannot be pushed over HTTP.
            EngineError: If the server does not take it, or then computes something else.
        """
        check_pushable(policy, lora=self.lora)
        ranks = rank_and_world_size()[1]
        if self.sleeps and ranks > 1:
            raise ValueError(f"sleeps=True needs a run in one process, this one has {ranks}: others may still sample")
        self.wake()
        self._push(policy, again=False)

    def version(self) -> int:
        """How many policies were pushed, the same one in a row counted once; a run that resumes counts on."""
        return self._version

    def state_dict(self) -> dict[str, Any]:
        """The count of versions, and which weights the last one had."""
        return {"version": self._version, "name": self._name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counts on from there; the weights are the policy's, and are pushed again."""
        self._version, self._name = state["version"], state["name"]

    def statistics(self) -> dict[str, Statistic]:
        """The version, what the last probe differed by, and how long the last push took."""
        one = Statistic(torch.tensor(float(self._version)))
        nothing = Statistic(torch.tensor(0.0), 0.0)  # of ranks that do not push
        known = {name: self._statistics.get(name, nothing) for name in ("engine/probe_difference", "time/push")}
        return {"engine/version": one, **known}

    def describe(self) -> str:
        """The engine in words."""
        return f"vLLM at {self.server.url}, weights by {self.folder}, probe within {self.probe_tolerance:g} nats"

    def generate(
        self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds
    ) -> Completions:
        """Completions of each prompt.

        Raises:
            EngineError: If the server gives none, or those of other weights.
            NonFiniteLogits: If its log-probabilities are not numbers.
        """
        contexts = [context for context in real_tokens(prompts.ids, prompts.mask) for _ in range(num_samples)]
        given = parameters, seeds, num_samples, prompts.ids.device
        bounds = prompts.bounds(parameters.max_completion_length)
        bounds = None if bounds is None else [bound for bound in bounds for _ in range(num_samples)]
        return self._write(contexts, range(len(contexts)), *given, bounds=bounds)

    def open(self, prompts: Prompts, parameters: SamplingParameters, *, num_samples: int = 1, seeds: Seeds) -> Turns:
        """The first turn of a session.

        Raises:
            EngineError: As in `generate`.
            NonFiniteLogits: Likewise.
        """
        rows = rows_of(prompts, num_samples)
        turn = self.generate(prompts, parameters, num_samples=num_samples, seeds=seeds)
        session = Turns(parameters, seeds, num_samples, rows, [], turn)
        session.add(turn, range(len(rows)))
        return session

    def extend(
        self,
        session: Turns,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        limits: Sequence[int] | None = None,
    ) -> Completions:
        """The next turn of some rows; all of their context is sent again, which the server's prefix cache knows.

        Raises:
            ValueError: If a row has ended, nothing is appended to one, or a limit is below 1.
            EngineError: As in `generate`.
            NonFiniteLogits: Likewise.
        """
        bounds = session.append(rows, tokens, limits)
        device, contexts = session.turn.ids.device, session.contexts(rows)
        given = session.parameters, session.seeds, session.num_samples
        return session.add(self._write(contexts, rows, *given, device, turn=session.turns, bounds=bounds), rows)

    def close(self, session: Turns) -> Completions:
        """All completions whole, on the host."""
        return session.whole((self.codec or Codec()).pad_token_id)

    def sleep(self) -> None:
        """Has the server give its memory back, where `sleeps` says so."""
        if self.sleeps and not self._asleep:
            self.server.sleep()
            self._asleep = True

    def wake(self) -> None:
        """Has it take the memory again."""
        if self._asleep:
            self.server.wake()
            self._asleep = False

    def _write(
        self,
        contexts: Sequence[list[int]],
        places: Sequence[int],
        parameters: SamplingParameters,
        seeds: Seeds,
        num_samples: int,
        device: torch.device,
        *,
        turn: int = 0,
        bounds: Sequence[int] | None = None,
    ) -> Completions:
        """What follows each context, within its bound; a row's place says which prompt's and which sample it is."""
        if self.policy is None:
            raise ValueError("the engine has no policy yet: push one first")
        codec = self.codec or Codec()
        strings = StopStrings(parameters.stop_strings, codec.tokenizer) if parameters.stop_strings else None
        fixed, longest = sampling_params(parameters), parameters.max_completion_length
        for _ in range(2):
            requests = []
            for number, (place, context) in enumerate(zip(places, contexts, strict=True)):
                prompt, sample = divmod(place, num_samples)
                index, limit = seeds.indices[prompt], longest if bounds is None else bounds[number]
                where = f"{seeds.seed}.{seeds.step}.{seeds.draw}.{index}.{sample}.{turn}"
                own = {"seed": seeds.number(index, sample, turn), "max_tokens": limit}
                requests.append(self._request(where, context, fixed | own))
            answers = self._answers(requests)
            found = self._others(answers)
            if found is None:
                written = [answer for answer in answers if answer is not None]
                return completions_of(written, parameters, strings, pad_token_id=codec.pad_token_id, device=device)
            _log.warning("%s answered with the weights %r instead of %r", self.server.url, found, self._name)
            self._push(self.policy, again=True)
        raise EngineError(
            f"{self.server.url} answers with the weights {found!r} again, though {self._name!r} was pushed: another "
            "run may push to the same server"
        )

    def _request(self, where: str, context: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """One request. Its id says which sample it is, and is never used twice: a former one may still run."""
        self._asked += 1
        request = {"request_id": f"{where}-{self._run}{self._asked}", "token_ids": context, "sampling_params": params}
        return request | ({"model": self._name} if self._is_adapter else {})

    def _answers(self, requests: list[dict[str, Any]]) -> list[Answer | None]:
        """The answers, in order; None where the server does not know the adapter."""
        found: list[Answer | None] = [None] * len(requests)
        pool = ThreadPoolExecutor(min(self.max_concurrency, len(requests)), thread_name_prefix="vllm")
        try:
            waiting = {pool.submit(self._answer, request): place for place, request in enumerate(requests)}
            for done, future in enumerate(as_completed(waiting), start=1):
                found[waiting[future]] = future.result()
                tell("sampling", done, len(requests))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return found

    def _answer(self, request: dict[str, Any]) -> Answer | None:
        try:
            return read_answer(self.server.generate(request), request)
        except RequestError as error:
            if error.status == 404 and self._is_adapter:
                return None
            raise EngineError(str(error)) from None

    @property
    def _is_adapter(self) -> bool:
        return self.lora == "adapter" and self.policy is not None and has_adapter(self.policy)

    def _others(self, answers: Sequence[Answer | None]) -> str | None:
        """Whose weights wrote an answer, or are on the server now, if not those that were pushed."""
        wanted = self._base if self._is_adapter else self._name
        for answer in answers:
            if answer is None or (self._is_adapter and answer.model not in (None, self._name)):
                return "an unknown adapter" if answer is None else answer.model
            if other := next((version for version in answer.versions if version != wanted), None):
                return other
        now = self.server.version()
        return None if now == wanted else str(now)

    def _holds(self) -> bool:
        """Whether the server has what was pushed."""
        if self._is_adapter:
            return self._name in self.server.adapters() and self.server.version() == self._base
        return self.server.version() == self._name

    def _wait(self, rank: int) -> None:
        """Until the first process has pushed the same weights.

        Raises:
            EngineError: If it takes longer than a request may.
        """
        started = time.monotonic()
        if self._is_adapter:
            self._base = self.server.version() or ""
        while not self._holds():
            if time.monotonic() - started > self.server.timeout:
                raise EngineError(
                    f"process {rank} waited timeout={self.server.timeout:g} seconds for the weights {self._name!r} on "
                    f"{self.server.url}, which process 0 pushes: their weights differ, or it had no prompt to complete"
                )
            time.sleep(0.05)

    def _push(self, policy: nn.Module, *, again: bool) -> None:
        """Has the server hold the policy's weights; `again`: also where they were delivered already."""
        self.policy, name = policy, name_of(policy)
        self._version += name != self._name
        self._name = name
        if rank := rank_and_world_size()[0]:
            self._wait(rank)
        elif again or self._delivered != name or not self._holds():
            self._deliver(policy)

    def _deliver(self, policy: nn.Module) -> None:
        """Writes the weights, has the server read them, and compares."""
        former, started = self._delivered, time.monotonic()
        tell("pushing")
        self.server.version()  # a server that is not there is told of before the weights are written
        folder = self._folder_of(self._name)
        export_policy(policy, folder, lora="adapter" if self._is_adapter else "merge")
        if self._is_adapter:
            self.server.load_adapter(self._name, folder)
            self._base = self.server.version() or ""
        else:
            self.server.load(folder, self._name, self.update)
        self._delivered = self._name
        if former and former != self._name:
            if self._is_adapter:
                self.server.unload_adapter(former)
            shutil.rmtree(self._folder_of(former), ignore_errors=True)
        self._probe(policy)
        self._statistics["time/push"] = Statistic(torch.tensor(time.monotonic() - started))

    def _probe(self, policy: nn.Module) -> None:
        """Compares what server and policy say of the probe; the weights do not count as delivered where they differ.

        Raises:
            EngineError: If they do.
        """
        params = sampling_params(PROBE_PARAMETERS) | {"seed": 0}
        try:
            answer = self._answer(self._request("probe", probe_prompt(policy), params))
            difference = probe_difference(policy, answer, self.probe_tolerance, self.server.url)
        except EngineError:
            self._delivered = ""
            raise
        self._statistics["engine/probe_difference"] = Statistic(torch.tensor(difference))

    def _folder_of(self, name: str) -> Path:
        return self.folder / name
