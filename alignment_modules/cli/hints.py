"""Where an option lives that other programs for the same work call by another name."""

_LR, _RATIO = "model.optimizer.lr", "model.lr_scheduler.warmup_steps"
_NAMES = {
    "lr": _LR,
    "learning_rate": _LR,
    "weight_decay": "model.optimizer.weight_decay",
    "adam_beta1": "model.optimizer.betas",
    "adam_beta2": "model.optimizer.betas",
    "optim": "model.optimizer",
    "optimizer": "model.optimizer",
    "lr_scheduler": "model.lr_scheduler",
    "lr_scheduler_type": "model.lr_scheduler",
    "warmup_steps": _RATIO,
    "warmup_ratio": _RATIO,
    "batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "train_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "num_train_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_prompt_length": "data.max_length",
    "max_completion_length": "model.max_completion_length",
    "max_new_tokens": "model.max_completion_length",
    "num_generations": "model.num_generations",
    "packing": "data.packing",
    "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "dataloader_num_workers": "data.num_workers",
    "num_workers": "data.num_workers",
    "output_dir": "trainer.default_root_dir",
    "report_to": "trainer.logger",
    "logging_steps": "trainer.log_every_n_steps",
    "eval_steps": "trainer.val_check_interval",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "deepspeed": "trainer.strategy",
    "fsdp": "trainer.strategy",
    "seed": "seed_everything",
    "resume_from_checkpoint": "ckpt_path",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.validation",
    "model_name_or_path": "model.policy.path",
    "torch_dtype": "model.policy.dtype",
    "dtype": "model.policy.dtype",
    "attn_implementation": "model.policy.attn_implementation",
    "gradient_checkpointing": "model.policy.gradient_checkpointing",
    "load_in_4bit": "model.policy.quantization",
    "load_in_8bit": "model.policy.quantization",
    "use_peft": "model.policy.lora",
    "lora_r": "model.policy.lora.r",
    "lora_alpha": "model.policy.lora.alpha",
    "lora_dropout": "model.policy.lora.dropout",
    "lora_target_modules": "model.policy.lora.target_modules",
    "neftune_noise_alpha": "model.neftune_alpha",
    "neftune_alpha": "model.neftune_alpha",
    "beta": "model.beta",
    "loss_type": "model.loss",
    "reward_funcs": "model.rewards",
    "reward_weights": "model.reward_weights",
    "ref_model": "model.reference",
    "precompute_ref_log_probs": "model.cache_reference",
    "temperature": "model.temperature",
}


def instead(option: str) -> str | None:
    """The option to use where `option` was meant; None where none is known.

    >>> instead("model.optimizer.learning_rate"), instead("--num_train_epochs"), instead("model.optimizer.lr")
    ('model.optimizer.lr', 'trainer.max_epochs', None)
    """
    option = option.lstrip("-")
    found = _NAMES.get(option.rpartition(".")[2])
    return None if found == option else found
