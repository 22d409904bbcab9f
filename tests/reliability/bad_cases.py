"""What users get wrong and are told: each message names the thing, its value and what is allowed."""

from dataclasses import dataclass

PARSING, BUILDING, TRAINING = "parsing", "before training", "training"


@dataclass
class Case:
    """`align fit -c PARADIGM.yaml ARGUMENTS` fails at the moment `when` with a message that holds all of `parts`."""

    paradigm: str
    arguments: list[str]
    parts: list[str]
    when: str = BUILDING


CALLBACK = ["--trainer.callbacks+=ModelCheckpoint"]
CASES = {
    # folders and tokenizers
    "missing policy": Case(
        "sft", ["--model.policy", "runs/sft/export"], ["policy.path='runs/sft/export'", "Hugging Face format"]
    ),
    "policy in an empty folder": Case("sft", ["--model.policy", "bad/empty"], ["'bad/empty'", "config.json"]),
    "missing tokenizer": Case("sft", ["--data.tokenizer", "./none"], ["tokenizer='./none'", "no such folder"]),
    "folder without tokenizer": Case(
        "sft", ["--model.policy", "other"], ["tokenizer='other'", "holds no tokenizer", "config.json"]
    ),
    "a vocabulary that does not fit": Case(
        "sft", ["--model.policy", "small", "--data.tokenizer", "policy"], ["42 ids", "embeddings for 10", "vocab_size"]
    ),
    "missing reference": Case(
        "dpo", ["--model.reference", "runs/sft/export"], ["reference.path='runs/sft/export'", "Hugging Face format"]
    ),
    # data
    "missing data": Case("sft", ["--data.train", "none.jsonl"], ["train='none.jsonl'", "no such file or folder"]),
    "a kind of file that is not known": Case(
        "sft", ["--data.train", "policy/model.safetensors"], ["'.safetensors'", "known: .jsonl"]
    ),
    "a line that does not parse": Case(
        "sft", ["--data.train", "bad/line.jsonl"], ["bad/line.jsonl:3", "not valid JSON", "one JSON object"]
    ),
    "a line that is no object": Case(
        "sft", ["--data.train", "bad/number.jsonl"], ["bad/number.jsonl:2", "JSON object"]
    ),
    "rows without the columns": Case(
        "dpo",
        ["--data.train", "sft.jsonl"],
        ["sft.jsonl:1", "['completion', 'prompt']", "PreferenceDataModule needs [prompt, chosen, rejected]"],
    ),
    "a later row without a column": Case(
        "sft", ["--data.train", "bad/column.jsonl"], ["bad/column.jsonl:2", "needs column completion", "['prompt']"]
    ),
    "an empty file": Case("sft", ["--data.train", "bad/empty.jsonl"], ["train='bad/empty.jsonl'", "no rows"]),
    "no source": Case("sft", ["--data.train", "null"], ["train=None", "give --data.train a source"]),
    "every row longer than the limit": Case(
        "sft",
        ["--data.max_length", "3", "--data.overflow", "drop"],
        ["every row is longer than max_length=3", "longest has", "raise max_length or"],
    ),
    "every row longer than the limit, as an error": Case(
        "sft",
        ["--data.max_length", "3", "--data.overflow", "error"],
        ["sft.jsonl:1", "max_length=3", "'drop'"],
    ),
    "no supervised token in the data": Case(
        "pretrain",
        ["--data.train", "bad/no_target.jsonl"],
        ["no row is left to use", "dropped without target 2"],
    ),
    "an epoch without a supervised token": Case(
        "sft",
        ["--data", "my_data.Masked", "--data.tokenizer", "policy"],
        ["nothing to learn in epoch 0", "labels all -100"],
        TRAINING,
    ),
    "batches of another paradigm": Case(
        "grpo",
        ["--data", "SFTDataModule", "--data.train", "sft.jsonl"],
        ["GRPOModule must hold prompts", "it holds ['attention_mask', 'input_ids', 'labels']"],
    ),
    "unknown overflow policy": Case(
        "sft", ["--data.overflow", "cut"], ["--data.overflow=cut", "'truncate' or 'drop' or 'error'"], PARSING
    ),
    # options that contradict each other or a value that is not allowed
    "one generation": Case("grpo", ["--model.num_generations", "1"], ["num_generations=1", "at least 2"]),
    "no micro-batch": Case("grpo", ["--model.micro_batch_size", "0"], ["micro_batch_size=0", "an integer from 1"]),
    "a reference that nothing reads": Case(
        "grpo", ["--model.reference", "other"], ["reference is given but beta=0", "KL penalty"]
    ),
    "accumulation by the Trainer": Case(
        "grpo",
        ["--trainer.accumulate_grad_batches", "2"],
        ["accumulate_grad_batches=2", "micro_batch_size"],
    ),
    "clipping by the Trainer": Case(
        "grpo", ["--trainer.gradient_clip_val", "0.5"], ["gradient_clip_val=0.5", "GRPOModule", "max_grad_norm"]
    ),
    "a KL estimator without a gradient": Case(
        "grpo", ["--model.beta", "0.1", "--model.kl_estimator", "k1"], ["'k1' must not stand in the loss", "'k3'"]
    ),
    "unknown KL estimator": Case(
        "grpo", ["--model.beta", "0.1", "--model.kl_estimator", "k9"], ["'k9'", "'k1', 'k2', 'k3'"]
    ),
    "label smoothing that a loss does not have": Case(
        "dpo", ["--model.loss", "ipo", "--model.label_smoothing", "0.1"], ["label_smoothing", "'ipo'", "0.1", "robust"]
    ),
    "a negative beta": Case("dpo", ["--model.beta", "-1"], ["beta", "-1.0", "> 0"]),
    "temperature of zero": Case("grpo", ["--model.temperature", "0"], ["temperature", "0.0", "> 0"]),
    "too many weights": Case(
        "grpo", ["--model.reward_weights", "[1, 2]"], ["weights=[1.0, 2.0]", "one factor for each of the 1 rewards"]
    ),
    "a path and an architecture": Case(
        "sft",
        ["--model.policy.path", "policy", "--model.policy.config", '{"model_type": "llama"}'],
        ["exactly one of 'path'", "'config'", "both are given"],
    ),
    "more warmup than steps": Case(
        "sft",
        ["--model.lr_scheduler", "CosineSchedule", "--model.lr_scheduler.warmup_steps", "500"],
        ["warmup_steps=500", "total_steps=6"],
    ),
    "adapters for layers that are not there": Case(
        "sft",
        ["--model.policy.path", "policy", "--model.policy.lora.target_modules", "query"],
        ["lora.target_modules='query'", "q_proj", "'all-linear'"],
    ),
    # what Lightning and torch refuse before the first batch
    "a learning rate below 0": Case("sft", ["--model.optimizer.lr", "-1"], ["Invalid learning rate: -1.0"]),
    "an optimizer that cannot take these parameters": Case(
        "sft", ["--model.optimizer", "Muon"], ["Muon only supports 2D parameters"]
    ),
    "an optimizer that takes no groups": Case(
        "sft", ["--model.optimizer", "LBFGS"], ["LBFGS doesn't support per-parameter options"]
    ),
    "unknown strategy": Case("sft", ["--trainer.strategy", "ddpp"], ["strategy='ddpp'"]),
    "unknown accelerator": Case(
        "sft", ["--trainer.accelerator", "xpuu"], ["trainer.accelerator='xpuu'", "auto", "cpu"]
    ),
    "an accelerator that is not there": Case(
        "sft", ["--trainer.accelerator", "tpu"], ["trainer.accelerator='tpu': this system has none", "auto", "cpu"]
    ),
    "no devices": Case(
        "sft", ["--trainer.devices", "0"], ["trainer.devices='0' on cpu", "auto, or a number of processes"]
    ),
    "a list of devices on the CPU": Case(
        "sft", ["--trainer.devices", "[0, 1]"], ["trainer.devices=[0, 1] on cpu", "auto, or a number of processes"]
    ),
    "validation after more batches than there are": Case(
        "sft", ["--trainer.val_check_interval", "50", "--data.validation", "sft.jsonl"], ["val_check_interval", "50"]
    ),
    "the best of no checkpoints": Case("sft", ["--ckpt_path", "best"], ["ckpt_path='best'", "holds no checkpoint"]),
    "batches that cannot be counted": Case(
        "sft",
        ["--model.lr_scheduler", "CosineSchedule", "--trainer.limit_train_batches", "0"],
        ["CosineSchedule", "set the Trainer's max_steps", "no length"],
    ),
    # exports
    "an export of adapters that are not there": Case(
        "sft", ["--export.lora", "adapter"], ["lora='adapter'", "has no adapters", "lora='merge'"]
    ),
    "an export into a folder of something else": Case(
        "sft", ["--export.directory", "policy"], ["policy'", "is not empty and not an export"]
    ),
    "an export of adapters on a base that is not on disk": Case(
        "sft",
        ["-c", "bad/fresh.yaml", "--export.lora", "adapter"],
        ["lora='adapter'", "base model under these adapters is not on disk"],
    ),
    # rewards
    "a reward that is not there": Case(
        "grpo", ["--model.rewards", "my_rewards.digit"], ["rewards[0]='my_rewards.digit'", "no attribute 'digit'"]
    ),
    "a reward's module that is not there": Case(
        "grpo",
        ["--model.rewards", "my_reward.digits"],
        ["rewards[0]=", "no module named 'my_reward'"],
    ),
    "a reward that raises": Case(
        "grpo", ["--model.rewards", "my_rewards.raises"], ["reward 'raises' raised in row 0", "ZeroDivisionError"]
    ),
    "a reward of the wrong count": Case(
        "grpo", ["--model.rewards", "my_rewards.too_few"], ["reward 'too_few' returned 1 values for 12 completions"]
    ),
    "a reward of NaN": Case(
        "grpo",
        ["--model.rewards", "my_rewards.never_a_number"],
        ["optimizer step 1", "never_a_number", "NaN for all completions"],
    ),
    "a reward that is no number": Case(
        "grpo", ["--model.rewards", "my_rewards.a_word"], ["'a_word' returned str 'good' in row 0", "must be a number"]
    ),
    "a reward's column that is not there": Case(
        "grpo",
        ["--model.rewards", "my_rewards.wants_a_column"],
        ["'wants_a_column' asks for 'solution'", "found: answer, completion_ids"],
    ),
    # checkpoints (more of them in test_checkpoints.py)
    "a checkpoint that is not there": Case(
        "sft", ["--ckpt_path", "runs/last.ckpt"], ["ckpt_path='runs/last.ckpt'", "no such file"]
    ),
    "a checkpoint of another paradigm": Case(
        "sft", ["--ckpt_path", "bad/other.ckpt"], ["'bad/other.ckpt'", "paradigm 'dpo'", "only paradigm 'sft'"]
    ),
    "a truncated checkpoint": Case(
        "sft", ["--ckpt_path", "bad/short.ckpt"], ["'bad/short.ckpt'", "truncated at 300 bytes", "earlier checkpoint"]
    ),
    "a stream without an end": Case(
        "sft",
        ["--data.stream.buffer_size", "5"],
        ["trainer.max_steps=-1", "the training rows are a stream", "set trainer.max_steps"],
    ),
    "a stream that is to be validated at its end": Case(
        "sft",
        ["--data.stream.buffer_size=5", "--trainer.max_steps=4", "--data.validation", "sft.jsonl"],
        ["trainer.val_check_interval=1.0", "a stream has no end of an epoch", "to an integer"],
    ),
    "a share of a stream": Case(
        "sft",
        ["--data.stream.buffer_size=5", "--data.validation=0.1"],
        ["validation=0.1 is a share of the training rows, and a stream does not tell how many it has"],
    ),
    "a stream of a folder of the wrong kind": Case(
        "sft",
        ["--data.stream.buffer_size=5", "--trainer.max_steps=4", "--data.train", "sft.yaml"],
        ["train='sft.yaml'", "'.yaml' cannot be read as a stream", ".jsonl, .ndjson, .txt, .parquet"],
    ),
    "a checkpoint of weights alone": Case(
        "sft", ["--ckpt_path", "bad/weights.ckpt"], ["'bad/weights.ckpt'", "pytorch-lightning_version", "no Trainer"]
    ),
    "a checkpoint with a pickle inside": Case(
        "sft", ["--ckpt_path", "bad/pickle.ckpt"], ["'bad/pickle.ckpt'", "Python objects", "refused"]
    ),
    "a misspelt metric": Case(
        "sft",
        [*CALLBACK, "--trainer.callbacks.monitor", "val/los", "--data.validation", "sft.jsonl"],
        ["'val/los'", "'val/loss'"],
        TRAINING,
    ),
}

FRESH = """
model:
  init_args:
    policy:
      class_path: PolicyConfig
      init_args:
        config: {model_type: llama, vocab_size: 42, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
          num_attention_heads: 2}
        lora: {}
data: {init_args: {tokenizer: policy}}
"""
