"""Chat templates of the shapes in use, and a tokenizer that only renders them."""

from transformers.utils.chat_template_utils import render_jinja_template

_HEAD = """{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson }}\\n{% endfor %}
{{- 'Answer with <tool_call>\\n{"name": <function-name>, "arguments": <args>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}"""
_OTHERS = """{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HERMES = (
    _HEAD
    + """{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant' }}
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}{% set call = tool_call.function %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}"""
    + _OTHERS
)
QWEN3 = HERMES.replace(
    "{{ '<|im_start|>assistant' }}", "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}"
).replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
LLAMA = """{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
QWEN_XML = (
    """{%- for message in messages %}
{%- if message.tool_calls %}{{ '<|im_start|>assistant\\n' + message.content }}{% for tool_call in message.tool_calls %}
{{- '<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
{%- for name, value in tool_call.function.arguments | items %}
{{- '<parameter=' + name + '>\\n' }}{{ value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}
{%- endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"""
    + _OTHERS
)
JSON_TEXT = HERMES.replace("{{ call.arguments | tojson }}", "{{ '' + call.arguments }}")  # arguments must be text
MISTRAL = """{%- for message in messages %}
{%- if message.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ ']</s>' }}
{%- else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}
{%- endfor %}"""
NO_TOOLS = """{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"""
REFUSES = """{% for message in messages %}
{%- if message.tool_calls %}{{ raise_exception('no tools') }}{% endif %}{{ message.content }}{% endfor %}"""


class Renderer:
    """A tokenizer as far as `apply_chat_template` to text goes."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tools=None, tokenize=True, add_generation_prompt=False):
        assert not tokenize
        [text], _ = render_jinja_template(
            [messages], tools=tools, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
        )
        return text

    def turn(self, calls, content=""):
        """What the template writes for a turn with calls, without the head that the prompt has and the end."""
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
        question = [{"role": "user", "content": "?"}]
        text = self.apply_chat_template(
            [*question, {"role": "assistant", "content": content, "tool_calls": calls}], tokenize=False
        )
        prompt = self.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        text = text[len(prompt) :] if text.startswith(prompt) else text[text.index("</think>") :]
        return text.removesuffix("\n").removesuffix("<|im_end|>").removesuffix("<|eot_id|>")
