"""The model card of an export: `README.md` with YAML in front, as model hubs read it."""

from __future__ import annotations

import html
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SECRET = re.compile(
    r"^(\s*(?:- )?[\w.-]*(?:api_?key|password|secret|credentials|access_token|auth_token|hf_token)\s*:)[ \t]*\S.*$",
    re.IGNORECASE | re.MULTILINE,
)
_PACKAGES = ("alignment-modules", "torch", "transformers", "lightning", "peft")


@dataclass(frozen=True)
class DataFacts:
    """What a split held.

    Attributes:
        split: Such as "train".
        source: Where its rows came from.
        rows: How many were used; None: not known.
        tokens: Tokens of them; None: not known.
    """

    split: str
    source: str
    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a policy beside what its folder shows.

    Attributes:
        base: The folder or hub id that training started from; None: from nothing, or not known.
        trained_by: Name of the module's class.
        paradigm: Such as "dpo", which becomes a tag.
        license: A licence's identifier on model hubs, such as "apache-2.0"; None: the card says nothing of it.
        weights: Which weights these are, in words.
        data: What was trained on.
        metrics: Logged numbers by name.
        config: The resolved configuration as YAML.
    """

    base: str | None = None
    trained_by: str | None = None
    paradigm: str | None = None
    license: str | None = None
    weights: str | None = None
    data: Sequence[DataFacts] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: str | None = None


def base_path(policy: nn.Module) -> str | None:
    """The folder or hub id that a policy's weights were loaded from; None where it does not tell."""
    inner: Any = policy.get_base_model() if hasattr(policy, "peft_config") else policy  # type: ignore[operator]
    return str(getattr(inner, "name_or_path", "") or "") or None


def write_model_card(directory: str | os.PathLike[str], facts: CardFacts | None = None) -> Path:
    """Writes an export's card; one that is there is replaced as a whole.

    Text from paths, data and configuration is escaped, and what a configuration calls a password or the like is left
    out. Of the environment the card holds the packages' versions alone.

    Args:
        directory: The folder of the export.
        facts: What to say; None: what the folder shows.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    folder, facts = Path(directory), facts or CardFacts()
    temporary = folder / f".{CARD}.{os.getpid()}.tmp"
    temporary.write_text(f"---\n{_front_matter(folder, facts)}---\n\n{_body(folder, facts)}", encoding="utf-8")
    return temporary.replace(folder / CARD)


def _front_matter(folder: Path, facts: CardFacts) -> str:
    import yaml

    kind = _kind(folder)
    known = {
        "base_model": _hub_base(facts.base),
        "library_name": {"adapter": "peft", "model": "transformers"}.get(kind),
        "license": " ".join((facts.license or "").split()),  # a line of its own could end the front matter
        "tags": ["alignment-modules", *([facts.paradigm] if facts.paradigm else [])],
    }
    return yaml.safe_dump({key: value for key, value in known.items() if value}, sort_keys=False, allow_unicode=True)


def _kind(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (folder / "config.json").is_file() else "module"


def _hub_base(base: str | None) -> str | None:
    """The hub id that a policy goes back to, through the cards of local exports: hubs refuse a path as `base_model`."""
    seen: set[str] = set()
    while base and Path(base).expanduser().is_dir() and base not in seen:
        seen.add(base)
        base = _named_base(Path(base).expanduser() / CARD)
    return base if base and base not in seen and _HUB_ID.fullmatch(base) else None


def _named_base(card: Path) -> str | None:
    import yaml

    try:
        front = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n", 2)[1])
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    base = front.get("base_model") if isinstance(front, dict) else None
    return base if isinstance(base, str) else None


def _body(folder: Path, facts: CardFacts) -> str:
    what = {"adapter": "A LoRA adapter", "model": "A model"}.get(_kind(folder), "Weights of a torch module")
    shape = _architecture(folder)
    by = f", trained by `{_code(facts.trained_by)}`" if facts.trained_by else ""
    start = f" from {_inline(facts.base)}" if facts.base else ""
    kept = f" The weights are {_text(facts.weights)}." if facts.weights else ""
    parts = [f"# {_text(shape or 'Policy')}", f"{what}{by}{start}.{kept}"]
    if facts.data:
        rows = [[_text(d.split), _inline(d.source), _number(d.rows), _number(d.tokens)] for d in facts.data]
        parts += ["## Data", _table(["split", "source", "rows", "tokens"], rows)]
    if facts.metrics:
        rows = [[_inline(name), f"{value:.6g}"] for name, value in sorted(facts.metrics.items())]
        parts += ["## Metrics", "As logged last.", _table(["metric", "value"], rows)]
    if facts.config:
        parts += ["## Configuration", _fenced(_SECRET.sub(r"\1 '***'", facts.config), "yaml")]
    parts += ["## Versions", _table(["package", "version"], _versions())]
    return "\n\n".join(parts) + "\n"


def _architecture(folder: Path) -> str:
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError):
        return ""
    return str(named[0]) if named else ""


def _versions() -> list[list[str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append([package, _text(importlib.metadata.version(package))])
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _text(value: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", html.escape(" ".join(value.split()), quote=False))


def _code(value: str) -> str:
    return " ".join(value.split()).replace("`", "'").replace("|", "\\|")


def _inline(value: str) -> str:
    return f"`{_code(value)}`"


def _fenced(text: str, language: str) -> str:
    """A block of code that none of its lines can end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
