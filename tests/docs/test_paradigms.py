"""The pages of the paradigms say what is true: their options are the constructor's, their metrics those logged."""

import ast
import copy
import inspect
import re

import pytest
import torch

from alignment_modules import AlignmentModule, get_module_class
from alignment_modules.paradigms import PARADIGMS
from alignment_modules.policies import PolicyConfig, build_policy
from tests.contract.two_ranks import NoTokenizer
from tests.docs.pages import METRICS, MODULES, ROOT, names, section
from tests.docs.pages import PAGES as EVERY_PAGE
from tests.docs.pages import PARADIGMS as IN_README
from tests.docs.pages import cells as table
from tests.models import MIXTRAL, other_than
from tests.paradigms import ROWS, build, headed

PAGES = {page.split("/")[-1].removesuffix(".md"): text for page, text in EVERY_PAGE.items() if "/paradigms/" in page}
PAGES.pop("index", None)
SECTIONS = ["When to use it", "Recipe", "Loss", "Options", "Metrics", "What to watch", "Learning rates that work"]
SECTIONS += ["What is exact"]
EVERY = pytest.mark.parametrize("name", PAGES)


def cells(page, heading):
    """Rows of the first table below a heading."""
    return table(section(page, heading))


def own_options(cls):
    """Keywords of a class and their defaults, less those that every paradigm has."""
    every = inspect.signature(AlignmentModule.__init__).parameters
    found = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and issubclass(base, AlignmentModule):
            for option in inspect.signature(base.__init__).parameters.values():
                if option.kind is option.KEYWORD_ONLY and option.name not in every:
                    found.setdefault(option.name, option.default)
    return found


def test_every_paradigm_has_a_page_that_the_readme_links_to():
    assert set(PAGES) == {module.paradigm for module in PARADIGMS}
    for text, folder in ((IN_README, "docs/paradigms/"), (MODULES, "")):
        assert [row[0] for row in table(text)] == [f"[`{name}`]({folder}{name}.md)" for name in ROWS]


@EVERY
def test_sections(name):
    page = re.sub("^```.*?^```", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    assert re.findall("^# (.*)", page, flags=re.MULTILINE) == [get_module_class(name).__name__]
    assert re.findall("^## (.*)", page, flags=re.MULTILINE) == SECTIONS
    introduction = page.split("\n## ")[0].splitlines()[1:]
    assert len("\n".join(introduction).strip().split("\n\n")) == 1
    assert all(section(page, heading).strip() for heading in SECTIONS)


@EVERY
def test_options(name):
    told = {names(option)[0]: default for option, default, _ in cells(PAGES[name], "Options")}
    options = own_options(get_module_class(name))
    assert set(told) == set(options)
    for option, default in options.items():
        if default is inspect.Parameter.empty:
            assert told[option] == "required", option
        else:
            assert repr(ast.literal_eval(names(told[option])[0])) == repr(default), option


def one_step(name, policy, train, *, without=(), more=None, variant="", **options):
    """What one optimizer step of a paradigm logs."""
    module = build(name, policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)
    batch = ROWS[name].variant_batches.get(variant, ROWS[name].batch)(range(8)) | (more or {})
    return set(train(module, [{key: value for key, value in batch.items() if key not in without}]).callback_metrics)


def given(completions):
    """A reward that goes by the name of those that a batch brings."""
    return [float(len(text)) for text in completions]


def further(name, policy, train):
    """Names that none of the contract's variants logs."""
    if name in ("pretrain", "sft"):
        torch.manual_seed(0)
        return one_step(name, build_policy(PolicyConfig(config=MIXTRAL)), train)
    if name == "dpo":
        return one_step(name, policy, train, log_logits=True)
    if name == "distillation":
        more = {"teacher": ["NAME"] * 8}
        return one_step(name, policy, train, teacher={"NAME": other_than(policy)}, more=more)
    if name in ("grpo", "ppo"):
        rollout = ("responses", "response_mask", "rewards", "old_logprobs", "greedy_rewards")
        options = {"rewards": given, "tokenizer": NoTokenizer()} | ({"baseline": "greedy"} if name == "grpo" else {})
        return one_step(name, policy, train, without=rollout, **options)
    return set()


@EVERY
def test_metrics(tiny_llama, train, name):
    every = {metric for cell, stages, *_ in table(METRICS) if stages == "all" for metric in names(cell)} - {"loss"}
    fresh = lambda: headed(name, copy.deepcopy(tiny_llama))  # noqa: E731
    logged = further(name, fresh(), train)
    for variant, options in [("", {}), *ROWS[name].variants.items()]:
        logged |= one_step(name, fresh(), train, variant=variant, **options)
    logged = {re.sub("rewards/(given|never_called|never_called_2)/", "rewards/NAME/", metric) for metric in logged}
    logged = {metric.removeprefix("train/") for metric in logged}
    told = [metric for cell, _ in cells(PAGES[name], "Metrics") for metric in names(cell)]
    assert len(told) == len(set(told))
    assert set(told) == logged - every


@EVERY
def test_the_recipe_is_the_shipped_one_and_has_what_to_change_first(name):
    text = section(PAGES[name], "Recipe")
    assert f"align fit --config {name} --model.policy.path my-model" in text
    options = set(own_options(get_module_class(name))) | set(inspect.signature(AlignmentModule.__init__).parameters)
    assert set(re.findall(r"--model\.(\w+)", text)) - {"policy"}
    assert set(re.findall(r"--model\.(\w+)", text)) <= options


@EVERY
def test_what_to_watch_is_logged(name):
    """What the signs name is a metric of the page, of every paradigm, or of validation and test."""
    logged = {metric: stages for cell, *stages in table(METRICS) for metric in names(cell)}
    told = {metric for cell, _ in cells(PAGES[name], "Metrics") for metric in names(cell)}
    signs = [metric for sign, _, _ in cells(PAGES[name], "What to watch") for metric in names(sign)]
    assert len(signs) > 3
    for metric in signs:
        stage, _, plain = metric.partition("/")
        if stage in ("val", "test") and plain in logged:
            continue
        assert metric in told or logged[metric][0] == "all", metric
    assert section(PAGES[name], "What to watch").strip().startswith("It goes well when ")


def test_every_picture_of_a_failure_is_drawn_by_the_benchmark_and_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from failures import FAILURES

    drawn = {path.stem for path in (ROOT / "docs/paradigms/failures").iterdir()}
    shown = [picture for page in PAGES.values() for picture in re.findall(r"\(failures/(\w+)\.svg\)", page)]
    assert drawn == set(FAILURES)
    assert sorted(shown) == sorted(drawn)
