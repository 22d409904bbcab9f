"""What the value of an option of TRL becomes here. Each function takes the value and all of TRL's options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from datamodules.rows.sources import is_hub_id

Given = Mapping[str, Any]
"""All options of a TRL command by name: what its file gives, else TRL's default."""
Value = Callable[[Any, Given], Any]

SKIP = object()
"""Stands for a value that is not written: it is the default here, or has no effect."""
CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
SMOOTHED = ("robust", "exo_pair")


class UntranslatedError(ValueError):
    """An option of TRL that has no counterpart here; the message says why, or what to do instead."""


def same(value: Any, given: Given) -> Any:
    """The value as it is."""
    return value


def unless(skipped: Any, to: Any = same) -> Value:
    """The value as it is (or `to`), and nothing where it is `skipped`."""
    return lambda value, given: SKIP if value == skipped else (to(value, given) if callable(to) else to)


def one_of(names: Mapping[Any, Any], hint: str = "") -> Value:
    """The value by a table."""

    def value(value: Any, given: Given) -> Any:
        if value not in names:
            known = ", ".join(map(str, names))
            raise UntranslatedError(f"has no counterpart here; translated are {known}{hint and '. ' + hint}")
        return names[value]

    return value


def refused(hint: str) -> Value:
    """Refuses every value but the option's default, with what to do instead."""

    def value(value: Any, given: Given) -> Any:
        raise UntranslatedError(hint)

    return value


def where(option: str, value: Value = same) -> Value:
    """What `value` makes of it where another option is set, else nothing."""
    return lambda found, given: value(found, given) if given[option] else SKIP


def of_loss(*losses: str, value: Value = same) -> Value:
    """What `value` makes of it with one of these losses, else nothing."""
    return lambda found, given: value(found, given) if given["loss_type"] in losses else SKIP


def epochs(value: Any, given: Given) -> Any:
    """Whole epochs, which `max_steps` overrides."""
    if given["max_steps"] > 0:
        return SKIP
    if value != int(value):
        raise UntranslatedError("parts of an epoch are not counted here; give max_steps")
    return int(value)


def clipping(value: Any, given: Given) -> Any:
    """The largest norm of the gradient; TRL's 0 is none."""
    return value or None


def template(value: Any, given: Given) -> Any:
    """A chat template's file."""
    if value is not None and not str(value).endswith(".jinja"):
        raise UntranslatedError("only a .jinja file is taken here: save that model's chat template as one")
    return SKIP if value is None else value


def saving(value: Any, given: Given) -> Any:
    """Steps between two checkpoints, where they are taken by steps."""
    return steps(value, given) if given["save_strategy"] == "steps" else SKIP


def steps(value: Any, given: Given) -> Any:
    """Optimizer steps; TRL also takes a share of the run below 1."""
    if value is None or value != int(value):
        raise UntranslatedError("a share of the run is not taken here; give optimizer steps")
    return int(value)


def betas(value: Any, given: Given) -> Any:
    """Both of Adam's betas."""
    return [given["adam_beta1"], given["adam_beta2"]]


def floor(value: Any, given: Given) -> Any:
    """The share of the rate at which a cosine ends."""
    if not value:
        return SKIP
    if (
        given["lr_scheduler_type"] != "cosine_with_min_lr"
        or len(value) != 1
        or not {*value} <= {"min_lr", "min_lr_rate"}
    ):
        raise UntranslatedError("only min_lr or min_lr_rate of cosine_with_min_lr are translated")
    [(name, number)] = value.items()
    return number / given["learning_rate"] if name == "min_lr" else number


def precision(value: Any, given: Given) -> Any:
    """Mixed precision: bfloat16 unless something else is asked for."""
    if given["fp16"]:
        return "16-mixed"
    return "32-true" if given["bf16"] is False else "bf16-mixed"


def source(split: str) -> Value:
    """Where the rows of a split are: a path, or a hub id with configuration and split."""

    def value(value: Any, given: Given) -> Any:
        if given["datasets"] and split == "train":
            return _of_mixture(given["datasets"])
        name = given["dataset_name"]
        if name is None or (split == "test" and (given["eval_strategy"] == "no" or given["datasets"])):
            return SKIP
        if not is_hub_id(name):
            return name
        config = given["dataset_config"]
        return f"{_named(name, config)}:{given[f'dataset_{split}_split']}"

    return value


def _named(name: str, config: str | None) -> str:
    return name if config is None else f"{name}@{config}"


def _of_mixture(entries: list[dict[str, Any]]) -> str:
    if len(entries) != 1:
        raise UntranslatedError("several data sets are sources of a MixtureDataModule here, each with its weight")
    entry = dict(entries[0])
    path, config, files = entry.pop("path"), entry.pop("name", None), entry.pop("data_files", None)
    split = entry.pop("split", "train")
    if any(one is not None for one in entry.values()):
        raise UntranslatedError(f"{', '.join(entry)} of a data set have no counterpart here")
    if path in ("json", "csv", "parquet", "text") and isinstance(files, str):
        return files
    if files is not None:
        raise UntranslatedError("data_files must be one path of the kind json, csv, parquet or text")
    return f"{_named(path, config)}:{split}"


def evaluation_interval(value: Any, given: Given) -> Any:
    """After how many batches validation runs, where TRL counts optimizer steps."""
    if given["eval_strategy"] != "steps":
        return SKIP
    interval = steps(given["eval_steps"] or given["logging_steps"], given)
    if "num_generations" not in given:
        return interval * given["gradient_accumulation_steps"]
    updates = minibatches(None, given) * given["num_iterations"]
    if interval % updates:
        raise UntranslatedError(f"must be a multiple of the {updates} optimizer steps of a rollout")
    return interval // updates


def evaluation(value: Any, given: Given) -> Any:
    """The same, and that the batches are counted over epochs."""
    interval = evaluation_interval(value, given)
    return interval, (SKIP if interval is SKIP else None)


def count(value: Any, given: Given) -> Any:
    """The value, which others are computed with; it must be 1 or more."""
    if not 1 <= value < math.inf:
        raise UntranslatedError("must be 1 or more")
    return value


def rollout_steps(given: Given) -> int:
    """Micro-batches of one generation of TRL, a multiple of those of an optimizer step."""
    accumulated = int(given["gradient_accumulation_steps"])
    found = int(given["steps_per_generation"] or accumulated)
    if found < accumulated and accumulated % found == 0 and given["num_iterations"] == 1:
        return accumulated  # several rollouts of one and the same policy
    if found % accumulated:
        raise UntranslatedError(
            f"steps_per_generation={found} must be a multiple of gradient_accumulation_steps={accumulated}: a rollout "
            "has whole optimizer steps here"
        )
    return found


def prompts(value: Any, given: Given) -> Any:
    """Prompts of a process in a rollout, of TRL's completions of a process in a micro-batch."""
    completions = int(given["per_device_train_batch_size"]) * rollout_steps(given)
    if completions % given["num_generations"]:
        raise UntranslatedError(
            f"a rollout of {completions} completions a process has no whole groups of num_generations="
            f"{given['num_generations']}: here all completions of a prompt are on one process"
        )
    return completions // given["num_generations"]


def minibatches(value: Any, given: Given) -> int:
    """Optimizer steps in a pass over a rollout."""
    return rollout_steps(given) // int(given["gradient_accumulation_steps"])


def rewards(value: Any, given: Given) -> Any:
    """A reward model's folder and import paths of functions."""
    found: list[Any] = [given["reward_model_name_or_path"]] if given["reward_model_name_or_path"] else []
    for name in given["reward_funcs"] or ():
        if name == "get_soft_overlong_punishment":
            found.append({"class_path": "SoftOverlong", "init_args": {"max_length": 1280, "buffer": 256}})
        elif "." in name:
            found.append(name)
        else:
            raise UntranslatedError(
                f"{name} has no counterpart here; give ExactMatch, NumericAnswer, RegexMatch, or the import path of a "
                "function of yours"
            )
    return found or SKIP


def cap(value: Any, given: Given) -> Any:
    """The clip range above 1; of `cispo` TRL gives the cap itself."""
    upper = given["epsilon"] if value is None else value
    if given["loss_type"] == "cispo":
        if upper < 1:
            raise UntranslatedError(f"TRL caps the ratio of cispo at {upper:g} itself, below 1; the paper's is 5")
        return upper - 1
    return upper if given["loss_type"] in CLIPPED else SKIP


def level(value: Any, given: Given) -> Any:
    """Of which ratio a loss is."""
    if given["loss_type"] == "luspo" and value != "sequence":
        raise UntranslatedError("luspo has the completion's ratio here: give importance_sampling_level: sequence")
    return SKIP if given["loss_type"] in ("luspo", "vespo") else value


def kl_estimator(value: Any, given: Given) -> Any:
    """k3, with TRL's factor or without, where there is a divergence."""
    return ("k3+score" if value else "k3") if given["beta"] else SKIP


def scaling(value: Any, given: Given) -> Any:
    """By what advantages are divided."""
    if given["multi_objective_aggregation"] == "normalize_then_sum":
        return SKIP
    return one_of({True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"})(value, given)


def losses(value: Any, given: Given) -> Any:
    """One loss of DPO by its name, several as a list."""
    found = [value] if isinstance(value, str) else list(value)
    if sorting := {"aot", "aot_unpaired"} & {*found}:
        raise UntranslatedError(
            f"{', '.join(sorted(sorting))} sorts the pairs of a micro-batch in TRL and those of a step here: write the "
            "step by hand, with micro_batch_size"
        )
    return found[0] if len(found) == 1 else found


def smoothing(value: Any, given: Given) -> Any:
    """Label smoothing where TRL reads it."""
    found = {given["loss_type"]} if isinstance(given["loss_type"], str) else {*given["loss_type"]}
    if not value or not found & {*SMOOTHED}:
        return SKIP
    if found & {"sigmoid", "sigmoid_norm"}:
        raise UntranslatedError("with several losses TRL reads it in robust and exo_pair alone, and here all read it")
    return value


def supervised(value: Any, given: Given) -> Any:
    """Which tokens are targets."""
    if given["assistant_only_loss"] or given["completion_only_loss"] is not False:
        return "completion"
    return "all"


def off_policy(value: Any, given: Given) -> Any:
    """The off-policy mask of DeepSeek-V3.2, with its threshold."""
    if value is None:
        return SKIP
    mask = {"level": "sequence", "metric": "k1", "action": "mask", "where": "negative", "against": "policy"}
    return mask | {"high": value}


def one_update(value: Any, given: Given) -> Any:
    """Nothing, where each rollout of RLOO makes one optimizer step."""
    if given["num_iterations"] != 1 or minibatches(None, given) != 1:
        raise UntranslatedError(
            "TRL clips the ratio of a whole completion, which the preset rloo does not: let each rollout make one "
            "optimizer step (num_iterations 1, steps_per_generation that of gradient_accumulation_steps)"
        )
    return SKIP
