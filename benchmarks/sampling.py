"""Our sampler against transformers' `generate`: the same policy, prompts, number of samples and length limit, in turn.

Both sample from the whole vocabulary at temperature 1, and both end a completion at the end-of-sequence token. Counted
are the tokens of the completions. Ours also returns their log-probabilities; `generate` does not. `--top-p` has both
draw from a nucleus, `--clock cpu` with `--threads 1` counts this process's processor time, for busy machines.

`--at-scale` measures what a token costs as rollouts grow, against `GRPOTrainer`'s generation (`generation.py`): 8 and
32 samples of each prompt, prompts of 100 and 800 tokens, each measurement a process of its own, in turn:

    python benchmarks/sampling.py --at-scale --trl-python .venv-trl/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import torch
import workload

CASES = ((8, 100), (32, 100), (8, 800), (32, 800))  # samples of a prompt, mean tokens of a prompt


def main() -> None:
    """Measure in turn, print tokens per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rollouts measured, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall", help="cpu with --threads 1: a busy machine")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus that both draw from; not with --at-scale")
    parser.add_argument("--at-scale", action="store_true", help="larger groups and longer prompts, against TRL")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of the environment with TRL")
    measure.add_workload(parser)
    options = parser.parse_args()
    if options.at_scale:
        if options.top_p != 1.0:
            parser.error("--top-p has no effect with --at-scale")
        at_scale(options)
    else:
        against_generate(options)


def at_scale(options: argparse.Namespace) -> None:
    """Microseconds of a token for each group and prompt length, and ours over TRL's."""
    measure.rows_folder(options)
    names = (
        "samples",
        "prompt tokens",
        "ours, us/token",
        "TRL, us/token",
        "TRL / ours",
        "memory, ours / TRL",
        "others",
    )
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for group, tokens in CASES:
        both = [measured(library, group, tokens, options) for library in ("ours", "trl")]
        costs = [[1e6 * s / n for s, n in zip(run["seconds"][1:], run["tokens"][1:], strict=True)] for run in both]
        own, other = ((statistics.median(cost), min(cost), max(cost)) for cost in costs)
        columns = [str(group), str(tokens), *("{:.0f} [{:.0f}, {:.0f}]".format(*cost) for cost in (own, other))]
        columns += [f"{other[0] / own[0]:.2f}", f"{both[0]['peak_mb'] / both[1]['peak_mb']:.2f}"]
        columns += [f"{max(run['other_processes'] for run in both):.0%}"]
        print(f"| {' | '.join(columns)} |", flush=True)


def measured(library: str, group: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of `generation.py` printed.

    Raises:
        SystemExit: It failed; the end of its output is in the message.
    """
    python = options.trl_python if library == "trl" else sys.executable
    words = [python, Path(__file__).with_name("generation.py"), library, "--group", group, "--prompt-tokens", tokens]
    words += ["--rounds", options.rounds, "--threads", options.threads, "--clock", options.clock]
    words += ["--size", options.size, "--folder", options.folder]
    words += ["--prompts", workload.SIZES[options.size].batch["grpo"]]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(measure.MARK):
            return json.loads(line.removeprefix(measure.MARK))
    raise SystemExit(f"{' '.join(map(str, words))}\nended with {done.returncode}:\n{done.stderr[-3000:]}")


def against_generate(options: argparse.Namespace) -> None:
    """Tokens per second of ours and of `generate`, in one process, and the ratio."""
    torch.set_num_threads(options.threads)
    clock = measure.CLOCKS[options.clock]
    folder = measure.rows_folder(options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignment_modules.rollouts import SamplingParameters, sample

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    parameters = SamplingParameters(workload.MAX_COMPLETION, top_p=options.top_p, stop_token_ids=(workload.EOS,))
    size, samples = workload.SIZES[options.size].batch["grpo"], workload.GROUP
    rows = workload.load_rows(folder, "grpo", options.rounds + 1)

    def ours(ids: torch.Tensor, mask: torch.Tensor, step: int) -> int:
        drawn = sample(policy, ids, mask, parameters=parameters, num_samples=samples, step=step)
        return int(drawn.mask.sum())

    def generate(ids: torch.Tensor, mask: torch.Tensor, step: int) -> int:
        limits = {"max_new_tokens": workload.MAX_COMPLETION, "num_return_sequences": samples}
        sampling = {"do_sample": True, "top_k": 0, "top_p": options.top_p, "temperature": 1.0}
        out = policy.generate(input_ids=ids, attention_mask=mask, pad_token_id=workload.PAD, **limits, **sampling)
        ended = (out[:, ids.shape[1] :] == workload.EOS).long().cumsum(1)
        return int((ended == 0).sum() + (ended.amax(1) > 0).sum())

    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for step in range(options.rounds + 1):  # the first is the warm-up
        prompts = [row["prompt"] for row in rows[step * size : (step + 1) * size]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        for name, run in (("generate", generate), ("ours", ours)):
            began = clock()
            tokens = run(batch["input_ids"], batch["attention_mask"], step)
            speeds[name].append(tokens / (clock() - began))
    for name, values in speeds.items():
        print(f"{name:9} {statistics.median(values[1:]):7.0f} tokens/s [{min(values[1:]):.0f}, {max(values[1:]):.0f}]")
    ratios = [own / other for own, other in zip(speeds["ours"][1:], speeds["generate"][1:], strict=True)]
    print(f"ours / generate: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
