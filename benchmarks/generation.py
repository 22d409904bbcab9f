"""Rollouts of one library, timed: `generation.py LIBRARY --group G --prompt-tokens N`. Prints one line of JSON.

`ours` is the sampler; `trl` is what `GRPOTrainer` generates with where there is no vLLM: its own method, with the
trainer's generation configuration, and with each prompt repeated for each of its samples. Both sample from the whole
vocabulary at temperature 1 and end a completion at the end-of-sequence token or after `MAX_COMPLETION` tokens. Ours
also gives log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import measure
import torch
import workload

Roll = Callable[[list[list[int]], int], int]
"""From prompts and the number of the rollout to how many tokens were made."""


def ours(options: argparse.Namespace, folder: Path) -> Roll:
    """The sampler."""
    from transformers import AutoModelForCausalLM

    from alignment_modules.rollouts import SamplingParameters, sample

    policy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    parameters = SamplingParameters(workload.MAX_COMPLETION, stop_token_ids=(workload.EOS,))

    def roll(prompts: list[list[int]], step: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[workload.PAD] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        drawn = sample(policy, ids, mask, parameters=parameters, num_samples=options.group, step=step)
        return int(drawn.mask.sum())

    return roll


def trl(options: argparse.Namespace, folder: Path) -> Roll:
    """The trainer's own generation."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = trl.GRPOConfig(
        output_dir=f"{options.folder}/trl",
        per_device_train_batch_size=options.prompts * options.group,
        num_generations=options.group,
        max_completion_length=workload.MAX_COMPLETION,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        model=str(folder / "model"),
        args=config,
        reward_funcs=workload.even_words,
        train_dataset=Dataset.from_list([{"prompt": "w1"}] * options.prompts),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )

    def roll(prompts: list[list[int]], step: int) -> int:
        torch.manual_seed(step)
        repeated = [row for row in prompts for _ in range(options.group)]
        completions, _ = trainer._generate_single_turn(repeated, None, {}, options.group)
        return sum(map(len, completions))

    return roll


def main() -> None:
    """Roll out, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["ours", "trl"])
    measure.add_workload(parser)
    parser.add_argument("--group", type=int, default=workload.GROUP, help="samples of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=100, help="mean length of the prompts")
    parser.add_argument("--prompts", type=int, default=4, help="of one rollout")
    parser.add_argument("--rounds", type=int, default=3, help="rollouts measured, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall", help="cpu with --threads 1: a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder, clock = measure.rows_folder(options), measure.CLOCKS[options.clock]
    prompts = workload.make_prompts(options.size, options.prompt_tokens, options.prompts * (options.rounds + 1))
    roll, neighbours = {"ours": ours, "trl": trl}[options.library](options, folder), measure.Neighbours()
    result: dict[str, Any] = {"library": options.library, "seconds": [], "tokens": []}
    for step in range(options.rounds + 1):
        batch = prompts[step * options.prompts : (step + 1) * options.prompts]
        if step == 1:
            neighbours.start()
        began = clock()
        result["tokens"].append(roll(batch, step))
        result["seconds"].append(clock() - began)
    result |= {"peak_mb": measure.peak_rss(), "other_processes": neighbours.share()}
    print(measure.MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
