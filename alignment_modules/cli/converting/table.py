"""TRL's options and ours: the table that `align convert` follows and that `docs/coming_from.md` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment_modules.cli.converting import values
from alignment_modules.cli.converting.acting_table import SAMPLED
from alignment_modules.cli.converting.row import Row, Section, nothing, refusal
from alignment_modules.cli.converting.values import SKIP, one_of, same, unless, where

ROWS = ("sft", "dpo", "reward")
EVERY = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
CLASSES = {
    "sft": ("SFTModule", "SFTDataModule"),
    "dpo": ("DPOModule", "PreferenceDataModule"),
    "kto": ("KTOModule", "UnpairedDataModule"),
    "reward": ("RewardModule", "PreferenceDataModule"),
    "grpo": ("GRPOModule", "PromptDataModule"),
    "rloo": ("GRPOModule", "PromptDataModule"),
}
"""Our module and data module, by TRL's command."""
FIXED: Mapping[str, Mapping[str, Any]] = {
    "reward": {"model.policy.head": "scalar"},
    "grpo": {"data.overflow": "error", "data.drop_last": True},
    "rloo": {"data.overflow": "error", "data.drop_last": True, "model.preset": "rloo"},
}
"""What a command of TRL's does without an option."""


SCHEDULES = {
    "linear": "LinearSchedule",
    "cosine": "CosineSchedule",
    "cosine_with_min_lr": "CosineSchedule",
    "constant": "ConstantSchedule",
    "constant_with_warmup": "ConstantSchedule",
    "inverse_sqrt": "InverseSquareRootSchedule",
}
ADAMW = {name: "torch.optim.AdamW" for name in ("adamw_torch", "adamw_torch_fused")}
DIVERGENCES = {"reverse_kl": SKIP, "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
POLICY = "model.policy"
LORA = "model.policy.lora"

TABLE = (
    Section(
        "Model and adapters",
        EVERY,
        (
            Row("model_name_or_path", f"{POLICY}.path", unless(None)),
            Row("model_revision", f"{POLICY}.revision", unless("main")),
            Row("dtype", f"{POLICY}.dtype", same),
            Row("attn_implementation", f"{POLICY}.attn_implementation", unless(None)),
            Row("trust_remote_code", f"{POLICY}.trust_remote_code", unless(False)),
            Row(
                "gradient_checkpointing",
                f"{POLICY}.gradient_checkpointing",
                same,
                note="on by default in TRL, off here",
            ),
            Row("activation_offloading", f"{POLICY}.activation_offloading", unless(False)),
            Row("torch_compile", f"{POLICY}.compile", unless(False)),
            Row(
                "use_peft",
                "export.lora",
                unless(False, "adapter"),
                note="the export holds the adapter alone, as in TRL",
            ),
            Row("lora_r", f"{LORA}.r", where("use_peft")),
            Row("lora_alpha", f"{LORA}.alpha", where("use_peft")),
            Row("lora_dropout", f"{LORA}.dropout", where("use_peft"), "off in DPO, KTO and GRPO here, whatever it is"),
            Row(
                "lora_target_modules",
                f"{LORA}.target_modules",
                where("use_peft", unless(None)),
                "not given: PEFT chooses by the model's family (query and value of Llama and Qwen), here all linear "
                "layers but the head",
                unasked=lambda given: given["use_peft"],
            ),
            Row("lora_modules_to_save", f"{LORA}.modules_to_save", where("use_peft", unless(None))),
            Row("use_rslora", f"{LORA}.use_rslora", where("use_peft")),
            Row("use_dora", f"{LORA}.use_dora", where("use_peft")),
            Row("lora_task_type", "", nothing, note="follows from the module"),
            Row("load_in_4bit", f"{POLICY}.quantization", unless(False, "4bit"), "NF4, its constants quantized, too"),
            Row("load_in_8bit", f"{POLICY}.quantization", unless(False, "8bit")),
            Row("use_bnb_nested_quant", "", nothing, note="always so here"),
        ),
    ),
    Section(
        "Training",
        EVERY,
        (
            Row(
                "output_dir",
                "trainer.default_root_dir",
                unless(None),
                "the model lies in its `export/`, checkpoints in `checkpoints/`",
            ),
            Row("num_train_epochs", "trainer.max_epochs", values.epochs, note="3 by default in TRL"),
            Row("max_steps", "trainer.max_steps", unless(-1), note="optimizer steps in both"),
            Row(
                "learning_rate",
                "model.optimizer.lr",
                same,
                note="2e-5 (SFT), 1e-4 (reward), 1e-6 (others) in TRL; 1e-3 here",
            ),
            Row("optim", "model.optimizer", one_of(ADAMW, "any optimizer goes as class_path and init_args")),
            Row("weight_decay", "model.optimizer.weight_decay", same, note="0 by default in TRL, torch's 0.01 here"),
            Row("adam_beta1", "model.optimizer.betas", values.betas),
            Row("adam_beta2", "model.optimizer.betas", values.betas),
            Row("adam_epsilon", "model.optimizer.eps", same),
            Row(
                "lr_scheduler_type",
                "model.lr_scheduler",
                one_of(SCHEDULES),
                note="linear in TRL; here none is constant",
            ),
            Row(
                "lr_scheduler_kwargs", "model.lr_scheduler.floor", values.floor, note="the floor is a share of the rate"
            ),
            Row(
                "warmup_steps",
                "model.lr_scheduler.warmup_steps",
                values.steps,
                "the first step has the rate 0 in TRL and 1/warmup_steps of it here",
            ),
            Row("bf16", "trainer.precision", values.precision, note="bf16-mixed by default in TRL, 32-true here"),
            Row("fp16", "trainer.precision", values.precision),
            Row("logging_steps", "trainer.log_every_n_steps", values.steps),
            Row(
                "seed", "seed_everything", same, "the same seed draws other orders and samples", "42 by default in TRL"
            ),
            Row("data_seed", "data.seed", unless(None)),
            Row("eval_strategy", "trainer.val_check_interval trainer.check_val_every_n_epoch", values.evaluation),
            Row(
                "eval_steps", "trainer.val_check_interval", values.evaluation_interval, "optimizer steps; here batches"
            ),
            Row("per_device_eval_batch_size", "data.eval_batch_size", same, note="changes no result here"),
            Row(
                "save_strategy",
                "trainer.enable_checkpointing",
                one_of({"steps": SKIP, "epoch": SKIP, "no": False}),
                note="saved after each epoch here, too",
            ),
            Row("save_steps", "checkpoints.every_n_steps", values.saving, "also every 10 minutes"),
            Row("save_total_limit", "", nothing, "the newest is kept; a ModelCheckpoint keeps more"),
            Row("use_cpu", "trainer.accelerator", unless(False, "cpu")),
            Row("report_to", "", one_of(dict.fromkeys(("none", "tensorboard"), SKIP), "give trainer.logger")),
            refusal("resume_from_checkpoint", None, "TRL's checkpoints cannot be gone on from here"),
            refusal("load_best_model_at_end", False, "add a ModelCheckpoint with monitor and give export.which: best"),
            refusal("deepspeed", None, "stack --config fsdp2 instead"),
            refusal("fsdp", None, "stack --config fsdp2 instead"),
            refusal("average_tokens_across_devices", True, "tokens are counted over all ranks here"),
            Row("logging_first_step", "", nothing, note="the first step is always logged here"),
            Row("use_liger_kernel", "", nothing, "the loss is computed in pieces here without it"),
            Row("ddp_find_unused_parameters", "", nothing),
            Row("disable_tqdm", "", nothing),
            Row("run_name", "", nothing, "`trainer.logger` has names"),
        ),
    ),
    Section(
        "Data",
        EVERY,
        (
            Row("dataset_name", "data.train", values.source("train"), note="a path, or `owner/name@config:split`"),
            Row("dataset_config", "data.train", values.source("train")),
            Row("dataset_train_split", "data.train", values.source("train")),
            Row("dataset_test_split", "data.validation", values.source("test")),
            Row("datasets", "data.train", values.source("train"), note="one entry; several are a `MixtureDataModule`"),
            Row(
                "test_split_size", "data.validation", unless(None), note="a share of the training rows, by `data.seed`"
            ),
            Row("dataset_streaming", "data.stream", unless(False, {"buffer_size": 2048})),
            Row("streaming", "data.stream", unless(False, {"buffer_size": 2048})),
            Row("dataset_num_proc", "data.cache.num_proc", unless(None)),
            Row(
                "max_length",
                "data.max_length",
                same,
                "TRL cuts the end, here the prompt's beginning goes first",
            ),
            Row("truncation_mode", "", one_of({"keep_start": SKIP}), note="see `data.overflow`"),
            Row("dataloader_num_workers", "data.num_workers", same),
            Row("dataloader_drop_last", "data.drop_last", same),
            Row(
                "train_sampling_strategy",
                "data.shuffle",
                one_of(
                    {"random": True, "sequential": False}, "rows of similar length come together by data.max_tokens"
                ),
                "TRL takes KTO's rows in their order, here they may be shuffled",
            ),
            Row("remove_unused_columns", "", nothing, note="columns that nobody reads are left alone"),
            Row("pad_to_multiple_of", "", nothing, note="padding is not computed here"),
            Row("dataloader_pin_memory", "", nothing),
            Row("dataloader_persistent_workers", "", nothing),
            Row("dataloader_prefetch_factor", "", nothing),
        ),
    ),
    Section(
        "Steps of SFT, DPO and the reward model",
        ROWS,
        (
            Row("per_device_train_batch_size", "data.batch_size", same, note="rows (pairs) of a process in both"),
            Row("gradient_accumulation_steps", "trainer.accumulate_grad_batches", same),
            Row("max_grad_norm", "trainer.gradient_clip_val", unless(0), note="no clipping by default in Lightning"),
        ),
    ),
    Section(
        "SFT",
        ("sft",),
        (
            Row("loss_type", "model.loss", one_of({"nll": "nll", "chunked_nll": "nll", "dft": "dft"})),
            Row("neftune_noise_alpha", "model.neftune_alpha", unless(None)),
            Row(
                "completion_only_loss",
                "data.loss_on",
                values.supervised,
                "not given: the completion of prompt and completion in both; of `messages` TRL learns all turns and "
                "here the assistant's are: `loss_on: all` for TRL's",
                unasked=lambda given: not given["assistant_only_loss"],
            ),
            Row(
                "assistant_only_loss",
                "data.loss_on",
                values.supervised,
                note="needs no marks in the chat template here",
            ),
            Row(
                "packing",
                "data.packing",
                same,
                "documents see nothing of each other here with any attention; TRL's strategy needs flash attention",
            ),
            Row("packing_strategy", "", one_of({"bfd": SKIP}), note="whole rows in both"),
            Row("padding_free", "", nothing, note="always so here"),
            Row("dataset_text_field", "data.columns", unless("text", lambda value, given: {value: "text"})),
            Row("shuffle_dataset", "", nothing, "`data.shuffle` draws an order every epoch"),
            Row("chat_template_path", "data.chat_template", values.template, "a file; a model's folder is not taken"),
        ),
    ),
    Section(
        "DPO",
        ("dpo",),
        (
            Row("beta", "model.beta", same),
            Row("loss_type", "model.loss", values.losses),
            Row("loss_weights", "model.loss_weights", unless(None)),
            Row(
                "label_smoothing",
                "model.label_smoothing",
                values.smoothing,
                "with `sigmoid` TRL does not read it, and here it is conservative DPO",
            ),
            Row("f_divergence_type", "model.f_divergence", one_of(DIVERGENCES)),
            Row(
                "f_alpha_divergence_coef",
                "model.alpha",
                lambda value, given: value if given["f_divergence_type"] == "alpha_divergence" else SKIP,
            ),
            Row(
                "discopop_tau",
                "model.discopop_tau",
                lambda value, given: value if "discopop" in given["loss_type"] else SKIP,
            ),
            Row("ld_alpha", "model.ld_alpha", unless(None)),
            Row("use_weighting", "model.wpo", unless(False)),
            Row(
                "precompute_ref_log_probs", "model.cache_reference", unless(False), "in the first epoch, not before it"
            ),
            Row("precompute_ref_batch_size", "", nothing),
            Row("sync_ref_model", "", nothing),
            Row("ref_model_mixup_alpha", "model.sync_reference.alpha", where("sync_ref_model")),
            Row("ref_model_sync_steps", "model.sync_reference.every_n_steps", where("sync_ref_model")),
            refusal("disable_dropout", True, "dropout is always off here"),
            Row("padding_free", "", nothing, note="always so here"),
        ),
    ),
    Section(
        "KTO",
        ("kto",),
        (
            Row(
                "per_device_train_batch_size",
                "data.batch_size model.micro_batch_size",
                lambda value, given: (value * given["gradient_accumulation_steps"], value),
                "the batch is an optimizer step here, over which `kl` is taken; TRL takes it of each micro-batch",
            ),
            Row("gradient_accumulation_steps", "", values.count, note="a factor of `data.batch_size`"),
            Row("max_grad_norm", "model.max_grad_norm", values.clipping),
            Row("beta", "model.beta", same),
            Row("loss_type", "model.loss", same),
            Row("desirable_weight", "model.desirable_weight", same),
            Row("undesirable_weight", "model.undesirable_weight", same),
            Row("precompute_ref_log_probs", "", nothing, "the reference is computed along the way"),
            Row("precompute_ref_batch_size", "", nothing),
            refusal("sync_ref_model", False, "KTO's reference stays as it is here"),
            refusal("disable_dropout", True, "dropout is always off here"),
        ),
    ),
    Section(
        "Reward model",
        ("reward",),
        (
            Row("center_rewards_coefficient", "model.center_coef", unless(None)),
            refusal("disable_dropout", True, "dropout is always off here"),
        ),
    ),
    *SAMPLED,
)
