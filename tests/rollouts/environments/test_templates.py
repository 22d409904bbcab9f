"""Chat templates that episodes can be written with, and what is said of others."""

import pytest

from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.environments import TurnRenderer, tool_format
from tests.datamodules.test_templates import make
from tests.rollouts.environments import chat_templates
from tests.rollouts.environments.turn_styles import CHATML, QWEN, TOOLS

# As Qwen3 does: thoughts stay in turns behind the last question, and empty ones are written for the last turn alone.
QWEN3 = QWEN.replace(
    "{%- if message.content %}{{ '\\n' + message.content }}{% endif %}",
    "{%- set words = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set thought = thought if '</think>' in message.content else '' %}"
    "{%- if loop.index0 > last.query and (loop.last or thought) %}"
    "{{ '\\n<think>\\n' + thought + '\\n</think>\\n\\n' }}{% else %}{{ '\\n' }}{% endif %}"
    "{{- words }}",
).replace(
    "{%- for message in messages %}\n",
    "{%- set last = namespace(query=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for message in messages %}\n",
    1,
)
STRIPS = QWEN.replace(
    "message.content %}{{ '\\n' + message.content }}", "true %}{{ '\\n' + message.content.split('</think>')[-1] }}"
)
OPENS = "{{ '<|im_start|>assistant\\n<think>\\n' }}"
REFUSED = {
    "no template": (None, "need a tokenizer with a chat template.*chat_template='plain'"),
    "no tools": (chat_templates.HERMES.replace("tools", "things"), "does not show the tools"),
    "no calls": (QWEN.replace("message.tool_calls", "message.nothing"), "does not show calls of tools"),
    "no results": (
        QWEN.replace("'tool'", "'observation'")
        .replace("message.content + '\\n</tool", "'\\n</tool")
        .replace("{%- else %}", "{%- elif message.role != 'tool' %}"),
        "does not show the results of tools",
    ),
    "refuses calls": (
        "{{ tools | tojson if tools else '' }}" + chat_templates.REFUSES,
        "refuses a conversation of user, assistant.*no tools",
    ),
    "no header": (
        QWEN.replace("{{ '<|im_start|>assistant\\n' }}", ""),
        r"ignores add_generation_prompt.*<\|im_start\|>assistant",
    ),
    "thoughts are taken out": (STRIPS, "rewrites history: it takes the policy's thoughts"),
    "opened thoughts are taken out": (
        STRIPS.replace("{{ '<|im_start|>assistant\\n' }}", OPENS),
        "rewrites history: it takes the policy's thoughts",
    ),
    "opened thoughts are not written": (
        QWEN.replace("{{ '<|im_start|>assistant\\n' }}", OPENS).replace(
            "message.content %}{{ '\\n' + message.content }}", "true %}{{ '\\n<thought>' + message.content[8:] }}"
        ),
        "behind a question it writes",
    ),
    "the last results are others": (
        QWEN.replace("message.content + '\\n</tool", "('' if loop.last else 'cut') + message.content + '\\n</tool"),
        "up to the second turn it writes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_episodes_cannot_be_written_with(case):
    template, named = REFUSED[case]
    codec = Codec(make(template, CHATML))
    with pytest.raises(ValueError, match=named):
        TurnRenderer(codec, tool_format("json_tags")).check(TOOLS)


@pytest.mark.parametrize(
    "template", [QWEN3, QWEN.replace("{{ '<|im_start|>assistant\\n' }}", OPENS)], ids=["qwen3", "opened and kept"]
)
def test_thoughts_that_stay_are_no_rewriting(template):
    codec = Codec(make(template, CHATML))
    codec.data_stops = (codec.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    TurnRenderer(codec, tool_format("json_tags")).check(TOOLS)
