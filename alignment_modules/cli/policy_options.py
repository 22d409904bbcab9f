"""What the rest of a configuration takes from its policy."""

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace


def policy_path(policy: Any) -> str | None:
    """Where a policy's weights, and so its tokenizer, come from; None for a fresh model.

    Args:
        policy: The option, as a path or as a mapping or namespace of `PolicyConfig`.
    """
    return _option(policy, "path") if not isinstance(policy, str) else policy


def follow_policy(data: Any, policy: Any) -> dict[str, Any]:
    """Options of a data module that are not given, and are the policy's then: the tokenizer and its added tokens.

    Args:
        data: The data module's own options (`init_args`), a mapping or a namespace.
        policy: As for `policy_path`.
    """
    own = {"tokenizer": policy_path(policy), "added_tokens": _option(policy, "added_tokens")}
    return {name: value for name, value in own.items() if name in data and data[name] is None and value is not None}


def _option(policy: Any, name: str) -> Any:
    return policy.get(name) if isinstance(policy, Mapping | Namespace) else None
