"""Rollouts that a batch brings: what its parts must be, and the completions they make."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment_modules.policies.masks import check_unbroken, check_within
from alignment_modules.rollouts.sampler import Completions
from alignment_modules.rollouts.stopping import StopStrings


def check_given_rollout(batch: Mapping[str, Any]) -> None:
    """Checks the part of a rollout that a batch brings.

    That is `responses`, `response_mask` (the token exists), `response_loss_mask` (the policy wrote it), `rewards` of a
    completion, one or each by itself, and `old_logprobs`; and `greedy_rewards` of a greedy completion of each prompt.

    Raises:
        ValueError: If a part is missing, of another shape than the responses, or too coarse to compare with; if
            `response_mask` has a hole; or if `response_loss_mask` marks a token that does not exist.
    """
    if "responses" in batch:
        needs, those = "response_mask", ["responses"]
    else:
        parts = ("response_loss_mask", "rewards", "old_logprobs")
        needs, those = "responses", [k for k in parts if isinstance(batch.get(k), Tensor)]
    if those and needs not in batch:
        raise ValueError(
            f"the batch brings {' and '.join(those)} without {needs}: completions that are given come as responses "
            "and response_mask, with or without their response_loss_mask, rewards and old_logprobs"
        )
    greedy = batch.get("greedy_rewards")
    if isinstance(greedy, Tensor) and tuple(greedy.shape) != (len(batch["prompts"]),):
        raise ValueError(
            f"greedy_rewards has shape {tuple(greedy.shape)}; for {len(batch['prompts'])} prompts it must be one each"
        )
    if not those:
        return
    rows, time = batch["responses"].shape
    grid = (rows, time)
    one = batch.get("rewards")
    each = (rows, *one.shape[1:]) if isinstance(one, Tensor) and one.dim() == 2 else (rows,)
    shapes = {"response_mask": grid, "response_loss_mask": grid, "old_logprobs": grid, "rewards": each}
    for name, shape in shapes.items():
        given = batch.get(name)
        if isinstance(given, Tensor) and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; for responses {(rows, time)} it must be {shape}")
    if not time:
        raise ValueError("responses has no column: completions have at least one token")
    old = batch.get("old_logprobs")
    if old is not None and old.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"old_logprobs is {old.dtype}, too coarse for a ratio: give it in float32. Trainer(precision='bf16-true') "
            "rounds all of a batch; train with precision='bf16-mixed' or PolicyConfig(dtype='bfloat16') instead"
        )
    mask = batch["response_mask"].bool().cpu()
    check_unbroken("response_mask", mask)
    if "response_loss_mask" in batch:
        check_within("response_loss_mask", batch["response_loss_mask"].cpu(), "response_mask", mask)


def given_completions(
    batch: Mapping[str, Any], stop_token_ids: Sequence[int], stop_strings: StopStrings | None = None
) -> Completions:
    """The completions that a batch brings, on the host but for their log-probabilities.

    Args:
        batch: Checked by `check_given_rollout`.
        stop_token_ids: A completion whose last token is none of these is truncated ...
        stop_strings: ... unless it ends one of these.

    Raises:
        ValueError: If the number of responses does not fit the prompts.
    """
    ids, mask = batch["responses"].cpu(), batch["response_mask"].bool().cpu()
    prompts = len(batch["prompts"])
    if len(ids) % prompts or len(ids) < prompts:
        raise ValueError(
            f"responses has {len(ids)} rows for {prompts} prompts: it must have the same number of completions for "
            "each prompt, grouped by prompt"
        )
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    stops = set(stop_token_ids)
    stopped = [
        bool(row) and (row[-1] in stops or (stop_strings is not None and stop_strings.ends(row))) for row in rows
    ]
    unknown = torch.full(batch["responses"].shape, torch.nan, device=batch["responses"].device)
    return Completions(
        ids=ids,
        mask=mask,
        token_logps=batch.get("old_logprobs", unknown).float(),
        truncated=~torch.tensor(stopped),
        own=batch["response_loss_mask"].bool().cpu() if "response_loss_mask" in batch else mask,
    )
