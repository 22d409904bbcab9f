"""Tokens that a base model does not know: ids in its tokenizer, rows in its embedding and its head.

A new token's row is the mean of the rows of the tokens that were there, in the embedding and, where it is not the same
matrix, in the head: its first logit is then no larger than those of known tokens, and it moves none of their
probabilities by much (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Nothing is drawn, so that
the same specification builds the same policy. Under LoRA these rows alone are trained of the two matrices; `peft`
keeps them beside the frozen weight and writes them into it on merging.

`peft` and `transformers` are never imported by importing this module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> bool:
    """Makes a transformers model know tokens, by rows of its embedding and head.

    Args:
        model: A transformers model; changed in place. `token_ids` says which of them have which ids (see there).
        tokenizer: The model's `transformers.PreTrainedTokenizerBase`, which gets the tokens, too.
        tokens: What both are to know. The rows of those that the tokenizer knows stay as they are.

    Returns:
        Whether a row was made, so that the model is not the one on disk.

    Raises:
        ValueError: The model has fewer rows than its tokenizer has ids.
    """
    known, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.shape[0]
    used = max(known.values(), default=-1) + 1
    if used > rows:
        raise ValueError(
            f"policy.added_tokens={list(tokens)}: the tokenizer has {used} ids, but the model has rows for {rows}"
        )
    from tokenizers import AddedToken

    unknown = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in unknown], special_tokens=True)
    ids = tokenizer.get_vocab()
    model.added_token_ids = {token: ids[token] for token in tokens}
    new = [ids[token] for token in unknown]
    if not new:
        return False
    if max(new) >= rows:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    with torch.no_grad():
        for _, module in ends(model):
            for table in (module.weight, getattr(module, "bias", None)):
                if table is not None:  # a tied matrix is written twice, from the same rows
                    table[new] = table[:used].mean(dim=0, dtype=torch.float64).to(table.dtype)
    return True


def token_ids(policy: nn.Module) -> dict[str, int]:
    """Ids of the tokens that `add_tokens` made a policy know; empty for any other policy."""
    get_base_model: Any = getattr(policy, "get_base_model", None)
    return getattr(policy if get_base_model is None else get_base_model(), "added_token_ids", {})


def ends(model: Any) -> list[tuple[str, Any]]:
    """Names and modules of a transformers model's embedding and head; a classifier has no such head."""
    wanted = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [(name, module) for name, module in model.named_modules() if any(module is end for end in wanted)]


def tied(model: Any) -> bool:
    """Whether a transformers model's embedding and head are one matrix."""
    weights = {id(module.weight) for _, module in ends(model)}
    return len(weights) == 1 and len(ends(model)) == 2


class TrainedRows:
    """What stands for a linear head some of whose rows are trained beside its frozen weight.

    Args:
        head: The module that `peft` put in the head's place.
    """

    bias: Tensor | None = None  # `peft` trains no rows of a head with one here

    def __init__(self, head: Any) -> None:
        self._head = head
        self.out_features = int(head.original_module.out_features)

    @property
    def weight(self) -> Tensor:
        """`[vocabulary, hidden]`, differentiable in the trained rows; the frozen one while adapters are off."""
        return self._head.weight


def trains_rows(module: Any) -> bool:
    """Whether some rows of a module are trained beside its frozen weight."""
    if "peft" not in sys.modules:  # nobody can have wrapped it
        return False
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(module, TrainableTokensWrapper)


def is_of_rows(buffer: str) -> bool:
    """Whether a buffer of that name is what `peft` keeps of rows before their training, which no base model has."""
    return ".trainable_tokens_original." in buffer


def is_untrained(module: Any) -> bool:
    """Whether the trained rows of a module are those of its frozen weight."""
    adapter = module.token_adapter
    if adapter.merged:
        return False
    for name in adapter.active_adapters:
        rows, frozen = adapter.trainable_tokens_delta[name], adapter.base_layer.weight
        if not rows.is_meta and not torch.equal(rows, frozen[adapter.token_indices[name]]):
            return False
    return True
