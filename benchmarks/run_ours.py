"""One measured training run with this library: `run_ours.py METHOD --variant V`. Prints one line of JSON.

Goes through `lightning.Trainer`, the modules and the datamodules, as a user's script would; logger, progress bar and
logging interval are as a user finds them. `--bare` runs the same objective in a plain loop without the Trainer: the
difference is what the Trainer costs.

Variants, beside `default`:

- `checkpointing`: gradient checkpointing on, as it is in TRL's defaults;
- `cached` (DPO): the reference's log-probabilities are in the cache before the first measured step, as after a first
  epoch; what filling it costs is in `setup_seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import measure
import torch
import workload
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.utils.rnn import pad_sequence


def make_optimizer(method: str) -> Any:
    """AdamW as the workload says."""
    return lambda groups: torch.optim.AdamW(groups, lr=workload.LEARNING_RATE[method], **workload.ADAM)


def build_module(options: argparse.Namespace, folder: Path, *, bare: bool = False, **of_policy: Any) -> Any:
    """The module of a method, with hooks that keep every step's unrounded loss; `of_policy` goes to its policy."""
    import alignment_modules
    from alignment_modules.policies import LoraConfig, PolicyConfig

    method = options.method
    base = alignment_modules.get_module_class("grpo" if method == "rloo" else method)
    held = {"gradient_checkpointing": options.variant == "checkpointing"} | of_policy
    lora = LoraConfig(**workload.LORA) if options.lora else None
    policy = PolicyConfig(path=str(folder / "model"), lora=lora, head=base.head, **held)
    common = {"policy": policy, "optimizer": make_optimizer(method), "tokenizer": str(folder / "model")}
    if method in ("dpo", "kto", "orpo", "online_dpo"):
        common["beta"] = workload.BETA
    if method in ("kto", "orpo", *workload.GROUPS):  # these clip by themselves
        common["max_grad_norm"] = workload.MAX_GRAD_NORM
    if method == "dpo":
        common["cache_reference"] = options.variant == "cached"
    if method == "orpo":  # TRL's likelihood is the mean over the tokens of prompt and chosen completion
        common |= {"nll_on_prompt": True, "nll_unit": "tokens"}
    if method in workload.GROUPS:
        common |= {"num_generations": workload.GROUPS[method], "max_completion_length": workload.MAX_COMPLETION}
        common |= {"rewards": workload.even_words, "seed": workload.SEED}
    if method == "grpo":  # TRL's KL term is the k3 estimator times the ratio
        common |= {"beta": options.beta, "kl_estimator": "k3+score"}
    if method == "rloo":
        common |= {"scale_rewards": "leave_one_out", "reduction": "sequence_mean_token_sum", "beta": options.beta}
        common |= {"kl_estimator": "k1", "kl_placement": "reward"} if options.beta else {}

    class Measured(base):  # type: ignore[misc,valid-type]
        """Keeps losses and gradient norms through the hooks that the library offers."""

        def __init__(self) -> None:
            super().__init__(**common)
            workload.draw_fresh(self.policy)
            self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.published: list[dict[str, float]] = []

        def extra_metrics(self, batch: Any, objective: Any) -> dict[str, Any]:
            terms = objective.terms.values()
            loss = sum(term.scaled.detach() / term.weight for term in terms)
            self.steps.append((loss, next(iter(terms)).weight))
            return super().extra_metrics(batch, objective)

        def publish(self, values: Any, stage: Any, step: int | None = None) -> None:
            self.published.append(dict(values))
            super().publish(values, stage, step)

    class Bare(Measured):
        """The same without a Trainer."""

        logging_due = False

        def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
            return values

    return (Bare if bare else Measured)()


def build_data(options: argparse.Namespace, folder: Path) -> Any:
    """The datamodule of a method, reading the workload's file in its order."""
    import datamodules

    classes = {"sft": "SFTDataModule", "kto": "UnpairedDataModule"}
    classes |= dict.fromkeys(workload.GROUPS, "PromptDataModule")
    return getattr(datamodules, classes.get(options.method, "PreferenceDataModule"))(
        train=str(workload.rows_file(folder, options.method)),
        tokenizer=str(folder / "model"),
        batch_size=workload.SIZES[options.size].batch[options.method],
        max_length=workload.MAX_LENGTH,
        shuffle=False,
    )


def fixed_batches(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Batches of prompts that bring the workload's completions and rewards, for a check."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    steps, method = options.warmup + options.steps, options.method
    size, rows = workload.SIZES[options.size].batch[method], workload.load_rows(folder, method, steps)
    for step in range(steps):
        prompts = [row["prompt"] for row in rows[step * size : (step + 1) * size]]
        encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        completions = [torch.tensor(ids) for ids in workload.fixed_completions(step, options.size, method)]
        yield {
            "prompts": encoded["input_ids"],
            "prompt_attention_mask": encoded["attention_mask"],
            "responses": pad_sequence(completions, batch_first=True, padding_value=workload.PAD),
            "response_mask": pad_sequence([torch.ones_like(ids) for ids in completions], batch_first=True),
            "rewards": torch.tensor(workload.fixed_rewards(step, options.size, method)),
        }


def batch_tokens(batch: dict[str, Any], method: str) -> int:
    """Real tokens of a batch by the workload's rule; of batches of prompts the prompts' part."""
    if "prompts" in batch:
        return workload.GROUPS[method] * int(batch["prompt_attention_mask"].sum())
    if "chosen_input_ids" in batch:
        counts = {name: int(batch[f"{name}_attention_mask"].sum()) for name in ("prompt", "chosen", "rejected")}
        return 2 * counts["prompt"] + counts["chosen"] + counts["rejected"]
    names = ("prompt_attention_mask", "completion_attention_mask") if "label" in batch else ("attention_mask",)
    return sum(int(batch[name].sum()) for name in names)


class Watch(L.Callback):
    """Ticks the clock and counts tokens; fills DPO's cache before the first step where it is asked to."""

    def __init__(self, options: argparse.Namespace, clock: measure.StepClock, profile: measure.Profile) -> None:
        self.options, self.clock, self.profile = options, clock, profile
        self.tokens: list[int] = []
        self.completion_tokens: list[int] = []
        self.fill_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, after the cache was filled."""
        if self.options.variant == "cached":
            began = time.perf_counter()
            fill_cache(pl_module, trainer.datamodule.train_dataloader(), self.options.warmup + self.options.steps)  # type: ignore[attr-defined]
            self.fill_seconds = time.perf_counter() - began
        self.clock.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts what goes into the step."""
        self.tokens.append(batch_tokens(batch, self.options.method))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """The step is over."""
        self.clock.tick()
        self.count(pl_module)
        if trainer.global_step == self.options.warmup:
            self.profile.start()

    def count(self, module: Any) -> None:
        """Adds what was sampled in the step."""
        if getattr(module, "rollout", None) is not None:
            self.completion_tokens.append(int(module.rollout.mask.sum()))


@torch.no_grad()
def fill_cache(module: Any, loader: Any, batches: int) -> None:
    """Scores the reference on the first batches, as a first epoch would."""
    from alignment_modules.policies.segments import Segments

    for _, batch in zip(range(batches), loader, strict=False):
        module.reference_logps(batch, Segments.from_pairs(*(batch[key] for key in module.batch_keys)))


def fit(module: Any, data: Any, options: argparse.Namespace, watch: Watch, **changes: Any) -> None:
    """Trains through the Trainer; `changes` are further keywords for it."""
    keywords = {
        "accelerator": "cpu",
        "max_steps": options.warmup + options.steps,
        "logger": TensorBoardLogger(options.folder, name="ours"),
        "log_every_n_steps": 1 if options.check else 10,  # 10 is TRL's default; Lightning's is 50
        "enable_checkpointing": False,
        "callbacks": [watch],
        "gradient_clip_val": workload.MAX_GRAD_NORM if module.automatic_optimization else None,
    }
    trainer = L.Trainer(**(keywords | changes))
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)


def update(module: Any, optimizer: Any, parameters: list[Any], batch: Any, method: str) -> None:
    """One optimizer step on a batch, or on what was sampled: forward, backward, clip, step."""
    if method in workload.GROUPS:
        batch = (module.pair if method == "online_dpo" else module.annotate)(batch)
    objective = module.objective(batch)
    module.extra_metrics(batch, objective)
    sum(term.scaled / term.weight for term in objective.terms.values()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, workload.MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def loop(module: Any, data: Any, options: argparse.Namespace, watch: Watch) -> None:
    """Trains in a plain loop, without the Trainer."""
    if isinstance(data, L.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    module.train()
    optimizer = module.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    watch.clock.start()
    steps = options.warmup + options.steps
    for step, batch in zip(range(1, steps + 1), data, strict=False):
        watch.tokens.append(batch_tokens(batch, options.method))
        if options.method in workload.GROUPS:
            batch = module.roll_out(batch)
        update(module, optimizer, parameters, batch, options.method)
        watch.clock.tick()
        watch.count(module)
        if step == options.warmup:
            watch.profile.start()


def main() -> None:
    """Run, measure, print."""
    parser = measure.arguments(__doc__ or "", "ours")
    parser.add_argument("--bare", action="store_true", help="a plain loop in place of the Trainer")
    parser.add_argument("--policy", type=json.loads, default={}, metavar="JSON", help="more options of PolicyConfig")
    options = parser.parse_args()
    measure.check_variant("ours", options)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(options.threads)
    L.seed_everything(workload.SEED)
    folder = measure.rows_folder(options)
    import transformers  # noqa: F401  (the baseline of memory is that of the imports)

    import alignment_modules
    import datamodules

    del alignment_modules, datamodules
    baseline = measure.peak_rss()
    clock, profile = measure.StepClock(options.warmup, measure.CLOCKS[options.clock]), measure.Profile(options.profile)
    began = time.perf_counter()
    module = build_module(options, folder, bare=options.bare, **options.policy)
    fixed = options.check and options.method in workload.GROUPS
    if fixed:
        data: Any = torch.utils.data.DataLoader(list(fixed_batches(options, folder)), batch_size=None)  # type: ignore[arg-type]
    else:
        data = build_data(options, folder)
    setup = time.perf_counter() - began
    watch = Watch(options, clock, profile)
    (loop if options.bare else fit)(module, data, options, watch)
    tokens = watch.tokens
    if options.method in workload.GROUPS:
        tokens = [prompts + own for prompts, own in zip(tokens, watch.completion_tokens, strict=True)]
    measure.report(
        options,
        library="bare" if options.bare else "ours",
        clock=clock,
        tokens=tokens,
        losses=[loss.item() for loss, _ in module.steps],
        baseline_mb=baseline,
        profile=profile.stop(),
        grad_norms=[values["grad_norm"] for values in module.published if "grad_norm" in values],
        completion_tokens=watch.completion_tokens,
        setup_seconds=setup + watch.fill_seconds,
    )


if __name__ == "__main__":
    main()
