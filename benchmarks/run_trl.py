"""One measured TRL training run: `run_trl.py METHOD --variant V`. Prints one line of JSON.

ORPO's trainer and online DPO's are experimental ones of TRL, the others are stable.

Variants, beside `default` (TRL's own settings: gradient checkpointing on):

- `no_checkpointing`: gradient checkpointing off;
- `padding_free`, `packing` (SFT): and TRL's own ways not to compute padding; packing changes the batches, so its losses
  cannot be compared;
- `precomputed` (DPO): no checkpointing, reference log-probabilities computed before the first step.

What is set away from TRL's defaults: bf16 off and the CPU, constant learning rate, rows in file order, no saving.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import measure
import torch
import workload

PACKED_ROWS = {"7m": 2, "135m": 1}  # of 1024 tokens per step: about as many tokens as 8 and 4 rows unpacked


def config_values(options: Any) -> dict[str, Any]:
    """Keywords of the trainer's config that are the same for all methods."""
    from workload import ADAM, LEARNING_RATE, MAX_GRAD_NORM, SEED, SIZES

    values = {
        "output_dir": f"{options.folder}/trl",
        "max_steps": options.warmup + options.steps,
        "per_device_train_batch_size": SIZES[options.size].batch[options.method],
        "learning_rate": LEARNING_RATE[options.method],
        "lr_scheduler_type": "constant",
        "adam_beta1": ADAM["betas"][0],
        "adam_beta2": ADAM["betas"][1],
        "adam_epsilon": ADAM["eps"],
        "weight_decay": ADAM["weight_decay"],
        "max_grad_norm": MAX_GRAD_NORM,
        "bf16": False,
        "use_cpu": True,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
    }
    if options.check:
        values["logging_steps"] = 1
    if options.variant != "default":
        values["gradient_checkpointing"] = False
    return values


def measured(base: type) -> type:
    """The trainer class, with each step's unrounded loss and token count kept, and the clock stopped after it."""

    class Measured(base):  # type: ignore[misc]
        """Keeps what `measure.report` wants."""

        def prepare_measurement(self, options: Any, clock: measure.StepClock, profile: measure.Profile) -> None:
            """Hand over the clock."""
            from transformers import TrainerCallback

            self.losses: list[torch.Tensor] = []
            self.tokens: list[int] = []
            self.completion_tokens: list[int] = []

            class Callback(TrainerCallback):
                """Ticks at the end of every optimizer step."""

                def on_train_begin(self, *_: Any, **__: Any) -> None:
                    clock.start()

                def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                    clock.tick()
                    if state.global_step == options.warmup:
                        profile.start()

            self.add_callback(Callback())

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """The trainer's own loss; what it was given is counted."""
            if "completion_mask" in inputs and "prompt_mask" in inputs:
                completions = int(inputs["completion_mask"].sum())
                self.completion_tokens.append(completions)
                self.tokens.append(completions + int(inputs["prompt_mask"].sum()))
            elif "attention_mask" in inputs:
                self.tokens.append(int(inputs["attention_mask"].sum()))
            elif "chosen_attention_mask" in inputs:
                self.tokens.append(sum(int(inputs[f"{side}_attention_mask"].sum()) for side in ("chosen", "rejected")))
            else:
                self.tokens.append(inputs["input_ids"].numel())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    return Measured


def build(options: Any, folder: Any) -> Any:
    """The trainer of a method and variant, as TRL's documentation builds it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    values = config_values(options)
    steps = values["max_steps"]
    rows = workload.load_rows(folder, options.method, workload.STEPS if options.variant == "packing" else steps)
    data = Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    common = {"model": str(folder / "model"), "train_dataset": data, "processing_class": tokenizer}
    if options.lora:
        common["peft_config"] = adapters(options.method)
    if options.method in workload.GROUPS:
        return build_sampling(options, values, common)
    values["train_sampling_strategy"] = "sequential"
    if options.variant == "padding_free":
        values |= {"padding_free": True, "max_length": None}
    if options.variant == "packing":
        values |= {"packing": True, "max_length": 1024, "per_device_train_batch_size": PACKED_ROWS[options.size]}
    if options.variant == "precomputed":
        values["precompute_ref_log_probs"] = True
    if options.method in ("dpo", "kto", "orpo"):
        values["beta"] = workload.BETA
    trainer, config = trainer_classes(options.method)
    return measured(trainer)(args=config(**values), **common)


def build_sampling(options: Any, values: dict[str, Any], common: dict[str, Any]) -> Any:
    """The trainer of a method that samples; in a check it is given the workload's completions instead."""
    import trl

    common["reward_funcs"] = workload.even_words
    if options.method == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        values |= {"max_new_tokens": workload.MAX_COMPLETION, "max_length": workload.MAX_LENGTH, "temperature": 1.0}
        values |= {"beta": workload.BETA, "train_sampling_strategy": "sequential"}
        trainer = measured_online(OnlineDPOTrainer, options)
        return trainer(args=OnlineDPOConfig(**values), **common)
    group = workload.GROUPS[options.method]
    values["per_device_train_batch_size"] *= group
    values |= {"num_generations": group, "max_completion_length": workload.MAX_COMPLETION, "beta": options.beta}
    values["shuffle_dataset"] = False
    if options.method == "rloo":
        trainer = measured(trl.RLOOTrainer)
        if options.check:
            trainer._generate_single_turn = given_completions(options)
        return trainer(args=trl.RLOOConfig(**values), **common)
    if options.check:
        common["rollout_func"] = partial(fixed_rollout, size=options.size)
    return measured(trl.GRPOTrainer)(args=trl.GRPOConfig(**values), **common)


def given_completions(options: Any) -> Any:
    """RLOO's sampling, replaced by the workload's completions of the step."""

    def generate(self: Any, *_: Any) -> list[list[int]]:
        return workload.fixed_completions(self.state.global_step, options.size, options.method)

    return generate


def measured_online(base: type, options: Any) -> type:
    """`measured` for the trainer of online DPO, which takes its step without `compute_loss`."""

    class Online(measured(base)):  # type: ignore[misc]
        """Keeps the losses that the step returns, and counts what the policy is scored on."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            """The trainer's own step."""
            self.counted = False
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        def _generate(self, model: Any, prompts: list[str], images: Any = None) -> Any:
            """The trainer's own samples, or those of the workload: the first of each prompt, then the second."""
            if not options.check:
                return super()._generate(model, prompts, images)
            side = {"padding_side": "left", "padding": True, "return_tensors": "pt"}
            encoded = self.processing_class(text=prompts, **side)
            rows = workload.fixed_completions(self.state.global_step, options.size, options.method)
            ids = [torch.tensor(row) for row in rows[0::2] + rows[1::2]]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=workload.PAD)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            prompt = (encoded["input_ids"].repeat(2, 1), encoded["attention_mask"].repeat(2, 1))
            return *prompt, padded, mask, None

        def _forward(self, model: Any, ids: Any, mask: Any, completions: Any, written: Any, *more: Any) -> Any:
            """The trainer's own forward pass, the first of each step counted."""
            if not self.counted:
                self.counted = True
                self.completion_tokens.append(int(written.sum()))
                self.tokens.append(int(written.sum()) + int(mask.sum()))
            return super()._forward(model, ids, mask, completions, written, *more)

    return Online


def trainer_classes(method: str) -> tuple[type, type]:
    """TRL's trainer of a method, and the trainer's configuration."""
    import trl

    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}
    return getattr(trl, f"{names[method]}Trainer"), getattr(trl, f"{names[method]}Config")


def adapters(method: str) -> Any:
    """The workload's LoRA as peft takes it; a reward model's head is trained whole beside it."""
    from peft import LoraConfig

    scalar = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return LoraConfig(
        r=workload.LORA["r"],
        lora_alpha=workload.LORA["alpha"],
        target_modules="all-linear",
        **(scalar if method == "reward" else {"task_type": "CAUSAL_LM"}),
    )


def fixed_rollout(prompts: list[str], trainer: Any, size: str) -> dict[str, Any]:
    """The workload's completions of this step, in place of sampled ones."""
    ids = trainer.processing_class(text=prompts)["input_ids"]
    completions = workload.fixed_completions(trainer.state.global_step, size)
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def main() -> None:
    """Run, measure, print."""
    options = measure.arguments(__doc__ or "", "trl").parse_args()
    measure.check_variant("trl", options)
    torch.set_num_threads(options.threads)
    folder = measure.rows_folder(options)
    import trl  # noqa: F401  (the baseline of memory is that of the imports)

    baseline = measure.peak_rss()
    clock, profile = measure.StepClock(options.warmup, measure.CLOCKS[options.clock]), measure.Profile(options.profile)
    began = time.perf_counter()
    trainer = build(options, folder)
    workload.draw_fresh(trainer.model)
    setup = time.perf_counter() - began
    trainer.prepare_measurement(options, clock, profile)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    measure.report(
        options,
        library="trl",
        clock=clock,
        tokens=trainer.tokens,
        losses=[loss.item() for loss in trainer.losses],
        baseline_mb=baseline,
        profile=profile.stop(),
        grad_norms=logged if options.check else [],
        completion_tokens=trainer.completion_tokens,
        setup_seconds=setup,
    )


if __name__ == "__main__":
    main()
