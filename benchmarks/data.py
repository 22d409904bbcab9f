"""What a start costs with tables in memory and on disk: processor time, wall time and peak memory; beside it TRL's.

    python benchmarks/data.py --rows 20000 --trl-python .venv-trl/bin/python
    python benchmarks/data.py --rows 1000000 --without memory

Every start is a process of its own: `prepare_data`, `setup` and the first hundred batches of an `SFTDataModule`; for
TRL `load_dataset` and the trainer's constructor with a model of two tiny layers, its cache kept between its two starts.
Counted is the processor time of the process, its threads and its children that ended, from behind the imports on. The
peak is the process's greatest resident memory less what it held behind the imports; what is mapped from files is
counted in it where it was touched, though all processes of a machine share that. "two ranks" are two second starts at
the same time, added up. Without `--trl-python` ours alone is measured.

The file is instructions of made-up words with replies, about 545 bytes a row, the tokenizer a byte-level BPE trained on
such words (those of `tokenising.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenising

STARTS = ("memory", "first", "second", "two ranks", "trl first", "trl second")
MARK = "RESULT "
DISTINCT = 20_000  # rows whose text is drawn; more repeat them with other numbers


def prepare(folder: Path, rows: int) -> Path:
    """Writes the file, unless it is there."""
    path = folder / f"instructions-{rows}.jsonl"
    if path.exists():
        return path
    text = tokenising.Text(0)
    drawn = [(text.write(text.length(26)), text.write(text.length(52))) for _ in range(min(rows, DISTINCT))]
    with path.with_suffix(".part").open("w", encoding="utf-8") as file:
        for number in range(rows):
            ask, reply = drawn[number % len(drawn)]
            file.write(json.dumps({"prompt": f"{number}: {ask}", "completion": f" {reply}"}) + "\n")
    return path.with_suffix(".part").rename(path)


def memory(name: str) -> float:
    """A line of this process's status, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def ours(path: Path, folder: Path, start: str, processes: int | None) -> int:
    """Starts with a data module; its rows."""
    from itertools import islice

    from datamodules import CacheOptions, SFTDataModule

    cache = None if start == "memory" else CacheOptions(folder=str(folder / "cache"), num_proc=processes, least_rows=1)
    tokenizer = tokenising.load_tokenizer(folder / "tokenizer", "sft")
    data = SFTDataModule(train=str(path), tokenizer=tokenizer, cache=cache)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    for _ in islice(loader, 100):
        pass
    return len(loader.dataset)


def trl(path: Path, folder: Path) -> int:
    """Starts with a trainer of TRL's; its rows."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "trl"))
    arguments = SFTConfig(output_dir=str(folder / "trl" / "out"), report_to="none", use_cpu=True, bf16=False)
    tokenizer = tokenising.load_tokenizer(folder / "tokenizer", "sft")
    model = str(folder / "model")
    return len(SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One start in this process."""
    path, folder = prepare(options.folder, options.rows), options.folder
    if options.start.startswith("trl"):
        import datasets
        import trl as library

        print(datasets.__version__, library.SFTTrainer.__name__)
    else:
        import datamodules

        print(datamodules.SFTDataModule.__name__)
    before, wall, held = tokenising.processor_time(), time.perf_counter(), memory("VmRSS")
    if options.start.startswith("trl"):
        rows = trl(path, folder)
    else:
        rows = ours(path, folder, options.start, options.processes)
    return {
        "rows": rows,
        "cpu": tokenising.processor_time() - before,
        "wall": time.perf_counter() - wall,
        "peak": memory("VmHWM") - held,
        "private": memory("RssAnon"),
    }


def run(options: argparse.Namespace, start: str) -> dict[str, Any]:
    """Starts in processes of their own; of two at once the sum, and the longer."""
    python = options.trl_python if start.startswith("trl") else sys.executable
    command = [python, __file__, "--start", "second" if start == "two ranks" else start, "--rows", str(options.rows)]
    command += ["--folder", str(options.folder)]
    command += [] if options.processes is None else ["--processes", str(options.processes)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2 if start == "two ranks" else 1)
    ]
    found = []
    for process in started:
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"{start}: ended with {process.returncode}")
        line = next(line for line in output.splitlines() if line.startswith(MARK))
        found.append(json.loads(line.removeprefix(MARK)))
    total = {name: sum(one[name] for one in found) for name in ("cpu", "peak", "private")}
    return total | {"rows": found[0]["rows"], "wall": max(one["wall"] for one in found)}


def main() -> None:
    """Measures every start, or in a process of its own one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the file")
    parser.add_argument("--folder", type=Path, default=Path("runs/data"), help="where files and caches lie")
    parser.add_argument("--processes", type=int, help="processes that tokenise; default: one a processor")
    parser.add_argument("--words", type=int, default=300_000, help="words that the tokenizer is trained on")
    parser.add_argument("--trl-python", help="an interpreter that has TRL; default: ours alone")
    parser.add_argument("--without", nargs="*", choices=STARTS, default=[], help="starts to leave out")
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(MARK + json.dumps(measure(options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenising.write_tokenizer(options.folder / "tokenizer", options.words)
    tokenising.write_model(options.folder / "model")
    path = prepare(options.folder, options.rows)
    for name in ("cache", "trl"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    print(f"{options.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
    print(f"{'start':<12} {'CPU s':>9} {'wall s':>9} {'CPU ms/row':>11} {'peak MB':>9} {'private MB':>11}")
    for start in STARTS:
        if start in options.without or (start.startswith("trl") and not options.trl_python):
            continue
        found = run(options, start)
        numbers = f"{found['cpu']:9.2f} {found['wall']:9.2f} {1e3 * found['cpu'] / options.rows:11.3f}"
        print(f"{start:<12} {numbers} {found['peak']:9.0f} {found['private']:11.0f}", flush=True)


if __name__ == "__main__":
    main()
