"""Plain text and examples to token ids, in batches, with the stop token and the tokenizer's own first tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from datamodules.rows.formats import Example
from datamodules.text.chat import PLAIN_TEMPLATE, Chat
from datamodules.text.continuing import continuation
from datamodules.text.together import Ids, Way, together
from datamodules.text.tokens import first_text, first_tokens, starts_with, tokenise

T = TypeVar("T")
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids of a prompt and a completion, and the latter's loss mask
LossOn = Literal["completion", "last_turn", "all"]


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from a folder or by hub id; code from the repository is never run.

    Raises:
        ValueError: The folder does not exist, or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"tokenizer={path!r}: no such folder (looked in {Path.cwd()})")
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        found = sorted(file.name for file in folder.iterdir())
        raise ValueError(f"tokenizer={path!r}: the folder holds no tokenizer (tokenizer.json); it holds {found}")
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.exists() else path, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError ...
        raise ValueError(f"tokenizer={path!r} cannot be loaded: {type(error).__name__}: {error}") from error


def written_backend(tokenizer: Any) -> str | None:
    """All that decides the ids of a fast tokenizer, as text; None: it has no form to write."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    before, added, content = backend.to_str().partition('"added_tokens"')  # before: settings of the last call
    return str(content if added else before)


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A tokenizer that knows tokens, each as one id that no text around it changes and that decoding may leave out.

    Args:
        tokenizer: A `transformers` tokenizer; it is left as it is.
        tokens: What it is to know. Those that it knows keep their ids.

    Returns:
        The tokenizer itself where it knows them all, else a copy.
    """
    known = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in known]
    if not unknown:
        return tokenizer
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in unknown], special_tokens=True)
    return tokenizer


def read_chat_template(chat_template: str, tokenizer: Any) -> str:
    """A template given as "plain", as the path of a file, or as the template itself.

    The plain one begins with the tokens that the tokenizer begins every text with.
    """
    if chat_template == "plain":
        return first_text(tokenizer) + PLAIN_TEMPLATE
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template={chat_template!r}: neither 'plain', nor a template, nor a file that exists")
    return path.read_text(encoding="utf-8")


class Encoder:
    """Turns texts and examples into token ids (int32 arrays `[time]`).

    Args:
        tokenizer: A `transformers` tokenizer with an end-of-sequence token. A pad token is not needed.

    Raises:
        ValueError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, so a model could never learn to stop; set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self._end = np.asarray([self.eos], dtype=np.int32)
        pad = tokenizer.pad_token_id
        self.pad = int(self.eos if pad is None else pad)
        self.first = first_tokens(tokenizer)
        self._chat: Chat | None = None

    @property
    def chat(self) -> Chat:
        """The chat template's encoder.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if self._chat is None:
            self._chat = Chat(self.tokenizer)
        return self._chat

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        return tokenise(self.tokenizer, texts) if self._chat is None else self._chat.pieces.ids(texts)

    def _along(self, ways: Iterable[Way[T]]) -> list[T]:
        return together(self.tokenizer, ways, self._ids)

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """First tokens, text, end-of-sequence token."""
        return self._along(map(self._document, texts))

    def _document(self, text: str) -> Way[np.ndarray]:
        (ids,) = yield Ids((text,))
        return self._close(self._open(ids))

    def pair(self, prompt: str, completion: str) -> Way[tuple[np.ndarray, np.ndarray]]:
        """Prompt and completion ids, the completion closed by the end-of-sequence token.

        Both are tokenised as one text where that leaves the prompt's own tokens as they are (what a sampler sees);
        else the completion is tokenised apart, so that no token lies across the boundary.
        """
        head, whole = yield Ids((prompt, prompt + completion))
        if starts_with(whole, head):
            tail = whole[len(head) :]
        else:
            tail = yield from continuation(head, completion, whole, head)
        return self._open(head), self._close(tail)

    def _open(self, ids: np.ndarray) -> np.ndarray:
        """Puts the first tokens before ids that lack them (a prompt decoded with its special tokens has them)."""
        return ids if starts_with(ids, self.first) else np.concatenate((self.first, ids))

    def _close(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and int(ids[-1]) == self.eos:
            return ids
        return np.concatenate((ids, self._end))

    def prompts(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Ids of each example's prompt, ready to be continued."""
        return self._along(map(self._prompt, examples))

    def _prompt(self, example: Example) -> Way[np.ndarray]:
        if isinstance(example.prompt, list):
            return (yield from self.chat.encode_prompt(example.prompt, example.tools))
        (ids,) = yield Ids((example.prompt or "",))
        return self._open(ids)

    def completions(self, examples: Sequence[Example], sides: Sequence[str]) -> list[list[Encoded]]:
        """Prompt ids, completion ids and the completion's loss mask, of each side of each example.

        Args:
            examples: The examples.
            sides: Of "completion", "chosen" and "rejected".
        """
        found = iter(self._along(self._completion(example, side) for example in examples for side in sides))
        return [[next(found) for _ in sides] for _ in examples]

    def _completion(self, example: Example, side: str) -> Way[Encoded]:
        if isinstance(example.prompt, list):
            return (yield from self.chat.encode_completion(example.prompt, getattr(example, side), example.tools))
        prompt, completion = yield from self.pair(str(example.prompt or ""), getattr(example, side))
        return prompt, completion, np.ones(len(completion), dtype=bool)

    def supervised(self, examples: Sequence[Example], loss_on: LossOn) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and loss mask (int32 and bool `[time]`) of texts, prompt/completion pairs and conversations.

        Where a reply has a weight of its own, the mask is float32 and holds the targets' weights, 0 elsewhere. The
        first token of a row is never a target, since nothing comes before it.
        """
        rows = self._along(self._supervised(example, loss_on) for example in examples)
        for _, mask in rows:
            mask[:1] = False
        return rows

    def _supervised(self, example: Example, loss_on: LossOn) -> Way[tuple[np.ndarray, np.ndarray]]:
        if example.text is not None:
            ids = yield from self._document(example.text)
            return ids, np.ones(len(ids), dtype=bool)
        if example.messages is not None or isinstance(example.prompt, list):
            return (yield from self._conversation(example, loss_on))
        prompt, completion = yield from self.pair(str(example.prompt), str(example.completion))
        ids = np.concatenate((prompt, completion))
        return ids, np.arange(len(ids)) >= (0 if loss_on == "all" else len(prompt))

    def _conversation(self, example: Example, loss_on: LossOn) -> Way[tuple[np.ndarray, np.ndarray]]:
        last = loss_on == "last_turn"
        marked = [*(example.messages or []), *(m for m in example.completion or [] if isinstance(m, dict))]
        if loss_on == "all" and any(message.get("learn", True) is not True for message in marked):
            raise ValueError(
                "a message is marked as not to be learnt, or has a weight, but here every token is learnt alike"
            )
        if example.messages is not None:
            ids, mask = yield from self.chat.encode(example.messages, last_only=last, tools=example.tools)
        else:
            prompt: list[Any] = list(example.prompt or [])
            completion: list[Any] = list(example.completion or [])
            messages = [*prompt, *completion]
            ids, mask = yield from self.chat.encode(messages, first=len(prompt), last_only=last, tools=example.tools)
        return ids, np.ones_like(mask) if loss_on == "all" else mask
