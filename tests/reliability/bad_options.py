"""Options and classes that there are none of, and values that no option takes: refused, mostly by the parser."""

from tests.reliability.bad_cases import PARSING, Case

OPTIONS = {
    "unknown option of a module": Case(
        "dpo",
        ["--model.betta", "0.3"],
        ["align fit: error", "--model.betta=0.3", "DPOModule has no option", "did you mean 'beta'?", "label_smoothing"],
        PARSING,
    ),
    "an option's name elsewhere": Case(
        "sft", ["--lr", "1e-4"], ["--lr=1e-4: there is no such option; use --model.optimizer.lr\n"], PARSING
    ),
    "an optimizer's option by another name": Case(
        "sft",
        ["--model.optimizer.learning_rate", "1"],
        ["--model.optimizer.learning_rate=1: AdamW has no option 'learning_rate'; use --model.optimizer.lr\n"],
        PARSING,
    ),
    "a data module's option by another name": Case(
        "sft",
        ["--data.max_seq_length", "9"],
        ["--data.max_seq_length=9: SFTDataModule has no option", "did you mean 'max_length'?"],
        PARSING,
    ),
    "the batch size by another name": Case(
        "sft", ["--per_device_train_batch_size=4"], ["there is no such option; use --data.batch_size\n"], PARSING
    ),
    "a base class of modules": Case(
        "sft",
        ["--model", "ActingModule"],
        ["--model=ActingModule: only a base", "allowed: OnlineDPOModule, GRPOModule, PPOModule\n"],
        PARSING,
    ),
    "a base class of schedules": Case(
        "sft", ["--model.lr_scheduler=Schedule"], ["--model.lr_scheduler=Schedule: only a base", "Cosine"], PARSING
    ),
    "not a number": Case("dpo", ["--model.beta", ".nan"], ["beta=nan must be a finite number > 0"]),
    "a number that is null": Case("dpo", ["--model.beta", "null"], ["beta=None must be a finite number > 0"]),
    "more workers than any machine has": Case(
        "sft",
        ["--data.num_workers", "1e20"],
        ["--data.num_workers=1e20: must be an integer from 0 to 1024"],
        PARSING,
    ),
    "weights that are all zero": Case(
        "grpo", ["--model.reward_weights", "[0]"], ["reward_weights=[0.0] must be finite and not all 0"]
    ),
    "unknown option in a file": Case(
        "dpo", ["-c", "bad/option.yaml"], ["--model.betta=0.3", "DPOModule", "'beta'", "label_smoothing"], PARSING
    ),
    "unknown option of a data module": Case(
        "sft", ["--data.batchsize=3"], ["--data.batchsize=3", "SFTDataModule", "'batch_size'", "max_length"], PARSING
    ),
    "unknown option of an optimizer": Case(
        "sft", ["--model.optimizer.lrate", "1"], ["--model.optimizer.lrate=1", "AdamW", "allowed: lr, betas"], PARSING
    ),
    "unknown option of a schedule": Case(
        "sft",
        ["--model.lr_scheduler", "CosineSchedule", "--model.lr_scheduler.warmup", "3"],
        ["--model.lr_scheduler.warmup=3", "CosineSchedule", "did you mean 'warmup_steps'?", "floor"],
        PARSING,
    ),
    "a misspelt option that has options itself": Case(
        "sft",
        ["--model.optimiser.lr", "1e-3"],
        ["--model.optimiser.lr=1e-3", "SFTModule has no option 'optimiser'", "did you mean 'optimizer'?"],
        PARSING,
    ),
    "a misspelt option that has options itself, in a file": Case(
        "sft",
        ["-c", "bad/optimiser.yaml"],
        ["--model.optimiser=", "SFTModule has no option 'optimiser'", "did you mean 'optimizer'?"],
        PARSING,
    ),
    "no number in an optimizer": Case(
        "sft", ["--model.optimizer.lr", "abc"], ["--model.optimizer.lr=abc: must be a finite number\n"], PARSING
    ),
    "no number in a schedule": Case(
        "sft",
        ["--model.lr_scheduler", "CosineSchedule", "--model.lr_scheduler.warmup_steps", "few"],
        ["--model.lr_scheduler.warmup_steps=few: must be an integer from 0"],
        PARSING,
    ),
    "no number deep in the policy": Case(
        "sft",
        ["--model.policy.path", "policy", "--model.policy.lora.r", "few"],
        ["--model.policy.lora.r=few: must be an integer from 1"],
        PARSING,
    ),
    "a schedule without what it needs": Case(
        "sft",
        ["--model.lr_scheduler", "StepLR"],
        ["--model.lr_scheduler.step_size: required by StepLR, but not given"],
        PARSING,
    ),
    "a schedule on a plateau of nothing": Case(
        "sft",
        ["--model.lr_scheduler", "ReduceLROnPlateau"],
        ["--model.lr_scheduler.monitor: required by ReduceLROnPlateau, but not given"],
        PARSING,
    ),
    "a schedule on a plateau of nothing, in a file": Case(
        "sft",
        ["-c", "bad/plateau.yaml"],
        ["--model.lr_scheduler.monitor: required by ReduceLROnPlateau, but not given"],
        PARSING,
    ),
    "unknown option of the policy": Case(
        "sft",
        ["--model.policy.path", "policy", "--model.policy.lora.rank", "8"],
        ["--model.policy.lora.rank=8", "LoraConfig has no option 'rank'", "allowed: r, alpha"],
        PARSING,
    ),
    "unknown option of the Trainer": Case(
        "sft", ["--trainer.max_epoch", "3"], ["--trainer.max_epoch=3", "did you mean 'max_epochs'?"], PARSING
    ),
    "unknown option of the Trainer in a file": Case(
        "sft", ["-c", "bad/trainer.yaml"], ["--trainer.max_epoch", "did you mean 'max_epochs'?", "accelerator"], PARSING
    ),
    "unknown option of the command": Case(
        "sft", ["--ckpt", "x.ckpt"], ["--ckpt=x.ckpt: there is no such option", "'ckpt_path'"], PARSING
    ),
    "a stray word": Case("sft", ["beta=1"], ["beta=1", "every option starts with --"], PARSING),
    "unknown module": Case(
        "sft", ["--model", "DPOModul"], ["--model=DPOModul", "did you mean 'DPOModule'?", "GRPOModule"], PARSING
    ),
    "unknown module with options": Case(
        "sft", ["--model", "DPOModul", "--model.beta", "1"], ["--model=DPOModul", "did you mean 'DPOModule'?"], PARSING
    ),
    "a class that is no module": Case(
        "sft", ["--model", "torch.nn.Linear"], ["--model=torch.nn.Linear", "subclass of AlignmentModule"], PARSING
    ),
    "a module of a package that is not there": Case(
        "sft",
        ["--model", "my_modules.SFT"],
        ["--model=my_modules.SFT", "No module named 'my_modules'"],
        PARSING,
    ),
    "unknown data module": Case(
        "sft", ["--data", "SFTData"], ["--data=SFTData", "did you mean 'SFTDataModule'?", "PromptDataModule"], PARSING
    ),
    "unknown optimizer": Case(
        "sft", ["--model.optimizer", "AdamX"], ["--model.optimizer=AdamX", "did you mean 'Adam", "SGD"], PARSING
    ),
    "unknown callback": Case(
        "sft", ["--trainer.callbacks+=SampleTabel"], ["SampleTabel", "did you mean 'SampleTable'?"], PARSING
    ),
    "unknown built-in reward": Case(
        "grpo",
        ["--model.rewards", '[{"class_path": "alignment_modules.rewards.ExactMach"}]'],
        ["--model.rewards=alignment_modules.rewards.ExactMach", "did you mean 'ExactMatch'?"],
        PARSING,
    ),
    "no number": Case("dpo", ["--model.beta", "big"], ["--model.beta=big", "must be a finite number > 0"], PARSING),
    "no such choice": Case(
        "grpo", ["--model.kl_placement", "los"], ["--model.kl_placement=los", "'loss' or 'reward'"], PARSING
    ),
    "a number of epochs that is none": Case(
        "sft", ["--trainer.max_epochs", "few"], ["--trainer.max_epochs=few", "an integer or null"], PARSING
    ),
    "a configuration that is not there": Case(
        "sft", ["-c", "nowhere.yaml"], ["--config=nowhere.yaml", "no such file"], PARSING
    ),
    "a configuration that is no YAML": Case("sft", ["-c", "bad/broken.yaml"], ["bad/broken.yaml", "line 2"], PARSING),
    "an empty configuration": Case("sft", ["-c", "bad/nothing.yaml"], ["--config=bad/nothing.yaml", "empty"], PARSING),
    "a configuration that is a list": Case("sft", ["-c", "bad/list.yaml"], ["--config=bad/list.yaml", "list"], PARSING),
    "a configuration that gives an option twice": Case(
        "sft",
        ["-c", "bad/twice.yaml"],
        ["--config=bad/twice.yaml: model.init_args.optimizer.init_args.lr is given twice, in lines 4 and 6"],
        PARSING,
    ),
    "a configuration that a configuration names and that gives an option twice": Case(
        "sft",
        ["-c", "bad/names.yaml"],
        ["--model.policy=bad/policy.yaml: path is given twice, in lines 1 and 3"],
        PARSING,
    ),
    "a typed value that gives a key twice": Case(
        "sft",
        ["--model.policy", '{"path": "policy", "path": "start"}'],
        ["--model.policy=", "path is given twice, in line 1"],
        PARSING,
    ),
    "a configuration that is no text": Case(
        "sft", ["-c", "bad/binary.yaml"], ["--config=bad/binary.yaml", "UTF-8"], PARSING
    ),
    "unknown loss": Case("dpo", ["--model.loss", "sigmod"], ["loss", "'sigmod'", "'sigmoid', 'robust'"]),
    "a model type that is not known": Case(
        "sft",
        ["--model.policy", "null", "--model.policy.config", '{"model_type": "lama"}', "--data.tokenizer", "policy"],
        ["policy.config.model_type='lama'", "llama"],
    ),
}
