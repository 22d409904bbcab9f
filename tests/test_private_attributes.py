"""What this project uses of Lightning, torch, transformers and jsonargparse though its name begins with "_".

One table: whose it is, its name, and why no public name serves. An upgrade that takes one away fails here by name.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers.modeling_layers import GradientCheckpointingLayer

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("alignment_modules", "datamodules")
DOCUMENTED = {"_asdict", "_replace", "_exit"}  # of namedtuple and os
# Read in another file than the one that defines it, or written into another's namespace.
OURS = {"_eval_meters", "_train_meters", "_keep_totals", "_check_total", "_resume_training"}


class Subcommands(ArgumentParser):
    """A parser with one subcommand that takes a number."""

    def __init__(self):
        super().__init__()
        inner = ArgumentParser()
        inner.add_argument("--size", type=int)
        self.add_subcommands().add_subcommand("fit", inner)


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def trainer():
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


TABLE = [
    (trainer, "_accelerator_connector", "whether Lightning itself started this process"),
    (trainer, "_checkpoint_connector", "a checkpoint of one process alone, after the others failed"),
    (trainer, "_signal_connector", "to agree on a signal over the processes, and to end the fit"),
    (lambda: trainer()._signal_connector, "_sigterm_notifier_fn", "its broadcast of SIGTERM meets that of a gradient"),
    (
        lambda: trainer().fit_loop,
        "_combined_loader_states_to_load",
        "the loaders' position, dropped by an early set-up",
    ),
    (lambda: trainer().fit_loop, "_load_combined_loader_states", "the same"),
    (lambda: trainer().fit_loop, "_data_fetcher", "the same: its iterator has the former position"),
    (ModelParallelStrategy, "_data_parallel_size", "known only once devices and nodes are"),
    (LightningModule, "_trainer", "`trainer` raises where there is none, and a module also works alone"),
    (lambda: TensorBoardLogger("."), "_experiment", "a writer whose thread has died: asking publicly makes another"),
    (ModelCheckpoint, "_last_checkpoint_saved", "the file saved last, so that none is written twice"),
    (ModelCheckpoint, "_last_global_step_saved", "its step"),
    (ModelCheckpoint, "_monitor_candidates", "the values that stand in a checkpoint's name"),
    (ModelCheckpoint, "_save_checkpoint", "saves to a name chosen here, and tells the loggers"),
    (ModelCheckpoint, "_save_topk_checkpoint", "saves now, by a clock that Lightning lacks in manual optimization"),
    (ModelCheckpoint, "_save_none_monitor_checkpoint", "where the former checkpoint is removed only after the next"),
    (ModelCheckpoint, "_should_remove_checkpoint", "keeps the checkpoint that a run was resumed from"),
    (ModelCheckpoint, "_should_skip_saving_checkpoint", "sanity checks, rehearsals and steps already saved"),
    (ModelCheckpoint, "_remove_checkpoint", "removes a former one on every file system"),
    (ModelCheckpoint, "_fs", "that file system"),
    (LightningCLI, "_get", "a configuration with or without a subcommand"),
    (LightningCLI, "_instantiate_trainer", "the only place where a callback made from the arguments can be added"),
    (LightningCLI, "_parse_ckpt_path", "it would put a checkpoint's hyperparameters over what was typed"),
    ("lightning.pytorch.core.mixins.hparams_mixin", "_given_hyperparameters", "what the command line hands a module"),
    ("lightning.fabric.utilities.types", "_PATH", "the signature of CheckpointIO"),
    (torch, "_foreach_mul_", "one kernel for all gradients; torch.nn.utils has none that scales"),
    (torch, "_foreach_norm", "one kernel for all norms, without stacking them on one device"),
    (lambda: torch.nn.Linear(1, 1), "_forward_hooks", "whether a layer does more than its formula"),
    (lambda: torch.nn.Linear(1, 1), "_forward_pre_hooks", "the same"),
    (torch.nn.Module, "_compiled_call_impl", "whether a model was compiled in place"),
    (lambda: torch.compile(torch.nn.Linear(1, 1)), "_orig_mod", "the model inside a compiled one, for its weights"),
    (LightningModule, "_compiler_ctx", "whether Lightning was given a compiled module, which is refused"),
    (lambda: torch.zeros(1), "_version", "whether a cached tensor was written to since"),
    (lambda: torch.zeros(1).to_sparse(), "_values", "the values of a sparse gradient that is not coalesced"),
    ("torch.distributed.distributed_c10d", "_get_default_store", "to agree where the others may hang in a collective"),
    (lambda: torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0), "_last_lr", "what get_last_lr returns"),
    (lambda: torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0), "_step_count", "torch's order of steps"),
    (transformers.PretrainedConfig, "_attn_implementation", "which attention a model really runs"),
    (transformers.PreTrainedModel, "_can_set_attn_implementation", "whether it can be switched"),
    (transformers.PreTrainedModel, "_supports_attention_backend", "the same"),
    (GradientCheckpointingLayer, "_gradient_checkpointing_func", "recomputation in eval mode: dropout stays off"),
    (Subcommands, "_actions", "the options of a parser, for help and for what comes close to a misspelt one"),
    (Subcommands, "_subcommands_action", "the parsers of its subcommands"),
]


def has(owner, name):
    """Whether an owner has an attribute, sets it in its constructor, or asks for it in its code."""
    if isinstance(owner, str):
        owner = importlib.import_module(owner)
    elif (not inspect.isclass(owner) and not inspect.ismodule(owner)) or owner is Subcommands:
        owner = owner()
    if hasattr(owner, name):
        return True
    return inspect.isclass(owner) and any(f"self.{name}" in inspect.getsource(level) for level in owner.__mro__[:-1])


@pytest.mark.parametrize(("owner", "name", "reason"), TABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_it_is_still_there(owner, name, reason):
    assert has(owner, name), f"{name} is gone: {reason}. Find another way before the upgrade."


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_uses(path):
    """The private names that a file reads or writes and does not define, with their lines."""
    tree = ast.parse(path.read_text())
    own, used = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute):
            at_home = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if at_home and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            used.append((node.attr, node.lineno))
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGES):
            used += [(part, node.lineno) for alias in node.names for part in (*node.module.split("."), alias.name)]
        elif isinstance(node, ast.Import):
            used += [(part, node.lineno) for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            used += [(str(name.value), node.lineno) for name in node.args[1:2] if isinstance(name, ast.Constant)]
    return [(name, line) for name, line in used if is_private(name) and name not in own | DOCUMENTED | OURS]


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_nothing_else_is_used():
    known = {name for _, name, _ in TABLE}
    found = {path: private_uses(path) for path in SOURCES}
    unknown = [
        f"{path.relative_to(ROOT)}:{line} {n}" for path, uses in found.items() for n, line in uses if n not in known
    ]
    assert not unknown, "not in the table: " + ", ".join(unknown)


def test_nothing_else_is_overridden():
    """A method of ours whose private name a class of another package has too takes its place, meant or not."""
    known, unknown = {name for _, name, _ in TABLE}, []
    for path in SOURCES:
        module = importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        for cls in [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]:
            foreign = [base for base in cls.__mro__[1:-1] if not base.__module__.startswith(PACKAGES)]
            mine = [name for name, value in vars(cls).items() if is_private(name) and inspect.isroutine(value)]
            names = [name for name in mine if name not in known]
            unknown += [f"{cls.__name__}.{name}" for name in names if any(name in vars(base) for base in foreign)]
    assert not unknown, unknown


def test_the_search_finds_what_it_is_for(tmp_path):
    (tmp_path / "code.py").write_text(
        "from lib import _a\nimport lib._b\ntrainer._c\ngetattr(x, '_d')\nself._e = 1\nself._e\nx._e2\nself._f\nx.__g__"
    )
    assert {name for name, _ in private_uses(tmp_path / "code.py")} == {"_a", "_b", "_c", "_d", "_e2", "_f"}


def test_nothing_in_the_table_is_unused():
    text = "\n".join(path.read_text() for path in SOURCES)
    assert [name for _, name, _ in TABLE if name not in text] == []
