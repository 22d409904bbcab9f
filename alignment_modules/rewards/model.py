"""A sequence-classification model as a reward."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from alignment_modules.functional.ranges import Count, Range, check_options
from alignment_modules.policies.config import DTYPES, PolicyConfig
from alignment_modules.policies.export import read_note
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.sharded import is_sharded
from alignment_modules.policies.sharding import shard
from alignment_modules.policies.tokenizers import load_tokenizer
from alignment_modules.policies.weights import read_model
from alignment_modules.rewards.protocol import RewardError

_log = logging.getLogger(__name__)


class SequenceClassifier:
    """Scores prompt and completion with a model in Hugging Face format (`AutoModelForSequenceClassification`).

    A model with one output gives that number; one with several gives the probability of `label`. If the tokenizer has a
    chat template, the prompt (text becomes one user message; a list of messages is taken as it is) and the completion
    (as the assistant's message) go through it; otherwise the texts are joined. Texts that are too long lose their
    beginning. The model is frozen and in eval mode.

    What `RewardModule` exported (merged, or an adapter beside its base) is given the tokens that it was trained on:
    messages go through the template, text does not, and the number is read at the token that ends the completion.

    Args:
        path: Folder or hub id; weights must be safetensors.
        label: Index or name of the output to reward, for models with several.
        prompt_column: The data set's column that holds the prompt as text or messages; None: the `prompts` given.
        use_chat_template: True: always; False: never; None: if the tokenizer has one, and for a `RewardModule`'s export
            where the prompt is messages.
        max_length: Longest input in tokens; None: what model and tokenizer allow.
        batch_size: Completions in one forward pass.
        dtype: "float32", "bfloat16", "float16" or "float64".
        name: The name under which the reward is logged; None: the folder's.
        trust_remote_code: Run model and tokenizer code that comes with `path`. Only for code that you have read.

    Raises:
        ValueError: If the folder is missing, holds no tokenizer or no trained classification head, or needs code of its
            own without `trust_remote_code`, or if `label` does not fit the model.
    """

    def __init__(
        self,
        path: str,
        label: Annotated[int, Range()] | str | None = None,
        prompt_column: str | None = None,
        use_chat_template: bool | None = None,
        max_length: Count | None = None,
        batch_size: Count = 16,
        dtype: str = "float32",
        name: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_options(SequenceClassifier.__init__, locals())
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {sorted(DTYPES)}")
        self.path = path
        self.name = name or Path(path).name
        self.prompt_column = prompt_column
        self.batch_size = batch_size
        self.model, self.tokenizer = _load(path, DTYPES[dtype], trust_remote_code)
        self.label = self._label_index(label)
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if use_chat_template and not has_template:
            raise ValueError(f"use_chat_template=True, but the tokenizer in path={path!r} has no chat template")
        self.use_chat_template = has_template if use_chat_template is None else use_chat_template
        self.stop_token_ids: list[int] = read_note(Path(path).expanduser()).get("stop_token_ids", [])
        self._template_for_text = self.use_chat_template and (use_chat_template is True or not self.stop_token_ids)
        self.max_length = self._limit(max_length)
        self._warned = False

    @property
    def required_columns(self) -> tuple[str, ...]:
        """What the data must have."""
        return () if self.prompt_column is None else (self.prompt_column,)

    def to(self, device: torch.device | str) -> SequenceClassifier:
        """Moves the model.

        Args:
            device: Where it computes.

        Returns:
            This object.
        """
        if not is_sharded(self.model):  # else it lies where its processes compute
            self.model.to(device)
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Keeps the weights in shards on the processes of a mesh; `RewardSet` gathers them while it judges."""
        shard(self.model, mesh, name=self.name)

    @torch.no_grad()
    def __call__(self, completions: list[str], prompts: list[Any] | None = None, **columns: Any) -> list[float]:
        """Scores each completion.

        Args:
            completions: N texts.
            prompts: N prompts, as text or as lists of messages.
            **columns: The data set's columns, of N entries each.

        Returns:
            N numbers.

        Raises:
            RewardError: If there is no prompt.
        """
        if self.prompt_column is not None:
            if self.prompt_column not in columns:
                found = ", ".join(sorted(columns)) or "none"
                raise RewardError(f"prompt_column={self.prompt_column!r} is not in the data; found: {found}")
            prompts = columns[self.prompt_column]
        if prompts is None:
            raise RewardError("prompts are needed to score completions")
        ids = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = [0.0] * len(ids)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # neighbours of like length waste less padding
        # Without a padding id there must be one that ends no row.
        size = max(1, min(self.batch_size, self.model.get_input_embeddings().weight.shape[0] - 1))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for row, score in zip(rows, self._forward([ids[row] for row in rows]), strict=True):
                scores[row] = score
        return scores

    def _encode(self, prompt: Any, completion: str) -> list[int]:
        if self._template_for_text if isinstance(prompt, str) else self.use_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            messages.append({"role": "assistant", "content": completion})
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            if self.stop_token_ids:
                text = self._up_to_the_end(text, completion)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
        else:
            if not isinstance(prompt, str):
                prompt = "".join(str(message["content"]) for message in prompt)
            ids = (
                self._joined(prompt, completion)
                if self.stop_token_ids
                else self.tokenizer(prompt + completion)["input_ids"]
            )
        if self.stop_token_ids and ids[-1:] not in [[stop] for stop in self.stop_token_ids]:
            ids = [*ids, self.tokenizer.eos_token_id]
        if self.max_length is not None and len(ids) > self.max_length:
            if not self._warned:
                _log.warning("%s: an input of %d tokens is cut to its last %d", self.name, len(ids), self.max_length)
                self._warned = True
            ids = ids[-self.max_length :]
        return list(ids)

    def _up_to_the_end(self, text: str, completion: str) -> str:
        """A rendered conversation without what the template writes behind the token that ends its last reply."""
        start = text.rfind(completion.strip()) + len(completion.strip())
        stops = [str(token) for token in self.tokenizer.convert_ids_to_tokens(self.stop_token_ids)]
        ends = [place + len(stop) for stop in stops if (place := text.find(stop, start)) >= 0]
        return text[: min(ends)] if ends else text

    def _joined(self, prompt: str, completion: str) -> list[int]:
        """Tokens of a prompt and its completion, none of them across the boundary."""
        head, own, whole = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, completion, prompt + completion)
        )
        opened = self.tokenizer(prompt + completion)["input_ids"]  # behind what the tokenizer writes before any text
        first: list[int] = next((opened[:n] for n in range(len(opened)) if opened[n : n + len(whole)] == whole), [])
        return first + (whole if whole[: len(head)] == head else head + own)

    def _forward(self, ids: list[list[int]]) -> list[float]:
        given = self.model.config.pad_token_id
        if given is not None:
            return self._padded(ids, given)
        ends = {row[-1] for row in ids}
        self.model.config.pad_token_id = next(token for token in range(len(ends) + 1) if token not in ends)
        try:
            return self._padded(ids, self.model.config.pad_token_id)
        finally:
            self.model.config.pad_token_id = None

    def _padded(self, ids: list[list[int]], pad: int) -> list[float]:
        device = next(self.model.parameters()).device
        longest = max(len(row) for row in ids)
        tokens = torch.full((len(ids), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for row, entry in enumerate(ids):
            tokens[row, : len(entry)] = torch.tensor(entry)
            mask[row, : len(entry)] = 1
        logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits.float()
        scores = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.label]
        return scores.tolist()

    def _label_index(self, label: int | str | None) -> int:
        count = self.model.config.num_labels
        if count == 1:
            return 0
        names = {name: index for index, name in self.model.config.id2label.items()}
        index = names.get(label, -1) if isinstance(label, str) else label
        if index is None or not 0 <= index < count:
            raise ValueError(
                f"label={label!r}: the model in path={self.path!r} has {count} outputs; "
                f"give one of {list(names)} or its index"
            )
        return index

    def _limit(self, max_length: int | None) -> int | None:
        limits = [max_length, getattr(self.model.config, "max_position_embeddings", None)]
        if self.tokenizer.model_max_length < 10**9:  # tokenizers without a limit report an astronomical one
            limits.append(self.tokenizer.model_max_length)
        return min((limit for limit in limits if limit is not None), default=None)


def _load(path: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    if is_folder and not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        raise ValueError(f"path={path!r} holds no config.json: it is not a model in Hugging Face format")
    source = str(folder) if is_folder else path
    if is_folder and (folder / "adapter_config.json").is_file():
        dtypes = {value: name for name, value in DTYPES.items()}
        adapter = PolicyConfig(path=source, head="scalar", dtype=dtypes[dtype], trust_remote_code=trust_remote_code)
        return build_policy(adapter, trainable=False).eval().requires_grad_(False), load_tokenizer(source)
    try:
        # Without `trust_remote_code` transformers would ask on standard input.
        model, info = read_model(
            AutoModelForSequenceClassification, source, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        _refuse_code(path, error)
        what = "holds no loadable" if is_folder else "is no folder, and no hub id of a reachable"
        raise ValueError(f"path={path!r} {what} sequence-classification model: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"path={path!r} is not a trained sequence-classification model: it lacks {missing}")
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        _refuse_code(path, error)
        raise ValueError(f"path={path!r} holds no loadable tokenizer: {error}") from error
    return model.eval().requires_grad_(False), tokenizer


def _refuse_code(path: str, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"path={path!r} needs code that comes with it (auto_map in its configuration); read it, then set "
            "trust_remote_code=true to run it"
        ) from error
