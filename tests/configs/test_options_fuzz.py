"""Every option of every class that a configuration can name, with every kind of value that it cannot mean.

A value is refused with one message that names the option and the value, or it stands in `ACCEPTED` with a reason.
"""

import contextlib
import copy
import io
import json
import math
import typing
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn

import datamodules
from alignment_modules.cli.classes import (
    CALLBACKS,
    CURRICULA,
    REWARDS,
    TASKS,
    bases_of,
    options_of,
    path_of,
    subclasses,
)
from alignment_modules.cli.errors import AlignArgumentParser, find_cause
from alignment_modules.cli.failures import is_message
from alignment_modules.evaluation import EvaluationConfig
from alignment_modules.functional.ranges import Range
from alignment_modules.policies import config as policy_config
from alignment_modules.policies import lora
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.lora import LoraConfig
from alignment_modules.rollouts.environments import ToolOptions
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.muon import MuonWithAdamW
from alignment_modules.training.parameter_groups import parameter_groups
from alignment_modules.training.schedules import Schedule
from datamodules.streams.options import StreamOptions

MODULES = [c for c in subclasses([AlignmentModule]) if c.__module__.startswith("alignment_modules.")]
DATA = [c for c in subclasses([LightningDataModule]) if c.__module__.startswith("datamodules.")]
OPTIMIZERS = [MuonWithAdamW]
SCHEDULES = [c for c in subclasses([Schedule]) if c.__module__.startswith("alignment_modules.")]
NEEDED = {
    "GRPOModule": {"rewards": "ExactMatch"},
    "GroupModule": {"rewards": "ExactMatch"},
    "DPOModule": {"f_divergence": "alpha"},
    "DistillationModule": {"teacher": "nowhere", "on_policy_share": 1.0},
    "SequenceClassifier": {"path": "nowhere"},
    "PatientReward": {"reward": "ExactMatch"},
    "PPOModule": {"rewards": "ExactMatch"},
    "ChatJudge": {"url": "http://localhost:8000/v1", "model_name": "small"},
    "RegexMatch": {"pattern": "x"},
    "ByColumn": {"column": "level"},
    "MixtureDataModule": {"sources": {"a": {"class_path": "SFTDataModule"}}},
    **{cls.__name__: {"split": "train", "size": 2} for cls in TASKS},
    "ReasoningGymPrompts": {"task": "chain_sum", "split": "train", "size": 2},
}
CHOICES = {
    "loss",
    "f_divergence",
    "kl_estimator",
    "scale_rewards",
    "preset",
    "baseline",
    "dtype",
}  # text of a fixed set
LEVELS, TOOL = (f"tests.rollouts.environments.things.{name}" for name in ("Counter", "double"))
OBJECTS = {  # options that take objects: what none of them can be
    "policy": [None, 3, [], {}, {"pth": "x"}, [1]],
    "reference": [3, [], {"pth": "x"}],
    "optimizer": [None, 3, "nosuch", {"class_path": "nosuch"}, {"class_path": "SFTModule"}],
    "lr_scheduler": [3, "nosuch", {"class_path": "nosuch"}],
    "rewards": [None, [], 3, "nosuch", [None], {"class_path": "nosuch"}, ["ExactMatch", 3]],
    "verifier": [3, "nosuch", {"class_path": "nosuch"}],
    "evaluation": [3, "nosuch", [1]],
    "lora": [3, "nosuch", [1]],
    "columns": [3, "nosuch", [1]],
    "parameters": [3, "nosuch", [1]],
    "sources": [None, 3, {}, [], "nosuch", {"a": None}, {"a": 3}, {"a": {}}, {"a": {"class_path": "nosuch"}}],
    "data": [None, 3, [], "nosuch", {"class_path": "nosuch"}, {"class_path": "SFTModule"}],
    "curriculum": [3, "nosuch", [1], {"class_path": "nosuch"}, {"class_path": "SFTModule"}, "Curriculum"],
    "cache": [3, "nosuch", [1], {"foldr": "x"}],
    "stream": [3, "nosuch", [1], {"buffersize": 3}],
    "environments": [
        *(3, "nosuch", "math.nosuch", "math.pi", "math.sqrt", [], [1], {}, {"class_path": "nosuch"}, {"a": None}),
        *({"a": 3}, {"a": "math.pi"}, {"a": {"class_path": "nosuch"}}),
        *({"class_path": LEVELS, "nosuch": 1}, {"class_path": LEVELS, "init_args": {"nosuch": 1}}),
        TOOL,  # no environment
    ],
    "tools": [
        *(3, [], {}, {"a": 1}, [None], [3], {"class_path": "nosuch"}, [{"class_path": "nosuch"}]),
        *("nosuch", "math.nosuch", "math.pi", "math.sqrt", ["nosuch"], ["math.pi"], [LEVELS, LEVELS], [TOOL, TOOL]),
    ],
    "tool_options": [3, "nosuch", [1], {"formt": "llama"}, {"time_limit": 0}, {"format": "nosuch"}],
    "format": [3, [1], {"a": 1}, "nosuch", "math.pi", "math.nosuch"],
}
ACCEPTED = {
    # (option, value): why it is no mistake
    ("entropy_coef", -1): "a penalty on the entropy",
}


def parts(hint):
    """The alternatives of a type, without null, and whether null is one."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [a for a in alternatives if a is not NoneType], NoneType in alternatives


def malformed(name, hint):
    """Values that an option of this type cannot mean."""
    alternatives, optional = parts(hint)
    if name in OBJECTS and not (name == "cache" and str in alternatives):  # a judge's is a file
        return OBJECTS[name]
    values = [] if optional else [None]
    kinds = {get_origin(a) or a for a in alternatives}
    for alternative in alternatives:
        origin, arguments = get_origin(alternative), get_args(alternative)
        if origin is Annotated:
            limits = arguments[1]
            values += [math.nan, math.inf, -math.inf, True, [1]]
            values += [] if str in kinds else ["few"]
            values += [2.5, 1e20] if arguments[0] is int else []
            step = 1 if arguments[0] is int else 0.5
            ends = [(limits.least, -step, "("), (limits.greatest, step, ")")]
            values += [end if bracket in limits.ends else end + out for end, out, bracket in ends if math.isfinite(end)]
        elif origin is Literal:
            values += ["nosuch", 3, [arguments[0]]]
        elif alternative is bool:
            values += ["maybe", 2, [True]]
        elif alternative is str and len(alternatives) == 1:
            values += [[1], {"a": 1}, *(["nosuch"] if name in CHOICES else [])]
        elif origin is list:
            element = malformed("", arguments[0])
            values += [{"a": 1}, *[[value] for value in element if value != "few"]]
    return [value for value in values if not any(means(value, alternative) for alternative in alternatives)]


def means(value, alternative):
    """Whether a value is one of a plain alternative of a type: what one alternative refuses another may take."""
    if get_origin(alternative) is Annotated and get_args(alternative)[0] is int:
        return type(value) is int and value in get_args(alternative)[1]
    return alternative is bool and type(value) is bool


def cases():
    for group, classes in (("model", MODULES), ("data", DATA), ("callback", CALLBACKS), ("schedule", SCHEDULES)):
        for cls in classes:
            yield group, cls
    for group, classes in (
        *(("reward", REWARDS), ("task", TASKS), ("optimizer", OPTIMIZERS)),
        ("curriculum", CURRICULA),
    ):
        for cls in classes:
            yield group, cls
    yield "source", datamodules.MixtureSource
    yield "evaluation", EvaluationConfig
    yield "policy", PolicyConfig
    yield "lora", LoraConfig
    yield "tools", ToolOptions
    yield "cache", datamodules.CacheOptions
    yield "stream", StreamOptions


@pytest.fixture(scope="module")
def parser():
    made = AlignArgumentParser(prog="align fit")
    made.add_subclass_arguments(AlignmentModule, "model", required=False)
    made.add_subclass_arguments(LightningDataModule, "data", required=False)
    made.add_argument("--trainer.callbacks", type=list[Callback])
    return made


def configuration(group, cls, options):
    spec = {"class_path": path_of(cls), "init_args": NEEDED.get(cls.__name__, {}) | options}
    if group == "model":
        return {"model": {"class_path": spec["class_path"], "init_args": {"policy": "nowhere"} | spec["init_args"]}}
    if group == "data":
        return {"data": spec}
    if group == "source":
        source = {"data": {"class_path": "PromptDataModule", "init_args": {"train": "nowhere"}}} | options
        return configuration("data", datamodules.MixtureDataModule, {"sources": {"a": source}})
    if group == "callback":
        return {"trainer": {"callbacks": [spec]}}
    inside = {
        "schedule": {"lr_scheduler": spec},
        "optimizer": {"optimizer": spec},
        "reward": {"rewards": [spec]},
        "evaluation": {"evaluation": options},
        "policy": {"policy": {"path": "nowhere"} | options},
        "lora": {"policy": {"path": "nowhere", "lora": options}},
        "tools": {"evaluation": {"tools": [TOOL], "tool_options": options}},
    }
    if group == "curriculum":
        return configuration("data", datamodules.PromptDataModule, {"curriculum": spec})
    if group == "cache":
        return configuration("data", datamodules.SFTDataModule, {"cache": options})
    if group == "stream":
        return configuration("data", datamodules.SFTDataModule, {"train": "nowhere", "stream": options})
    if group == "task":
        return configuration("data", datamodules.SFTDataModule, {"train": spec})
    module = "GRPOModule" if group == "reward" else "SFTModule"
    return configuration("model", next(c for c in MODULES if c.__name__ == module), inside[group])


def stub_policy(policy, *arguments, **keywords):
    """What stands for loading weights: the checks that come before it."""
    if isinstance(policy, PolicyConfig):
        policy_config.check_options(policy, trainable=True)
        if policy.lora is not None:
            lora._check_options(policy.lora)
    elif not isinstance(policy, str | nn.Module):
        raise TypeError(f"policy={policy!r}")
    return nn.Linear(2, 2)


def outcome(parser, given):
    """ "refused" with its text, "accepted", or "traceback" with the error."""
    stream = io.StringIO()
    try:
        with contextlib.redirect_stderr(stream):
            built = parser.instantiate(parser.parse_object(copy.deepcopy(given)))
            if MuonWithAdamW.__name__ in str(given):
                built.get("model").make_optimizer(parameter_groups(nn.Linear(2, 2)))
            schedule = getattr(built.get("model"), "make_lr_scheduler", None)
            if schedule is not None:
                schedule(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    except SystemExit:
        return "refused", stream.getvalue()
    except Exception as error:
        error = find_cause(error)
        return ("refused" if is_message(error) else "traceback"), f"{error!r}"
    return "accepted", ""


def words(value):
    """How a message may show a value."""
    if value is None:
        return {"None", "null", "not given"}
    if value == {}:
        return {"{}", "neither is given"}
    if isinstance(value, list | dict) and value:
        entries = value.values() if isinstance(value, dict) else value
        return {str(value), repr(value), *(word for entry in entries for word in words(entry))}
    return {str(value), repr(value), *([repr(int(value))] if value == 1e20 else [])}


@pytest.mark.parametrize(("group", "cls"), list(cases()), ids=lambda value: getattr(value, "__name__", value))
def test_what_an_option_cannot_mean_is_refused(parser, monkeypatch, group, cls):
    monkeypatch.setattr("alignment_modules.training.module.build_policy", stub_policy)
    for place in ("paradigms.dpo", "paradigms.online_dpo", "training.policy_gradient"):
        monkeypatch.setattr(f"alignment_modules.{place}.frozen_companion", stub_policy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong, count = [], 0
    for level, parameter, hint, _ in options_of(cls):
        if group in ("model", "data") and level not in vars_of(cls, group):
            continue
        for value in malformed(parameter.name if bases_of(hint) or group != "source" else "", hint):
            if (parameter.name, value if isinstance(value, int) else None) in ACCEPTED:
                continue
            count += 1
            result, text = outcome(parser, configuration(group, cls, {parameter.name: value}))
            named = parameter.name in text and any(word in text for word in words(value))
            short = len(text.strip().splitlines()) <= 6 and text.count("error:") <= 1
            if result != "refused" or not named or not short:
                wrong.append(f"{parameter.name}={value!r}: {result} {text.strip()[:300]}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def vars_of(cls, group):
    """The classes whose options are tried with this one: those of a base once, with the first that has them."""
    levels = {c: {level for level, *_ in options_of(c)} for c in (MODULES if group == "model" else DATA)}
    return {base for base in levels[cls] if cls is next(c for c, found in levels.items() if base in found)}


@pytest.mark.parametrize("form", ["ExactMatch", [{"class_path": "ExactMatch"}], ["ExactMatch", "RegexMatch"]], ids=str)
def test_short_names_of_rewards(parser, monkeypatch, form):
    """On the command line, where values are text, and in a file, which is read by the same loader."""
    monkeypatch.setattr("alignment_modules.training.module.build_policy", stub_policy)
    given = [
        "--model=GRPOModule",
        "--model.policy=nowhere",
        f"--model.rewards={form if isinstance(form, str) else json.dumps(form)}",
    ]
    if form[-1] == "RegexMatch":
        with pytest.raises(ValueError, match="class that needs arguments"):
            parser.instantiate(parser.parse_args(given))
        return
    assert parser.instantiate(parser.parse_args(given)).model.rewards.names == ("exact_match",)


@pytest.mark.parametrize("cls", dict.fromkeys(cls for _, cls in cases()), ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    for _, parameter, hint, _ in options_of(cls):
        if parameter.name not in ("label",):
            plain = [a for a in parts(hint)[0] if a in (int, float)]
            assert not plain, f"{cls.__name__}.{parameter.name}: {hint}"


def test_both_packages_check_alike():
    """They import nothing of each other, so each has the same file."""
    from pathlib import Path

    import alignment_modules.functional.ranges
    import datamodules.ranges

    ours, theirs = alignment_modules.functional.ranges, datamodules.ranges
    assert Path(ours.__file__).read_text() == Path(theirs.__file__).read_text()
    assert typing.get_args(ours.Share)[1] == Range(0, 1)
    assert REWARDS
