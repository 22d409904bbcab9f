"""Peak memory of each process of a run: every process with all weights (`ddp`) against shards (`fsdp2`).

    python benchmarks/sharded_memory.py
    python benchmarks/sharded_memory.py --method dpo --devices 4

Trains a model of random weights in float32 with AdamW for a few steps of few tokens, so that weights, gradients and
optimizer states are what counts; saves a checkpoint and an export, and resumes. Prints, of the first process and of the
largest other one, the most anonymous memory of each phase beyond what the imports take, in MB (1e6 bytes). Linux only.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload

WAYS = {"ddp": "ddp", "fsdp2, each builds": "fsdp2", "fsdp2": "fsdp2", "fsdp2, one file": "fsdp2"}
PHASES = ("build", "train", "save", "export", "resume")


def anonymous() -> float:
    """This process's anonymous memory now, MB: its own, without files that are mapped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / 1e6


class Peaks:
    """The most anonymous memory of each phase, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.before, self.found, self._phase = anonymous(), dict[str, float](), ""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            if self._phase:
                self._look()
            time.sleep(0.01)

    def _look(self) -> None:
        self.found[self._phase] = max(self.found.get(self._phase, 0.0), anonymous() - self.before)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts as this phase."""
        former, self._phase = self._phase, name
        yield
        self._look()
        self._phase = former


def run(way: str, given: argparse.Namespace, folder: Path) -> None:
    """One process of one way."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from alignment_modules import DPOModule, SFTModule
    from alignment_modules.policies.weights import on_first_process
    from alignment_modules.training.checkpoint_io import AtomicCheckpointIO
    from alignment_modules.training.strategies import FSDP2Strategy

    torch.set_num_threads(1)
    ids = torch.randint(0, 1000, (given.steps * given.devices, given.tokens))
    names = ("input_ids",) if given.method == "sft" else ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    rows = []
    for row in ids[:, None]:
        batch = {name: row + number for number, name in enumerate(names)}
        more = {"labels": row} if given.method == "sft" else {}
        rows.append(batch | more | {n.replace("input_ids", "attention_mask"): torch.ones_like(row) for n in names})

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == given.steps:
                trainer.strategy.barrier()
                with peaks.phase("save"):
                    trainer.save_checkpoint(folder / "last.ckpt")

        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step > given.steps:
                return
            with peaks.phase("export"):
                if trainer.is_global_zero or way != "ddp":
                    module.export(folder / "export")  # type: ignore[operator]
            trainer.strategy.barrier()

    peaks = Peaks()

    def fit(steps: int, phase: str, ckpt_path: Path | None = None) -> None:
        strategy: Any = "ddp" if way == "ddp" else FSDP2Strategy("one file" not in way)
        module_class = SFTModule if given.method == "sft" else DPOModule
        where = nullcontext() if way in ("ddp", "fsdp2, each builds") else on_first_process()
        with peaks.phase("build" if ckpt_path is None else phase), where:
            module = module_class(policy=str(folder / "model"), optimizer=torch.optim.AdamW)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=given.devices,
            strategy=strategy,
            max_steps=steps,
            max_epochs=-1,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Saving()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with peaks.phase(phase):
            trainer.fit(module, DataLoader(rows, batch_size=None), ckpt_path=ckpt_path)

    fit(given.steps, "train")
    gc.collect()
    fit(given.steps + 1, "resume", folder / "last.ckpt")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    (folder / f"{rank}.json").write_text(json.dumps(peaks.found))


def write_model(folder: Path, size: str) -> float:
    """Writes the model; returns the megabytes of its weights."""
    import transformers

    config = transformers.AutoConfig.for_model("llama", **workload.SIZES[size].model)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6


def main() -> None:
    """Measures all ways and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("sft", "dpo"), default="sft", help="default: %(default)s")
    parser.add_argument("--size", choices=workload.SIZES, default="135m", help="of the model, default: %(default)s")
    parser.add_argument("--devices", type=int, default=2, help="processes, default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="of a row, default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help="run one, in this process")
    parser.add_argument("--folder", type=Path, help="of that one")
    given = parser.parse_args()
    if given.way:
        run(given.way, given, given.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        weights = write_model(Path(temporary) / "model", given.size)
        print(f"weights {weights:,.0f} MB, {given.method}, {given.devices} processes\n")
        print(f"| | process | {' | '.join(PHASES)} |\n|---|---|{'---|' * len(PHASES)}")
        for way in WAYS:
            folder = Path(temporary) / way.replace(", ", "_").replace(" ", "_")
            folder.mkdir()
            (folder / "model").symlink_to(Path(temporary) / "model")
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(given.devices)]
            others = {phase: max(one[phase] for one in found[1:]) for phase in PHASES}
            for name, peaks in (("first", found[0]), ("others", others)):
                print(f"| {way} | {name} | {' | '.join(f'{peaks[phase]:,.0f}' for phase in PHASES)} |", flush=True)


if __name__ == "__main__":
    main()
