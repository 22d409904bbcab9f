"""Peak memory of distillation's divergence over a large vocabulary: in chunks against all logits at once.

    python benchmarks/divergence_memory.py

Each computes the mean divergence of two linear heads and its gradients in the student's states and head, in a process
of its own. Prints what each needs beyond its inputs, its seconds, and how far values and gradients are apart.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import MARK, measured_apart, peak_rss

WAYS = ("chunked", "plain")


def measured(way: str, arguments: argparse.Namespace) -> dict[str, float | list[float]]:
    """One way in this process: its memory, its seconds, and numbers to compare."""
    import torch

    from alignment_modules.functional import LinearHead, distribution_divergence, linear_divergence

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    states, teacher_states = (torch.randn(arguments.tokens, arguments.hidden) for _ in range(2))
    weight, teacher_weight = (0.05 * torch.randn(arguments.vocabulary, arguments.hidden) for _ in range(2))
    states.requires_grad_(), weight.requires_grad_()
    before, started = peak_rss(), time.perf_counter()
    if way == "plain":
        values = distribution_divergence(states @ weight.T, teacher_states @ teacher_weight.T, kind=arguments.kind)
    else:
        heads = LinearHead(weight), LinearHead(teacher_weight)
        values = linear_divergence(states, heads[0], teacher_states, heads[1], kind=arguments.kind)
    values.mean().backward()
    seconds = time.perf_counter() - started
    assert states.grad is not None
    assert weight.grad is not None
    compared = [values.detach().mean(), states.grad.norm(), weight.grad.norm(), *states.grad[0, :8]]
    return {"megabytes": peak_rss() - before, "seconds": seconds, "compared": [float(number) for number in compared]}


def main() -> None:
    """Measures both ways and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="supervised tokens, default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="width of both models, default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=150_000, help="default: %(default)s")
    parser.add_argument("--kind", choices=("forward", "reverse", "jsd"), default="reverse", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="measure one, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        print(MARK + json.dumps(measured(arguments.way, arguments)))
        return
    found = {}
    for way in WAYS:
        found[way] = measured_apart("--way", way)
    logits = arguments.tokens * arguments.vocabulary * 4 / 1e6
    print(
        f"one [tokens, vocabulary] of float32: {logits:,.0f} MB\n\n| | MB beyond the inputs | seconds |\n|---|---|---|"
    )
    for way, result in found.items():
        print(f"| {way} | {result['megabytes']:,.0f} | {result['seconds']:.2f} |")
    apart = max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(*(found[way]["compared"] for way in WAYS), strict=True))
    print(f"\nmemory: {found['chunked']['megabytes'] / found['plain']['megabytes']:.3f} of the plain computation's")
    print(f"largest relative difference of the numbers compared: {apart:.1e}")


if __name__ == "__main__":
    main()
