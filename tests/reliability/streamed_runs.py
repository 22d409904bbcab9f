"""Runs on streams. Usage: `python -m tests.reliability.streamed_runs RESULTS`, in the folder of the configurations."""

import signal
import sys

from tests.reliability.forked_runs import TWO_RANKS, Runs, last

OPTIONS = {
    # blocks of 5 of 24 documents, packed; batches of 2 rows, and two of them a step
    "pretrain": ("--trainer.accumulate_grad_batches=2", "--trainer.max_steps=14"),
    # blocks of 5 of 12 prompts; four steps a batch
    "grpo": ("--model.num_iterations=2", "--model.minibatches=2", "--trainer.max_steps=32", "--data.batch_size=2"),
}
EVERY = {"pretrain": 4, "grpo": 8}  # optimizer steps between two checkpoints
KILL = int(signal.SIGKILL)

if __name__ == "__main__":
    runs = Runs(sys.argv[1])

    def run(paradigm, name, *options, workers, **more):
        common = ("--data.stream.buffer_size=5", "--trainer.max_epochs=-1", f"--data.num_workers={workers}")
        options = (*common, *OPTIONS[paradigm], *options)
        return runs(f"{paradigm}/{name}", f"{paradigm}.yaml", *options, every=EVERY[paradigm], **more)

    for paradigm, step, odd in (("pretrain", 9, False), ("grpo", 18, True)):
        run(paradigm, "whole", workers=2)
        killed = run(paradigm, "killed", workers=2, end={"step": step, "signal": KILL, "odd": odd})
        for workers in (2, 0):
            run(paradigm, f"resumed_{workers}", workers=workers, resume=last(killed))
    # Lightning finishes the batch of the signal: the first of an optimizer step's two
    stopped = run("pretrain", "stopped", workers=2, end={"step": 9, "signal": int(signal.SIGTERM)})
    run("pretrain", "continued", workers=2, resume=last(stopped))
    run("pretrain", "two_whole", *TWO_RANKS, workers=1)
    killed = run("pretrain", "two_killed", *TWO_RANKS, workers=1, end={"step": 9, "signal": KILL})
    run("pretrain", "two_resumed", *TWO_RANKS, workers=1, resume=last(killed))
    run("pretrain", "one_resumed", workers=1, resume=last(killed))
    runs.save()
