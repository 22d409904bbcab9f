"""A policy from a folder, ready to write: its weights, its tokenizer, and where its completions end."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignment_modules.policies.adapters import adapter_off, has_adapter
from alignment_modules.policies.architecture import own_stop_ids
from alignment_modules.policies.load import (
    PolicyConfig,
    build_policy,
    check_vocabulary,
    load_tokenizer,
    vocabulary_size,
)
from alignment_modules.policies.modes import eval_mode
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.parameters import SamplingOptions, SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import sample_prompts
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings
from alignment_modules.rollouts.streaming import TextStream
from datamodules.rows.formats import Example
from datamodules.text.encoding import Encoder

_DTYPES = ("float32", "bfloat16", "float16", "auto")


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which policy writes."""
    group = parser.add_argument_group("the policy")
    names = ("--policy", "--model.policy.path", "--model.policy")
    group.add_argument(*names, metavar="FOLDER", required=True, help="folder in Hugging Face format, or a hub id")
    group.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default float32)")
    group.add_argument("--device", metavar="NAME", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float | None) -> None:
    """Adds the options that say how completions are drawn.

    Args:
        parser: The command's.
        temperature: The default; None: it depends on the number of samples.
    """
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    default = "0 for one sample, 1 for several" if temperature is None else f"{temperature:g}"
    text = f"0: the likeliest tokens (default {default})"
    add("--temperature", type=float, default=temperature, metavar="T", help=text)
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens of this mass (default 1: all)")
    add("--top-k", type=int, default=0, metavar="K", help="only this many likeliest tokens (default 0: all)")
    add("--max-completion-length", type=int, default=256, metavar="N", help="most tokens of a completion (default 256)")
    add("--seed", type=int, default=0, help="of the random numbers (default 0)")


def sampling_parameters(given: argparse.Namespace, stop_token_ids: tuple[int, ...] = ()) -> SamplingParameters:
    """What `add_sampling_options` was given, checked.

    Raises:
        ValueError: If a value is out of its range.
    """
    if given.seed < 0:
        raise ValueError(f"seed={given.seed} must be 0 or more")
    greedy = given.temperature == 0
    options = SamplingOptions(
        max_completion_length=given.max_completion_length,
        temperature=1.0 if greedy else given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
    )
    return options.parameters(greedy=greedy, stop_token_ids=stop_token_ids)


@dataclass
class LoadedPolicy:
    """A policy that writes.

    Attributes:
        path: Where it came from.
        policy: The model, in eval mode; an adapter of the folder is attached.
        codec: Tokens to text, and the stop tokens.
        encoder: Text to tokens, as in training.
        adapter: Whether an adapter, where it has one, is on.
    """

    path: str
    policy: nn.Module
    codec: Codec
    encoder: Encoder
    adapter: bool = True

    @classmethod
    def load(cls, path: str, given: argparse.Namespace, *, merge: bool = True) -> "LoadedPolicy":
        """Loads a folder or hub id.

        Args:
            path: Which.
            given: What `add_policy_options` was given.
            merge: Whether an adapter is merged into its base, and so cannot be switched off.

        Raises:
            ValueError: If it cannot be loaded or put on the device.
        """
        config = PolicyConfig(path=path, dtype=given.dtype, trust_remote_code=given.trust_remote_code)
        policy = build_policy(config, trainable=False, head="lm", merge=merge).eval().requires_grad_(False)
        tokenizer = load_tokenizer(path, trust_remote_code=given.trust_remote_code)
        check_vocabulary(policy, tokenizer)
        codec, encoder = Codec(tokenizer, own_stop_ids(policy, vocabulary_size(policy))), Encoder(tokenizer)
        if tokenizer.chat_template:
            codec.data_stops = encoder.chat.stop_token_ids()
        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return cls(path, policy.to(device), codec, encoder)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.policy.parameters()).device

    @property
    def has_template(self) -> bool:
        """Whether its tokenizer says how a conversation is written."""
        return bool(self.codec.tokenizer.chat_template)

    @property
    def has_adapter(self) -> bool:
        """Whether it has an adapter to switch off."""
        return has_adapter(self.policy)

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Ids of a text to continue, or of a conversation to answer.

        Raises:
            ValueError: If the template refuses the conversation, or nothing is left to continue.
        """
        ids = self.encoder.prompts([Example(prompt=prompt)])[0].tolist()
        if not ids:
            raise ValueError("the prompt has no token")
        return ids

    def write(
        self,
        prompt: str | list[dict[str, Any]],
        parameters: SamplingParameters,
        seeds: Seeds,
        show: Callable[[str], None],
    ) -> tuple[str, str]:
        """Continues a text, or answers a conversation, and shows it as it is written.

        Args:
            prompt: Text or messages.
            parameters: How to draw.
            seeds: Of one prompt.
            show: Gets each new piece of text.

        Returns:
            The whole text, and how it ended: "stopped", "cut" at the length limit, or "interrupted" by the user.

        Raises:
            ValueError: If the prompt cannot be encoded, or the policy's logits are not finite.
        """
        ids, how = self.write_ids(self.encode(prompt), parameters, seeds, show)
        return self.codec.decode([ids])[0] if ids else "", how

    @torch.no_grad()
    def write_ids(
        self, context: list[int], parameters: SamplingParameters, seeds: Seeds, show: Callable[[str], None]
    ) -> tuple[list[int], str]:
        """As `write`, from ids to ids.

        Args:
            context: What stands before; not empty.
            parameters: How to draw.
            seeds: Of one prompt.
            show: Gets each new piece of text.

        Returns:
            What was written, with its stop token, and how it ended.

        Raises:
            ValueError: If the policy's logits are not finite.
        """
        prompts = Prompts.from_rows([context], self.device)
        strings = StopStrings(parameters.stop_strings, self.codec.tokenizer) if parameters.stop_strings else None
        stream = TextStream(self.codec, show)
        how = "interrupted"
        try:
            with eval_mode(self.policy), nullcontext() if self.adapter else adapter_off(self.policy):
                found, _ = sample_prompts(
                    self.policy, prompts, parameters, num_samples=1, seeds=seeds, stop_strings=strings, watch=stream
                )
            how = "cut" if bool(found.truncated) else "stopped"
        except KeyboardInterrupt:
            pass
        stream.finish()
        return stream.ids, how
