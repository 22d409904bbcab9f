"""Our sampler against transformers' `generate`: the same policy, prompts, number of samples and length limit, in turn.

Both sample from the whole vocabulary at temperature 1, and both end a completion at the end-of-sequence token. Counted
are the tokens of the completions. Ours also returns their log-probabilities; `generate` does not.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import torch
import workload


def main() -> None:
    """Measure in turn, print tokens per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    measure.add_workload(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = measure.rows_folder(options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignment_modules.rollouts import SamplingParameters, sample

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    parameters = SamplingParameters(workload.MAX_COMPLETION, stop_token_ids=(workload.EOS,))
    size, samples = workload.SIZES[options.size].batch["grpo"], workload.GROUPS["grpo"]
    rows = workload.load_rows(folder, "grpo", options.rounds + 1)

    def ours(ids: torch.Tensor, mask: torch.Tensor, step: int) -> int:
        drawn = sample(policy, ids, mask, parameters=parameters, num_samples=samples, step=step)
        return int(drawn.mask.sum())

    def generate(ids: torch.Tensor, mask: torch.Tensor, step: int) -> int:
        limits = {"max_new_tokens": workload.MAX_COMPLETION, "num_return_sequences": samples}
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        out = policy.generate(input_ids=ids, attention_mask=mask, pad_token_id=workload.PAD, **limits, **sampling)
        ended = (out[:, ids.shape[1] :] == workload.EOS).long().cumsum(1)
        return int((ended == 0).sum() + (ended.amax(1) > 0).sum())

    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for step in range(options.rounds + 1):  # the first is the warm-up
        prompts = [row["prompt"] for row in rows[step * size : (step + 1) * size]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        for name, run in (("generate", generate), ("ours", ours)):
            began = time.perf_counter()
            tokens = run(batch["input_ids"], batch["attention_mask"], step)
            speeds[name].append(tokens / (time.perf_counter() - began))
    for name, values in speeds.items():
        print(f"{name:9} {statistics.median(values[1:]):7.0f} tokens/s [{min(values[1:]):.0f}, {max(values[1:]):.0f}]")
    ratios = [own / other for own, other in zip(speeds["ours"][1:], speeds["generate"][1:], strict=True)]
    print(f"ours / generate: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
