"""The public HTTP routes of a vLLM server that an engine uses, asked with patience."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from alignment_modules.functional.http import RequestError, check_url, fetch, pause_before, short
from alignment_modules.rollouts.engines.protocol import EngineError

_log = logging.getLogger(__name__)

UNFINISHED = "unfinished"
"""The version of weights while they are exchanged: a server that died halfway must not be taken for a finished one."""


class VLLMServer:
    """A vLLM server (`vllm serve`) by its routes; nothing of vLLM is imported.

    What has no answer is asked again after a pause of 0.1 seconds, then four times as long each time, 30 at most.

    Args:
        url: Its address, such as "http://localhost:8000".
        timeout: Seconds that one request may take.
        retries: How often a request that failed is made again.
        api_key_env: Name of the environment variable that holds the key; None: no key is sent.

    Raises:
        ValueError: If `url` is no address, or the environment variable is not set.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, api_key_env: str | None = None) -> None:
        check_url(url)
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"api_key_env={api_key_env!r}: this environment variable is not set")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.api_key_env = timeout, retries, api_key_env

    def ask(self, route: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> Any:
        """What a route answers, from JSON; None where it answers nothing.

        Args:
            route: Such as "/health".
            body: What is sent, as JSON.
            method: "POST" or "GET".

        Raises:
            RequestError: If the server refuses.
            EngineError: If there is no answer, however often it is asked.
        """
        headers = {}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        sent = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause_before(attempt))
            try:
                text = fetch(self.url + route, sent, timeout=self.timeout, headers=headers, method=method)
                break
            except RequestError as error:
                if not error.passing:
                    raise
                failure = error
                _log.debug("asked %s times: %s", attempt + 1, error)
        else:
            raise EngineError(
                f"{failure}; asked {self.retries + 1} times. Is the server running? The run can be resumed from its "
                "last checkpoint once it is"
            )
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            return text  # the routes of adapters answer in words

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """One completion: the choice that `/inference/v1/generate` answers with, and which `model` wrote it.

        Raises:
            RequestError: If the server refuses.
            EngineError: If there is no answer, or one without a completion.
        """
        answer = self.ask("/inference/v1/generate", request)
        try:
            choice = answer["choices"][0]
            return {**choice, "model": answer.get("model")}
        except (LookupError, TypeError, AttributeError):
            raise EngineError(
                f"{self.url}/inference/v1/generate answered with no completion: {short(answer)}"
            ) from None

    def version(self) -> str | None:
        """The version that the server's weights were given last; "default" of those that it was started with."""
        try:
            answer = self.ask("/weight_info", method="GET")
        except RequestError as error:
            if error.status in (404, 405):
                raise EngineError(
                    f"{error}. Versions of weights are a development route: start the server with "
                    "VLLM_SERVER_DEV_MODE=1, of a vLLM that has /weight_info (0.33 does)"
                ) from None
            raise
        return answer.get("weight_version") if isinstance(answer, dict) else None

    def load(self, folder: Path, version: str, update: Literal["reload", "transfer"]) -> None:
        """Exchanges all weights, between requests.

        Args:
            folder: A checkpoint in Hugging Face format, at the same path on the server's machine.
            version: What the weights are called from then on.
            update: "reload": the workers read the folder (`/collective_rpc`, `reload_weights`). "transfer": start,
                update and finish of a weight transfer, whose backend is told the path.

        Raises:
            EngineError: If it fails; what the server then holds counts as unfinished.
        """
        try:
            self.ask("/pause?mode=wait")
            try:
                self.ask("/update_weight_version", {"new_version": UNFINISHED})
                if update == "reload":
                    arguments = {"weights_path": str(folder)}
                    self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
                    self.ask("/update_weight_version", {"new_version": version})
                else:
                    self.ask("/init_weight_transfer_engine", {"init_info": {}})
                    self.ask("/start_weight_update")
                    self.ask("/update_weights", {"update_info": {"path": str(folder)}})
                    self.ask("/finish_weight_update", {"weight_version": version})
                self.ask("/reset_prefix_cache")
            except BaseException:
                with suppress(RequestError, EngineError):
                    self.ask("/resume")
                raise
            self.ask("/resume")
        except RequestError as error:
            raise EngineError(f"update={update!r}: the weights of {folder} could not be exchanged: {error}") from None

    def adapters(self) -> list[str]:
        """The names of the models and adapters that are served."""
        answer = self.ask("/v1/models", method="GET")
        try:
            return [str(one["id"]) for one in answer["data"]]
        except (LookupError, TypeError):
            raise EngineError(f"{self.url}/v1/models answered with no list of models: {short(answer)}") from None

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serves an adapter under a name of its own; one of that name is there already: nothing.

        Raises:
            EngineError: If the server refuses.
        """
        try:
            self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except RequestError as error:
            if error.status == 400 and name in self.adapters():  # a former attempt, whose answer was lost
                return
            hint = ". Adapters are loaded while it runs where VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            raise EngineError(f"{error}{hint * (error.status in (404, 405))}") from None

    def unload_adapter(self, name: str) -> None:
        """Serves an adapter no more; one that is not there: nothing."""
        with suppress(RequestError):
            self.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def sleep(self) -> None:
        """Moves the weights to the host and gives the cache's memory back."""
        self.ask("/sleep?level=1")

    def wake(self) -> None:
        """Takes the memory again."""
        self.ask("/wake_up")
