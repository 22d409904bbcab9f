"""`align generate`: completions of prompts, shown or written as rows to train on."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from alignment_modules.callbacks.jsonl import to_json_line
from alignment_modules.cli.loaded_policy import (
    LoadedPolicy,
    add_policy_options,
    add_sampling_options,
    sampling_parameters,
)
from alignment_modules.cli.options import OptionParser
from alignment_modules.cli.own_files import find_own_files
from alignment_modules.cli.row_file import RowFile
from alignment_modules.cli.sampling import KINDS, PromptSampler, Sampled
from alignment_modules.cli.screen import PROMPT, printable
from alignment_modules.policies.fingerprints import fingerprint
from alignment_modules.rewards import RewardSet, verifiers
from datamodules.rows.strict_json import strict_json

_DECIDING = ("num_samples", "temperature", "top_p", "top_k", "max_completion_length", "seed", "batch_size")
"""Options that decide the rows; a batch's size changes how its numbers are rounded."""


def generate_command(arguments: list[str]) -> int:
    """Runs `align generate`.

    Args:
        arguments: What follows `align generate`.

    Returns:
        0.

    Raises:
        ValueError: If an option, the policy, a prompt or a reward cannot be used.
    """
    given = _parser().parse_args(arguments)
    if given.temperature is None:
        given.temperature = 0.0 if given.num_samples == 1 else 1.0
    _check(given)
    find_own_files()
    rewards = RewardSet([_reward_name(name) for name in given.rewards], given.reward_weights) if given.rewards else None
    source = given.prompts or ([{"prompt": text} for text in given.prompt] if given.prompt else _read_stdin())
    if rewards is not None:
        rewards.limit_to(given.max_completion_length)
    loaded = LoadedPolicy.load(given.policy, given)
    sampler = PromptSampler(
        loaded,
        source,
        sampling_parameters(given, loaded.codec.stop_token_ids),
        num_samples=given.num_samples,
        seed=given.seed,
        rewards=rewards,
        batch_size=given.batch_size,
        as_chat=given.as_chat,
    )
    if given.write is None:
        _print(_noted(sampler), given.json, named=len(sampler) > 1 and sys.stdout.isatty())
    else:
        _write(sampler, given)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "generate",
        "--policy FOLDER [PROMPT ...] [options]",
        "Complete prompts: those of the command line, those of --prompts, or those of standard input, one a line or\n"
        "one row of JSON a line. Text is continued as it stands; --as-chat asks it as a user's message. Messages go\n"
        "through the tokenizer's chat template. A terminal shows each of several prompts above its completions.",
        'align generate --policy runs/sft/export "1+1="\n'
        "align generate --policy runs/sft/export --prompts questions.jsonl --num-samples 8 --rewards ExactMatch \\\n"
        "    --write pairs pairs.jsonl",
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="a text to continue")
    add = parser.add_argument
    add("--prompts", metavar="SOURCE", help="file, folder or hub id of rows with a prompt, in any format for training")
    add(
        "--as-chat",
        action="store_true",
        help="ask a text as a user's message, as align chat does, instead of continuing it",
    )
    add("--json", action="store_true", help="print rows of JSON instead of text")
    add_policy_options(parser)
    add_sampling_options(parser, temperature=None)
    add("--num-samples", type=int, default=1, metavar="N", help="completions of each prompt (default 1)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts completed at once (default 8)")
    group = parser.add_argument_group("making data")
    add = group.add_argument
    add("--rewards", nargs="+", metavar="REWARD", help="how completions are judged, as model.rewards of GRPOModule")
    add("--reward-weights", nargs="+", type=float, metavar="W", help="a factor for each reward (default 1)")
    add(
        "--write",
        nargs=2,
        metavar=("KIND", "FILE"),
        help="append to a JSONL file: scored (completions with rewards), pairs (the best against the worst) or best "
        "(the best alone); a run that was killed goes on where it was",
    )
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuses options that contradict each other, before anything is loaded."""
    sampling_parameters(given)
    for name in ("num_samples", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name}={getattr(given, name)} must be 1 or more")
    if given.num_samples > 1 and given.temperature == 0:
        raise ValueError(f"temperature=0 makes num_samples={given.num_samples} equal completions; give one above 0")
    if given.prompt and given.prompts:
        raise ValueError(f"prompts={given.prompts!r} and {len(given.prompt)} on the command line: give one of the two")
    if given.reward_weights and not given.rewards:
        raise ValueError(f"reward_weights={given.reward_weights} needs rewards")
    if given.write is None:
        return
    kind, least = given.write[0], 1 if given.write[0] == "best" else 2
    if kind not in KINDS:
        raise ValueError(f"write={kind!r} must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, and then a file")
    if not given.rewards:
        raise ValueError(f"write={kind!r} needs rewards to judge completions by, as in --rewards ExactMatch")
    if given.num_samples < least:
        raise ValueError(f"write={kind!r} needs num_samples of {least} or more, not {given.num_samples}")


def _reward_name(name: str) -> str:
    """`exact_match`, as metrics call it, is ExactMatch."""
    own = "".join(part.capitalize() for part in name.split("_"))
    return own if hasattr(verifiers, own) else name


def _read_stdin() -> list[dict[str, Any]]:
    """A prompt a line, or a row of JSON a line; blank lines count for nothing.

    Raises:
        ValueError: If there is none, or a row is no JSON.
    """
    if sys.stdin.isatty():
        raise ValueError("no prompt: give one on the command line, --prompts SOURCE, or lines on standard input")
    lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(sys.stdin, start=1) if line.strip()]
    if not lines:
        raise ValueError("no prompt: standard input is empty")
    if not lines[0][1].lstrip().startswith("{"):
        return [{"prompt": line} for _, line in lines]
    return [_parse(number, line) for number, line in lines]


def _parse(number: int, line: str) -> dict[str, Any]:
    try:
        row = strict_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"standard input:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"standard input:{number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"standard input:{number}: holds a JSON {type(row).__name__}; each line must hold one object")
    return row


def _noted(sampler: PromptSampler, start: int = 0) -> Iterator[list[Sampled]]:
    """The sampler's batches; says once where a text was continued by a policy that could have been asked it."""
    told = not sampler.loaded.has_template
    for batch in sampler.batches(start):
        if not told and any(isinstance(sampled.row["prompt"], str) for sampled in batch):
            told = True
            sys.stderr.write(
                "text is continued as it stands, without the chat template; --as-chat asks it as a message\n"
            )
        yield batch


def _print(batches: Iterable[list[Sampled]], as_json: bool, *, named: bool) -> None:
    for batch in batches:
        for sampled in batch:
            if as_json:
                sys.stdout.write(to_json_line(sampled.plain()))
                continue
            if named:
                print(f"{PROMPT}{printable(_shown(sampled.row['prompt']))}")
            for text in sampled.completions:
                print(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def _shown(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a chat shows it: the text, or what was said last."""
    said = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)


def _write(sampler: PromptSampler, given: argparse.Namespace) -> None:
    kind, path = given.write[0], Path(given.write[1]).expanduser()
    options = {name: getattr(given, name) for name in _DECIDING} | {
        "kind": kind,
        "rewards": given.rewards,
        "reward_weights": given.reward_weights,
        "policy": fingerprint(sampler.loaded.policy),
        "prompts": sampler.fingerprint,
        "device": sampler.loaded.device.type,
    }
    console = Console(stderr=True)
    with RowFile(path, options) as file, Progress(console=console, disable=not console.is_terminal) as progress:
        if file.count:
            console.print(f"{path} holds {file.count} rows; going on behind them", highlight=False, soft_wrap=True)
        start = sampler.first_after(file.last)
        task = progress.add_task(kind, total=len(sampler), completed=start)
        for batch in _noted(sampler, start):
            file.append(row for row in (sampled.training_row(kind) for sampled in batch) if row is not None)
            progress.advance(task, len(batch))
    left = len(sampler) - file.count
    why = {"pairs": "no two rewards differ", "scored": "fewer than two were judged", "best": "none was judged"}[kind]
    told = f"; {left} left out, of which {why}" if left else ""
    console.print(f"wrote {file.count} rows of {len(sampler)} prompts to {path}{told}", highlight=False, soft_wrap=True)
