"""A tokenizer with one token a character, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
ROLES = ("<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<assistant>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(
    characters: str = "0123456789+=", *, roles: Sequence[str] = ROLES, chat_template: str = CHAT_TEMPLATE
) -> Any:
    """A `transformers` tokenizer whose tokens are four special ones, the roles and the given characters, in this order.

    Text starts with `<bos>`. The chat template marks turns with `<user>` and `<assistant>`, ends replies with `<eos>`
    and marks what is generated, so that loss masks are exact.

    Args:
        characters: The alphabet; any other character becomes `<unk>`.
        roles: Special tokens that the template begins turns with.
        chat_template: The template.

    Raises:
        ValueError: A character comes twice, or there is none.
    """
    if not characters or len(set(characters)) != len(characters):
        raise ValueError(f"characters={characters!r}; must be at least one character, each once")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *roles, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  no password
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=[*roles],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
