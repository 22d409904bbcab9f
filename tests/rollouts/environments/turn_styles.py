"""Chat templates with tools in the styles of well-known families, tokenizers of each kind, and both in a renderer."""

import json

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.environments import TurnRenderer, tool_format
from datamodules.text.chat import PLAIN_TEMPLATE
from tests.datamodules.alone import Chat
from tests.datamodules.test_templates import make
from tests.datamodules.test_tokens import byte_level, prefix_space
from tests.rollouts.environments import chat_templates

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        },
    }
]
CHATML = "<|im_start|> <|im_end|> <tool_call> </tool_call>"
LLAMA3 = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
# Results of a turn stand in one message of the user.
QWEN = """{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant' }}
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Tools in the first message, one call a turn, results as JSON; turns with calls end otherwise than answers.
LLAMA = """{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + message.tool_calls[0].function.name }}
{{- '", "parameters": ' }}{{ message.tool_calls[0].function.arguments | tojson }}{{ '}<|eom_id|>' }}
{%- elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{{- {'output': message.content | trim} | tojson }}{{ '<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{% endif %}
{{- message.content | trim }}{{ '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
XML = "{%- for tool in tools or [] %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}" + chat_templates.QWEN_XML
MISTRAL = """{%- if tools %}{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' }}{{ message.content | tojson }}{{ '}[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
{%- else %}{{ '[INST]' + message.content + '[/INST]' }}{% endif %}
{%- endfor %}"""
STYLES = {
    "qwen": (QWEN, CHATML),
    "hermes": (chat_templates.HERMES, CHATML),
    "llama": (LLAMA, LLAMA3),
    "qwen xml": (XML, CHATML),
    "mistral": (MISTRAL, "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"),
    "plain": (PLAIN_TEMPLATE, ""),
}


def mistral_calls(text):
    """Calls in a list behind a token."""
    _, mark, listed = text.partition("[TOOL_CALLS]")
    return [{"name": one["name"], "arguments": one["arguments"]} for one in json.loads(listed)] if mark else []


def with_special(tokenizer, special):
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    return tokenizer


TOKENIZERS = {
    "byte": lambda special: make(None, special),
    "not special": lambda special: make(None, "", special),
    "byte level": lambda special: with_special(byte_level(), special),
    **{
        f"prefix space, {scheme}": lambda special, scheme=scheme: with_special(prefix_space(scheme), special)
        for scheme in ("legacy", "first", "never")
    },
}


def renderer(style, tokenizer="byte", **options):
    template, special = STYLES[style]
    tokenizer = TOKENIZERS[tokenizer](special)
    tokenizer.chat_template = template
    codec = Codec(tokenizer)
    codec.data_stops = tuple(Chat(tokenizer).stop_token_ids())
    return TurnRenderer(codec, tool_format(mistral_calls if style == "mistral" else None, tokenizer), **options)


def call(number, **arguments):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def told(number, text):
    return {"role": "tool", "name": "add", "tool_call_id": f"call{number:05d}", "content": text}


def text_of(one, ids):
    return one.codec.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
