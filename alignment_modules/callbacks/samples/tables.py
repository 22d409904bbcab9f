"""Samples as tables of TensorBoard, Weights & Biases and MLflow."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

_NAME = "samples"
_COMPACT = ("id", "reward", "advantage", "stop_reason", "turns", "tool_calls", "completion")
_MARKUP = str.maketrans({**{mark: f"&#{ord(mark)};" for mark in "\\`*_|~[]"}, "\r": "", "\n": " "})


def log_samples(logger: Logger, rows: Sequence[dict[str, Any]], step: int, max_characters: int) -> None:
    """Sends rows to a logger: to Weights & Biases and MLflow as tables, to TensorBoard as a short text table.

    Per-token lists are left out. Loggers that know neither tables nor text get nothing.

    Args:
        logger: Any logger.
        rows: With equal keys.
        step: The optimizer step.
        max_characters: Longest completion in TensorBoard.
    """
    if isinstance(logger, WandbLogger):
        columns = _columns(rows)
        data = [[_cell(row.get(name)) for name in columns] for row in rows]
        logger.log_table(_NAME, columns=columns, data=data, step=step)
    elif isinstance(logger, MLFlowLogger):
        columns = ["step", *_columns(rows)]
        table = {name: [_cell(row.get(name, step)) for row in rows] for name in columns}
        logger.experiment.log_table(str(logger.run_id), table, f"{_NAME}.json")
    else:
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if callable(add_text):
            add_text(_NAME, text_table(rows, max_characters), global_step=step)


def text_table(rows: Sequence[dict[str, Any]], max_characters: int) -> str:
    """A Markdown table that fits a screen: id, reward, advantage, and each completion's first line.

    Of an episode it is all of its turns, with calls and results in boxes of one line, and how it ended.

    Args:
        rows: With equal keys.
        max_characters: Longest completion; of an episode longest part of it.
    """
    columns = [name for name in _COMPACT if name in rows[0]]
    lines = [[name.translate(_MARKUP) for name in columns], ["---"] * len(columns)]
    lines += [[_said(row, name, max_characters) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _said(row: dict[str, Any], name: str, limit: int) -> str:
    episode = row.get("episode")
    if name != "completion" or not episode:
        return _short(row[name], limit)
    return "<br>".join(_parts(episode, limit))


def _parts(episode: Sequence[dict[str, Any]], limit: int) -> Iterator[str]:
    """What was said in an episode, what was called, and what came of it."""
    for message in episode:
        told = f" failed ({message['failed']})" if message.get("failed") else ""
        if message["role"] == "tool":
            yield f"⇐{told} {_short(message['content'], limit)}"
            continue
        if said := _short(message.get("content") or "", limit):
            yield said
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            yield f"⇒ {_short(f'{name} {json.dumps(arguments, ensure_ascii=False, default=str)}', limit)}"


def _short(value: Any, limit: int) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    first, _, more = str(value).strip("\n").partition("\n")
    if more or len(first) > limit:
        first = first[:limit] + "…"
    # controls, and what turns the direction of a line, are written out
    first = "".join(c if c.isprintable() or c in "\r\t" else c.encode("unicode_escape").decode() for c in first)
    # what a model writes must neither break the table nor vanish as markup
    return html.escape(first, quote=False).translate(_MARKUP)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in rows[0] if not isinstance(rows[0][name], list | dict) and name != "messages"]


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
