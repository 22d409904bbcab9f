"""Tokenizers of folders and hub ids, and whether their ids fit a policy. `transformers` is imported on use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alignment_modules.policies.added_tokens import token_ids
from alignment_modules.policies.config import adapter_config, listing, resolve_folder

TOKENIZER_PREFIXES = ("tokenizer", "vocab", "spiece", "sentencepiece", "tekken", "merges")


def load_tokenizer(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Loads the tokenizer of a model folder or hub id.

    A folder with an adapter and no tokenizer gives its base model's.

    Args:
        path: Folder or hub id.
        trust_remote_code: Run tokenizer code that comes with `path`.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A `transformers.PreTrainedTokenizerBase`.

    Raises:
        ValueError: The folder is missing or holds no tokenizer, or the tokenizer cannot be read.
    """
    return _load_tokenizer(os.fspath(path), trust_remote_code, revision, frozenset())


def _load_tokenizer(path: str, trust_remote_code: bool, revision: str | None, seen: frozenset[str]) -> Any:
    """Follows adapters to their base, each folder once."""
    folder = resolve_folder(path, "tokenizer")
    if Path(folder).is_dir() and not any(
        e.name.startswith(TOKENIZER_PREFIXES) or e.suffix in (".model", ".tiktoken") for e in Path(folder).iterdir()
    ):
        adapter = adapter_config(folder, None)
        base = (adapter or {}).get("base_model_name_or_path")
        seen = seen | {os.path.realpath(folder)}
        if base and os.path.realpath(Path(base).expanduser()) in seen:
            raise ValueError(
                f"tokenizer={path!r}: the folder holds no tokenizer, and the base model that its adapter names "
                f"(base_model_name_or_path={base!r}) leads back to it."
            )
        if base:
            return _load_tokenizer(base, trust_remote_code, None, seen)
        raise ValueError(
            f"tokenizer={path!r}: the folder holds no tokenizer (such as tokenizer.json); it holds "
            f"{listing(Path(folder))}."
        )
    import transformers

    try:
        options = {"revision": revision} if revision else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
        size = len(tokenizer)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        where = (
            "the folder's tokenizer"
            if Path(folder).is_dir()
            else f"neither a folder (looked at {Path(folder).absolute()}) nor on the hub: it"
        )
        raise ValueError(f"tokenizer={path!r}: {where} cannot be loaded. ({type(error).__name__}: {error})") from error
    if size == 0:
        raise ValueError(f"tokenizer={path!r} has an empty vocabulary.")
    return tokenizer


def check_vocabulary(policy: nn.Module, tokenizer: Any, *, name: str = "policy") -> None:
    """Makes sure that the policy has an embedding for every id that the tokenizer can give.

    A policy with more rows than the tokenizer has tokens is fine (vocabularies are often padded). A plain module that
    tells no size (no `get_input_embeddings`, no `config.vocab_size`) is not checked.

    Args:
        policy: The model.
        tokenizer: A transformers tokenizer, or any object with `get_vocab()` or a length; others are not checked.
        name: What the model is called in the message.

    Raises:
        ValueError: The largest id does not fit; the message names both sizes. Or a token that was added to the policy
            has another id.
    """
    rows = vocabulary_size(policy)
    if hasattr(tokenizer, "get_vocab"):
        _check_added(policy, tokenizer.get_vocab(), name)
    vocabulary = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else None
    if rows is None or (vocabulary is None and not hasattr(tokenizer, "__len__")):
        return
    needed = len(tokenizer) if vocabulary is None else max(vocabulary, default=-1) + 1
    if needed > rows:
        raise ValueError(
            f"The tokenizer has {needed} ids (largest {needed - 1}) but the {name} {type(policy).__name__} has "
            f"embeddings for {rows}. "
            "Use the tokenizer that belongs to the model, or give a fresh model vocab_size >= the tokenizer's size."
        )


def _check_added(policy: nn.Module, ids: Mapping[str, int], name: str) -> None:
    for token, number in token_ids(policy).items():
        if ids.get(token) != number:
            other = f"gives it the id {ids[token]}" if token in ids else "does not know it"
            raise ValueError(
                f"{name}.added_tokens: {token!r} has the id {number} in the {name}, but the data's tokenizer {other}. "
                "Give the data module the policy's tokenizer and the same added_tokens."
            )


def vocabulary_size(policy: nn.Module) -> int | None:
    """Number of ids that a policy has an embedding for; None where it does not tell."""
    try:
        embedding = policy.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        rows = getattr(getattr(policy, "config", None), "vocab_size", None)
        return rows if isinstance(rows, int) else None


def tokenizer_path(model: Any) -> str | None:
    """Where the tokenizer of a model may lie that is given as a folder or hub id, or as a `PolicyConfig` with one."""
    path = model.get("path") if isinstance(model, Mapping) else getattr(model, "path", model)
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else None


def compared_ids(
    policy: nn.Module, teacher: nn.Module, tokenizer: Any, teacher_path: str | None, *, name: str = "teacher"
) -> int | None:
    """How many ids a policy and a teacher share, from the first on; they must mean the same tokens.

    Args:
        policy: The model that learns.
        teacher: The model that it is compared with.
        tokenizer: The policy's tokenizer; None where it is not known.
        teacher_path: The teacher's folder or hub id, whose tokenizer is compared where it holds one; None: not known.
        name: What the teacher is called in a message.

    Returns:
        The number of ids that both heads have, where they are padded to different sizes and the tokenizer fits in
        both; None where they have the same size, or do not tell it.

    Raises:
        ValueError: The sizes differ and the tokenizer is not known or does not fit in both, or the teacher's tokenizer
            gives a token another id.
    """
    ids = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    if ids is not None and teacher_path is not None:
        _check_same_ids(ids, teacher_path, token_ids(teacher), name)
    sizes = [vocabulary_size(model) for model in (policy, teacher)]
    if None in sizes or sizes[0] == sizes[1]:
        return None
    ours, theirs = sizes
    shared, needed = min(sizes), None if ids is None else max(ids.values(), default=-1) + 1  # type: ignore[type-var]
    if needed is not None and needed <= shared:  # type: ignore[operator]
        return shared
    known = (
        "no tokenizer is known that would tell which are padding" if needed is None else f"the tokenizer has {needed}"
    )
    raise ValueError(
        f"{name} has {theirs} ids and the policy {ours}, and {known}: a divergence compares the probabilities of the "
        f"same tokens. Use a teacher with the policy's tokenizer"
        + (", and give the module `tokenizer`" if needed is None else "")
    )


def _check_same_ids(ids: Mapping[str, int], path: str, added: Mapping[str, int], name: str) -> None:
    """Compares with the tokenizer of a teacher's folder and what was added to it; none there is not compared."""
    try:
        theirs = load_tokenizer(path).get_vocab() | added
    except ValueError:
        return
    for token, number in sorted(ids.items(), key=lambda entry: entry[1]):
        if theirs.get(token) != number:
            other = f"gives it {theirs[token]}" if token in theirs else "does not have it"
            raise ValueError(
                f"{name}={path!r} has another tokenizer than the policy: the policy's gives {token!r} the id {number}, "
                f"the teacher's {other}. A divergence compares the probabilities of the same tokens."
            )
