"""Tokens to text and back: a tokenizer, and the tokens that end a completion."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment_modules.rewards.judged_rows import REWARD_NAMES


class Codec:
    """What acting and evaluation know of text; engines see tokens alone.

    Attributes:
        tokenizer: As in transformers, or anything with `batch_decode`; None: there is no text.
        policy_stops: Ids at which the policy's own generation configuration stops.
        data_stops: Ids that end a completion in the data trained on, such as the chat template's end of turn.
    """

    def __init__(self, tokenizer: Any = None, policy_stops: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.policy_stops = tuple(policy_stops)
        self.data_stops: tuple[int, ...] = ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: end-of-sequence tokens of tokenizer and policy, and the data's end of turn."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(sorted({*self.policy_stops, *self.data_stops, *(() if eos is None else (int(eos),))}))

    @property
    def pad_token_id(self) -> int:
        """The id that fills empty places; masks decide what counts, so any id serves."""
        found = getattr(self.tokenizer, "pad_token_id", None)
        return int(found) if found is not None else 0

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: If there is none.
        """
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer=None: rewards read text. Give the module a tokenizer (a folder or an object), or the "
                "Trainer a datamodule that has one"
            )
        return self.tokenizer

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Completions as text: without the stop token, with all else, such as a special `<think>`."""
        stops, kept = set(self.stop_token_ids), []
        for row in rows:
            end = len(row)
            while end and row[end - 1] in stops:
                end -= 1
            kept.append(row[:end])
        return self.require_tokenizer().batch_decode(kept, skip_special_tokens=False)

    def prompts(self, batch: Mapping[str, Any]) -> list[Any]:
        """A batch's prompts as the data set gave them (column `prompt`: text or messages), else decoded."""
        if isinstance(batch.get("prompt"), list):
            return batch["prompt"]
        return self.seen_prompts(batch, skip_special_tokens=True)

    def seen_prompts(self, batch: Mapping[str, Any], *, skip_special_tokens: bool = False) -> list[str]:
        """A batch's prompts as the policy saw them, decoded."""
        rows = real_tokens(batch["prompts"], batch["prompt_attention_mask"])
        return self.require_tokenizer().batch_decode(rows, skip_special_tokens=skip_special_tokens)

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Token ids of a prompt that is to be completed: a text as it stands, messages by the chat template.

        Raises:
            ValueError: If messages come without a chat template.
        """
        if isinstance(prompt, str):
            encoded = self.tokenizer(prompt)["input_ids"]
            eos = getattr(self.tokenizer, "eos_token_id", None)
            # Some tokenizers close every text, which would end the prompt before its completion.
            return encoded[:-1] if len(encoded) > 1 and eos is not None and encoded[-1] == eos else encoded
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "messages need a tokenizer with a chat template; this one has none: give the prompt as text"
            )
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def real_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of padded [rows, time] ids without their padding."""
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu().bool(), strict=True)]


def columns_of(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The data set's columns in a batch: its lists, but for the rows' `index` and who judges them."""
    others = ("index", REWARD_NAMES)
    return {name: values for name, values in batch.items() if isinstance(values, list) and name not in others}


def messages_of(batch: Mapping[str, Any]) -> list[list[dict[str, Any]] | None] | None:
    """A batch's prompts as messages, None for those that are text; None where all are."""
    prompts = batch.get("prompt")
    found = [prompt if isinstance(prompt, list) else None for prompt in prompts] if isinstance(prompts, list) else []
    return found if any(found) else None


def prompt_indices(batch: Mapping[str, Any]) -> list[int]:
    """What a prompt's samples are seeded with: its `index`, else its place in the batch, another on each rank."""
    if "index" in batch:
        return [int(index) for index in batch["index"]]
    rank, ranks = rank_and_world_size()
    return [rank + ranks * row for row in range(len(batch["prompts" if "prompts" in batch else "input_ids"]))]


def rank_and_world_size() -> tuple[int, int]:
    """This process among those of the run."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
