"""`align convert`: a configuration of TRL trains here as it does there, or is refused by name."""

import json

import pytest
import yaml

from alignment_modules.cli.commands import run_command
from alignment_modules.cli.converting.convert import convert, defaults, rows
from alignment_modules.cli.converting.table import CLASSES
from datamodules import PromptDataModule

SUMS = [(a, b) for a in range(6) for b in range(4)]
FILES = {
    "sft": [{"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + a % 3)} for a, b in SUMS],
    "dpo": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1) * 2} for a, b in SUMS],
    "kto": [{"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + b % 2), "label": a % 2 == 0} for a, b in SUMS],
}
SHORT = """
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: 2
learning_rate: 1e-3
bf16: false
logging_steps: 1
use_cpu: true
train_sampling_strategy: sequential
save_strategy: no
gradient_checkpointing: false
lr_scheduler_type: cosine
max_length: 64
"""
OWN = {
    "dpo": {"beta": 0.5, "loss_type": ["sigmoid", "bco_pair"]},
    "kto": {"beta": 0.5, "loss_type": "apo_zero_unpaired"},
}
LOGGED = {  # by TRL 1.16.0 of the same model, rows and options: losses and norms of the gradient
    "sft": ([5.025, 5.062, 5.387, 4.604, 4.783, 5.201], [5.428, 5.142, 7.086, 4.747, 4.223, 7.388]),
    "dpo": ([2.079, 1.99, 2.173, 1.651, 1.643, 1.865], [6.648, 9.683, 20.23, 5.22, 6.632, 17.7]),
    "kto": ([0.5, 0.4919, 0.5283, 0.42, 0.439, 0.4892], [1.12, 1.264, 2.756, 1.033, 1.158, 2.537]),
}


def option(tree, name):
    """The value at a dotted name, through classes and their arguments; KeyError where there is none."""
    for part in name.split("."):
        tree = tree["init_args"] if part not in tree and "init_args" in tree else tree
        tree = tree[part]
    return tree


def converted(command, **given):
    return convert(command, given)[0]


@pytest.mark.parametrize("command", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "kto"))])
def test_it_trains_as_trl_does(command, model_folder, tmp_path, align):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows_file, trl, ours = tmp_path / "rows.jsonl", tmp_path / "trl.yaml", tmp_path / "ours.yaml"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in FILES[command]))
    given = {"model_name_or_path": str(model_folder), **OWN.get(command, {})}
    given["datasets"] = [{"path": "json", "data_files": str(rows_file)}]
    trl.write_text(SHORT + yaml.safe_dump(given))
    assert run_command("convert", [command, str(trl), "--write", str(ours)]) == 0
    done = align("fit", "--config", ours, "--trainer.enable_progress_bar", "false")
    assert done.code == 0, done.text
    events = EventAccumulator(str(done.root))
    events.Reload()
    norm = next(tag for tag in events.Tags()["scalars"] if tag.endswith("grad_norm"))
    for name, numbers in zip(("train/loss", norm), LOGGED[command], strict=True):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(numbers, rel=5e-4), name


@pytest.mark.parametrize("command", CLASSES)
def test_trls_defaults_are_a_configuration_of_ours(command, tmp_path, align):
    (tmp_path / "trl.yaml").write_text("model_name_or_path: policy\ndataset_name: prompts.jsonl\n")
    assert run_command("convert", [command, str(tmp_path / "trl.yaml"), "--write", str(tmp_path / "ours.yaml")]) == 0
    done = align("fit", "--config", tmp_path / "ours.yaml", "--print_config")
    assert done.code == 0, done.text


def test_options_are_translated():
    adapters = converted("dpo", use_peft=True, lora_r=8, load_in_4bit=True, lora_target_modules=["q_proj"])
    assert option(adapters, "model.policy.lora") == {
        "r": 8,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": ["q_proj"],
        "use_rslora": False,
        "use_dora": False,
    }
    assert option(adapters, "model.policy.quantization") == "4bit"
    assert adapters["export"] == {"lora": "adapter"}
    assert "lora" not in option(converted("dpo", lora_r=8), "model.policy")
    pairs = converted("dpo", loss_type="robust", label_smoothing=0.1, f_divergence_type="js_divergence", ld_alpha=0.5)
    chosen = {name: option(pairs, f"model.{name}") for name in ("loss", "label_smoothing", "f_divergence", "ld_alpha")}
    assert chosen == {"loss": "robust", "label_smoothing": 0.1, "f_divergence": "js", "ld_alpha": 0.5}
    assert "label_smoothing" not in option(converted("dpo", label_smoothing=0.1), "model.policy") | pairs["trainer"]
    moved = converted("dpo", sync_ref_model=True, ref_model_sync_steps=64)
    assert option(moved, "model.sync_reference") == {"alpha": 0.6, "every_n_steps": 64}
    rows = converted("sft", dataset_name="owner/rows", dataset_config="easy", eval_strategy="steps", eval_steps=5)
    assert option(rows, "data.train") == "owner/rows@easy:train"
    assert option(rows, "data.validation") == "owner/rows@easy:test"
    accumulated = converted("sft", eval_strategy="steps", eval_steps=5, gradient_accumulation_steps=4)
    assert option(accumulated, "trainer.val_check_interval") == 20  # batches
    assert accumulated["trainer"]["check_val_every_n_epoch"] is None
    rates = converted("sft", lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 2e-6}, max_steps=9)
    assert option(rates, "model.lr_scheduler.floor") == pytest.approx(0.1)
    assert option(rates, "trainer.max_steps") == 9
    assert "max_epochs" not in rates["trainer"]
    assert option(converted("sft", completion_only_loss=False), "data.loss_on") == "all"


@pytest.mark.parametrize(
    ("given", "prompts", "minibatches"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 4, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 8}, 8, 2),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 1}, 2, 1),
        ({"per_device_train_batch_size": 16, "num_generations": 4}, 4, 1),
    ],
)
def test_batches_of_completions_are_rollouts_of_prompts(given, prompts, minibatches):
    found = converted("grpo", **given)
    assert option(found, "data.batch_size") == prompts
    assert option(found, "model.minibatches") == minibatches
    assert option(found, "model.micro_batch_size") == given["per_device_train_batch_size"]


def test_losses_of_grpo():
    plain = option(converted("grpo", beta=0.04), "model.init_args")
    assert {name: plain[name] for name in ("loss", "epsilon", "epsilon_high", "kl_estimator", "scale_rewards")} == {
        "loss": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.2,
        "kl_estimator": "k3+score",
        "scale_rewards": "group",
    }
    capped = option(converted("grpo", loss_type="cispo", epsilon_high=5.0, scale_rewards=False), "model.init_args")
    assert (capped["epsilon_high"], capped["scale_rewards"]) == (4.0, "none")
    assert "epsilon" not in capped
    gated = option(converted("grpo", loss_type="sapo", sapo_temperature_neg=1.2), "model.init_args")
    assert gated["loss_options"] == {"temperature_pos": 1.0, "temperature_neg": 1.2}
    assert {"epsilon", "epsilon_high"}.isdisjoint(gated)


@pytest.mark.parametrize(
    ("command", "given", "reason"),
    [
        ("dpo", {"beat": 0.1}, "beat: `trl dpo` of TRL 1.16.0 has no such option; did you mean beta?"),
        ("sft", {"warmup_ratio": 0.1}, "warmup_ratio: `trl sft` of TRL 1.16.0 has no such option"),
        ("sft", {"hub_model_id": "owner/name"}, "hub_model_id='owner/name': has no counterpart here"),
        ("sft", {"optim": "adafactor"}, "optim='adafactor': has no counterpart here; translated are adamw_torch"),
        ("sft", {"num_train_epochs": 0.5}, "num_train_epochs=0.5: parts of an epoch are not counted here"),
        ("sft", {"max_length": None}, "max_length=None: must be a number here, too"),
        ("sft", {"packing_strategy": "wrapped"}, "packing_strategy='wrapped': has no counterpart here"),
        ("dpo", {"loss_type": "aot"}, "loss_type='aot': aot sorts the pairs of a micro-batch in TRL"),
        ("sft", {"per_device_train_batch_size": "8"}, "per_device_train_batch_size='8': must be a number"),
        ("sft", {"packing": "yes"}, "packing='yes': must be true or false"),
        ("dpo", {"disable_dropout": False}, "disable_dropout=False: dropout is always off here"),
        (
            "dpo",
            {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
            "label_smoothing=0.1: with several losses TRL reads it in robust and exo_pair alone",
        ),
        ("grpo", {"generation_batch_size": 64}, "generation_batch_size=64: depends on the processes"),
        (
            "grpo",
            {"num_generations": 7},
            "a rollout of 8 completions a process has no whole groups of num_generations=7",
        ),
        (
            "grpo",
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            "steps_per_generation=6 must be a multiple of gradient_accumulation_steps=4",
        ),
        ("grpo", {"reward_funcs": ["accuracy_reward"]}, "accuracy_reward has no counterpart here"),
        ("grpo", {"use_vllm": True}, "use_vllm=True: stack --config engines/vllm"),
        ("grpo", {"loss_type": "cispo"}, "TRL caps the ratio of cispo at 0.2 itself"),
        ("grpo", {"loss_type": "luspo"}, "luspo has the completion's ratio here"),
        ("grpo", {"repetition_penalty": 1.1}, "repetition_penalty=1.1: has no counterpart here"),
        ("rloo", {"num_iterations": 2}, "epsilon=0.2: TRL clips the ratio of a whole completion"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(command, given, reason):
    with pytest.raises(ValueError, match="of TRL's options cannot be translated") as refused:
        convert(command, given)
    assert reason in str(refused.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match="3 of TRL's options cannot be translated") as refused:
        convert("sft", {"optim": "sgd", "beat": 1, "fsdp": "full_shard"})
    assert len(str(refused.value).splitlines()) == 4


@pytest.mark.parametrize("command", CLASSES)
def test_every_option_is_translated_or_refused(command):
    """No option of TRL's that is given another value than its default is left out in silence."""
    for name in defaults(command).keys() - {row.name for row in rows(command)}:
        if name.startswith("vllm_"):  # without effect in TRL, too, unless `use_vllm`
            continue
        with pytest.raises(ValueError, match=f"{name}='other': has no counterpart here"):
            convert(command, {name: "other"})


WRONG = ("other", -1, 0, 2.5, float("nan"), True, None, [], [1, "x"], [{}], {}, {"x": 1})


@pytest.mark.parametrize(
    "command",
    ["sft", "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "kto", "reward", "rloo"))],
)
def test_malformed_values_are_refused_or_translated(command):
    """Whatever stands in the file: a configuration, or an error that names the option."""
    for name in defaults(command):
        for value in WRONG:
            told = outcome(command, {name: value})
            assert name in told, (name, value, told)


def outcome(command, given):
    """What is told of options that cannot be translated; where they can be, their names."""
    try:
        yaml.safe_dump(convert(command, given)[0])
    except ValueError as refused:
        return str(refused)
    return str([*given])


def test_what_differs_is_told_of_what_is_given(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text("warmup_steps: 10\nlearning_rate: 1e-6\n")
    assert run_command("convert", ["dpo", str(tmp_path / "trl.yaml")]) == 0
    out, told = capsys.readouterr()
    assert option(yaml.safe_load(out), "model.optimizer.lr") == 1e-6
    assert told.splitlines() == [
        "differs: warmup_steps: the first step has the rate 0 in TRL and 1/warmup_steps of it here"
    ]


def test_what_is_not_given_is_told_where_it_matters():
    assert any(line.startswith("lora_target_modules: not given") for line in convert("dpo", {"use_peft": True})[1])
    assert convert("dpo", {})[1] == []
    assert any(line.startswith("completion_only_loss: not given") for line in convert("sft", {})[1])
    assert convert("sft", {"assistant_only_loss": True})[1] == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read"),
        ("- learning_rate", "must be a YAML file of options"),
        ("learning_rate: [", "cannot be read"),
        ("beta: 0.1\nbeta: 0.2\n", "beta"),
    ],
)
def test_bad_files(tmp_path, text, reason):
    path = tmp_path / "trl.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        run_command("convert", ["dpo", str(path)])
    assert "trl.yaml" in str(refused.value)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "trl.yaml").write_text("beta: 0.2\n")
    with pytest.raises(ValueError, match=r"--write=.*trl\.yaml: cannot be written: .*exists"):
        run_command("convert", ["dpo", str(tmp_path / "trl.yaml"), "--write", str(tmp_path / "trl.yaml")])


def test_prompts_are_not_cut_in_silence():
    assert option(converted("grpo"), "data.overflow") == "error"
    assert PromptDataModule(train=[], overflow="error").overflow == "error"
