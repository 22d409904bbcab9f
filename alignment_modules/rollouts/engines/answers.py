"""What is asked of a vLLM server for one completion, and what its answer says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment_modules.functional.http import short
from alignment_modules.functional.support import Support
from alignment_modules.rollouts.engines.protocol import EngineError
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.sampler import Completions, NonFiniteLogits
from alignment_modules.rollouts.stopping import StopStrings


@dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        ids: Its tokens, with that which ended it.
        logps: Their log-probabilities in nats, under temperature and filters.
        stopped: Whether something ended it but the limit.
        kept: What each token was drawn from; None: the server does not tell.
        versions: The weights that it was written with, as far as the server tells.
        model: The model or adapter that wrote it.
    """

    ids: list[int]
    logps: list[float]
    stopped: bool
    kept: list[list[int]] | None
    versions: tuple[str, ...]
    model: str | None


def sampling_params(parameters: SamplingParameters) -> dict[str, Any]:
    """How the server samples, in its words; the seed is each request's own."""
    params: dict[str, Any] = {
        "temperature": 0.0 if parameters.greedy else parameters.temperature,
        "max_tokens": parameters.max_completion_length,
        "stop_token_ids": list(parameters.stop_token_ids),
        "ignore_eos": True,  # what ends a completion is what the trainer says
        "logprobs": 0,  # of the sampled token alone
        "skip_special_tokens": False,  # stop strings are looked for among these, too
        "detokenize": bool(parameters.stop_strings),
    }
    filters = {"top_p": (parameters.top_p, 1.0), "top_k": (parameters.top_k, 0), "min_p": (parameters.min_p, 0.0)}
    params |= {name: value for name, (value, all_of_it) in filters.items() if value != all_of_it}
    if parameters.stop_strings:
        params |= {"stop": list(parameters.stop_strings), "include_stop_str_in_output": True}
    return params


def read_answer(choice: dict[str, Any], request: dict[str, Any]) -> Answer:
    """What a choice of `/inference/v1/generate` says.

    Raises:
        EngineError: If the server gave the completion up, or something is missing.
    """
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise EngineError(f"the server ended request {request['request_id']!r} with finish_reason={reason!r}")
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logps = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        kept = choice.get("sampling_mask")
        spans = choice.get("weight_versions") or ()
        versions = tuple(dict.fromkeys(str(span.get("version", span.get("weight_version"))) for span in spans))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise EngineError(f"the server answered without tokens and their log-probabilities: {short(choice)}") from None
    if not ids or len(logps) != len(ids) or (kept is not None and len(kept) != len(ids)):
        told = "" if kept is None else f" and {len(kept)} sets of what was kept"
        raise EngineError(f"the server answered with {len(ids)} tokens, {len(logps)} log-probabilities{told}")
    return Answer(ids, logps, reason == "stop", kept, versions, choice.get("model"))


def completions_of(
    answers: Sequence[Answer],
    parameters: SamplingParameters,
    strings: StopStrings | None,
    *,
    pad_token_id: int,
    device: torch.device,
) -> Completions:
    """Completions beside each other.

    Args:
        answers: One a row.
        parameters: How they were sampled.
        strings: Its stop strings.
        pad_token_id: Written behind the completions.
        device: Where they go.

    Raises:
        EngineError: If a filter was on and the server does not tell what it kept, or not the token that it drew.
        NonFiniteLogits: If a log-probability is not a number.
    """
    if not all(math.isfinite(logp) for answer in answers for logp in answer.logps):
        raise NonFiniteLogits("the server gave log-probabilities that are not finite; its weights may hold NaN.")
    shape = (len(answers), max(len(answer.ids) for answer in answers))
    ids, token_logps = torch.full(shape, pad_token_id), torch.zeros(shape)
    for row, answer in enumerate(answers):
        ids[row, : len(answer.ids)] = torch.tensor(answer.ids)
        token_logps[row, : len(answer.ids)] = torch.tensor(answer.logps)
    mask = torch.arange(shape[1]) < torch.tensor([len(answer.ids) for answer in answers])[:, None]
    stops = {*parameters.stop_token_ids}
    stopped = [
        answer.stopped or answer.ids[-1] in stops or (strings is not None and strings.ends(answer.ids))
        for answer in answers
    ]
    filtered = parameters.truncates_support and not parameters.greedy
    support = _support(answers, shape) if filtered else None
    truncated = ~torch.tensor(stopped)
    return Completions(ids.to(device), mask.to(device), token_logps.to(device), truncated.to(device), support=support)


def _support(answers: Sequence[Answer], shape: tuple[int, int]) -> Support:
    sizes, ids = torch.zeros(shape, dtype=torch.int32), list[int]()
    for row, answer in enumerate(answers):
        if answer.kept is None:
            raise EngineError(
                "top_k filters, and the server does not tell what it kept: start it with --return-sampling-mask "
                "(vLLM 0.28 or newer)"
            )
        for time, (token, kept) in enumerate(zip(answer.ids, answer.kept, strict=True)):
            if token not in kept:
                raise EngineError(f"the server drew token {token} from a set without it: {short(kept)}")
            sizes[row, time] = len(kept)
            ids += sorted(kept)
    return Support(sizes, torch.tensor(ids, dtype=torch.int32), torch.zeros(0, 0, dtype=torch.uint8))
