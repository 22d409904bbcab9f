"""Conversations to token ids with a loss mask that is right or refused, never silently empty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from datamodules.formats import Message

# For base models: plain words as roles, each reply ended by the tokenizer's own end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    """Applies a tokenizer's chat template and finds the tokens that the model must learn to write.

    Where the template has `{% generation %}` markers they say which tokens; else each assistant turn is the text
    between the conversation before it (with the generation prompt) and the conversation with it. That needs every
    earlier rendering to be a prefix of the later one, which is checked: a template that rewrites history is refused. In
    both cases a turn's stop token is supervised, and appended to the last turn where the template writes none.

    Args:
        tokenizer: A `transformers` tokenizer with a chat template.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the rows are conversations but the tokenizer has no chat_template; give chat_template='plain', a "
                "template or a file with one, or use plain prompt and completion columns"
            )
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        self.special |= {int(index) for index, token in decoder.items() if getattr(token, "special", False)}
        # These never end a turn, unless one of them doubles as the end-of-sequence token.
        never = ("unk_token_id", "bos_token_id", "pad_token_id", "mask_token_id", "cls_token_id")
        self.special -= {getattr(tokenizer, name, None) for name in never} - {tokenizer.eos_token_id}

    def render(self, messages: list[Message], *, tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text, with the header of a reply at its end if `prompt`.

        Raises:
            ValueError: The template refuses the conversation.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, continue_final_message=False
            )
        except Exception as error:  # templates raise what they like
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error
        return str(text)

    def encode_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> np.ndarray:
        """Prompt ids, int32 `[time]`, that end with a reply's header or with the last assistant message left open."""
        if messages[-1]["role"] == "assistant":
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, continue_final_message=True
            )
        else:
            text = self.render(messages, tools=tools, prompt=True)
        return self._encode([text])[0]

    def encode(
        self, messages: list[Message], *, first: int = 0, last_only: bool = False, tools: list[Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss mask of a conversation, up to its last supervised token.

        Args:
            messages: The conversation.
            first: Only assistant turns from this message on are supervised.
            last_only: Supervise the last assistant turn alone.
            tools: Tool descriptions for the template.

        Returns:
            ids: int32 `[time]`.
            mask: bool `[time]`, true on every supervised token, stop tokens included.

        Raises:
            ValueError: No assistant turn to learn from, or the tokens of one cannot be told with certainty.
        """
        turns = self._turns(messages, first, last_only)
        if not self._has_markers(tools):
            return self._encode_by_boundaries(messages, turns, tools)
        marked = self._encode_by_markers(messages, turns, tools)
        return marked if marked is not None else self._encode_by_boundaries(messages, turns, tools)

    def encode_completion(
        self, prompt: list[Message], completion: list[Message], tools: list[Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and completion ids, int32 `[time]` each.

        The completion starts after the reply's header and ends with its stop token.

        Raises:
            ValueError: The completion does not start with an assistant message, or its tokens cannot be told.
        """
        messages = [*prompt, *completion]
        turns = self._turns(messages, len(prompt), False)
        if turns[0] != len(prompt):
            raise ValueError(f"a completion must start with an assistant message, found {completion[0]['role']!r}")
        ids, mask = self._encode_by_boundaries(messages, turns, tools)
        start = int(np.argmax(mask))
        return ids[:start], ids[start:]

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: the end-of-sequence token and the token that the template ends assistant turns with."""
        stops = set() if self.tokenizer.eos_token_id is None else {int(self.tokenizer.eos_token_id)}
        try:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, _ = self._encode_by_boundaries(probe, [1], None)
            stops.add(int(ids[-1]))
        except ValueError:
            pass
        return tuple(sorted(stops))

    @staticmethod
    def _turns(messages: list[Message], first: int, last_only: bool) -> list[int]:
        turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        if not turns:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the conversation has no assistant message to learn from; its roles are {roles}")
        return turns[-1:] if last_only else turns

    def _has_markers(self, tools: list[Any] | None) -> bool:
        template = self.tokenizer.get_chat_template(tools=tools) if tools else self.tokenizer.get_chat_template()
        return bool(_MARKER.search(template)) and bool(getattr(self.tokenizer, "is_fast", False))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Templates write special tokens themselves; adding them again would double the first one.
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def _encode_by_markers(
        self, messages: list[Message], turns: list[int], tools: list[Any] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        messages = messages[: turns[-1] + 1]
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        marked = np.asarray(encoded["assistant_masks"], dtype=bool)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], marked, [False])).astype(np.int8)))
        spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(assistants):
            return None  # an empty or merged turn: the boundaries decide, or refuse
        wanted = [span for i, span in zip(assistants, spans, strict=True) if i in turns]
        start, end = spans[-1]
        stop = self._stop_in(ids, start, end)
        if stop is None:  # the marker closes before the stop token: take what follows the last turn
            tail = next((i for i in range(end, len(ids)) if int(ids[i]) in self.special), None)
            if tail is None:
                ids, marked = self._append_eos(ids[:end], marked[:end])
                return self._finish(ids, self._mask(len(ids), [*wanted[:-1], (wanted[-1][0], len(ids))]))
            stop_id = int(ids[tail])
            wanted = [(begin, self._through(ids, finish, stop_id)) for begin, finish in wanted]
        return self._finish(ids, self._mask(len(ids), wanted))

    def _through(self, ids: np.ndarray, end: int, stop_id: int) -> int:
        """End of a span moved behind its stop token, if only white space lies between."""
        position = end
        while position < len(ids) and int(ids[position]) != stop_id:
            if int(ids[position]) in self.special or self._text(ids[position : position + 1]).strip():
                return end
            position += 1
        return position + 1 if position < len(ids) else end

    def _encode_by_boundaries(
        self, messages: list[Message], turns: list[int], tools: list[Any] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        last = turns[-1]
        if turns[0] == 0:
            raise ValueError("the conversation starts with an assistant message; a user or system one must come first")
        whole = self.render(messages[: last + 1], tools=tools)
        cuts: list[int] = []
        for turn in turns:
            before = self.render(messages[:turn], tools=tools, prompt=True)
            after = whole if turn == last else self.render(messages[: turn + 1], tools=tools)
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                raise ValueError(
                    f"the chat template rewrites history: the conversation up to message {turn} is not the beginning "
                    "of the whole one, so the tokens of that reply cannot be told. Supervise the last turn alone "
                    "(loss_on='last_turn'), or use a template with {% generation %} markers"
                )
            cuts += [len(before), len(after)]
        ids, bounds = self._encode_cut(whole, cuts)
        spans = []
        for turn, start, end in zip(turns, bounds[::2], bounds[1::2], strict=True):
            stop = self._stop_in(ids, start, end)
            if stop is None and turn == last:
                ids, _ = self._append_eos(ids[:end], np.zeros(end, dtype=bool))
                end = len(ids)
            spans.append((start, end if stop is None else stop + 1))
        return self._finish(ids, self._mask(len(ids), spans))

    def _encode_cut(self, text: str, cuts: list[int]) -> tuple[np.ndarray, list[int]]:
        """Ids of a text and the token positions of its character cuts.

        The text is tokenised as a whole where each part up to a cut has the same tokens alone (what the model sees when
        it starts to write there); else the parts are tokenised one by one and joined, so no token lies across a cut.
        """
        ids, *heads = self._encode([text, *(text[:cut] for cut in cuts)])
        if all(np.array_equal(ids[: len(head)], head) for head in heads):
            return ids, [len(head) for head in heads]
        edges = [0, *cuts, len(text)]
        parts = self._encode([text[a:b] for a, b in pairwise(edges)])
        return np.concatenate(parts), np.cumsum([len(part) for part in parts])[: len(cuts)].tolist()

    def _stop_in(self, ids: np.ndarray, start: int, end: int) -> int | None:
        """Position of the special token that ends a span (only white space may follow), or None."""
        for position in range(end - 1, start - 1, -1):
            if int(ids[position]) in self.special:
                return position
            if self._text(ids[position : position + 1]).strip():
                return None
        return None

    def _append_eos(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the chat template writes no stop token and the tokenizer has no eos_token; set one")
        return np.append(ids, np.int32(eos)), np.append(mask, True)

    def _text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist()))

    @staticmethod
    def _mask(length: int, spans: list[tuple[int, int]]) -> np.ndarray:
        mask = np.zeros(length, dtype=bool)
        for start, end in spans:
            mask[start:end] = True
        return mask

    @staticmethod
    def _finish(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not mask.any():
            raise ValueError("the chat template leaves no token of the reply to learn from")
        end = int(np.flatnonzero(mask)[-1]) + 1  # what follows the last target only costs time
        return ids[:end], mask[:end]
