"""What a policy is to act on: its tools, how it calls them, and its prompts with them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alignment_modules.cli.inspection.findings import Actions, Passage, Row, ToolUse
from alignment_modules.cli.inspection.tokens import readable
from alignment_modules.rollouts.codec import prompt_indices
from alignment_modules.rollouts.environments.formats import FORMATS
from alignment_modules.rollouts.environments.loop import Episodes
from alignment_modules.rollouts.environments.templates import Template
from alignment_modules.rollouts.seeds import Seeds


def actions_of(episodes: Episodes) -> Actions:
    """What there is to act on, once the tokenizer is known.

    Args:
        episodes: What would run the episodes.

    Raises:
        ValueError: If the chat template cannot show the tools.
    """
    form, tokenizer, options = episodes.prepare().tool_format, episodes.codec.tokenizer, episodes.options
    found, calls = episodes.environments, episodes.max_tool_calls
    names = found.names or (None,)
    tools = tuple(_use(name or "", schema["function"]) for name in names for schema in found.schemas(name))
    schemas = next((found.schemas(name) for name in names if found.schemas(name)), [])
    tokens = tuple(tokenizer.decode([stop], skip_special_tokens=False) for stop in episodes.codec.stop_token_ids)
    given = next((name for name, one in FORMATS.items() if one is form), options.format)
    return Actions(
        form=str(getattr(given, "__name__", given)),
        call=_call(Template(tokenizer), schemas) if schemas else "",
        stops=(*tokens, *form.stop_strings),
        limits=f"{episodes.max_turns:,} turns, {'any number of' if calls is None else f'{calls:,}'} calls, "
        f"{options.time_limit:g} seconds a call, {options.max_result_length:,} tokens a result",
        tools=tools,
    )


def with_prompts(rows: list[Row], batch: Mapping[str, Any], episodes: Episodes, seed: int) -> list[Row]:
    """Rows whose prompts are what the policy reads: with the tools, and what environments say at the start.

    Args:
        rows: The first rows of the batch.
        batch: Prompts with their columns.
        episodes: What would run the episodes.
        seed: Of the environments.

    Raises:
        ValueError: If a row names no environment or lacks a column.
    """
    first = {name: values[: len(rows)] for name, values in batch.items()}
    prompts = episodes.prompts(first, Seeds(prompt_indices(first), seed))
    return [_with(row, ids, errors, episodes.codec.tokenizer) for row, (ids, errors) in zip(rows, prompts, strict=True)]


def _with(row: Row, ids: list[int], errors: list[str], tokenizer: Any) -> Row:
    prompt = Passage("prompt", (readable(tokenizer, ids, [False] * len(ids)),), len(ids), 0)
    others = tuple(passage for passage in row.passages if passage.name != "prompt")
    failed = {"environment failed": "; ".join(errors)} if errors else {}
    return replace(row, passages=(prompt, *others), columns=row.columns | failed)


def _use(environment: str, function: Mapping[str, Any]) -> ToolUse:
    properties = function.get("parameters", {}).get("properties", {})
    arguments = ", ".join(f"{name}: {_kind(schema)}" for name, schema in properties.items())
    return ToolUse(function["name"], environment, arguments, str(function.get("description", "")))


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", "any")
    return " or ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _call(template: Template, schemas: list[dict[str, Any]]) -> str:
    """A call of the first tool, as the template writes it."""
    function = schemas[0]["function"]
    arguments: Any = {name: "..." for name in function.get("parameters", {}).get("properties", {})}
    question = [{"role": "user", "content": "?"}]
    prompt = template.text(question, schemas)
    for given in (arguments, str(arguments).replace("'", '"')):  # templates differ in how they take arguments
        call = {"id": "call00000", "type": "function", "function": {"name": function["name"], "arguments": given}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = template.text([*question, turn], schemas, prompt=False)
        except ValueError:
            continue
        same = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
        return text[same:].strip()
    return ""
