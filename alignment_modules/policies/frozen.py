"""Frozen companions of a policy: references, teachers, reward models, old critics."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignment_modules.functional.ranges import Share, check_options
from alignment_modules.policies.adapter_beside import put_beside
from alignment_modules.policies.adapters import (
    adapter_alone,
    adapter_off,
    adapter_weights,
    has_adapter,
    merged_copy,
    merged_state,
    trained_base,
    why_not_off,
)
from alignment_modules.policies.added_tokens import is_of_rows
from alignment_modules.policies.compiling import compile_as
from alignment_modules.policies.config import Head, PolicyConfig, dtype_name, from_mapping
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.modes import reading_mode
from alignment_modules.policies.quantization import quantized_entries, stored_parts
from alignment_modules.policies.sharded import agreed, class_of, cut_as, free, local, steady_parameters


class Frozen(nn.Module):
    """A model that accompanies a policy and is not trained; it looks after itself wherever it is a child.

    It is in eval mode for ever and needs no gradients, so that no optimizer takes it. State dictionaries have no entry
    of it and ask for none when they are loaded, unless it is `saved`. A deep copy of it
    alone copies `of`, too.

    Args:
        module: The model, which is frozen *in place*. None: `of` with its adapters off, or with `adapter` alone.
        of: The policy that it accompanies. It is not a child of this module.
        saved: Whether checkpoints hold its weights: needed where they change in the course of a run (`refresh`).
        adapter: Name of an adapter of `of` that is on, alone, while this companion is read.
        why: Why it is a model of its own, for people.

    Raises:
        ValueError: `module` is None and `of` has no adapters.
    """

    of: nn.Module

    def __init__(
        self,
        module: nn.Module | None,
        *,
        of: nn.Module,
        saved: bool = False,
        adapter: str | None = None,
        why: str | None = None,
    ) -> None:
        super().__init__()
        if module is None and not has_adapter(of):
            raise ValueError(
                f"module=None stands for the policy with its adapters off, but {type(of).__name__} has none; give a "
                "module, or call frozen_companion"
            )
        for parameter in () if module is None else module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.module = module
        self.__dict__["of"] = of  # as a child it would be held in eval mode
        self.saved, self.adapter, self.why = saved, adapter, why
        self._mark = b""
        self._fingerprint: str | None = None
        self._scores: dict[bytes, Tensor] = {}
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_fill_in)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        """Eval mode, whatever is asked for."""
        return super().train(False)

    @contextmanager
    def reading(self) -> Iterator[nn.Module]:
        """Runs a block that reads with the model: in eval mode, without gradients, the policy's adapters off.

        Yields:
            The model. On leaving, also by an exception, every submodule's training flag and every parameter's
            `requires_grad` are as they were.
        """
        module = self.of if self.module is None else self.module
        with reading_mode(module), self._chosen():
            yield module

    def _chosen(self) -> AbstractContextManager[Any]:
        if self.module is not None:
            return nullcontext()
        return adapter_off(self.of) if self.adapter is None else adapter_alone(self.of, self.adapter)

    def fingerprint(self) -> str | None:
        """An exact hash of the weights, computed again only where they changed; None: adapters off."""
        self._forget_what_changed()
        if self._fingerprint is None and self.module is not None:
            self._fingerprint = fingerprint(self.module)
        elif self._fingerprint is None and self.adapter is not None:
            self._fingerprint = fingerprint(adapter_weights(self.of, self.adapter))
        return self._fingerprint

    def check_base(self, name: str) -> None:
        """Refuses a companion on the policy's base where that base is trained, and so would not stay as it is.

        Args:
            name: What the companion is called in an error.

        Raises:
            ValueError: Naming what is trained.
        """
        if self.module is None and (moved := trained_base(self.of)):
            raise ValueError(
                f"{name} is {self.describe()}, and {moved[0]!r} of the policy's base is trained, so that the {name} "
                f"would move with it: freeze the base, or give {name} a folder or a module of its own"
            )

    def refresh(self, alpha: Share = 1.0) -> None:
        """Moves the model towards the policy: `alpha * of + (1 - alpha) * module` (TR-DPO, arXiv:2404.09656).

        The weights are mixed. Those of a policy with adapters are its base's with the adapters merged in, so that a
        mixture is one of models, not of the factors of an adapter.

        Args:
            alpha: Share of the policy, in [0, 1]; 1 takes its weights over. Buffers are taken over with any.

        Raises:
            ValueError: `alpha` is out of range, or the model is not one that can be moved (`check_refreshable`).
        """
        check_options(Frozen.refresh, locals())
        for model in (self.of, self.module):
            if model is not None:
                free(model)
        self.check_refreshable()
        module = cast(nn.Module, self.module)
        with torch.no_grad():
            theirs = self._weights_of_policy()
            for name, parameter in module.named_parameters():
                mine = local(parameter)
                mine.lerp_(local(cut_as(theirs[name], parameter)).to(mine), alpha)
            own = [name for name, _ in module.named_buffers() if not is_of_rows(name)]
            others = [buffer for name, buffer in self.of.named_buffers() if not is_of_rows(name)]
            for name, new in zip(own, others, strict=True):
                module.get_buffer(name).copy_(new)
        self._forget_what_changed()

    def check_refreshable(self) -> None:
        """Checks that the model can be moved towards the policy.

        Raises:
            ValueError: The model is the policy with its adapters off, is not `saved` (a checkpoint would be of weights
                that no run can build again), or has other parameters than the policy.
        """
        if self.module is None or not self.saved:
            what = "is in no checkpoint" if self.module is not None else "is the policy with its adapters off"
            what = what if self.adapter is None else f"is {self.describe()}"
            raise ValueError(f"refresh: this companion {what}; build it with saved=True, as a copy that is saved")
        mine, theirs = dict(self.module.named_parameters()), self._weights_of_policy()
        other = [name for name in {**mine, **theirs} if _shape(mine, name) != _shape(theirs, name)]
        if other:
            raise ValueError(
                f"refresh: {type(self.module).__name__} and the policy {type(self.of).__name__} differ in "
                f"{len(other)} parameters, first {other[0]!r}"
            )

    def _weights_of_policy(self) -> dict[str, Tensor]:
        """The policy's parameters by name; with its adapters merged in where the model has none."""
        if not has_adapter(self.of) or has_adapter(cast(nn.Module, self.module)):
            return dict(self.of.named_parameters())
        buffers = {name for name, _ in cast(nn.Module, self.module).named_buffers()}
        tied = {name for name, _ in cast(nn.Module, self.module).named_parameters(remove_duplicate=False)}
        own = {name for name, _ in cast(nn.Module, self.module).named_parameters()}
        state = merged_state(self.of)[1]
        return {name: value for name, value in state.items() if name not in buffers and name not in tied - own}

    def cached(self, keys: Sequence[bytes], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives for rows that all were seen before, else its result; forgotten when weights change.

        Args:
            keys: One a row, made of its tokens (`row_keys`): rows of several data sets are then never mixed up.
            compute: Gives a tensor [rows, ...].

        Returns:
            The tensor, of the last time that the weights were these.
        """
        self._forget_what_changed()
        known = bool(keys) and all(key in self._scores for key in keys)
        if agreed(self.of if self.module is None else self.module, known):
            return torch.stack([self._scores[key] for key in keys])
        scores = compute()
        self._scores.update(zip(keys, scores.clone().unbind(), strict=True))
        self._mark = self._weights_mark()  # as the forward pass leaves them
        return scores

    def describe(self) -> str:
        """What it is, for people."""
        if self.module is None:
            return "the policy, adapter off" if self.adapter is None else "another adapter on the policy's base"
        reason = "" if self.why is None else f", a copy since {self.why}"
        return f"{class_of(self.module).__name__}, frozen{', in the checkpoints' * self.saved}{reason}"

    def _forget_what_changed(self) -> None:
        if (self._scores or self._fingerprint is not None) and self._weights_mark() == self._mark:
            return
        self._scores.clear()
        self._fingerprint, self._mark = None, self._weights_mark()

    def _weights_mark(self) -> bytes:
        """A cheap mark of the weights as they stand: another one where they were changed or replaced.

        Made of each tensor's address and version counter, and, since a write to `.data` counts no version, of a sample
        of its values.
        """
        tensors: list[Any] = [parameter for parameter in steady_parameters(self.of) if not parameter.requires_grad]
        if self.module is not None:
            free(self.module)
            tensors = [*self.module.parameters(), *self.module.buffers()]
        own = [part for tensor in tensors for part in stored_parts(local(tensor))]
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in own]
        floats = [t.detach() for t in own if t.is_floating_point() and t.numel()]
        parts = [t.reshape(-1)[:: max(1, t.numel() // 32)].float() for t in floats[:: max(1, len(floats) // 8)]]
        sample = torch.cat(parts).cpu().numpy().tobytes() if parts else b""
        return hashlib.blake2b(repr(state).encode() + sample, digest_size=16).digest()


def frozen_companion(
    model: str | PolicyConfig | nn.Module | None,
    policy: nn.Module,
    *,
    name: str = "reference",
    saved: bool = False,
    head: Head | None = "lm",
) -> Frozen:
    """Builds the frozen model that a policy is held against.

    Call it before the first step, and before a checkpoint is restored into the policy.

    Args:
        model: A folder or hub id (loaded in the policy's dtype), a configuration, or a module of yours, which is frozen
            *in place*. With `merge_adapter=False` a configuration is a second adapter on the policy's base. None is the
            policy as it stands: a deep copy that shares nothing with it, or, where the policy carries fresh adapters on
            a frozen base, the policy itself with its adapters off, which gives the same model. An adapter that was
            trained before is not switched off but copied with its model. A folder's model and a copy are compiled where
            the policy is.
        policy: The policy, built.
        name: What the option is called in an error.
        saved: Whether checkpoints hold its weights (see `Frozen`); None is then always a copy, with the adapters of a
            policy that has some merged in.
        head: The head that it is to have, as in `build_policy`; None: any.

    Raises:
        ValueError: The model is the policy itself or shares a weight with it, or cannot be built.
        ImportError: A quantized model without its package.
    """
    if model is None:
        why = why_not_off(policy) if has_adapter(policy) else None
        if saved and has_adapter(policy):
            return Frozen(compile_as(policy, merged_copy(policy)), of=policy, saved=True)
        off = has_adapter(policy) and why is None
        return Frozen(None if off else compile_as(policy, copy.deepcopy(policy)), of=policy, saved=saved, why=why)
    by_path = False
    if isinstance(model, (str, os.PathLike)):
        by_path, model = True, PolicyConfig(path=os.fspath(model), dtype=dtype_name(policy))
    elif isinstance(model, Mapping):
        model = from_mapping(model)
    if isinstance(model, PolicyConfig) and not model.merge_adapter:
        if saved:
            raise ValueError(
                f"{name}.merge_adapter=False shares the policy's base, so that it cannot be moved: leave it out"
            )
        return Frozen(None, of=policy, adapter=put_beside(policy, model, name))
    try:
        module = build_policy(model, trainable=False, head=head)
    except (ValueError, ImportError) as error:
        raise type(error)(_renamed(str(error), name)) from error
    if by_path:
        compile_as(policy, module)
    ours = {id(parameter) for parameter in policy.parameters()}
    shared = [key for key, parameter in module.named_parameters() if id(parameter) in ours]
    if module is policy or shared:
        raise ValueError(
            f"{name} shares {shared[0] if shared else 'everything'!r} with the policy, so that freezing it would "
            f"freeze the policy. Give another module, or leave {name} out for a frozen copy of the policy."
        )
    return Frozen(module, of=policy, saved=saved)


def companions(module: nn.Module) -> dict[str, Frozen]:
    """The frozen companions within a module, by their names in it."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Frozen)}


def row_keys(*columns: tuple[Tensor, Tensor]) -> list[bytes]:
    """One key a row, made of its values: rows with the same key hold the same, whatever their padding.

    Args:
        columns: Values and the mask of those that count, each [rows, time].
    """
    host = [(values.cpu(), mask.cpu().bool()) for values, mask in columns]
    rows = ([values[row][mask[row]].tolist() for values, mask in host] for row in range(len(host[0][0])))
    return [hashlib.blake2b(repr(parts).encode(), digest_size=16).digest() for parts in rows]


def _leave_out(companion: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Takes the entries of a companion that is not saved out of a state dictionary."""
    for key in [] if companion.saved else [key for key in state if key.startswith(prefix)]:
        del state[key]


def _fill_in(companion: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Gives what `_leave_out` took: the companion's own weights, as they are."""
    if not companion.saved and isinstance(companion.module, nn.Module):
        own = companion.module.state_dict(keep_vars=True)
        for key in own.keys() - quantized_entries(companion.module, own):  # which torch cannot load
            state.setdefault(f"{prefix}module.{key}", own[key])


def _shape(parameters: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return parameters[name].shape if name in parameters else None


def _renamed(message: str, name: str) -> str:
    """What `build_policy` said, with the options called by the name that the companion's have."""
    named = re.sub(r"(?<![\w'/])(policy|reference)(?=[.=][a-z_']+)", name, message)
    return named if name in named else f"{name}: {named}"
