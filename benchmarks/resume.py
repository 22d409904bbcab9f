"""Kills every recipe at random moments, resumes it, and compares its end with an uninterrupted run's, bit for bit.

    python benchmarks/resume.py --kills 60 --seed 0

Each recipe of configs/recipes runs as it is, with a tiny model and tiny data made here, workers 0 and 2, one process
and two (DDP). A run is killed by SIGKILL at a random moment of its training, resumed from the newest checkpoint, killed
again, and at last left to end. Compared with a run that was never killed: the rows of every optimizer step, weights,
optimizer, schedule, tokens, and all that was logged but times. Exits with 1 on any difference.

Each run is a fork of one process that has imported everything, so that a kill costs a second or two.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch import Callback

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
NAMES = ("pretrain", "sft", "dpo", "grpo")
TIMES = ("time/", "per_second")


class Notes(Callback):
    """Notes the rows of each batch as they come, and what the run ends with."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Appends one line: optimizer step, epoch, batch of the epoch and rows."""
        rows = batch.get("prompts", batch.get("input_ids", batch.get("chosen_input_ids")))
        line = {"at": [trainer.global_step, trainer.current_epoch, batch_idx], "rows": rows.tolist()}
        with open(self.folder / f"rows_{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keeps all that must be equal."""
        if trainer.is_global_zero:
            end = {
                "weights": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "tokens": float(module.window.num_tokens),
                "step": trainer.global_step,
            }
            torch.save(end, self.folder / "end.pt")


def letters(completions: list[str]) -> list[float]:
    """A reward that an untrained model gets some of."""
    return [sum(character in "aeiou" for character in text) / (1 + len(text)) for text in completions]


def write_workplace(folder: Path) -> None:
    """Writes a policy of one layer with a byte-level tokenizer, and rows for every recipe."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"num_key_value_heads": 1, "attention_dropout": 0.1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **sizes, **options)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    sums = [(a, b) for a in range(7) for b in range(5)]
    rows = {
        "pretrain": [{"text": f"{a} and {b} are {a + b}."} for a, b in sums],
        "sft": [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums],
        "dpo": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in sums],
        "grpo": [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def settings(name: str, rng: random.Random) -> tuple[list[str], int]:
    """A recipe's options beside its file, and the optimizer steps between two checkpoints, some drawn at random."""
    options = {"trainer.max_epochs": 2, "trainer.log_every_n_steps": rng.choice([1, 3, 4]), "data.batch_size": 2}
    every = rng.choice([1, 2, 3])
    if rng.random() < 0.5:
        options |= {"data.validation": f"{name}.jsonl", "trainer.val_check_interval": rng.choice([2, 5])}
        options |= {"trainer.limit_val_batches": 3}
    if rng.random() < 0.3:
        options |= {"model.policy.lora": json.dumps({"r": 2})}
    if name == "grpo":
        iterations, minibatches = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
        options |= {"model.num_generations": 4, "model.max_completion_length": 6, "model.micro_batch_size": 3}
        options |= {
            "model.num_iterations": iterations,
            "model.minibatches": minibatches,
            "model.rewards": "resume.letters",
        }
    else:
        options |= {"trainer.accumulate_grad_batches": rng.choice([1, 2, 3]), "data.max_length": 16}
    return list(itertools.chain(*((f"--{key}", str(value)) for key, value in options.items()))), every


def align(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """Runs the command in this process, which is a fork and the head of its group."""
    os.setpgid(0, int(environment.pop("GROUP", "0")))
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["align", *arguments]
    from alignment_modules.cli import main

    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(70)


class Run:
    """One run of a recipe in a folder of its own, in one process or two."""

    def __init__(self, folder: Path, arguments: list[str], every: int, processes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        checkpoint = {
            "dirpath": str(folder / "kept"),
            "filename": "{step}",
            "every_n_train_steps": every,
            "save_top_k": -1,
        }
        callbacks = [
            {"class_path": "ModelCheckpoint", "init_args": checkpoint},
            {"class_path": "resume.Notes", "init_args": {"folder": str(folder)}},
        ]
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "csv"}}
        arguments = ["fit", *arguments, "--trainer.callbacks", json.dumps(callbacks)]
        arguments += ["--trainer.logger", json.dumps(logger), "--trainer.default_root_dir", str(folder / "root")]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
        environment: dict[str, str] = {}
        if processes > 1:
            arguments += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
        context = multiprocessing.get_context("fork")
        self.processes: list[Any] = []
        for rank in range(processes):
            own = environment | ({"LOCAL_RANK": str(rank)} if processes > 1 else {})
            own |= {"GROUP": str(self.processes[0].pid)} if rank else {}
            process = context.Process(target=align, args=(folder / f"log_{rank}.txt", arguments, own))
            process.start()
            self.processes.append(process)
            with contextlib.suppress(ProcessLookupError):  # here, too: the others may be faster than the head
                os.setpgid(process.pid, self.processes[0].pid)

    def wait(self, seconds: float = 240.0) -> list[int | None]:
        """Waits for the end; whoever is not done by then is killed."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all processes, loader workers included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def trains(self, after_a_checkpoint: bool = False) -> bool:
        """Waits for the first batch, or the first checkpoint; False if the run ended before."""
        while not (list(self.folder.glob("kept/*.ckpt")) if after_a_checkpoint else self._rows().exists()):
            if not all(process.is_alive() for process in self.processes):
                return False
            time.sleep(0.002)
        return True

    def _rows(self) -> Path:
        return self.folder / "rows_0.jsonl"

    def log(self) -> str:
        """The end of what the first process said."""
        return (self.folder / "log_0.txt").read_text()[-3000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def newest(folders: list[Path]) -> Path | None:
    """The last checkpoint of the latest run that has one; it may fall into the middle of an optimizer step."""
    for folder in reversed(folders):
        found = list((folder / "kept").glob("step=*.ckpt"))
        if found:
            return max(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns))
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps taken, from the file's name."""
    return int(checkpoint.stem.partition("=")[2].partition("-")[0])


def rows_trained(folders: list[Path], processes: int) -> dict[str, Any]:
    """Which rows each batch of each rank held; of a batch that was read again, the last reading."""
    found: dict[str, Any] = {}
    for folder, rank in itertools.product(folders, range(processes)):
        path = folder / f"rows_{rank}.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            found[f"{line['at']} of rank {rank}"] = line["rows"]
    return found


def logged(folders: list[Path]) -> dict[str, float]:
    """All numbers on disk by step and name, but for times; of a step that was logged again, the last."""
    found: dict[str, float] = {}
    for folder in folders:
        path = folder / "csv" / "metrics.csv"
        if path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    for name, value in row.items():
                        if value and name != "step" and not any(part in name for part in TIMES):
                            found[f"{name} at step {row['step']}"] = float(value)
    return found


def differences(left: Any, right: Any, name: str = "") -> list[str]:
    """Where two nested values differ in any bit."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and torch.equal(left, right)
        return [] if same else [name]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [d for key in keys for d in differences(left.get(key), right.get(key), f"{name}/{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [
            d
            for number, pair in enumerate(zip(left, right, strict=True))
            for d in differences(*pair, f"{name}/{number}")
        ]
    return [] if left == right else [f"{name}: {str(left)[:60]} != {str(right)[:60]}"]


def compare(whole: list[Path], broken: list[Path], processes: int) -> list[str]:
    """What differs between the uninterrupted run and the killed one."""
    found = differences(*(torch.load(legs[-1] / "end.pt", weights_only=True) for legs in (whole, broken)), "end")
    found += differences(*(rows_trained(legs, processes) for legs in (whole, broken)), "rows")
    first, second = logged(whole), logged(broken)
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key, math.nan), second.get(key, math.nan)
        if a != b:
            found.append(f"logged {key}: {a} != {b}")
    return found


def chain(folder: Path, name: str, workers: int, processes: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """One recipe, run whole, and killed and resumed until it has been killed often enough; then left to end."""
    options, every = settings(name, rng)
    fixed = [
        "--config",
        str(RECIPES / f"{name}.yaml"),
        "--model.policy.path",
        "policy",
        "--data.train",
        f"{name}.jsonl",
    ]
    arguments = [*fixed, *options, "--data.num_workers", str(workers)]
    started = time.monotonic()
    whole = Run(folder / "whole", arguments, every, processes)
    whole.trains()
    begun = time.monotonic()
    if set(whole.wait()) != {0}:
        return {"killed": 0, "found": [f"the uninterrupted run failed: {whole.log()}"]}
    length, legs, killed, steps = time.monotonic() - begun, [], 0, []
    for number in itertools.count():
        last = newest(legs)
        resume = [] if last is None else ["--ckpt_path", str(last)]
        run = Run(folder / f"leg_{number}", arguments + resume, every, processes)
        legs.append(run.folder)
        if killed < kills and run.trains(after_a_checkpoint=rng.random() < 0.8):
            time.sleep(rng.uniform(0, length / (kills + 1)))
            if run.processes[0].is_alive():
                run.kill()
                killed += 1
                steps.append(0 if (last := newest(legs)) is None else step_of(last))
                continue
        if set(run.wait()) != {0}:
            return {"killed": killed, "found": [f"the resumed run failed: {run.log()}"]}
        if (run.folder / "end.pt").exists():
            break
        return {"killed": killed, "found": [f"no training was left to do: {run.log()}"]}
    found = compare([whole.folder], legs, processes)
    return {"killed": killed, "found": found, "steps": steps, "options": options, "seconds": time.monotonic() - started}


def main() -> int:
    """Runs all chains; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="at least so many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where to leave all runs; default: a temporary one")
    given = parser.parse_args()
    from alignment_modules.policies.load import build_policy, load_tokenizer

    rng, kept = random.Random(given.seed), given.folder or Path(tempfile.mkdtemp())
    kept.mkdir(parents=True, exist_ok=True)
    write_workplace(kept)
    os.chdir(kept)
    build_policy("policy")  # imports what a run imports
    load_tokenizer("policy")
    import alignment_modules.cli  # noqa: F401

    torch.set_num_threads(1)
    cases = list(itertools.product(given.recipes, given.workers, given.processes))
    total, failed = 0, 0
    for number, (name, workers, processes) in enumerate(cases):
        kills = max(1, -(-(given.kills - total) // (len(cases) - number)))
        result = chain(kept / f"{name}_{workers}_{processes}", name, workers, processes, kills, rng)
        total, failed = total + result["killed"], failed + bool(result["found"])
        outcome = "equal" if not result["found"] else f"{len(result['found'])} DIFFERENCES"
        at = f"resumed at steps {result.get('steps')}, {result.get('seconds', 0):.0f} s"
        print(
            f"{name:9} workers {workers}  processes {processes}  kills {result['killed']:2}  {outcome}  ({at})",
            flush=True,
        )
        for difference in result["found"][:10]:
            print(f"    {difference}", flush=True)
    print(f"{total} kills, {len(cases)} settings, {failed} not equal (seed {given.seed}; {kept})")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
