"""Run by test_ranks.py: every paradigm takes one optimizer step on two ranks, and the weights' changes are saved.

Usage: python -m tests.contract.two_ranks FOLDER [variants]. The changes lie in FOLDER/one of a single rank, which gets
the union of the rows, and in FOLDER/ddp and FOLDER/fsdp2 of two, which are the same two processes: their imports take
longer than the steps. With `variants` it is every variant of the paradigms that act, with all weights and with LoRA.
"""

import copy
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from alignment_modules import AlignmentModule, PolicyConfig, SFTModule
from alignment_modules.policies.export import export_policy
from alignment_modules.policies.load import build_policy
from alignment_modules.policies.lora import LoraConfig, add_lora
from alignment_modules.policies.parts import train_part
from alignment_modules.policies.sharded import whole
from alignment_modules.training.muon import MuonWithAdamW
from tests import episodes
from tests.models import MIXTRAL, adapted, moved, other_than, quantized
from tests.paradigms import ROWS, build, headed
from tests.shapes import LLAMA


@dataclass
class Batches:
    """One batch a rank: 3 and 5 of 8 rows, so that the means of the ranks have different weights."""

    make: Callable[[list[int]], dict[str, Any]]
    devices: int

    def __len__(self) -> int:
        return self.devices

    def __getitem__(self, rank: int) -> dict[str, Any]:
        return self.make(list(range(8)) if self.devices == 1 else [list(range(3)), list(range(3, 8))][rank])


COUPLED = (
    "clip_cov",
    "kl_cov",
    "top entropy",
    "prompt mean",
    "reinforce_pp",
    "gdpo",
    "optimal_token whitened",
    "remax",
)
"""What GRPO's row varies and the rows of all ranks decide."""


QUANTIZED = (("sft", "8bit"), ("dpo", "4bit"), ("grpo", "4bit")) if importlib.util.find_spec("bitsandbytes") else ()
"""Paradigms on a quantized base, where its package is installed."""
ADAPTERS = {"dora": {"use_dora": True}, "pissa": {"init": "pissa"}, "olora": {"init": "olora"}}
"""Kinds of adapters beside the usual one."""
BESIDE = ("sft further", "dpo further", "dpo beside", "dpo beside dora")
"""Runs with a saved adapter that stays one (`merge_adapter=False`)."""


class NoTokenizer:
    """Decodes ids to text; enough for rewards."""

    eos_token_id, pad_token_id = 7, 0

    def __len__(self) -> int:
        return 40

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]


def many_threes(completions):
    """A reward that differs between samples."""
    return [float(text.count("3")) for text in completions]


def unjudged(rows):
    """Groups with none, one and two rewards of three; the first rank has none at all."""
    batch = ROWS["grpo"].batch(rows, group=3)
    judged = torch.tensor([row >= 3 and member < row - 3 for row in rows for member in range(3)])
    return batch | {"rewards": batch["rewards"].masked_fill(~judged, torch.nan)}


def differing(rows):
    """Groups of which one in four differs, none of them on the first rank."""
    batch = ROWS["grpo"].batch(rows)
    keep = torch.tensor([row in (3, 6) for row in rows for _ in range(4)])
    return batch | {"rewards": torch.where(keep, batch["rewards"], 1.0)}


def sampled(rows):
    """Prompts alone."""
    batch = ROWS["grpo"].batch(rows)
    return {key: batch[key] for key in ("prompts", "prompt_attention_mask")} | {"index": rows}


def taught(rows):
    """Rows of two teachers, of whom the first rank sees one."""
    return ROWS["distillation"].batch(rows) | {"teacher": ["b" if row > 3 else "a" for row in rows]}


SOURCES = ("math", "code", "math", "code", "chat", "chat", "code", "chat")
"""Of the rows: the first rank has none from the last source, and the second none from the first."""
SOURCED = ("sft", "dpo", "grpo", "orpo of tokens", "ppo shared with nll")
"""Paradigms and their variants on rows with sources and weights."""


def sourced(make: Callable) -> Callable:
    """Batches of rows with a source and a weight each."""

    def batch(rows):
        weights = torch.tensor([0.25 + 0.5 * (row % 5) for row in rows])
        return make(rows) | {"source_name": [SOURCES[row] for row in rows], "source_weights": weights}

    return batch


def experts() -> AlignmentModule:
    """SFT whose router loss takes shares over both ranks, which have two and three pieces."""
    torch.manual_seed(0)
    options = {"micro_batch_size": 2, "max_grad_norm": None}
    return SFTModule(
        policy=PolicyConfig(config=MIXTRAL), optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0), **options
    )


def muon() -> AlignmentModule:
    """SFT by Muon and AdamW, in float64: either makes a step of full size of a gradient's rounding error."""
    torch.manual_seed(0)
    return SFTModule(
        policy=PolicyConfig(config=LLAMA, dtype="float64"), optimizer=lambda groups: MuonWithAdamW(groups, lr=0.01)
    )


def last_layer_of(policy: torch.nn.Module) -> torch.nn.Module:
    """A copy of which the last layer alone is trained."""
    policy = copy.deepcopy(policy)
    train_part(policy, ["model.layers.1.*"], None)
    return policy


def acts(name: str, policy: torch.nn.Module) -> AlignmentModule:
    """A paradigm that acts on an environment; its ranks' episodes have other numbers of turns."""
    return episodes.build(name, policy, micro_batch_size=4, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))


def distils(policy: torch.nn.Module, share: float) -> AlignmentModule:
    """Distillation on episodes; at a share of 0.3 the first rank's rows are all given."""
    options = {"on_policy_share": share, "seed": 2}
    return episodes.distils(policy, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0), **options)


def failing_first(rows):
    """Rows of which the first rank's environments fail."""
    return episodes.batch(rows, fails=[row < 3 for row in rows])


WHOLE = ("muon", *(f"{name} {kind}" for name, kind in QUANTIZED))
"""What is refused in shards."""

Case = tuple[str, Callable[[], AlignmentModule], Callable]
VARIANTS = [(name, label) for name, row in ROWS.items() if row.kind == "acting" for label in row.variants]


def maker(policy: torch.nn.Module) -> Callable[..., AlignmentModule]:
    """Makes a paradigm's module on a copy of the policy, or on one that is given."""
    other = other_than(policy)

    def make(name: str, **options: Any) -> AlignmentModule:
        pieces = {} if ROWS[name].kind == "automatic" else {"micro_batch_size": 4}
        options = pieces | {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0)} | options
        return build(name, options.pop("policy", None) or copy.deepcopy(policy), other=copy.deepcopy(other), **options)

    return make


def variants(policy: torch.nn.Module, base: Path) -> Iterator[Case]:
    """Every loss, baseline and critic of the table, with all weights and with LoRA."""
    make = maker(policy)
    for name, label in VARIANTS:
        row = ROWS[name]
        batch, given = row.variant_batches.get(label, row.batch), row.variants[label]
        yield f"{name} {label}", lambda name=name, given=given: make(name, **given), batch
        yield (
            f"{name} {label} lora",
            lambda name=name, given=given: make(name, **given | {"policy": adapted(policy), "reference": None}),
            batch,
        )


def with_lora(name: str, policy: torch.nn.Module) -> dict[str, Any]:
    """What makes a paradigm train adapters, beside a reference with the adapters as they are where it has one."""
    given = {"policy": adapted(headed(name, policy))}
    return given | ({"reference": None} if "reference" in ROWS[name].options(policy) else {})


def changed(config: PolicyConfig) -> torch.nn.Module:
    """A policy with adapters that do something already."""
    torch.manual_seed(2)
    return moved(build_policy(config))


def fresh(base: Path, **options: Any) -> torch.nn.Module:
    """The policy of a folder with adapters of these options."""
    return changed(PolicyConfig(path=str(base), lora=LoraConfig(alpha=4, **options)))


def on_one_base(policy: torch.nn.Module, base: Path) -> list[Case]:
    """A saved adapter that is trained further, and one that is the reference on the policy's base."""
    make, saved = maker(policy), PolicyConfig(path=str(base / "saved"), merge_adapter=False)
    made: dict[str, Callable[[], AlignmentModule]] = {
        "sft further": lambda: make("sft", policy=build_policy(saved)),
        "dpo further": lambda: make("dpo", policy=changed(saved), reference=saved),
        "dpo beside": lambda: make("dpo", policy=fresh(base, r=2), reference=saved),
        "dpo beside dora": lambda: make("dpo", policy=fresh(base, r=2, use_dora=True), reference=saved),
    }
    return [(name, made[name], ROWS[name.partition(" ")[0]].batch) for name in BESIDE]


def starting(policy: torch.nn.Module) -> torch.nn.Module:
    """A policy whose adapters start from what their layers read."""
    torch.manual_seed(2)
    return add_lora(copy.deepcopy(policy), LoraConfig(r=2, alpha=4, init="eva"))


def cases(policy: torch.nn.Module, base: Path) -> Iterator[Case]:
    """One a paradigm, each with a piece of more rows than one rank has, and what only sampling can show."""
    make, other = maker(policy), other_than(policy)
    for name, row in ROWS.items():
        yield name, lambda name=name: make(name), row.batch
        for label, batch in row.batches.items():
            yield f"{name} {label}", lambda name=name: make(name), batch
    for loss in ("aot", "aot_unpaired"):
        options = {"loss": loss, "micro_batch_size": 2, "max_grad_norm": None}
        yield loss, lambda options=options: make("dpo", **options), ROWS["dpo"].batch
    for label, batch in (("experts", ROWS["sft"].batch), ("experts weighted", ROWS["sft"].batches["weighted"])):
        yield label, experts, batch
    yield "muon", muon, ROWS["sft"].batch
    yield "sft part", lambda: make("sft", policy=last_layer_of(policy)), ROWS["sft"].batch
    yield "dpo part", lambda: make("dpo", policy=last_layer_of(policy), reference=None), ROWS["dpo"].batch
    tokens = {"nll_unit": "tokens", "micro_batch_size": 2, "max_grad_norm": None}
    yield "orpo tokens", lambda: make("orpo", **tokens), ROWS["orpo"].batch
    yield "teachers", lambda: make("distillation", teacher={"a": copy.deepcopy(other), "b": adapted(other)}), taught
    own = ROWS["distillation"].variants["half on policy"]
    yield "on policy", lambda: make("distillation", **own), ROWS["distillation"].batch
    yield "on policy lora", lambda: make("distillation", policy=adapted(policy), **own), ROWS["distillation"].batch
    for name, row in ROWS.items():
        yield f"{name} lora", lambda name=name: make(name, **with_lora(name, policy)), row.batch
    for kind, options in ADAPTERS.items():
        yield (
            f"dpo {kind}",
            lambda options=options: make("dpo", policy=adapted(policy, **options), reference=None),
            ROWS["dpo"].batch,
        )
    yield "ppo eva", lambda: make("ppo", policy=starting(policy), reference=None, critic=None), ROWS["ppo"].batch
    yield "sft eva", lambda: make("sft", policy=starting(policy)), ROWS["sft"].batch
    for name, kind in QUANTIZED:
        held = {"reference": None} if "reference" in ROWS[name].options(policy) else {}
        yield (
            f"{name} {kind}",
            lambda name=name, kind=kind, held=held: make(name, policy=quantized(policy, kind, base), **held),
            ROWS[name].batch,
        )
    yield from on_one_base(policy, base)
    for label in ("scaled", "shared with nll", "bootstrap", "turns"):
        yield f"ppo {label}", lambda label=label: make("ppo", **ROWS["ppo"].variants[label]), ROWS["ppo"].batch
    online = {"rewards": many_threes, "tokenizer": NoTokenizer()}
    for name, batch, group in (("batch", lambda rows: ROWS["grpo"].batch(rows), 4), ("unjudged", unjudged, 3)):
        yield name, lambda group=group: make("grpo", scale_rewards="batch", num_generations=group, **online), batch
    yield (
        "dynamic",
        lambda: make("grpo", dynamic_sampling=1, scale_rewards="batch", beta=0.0, reference=None),
        differing,
    )
    control: dict[str, Any] = {"kl_target": 0.001, "kl_horizon": 40, "entropy_target": 3.0, "num_iterations": 2}
    control["optimizer"] = lambda groups: torch.optim.SGD(groups, lr=0.1)
    yield "controllers", lambda: make("grpo", **control), ROWS["grpo"].batch
    for label in COUPLED:
        row = ROWS["grpo"]
        options, batch = row.variants[label], row.variant_batches.get(label, row.batch)
        yield f"grpo {label}", lambda options=options: make("grpo", **options), batch
    for label in SOURCED:
        name, _, variant = label.partition(" ")
        options = ROWS[name].variants.get(variant, {}) | ({"micro_batch_size": 2} if variant else {})
        batch = sourced(ROWS[name].batch)
        yield f"{label} sources", lambda name=name, options=options: make(name, **options), batch
    taught_by = {"teacher": copy.deepcopy(other), "teacher_coef": 0.3, "scale_rewards": "batch"}
    yield "teacher", lambda: make("grpo", **taught_by), ROWS["grpo"].batch
    acting = episodes.policy()
    for name in episodes.OPTIONS:
        yield f"{name} episodes", lambda name=name: acts(name, acting), episodes.batch
    yield "grpo episodes of one rank", lambda: acts("grpo", acting), failing_first
    for label, share, batch in (("", 1.0, episodes.batch), (" of one rank", 0.3, episodes.labelled)):
        yield f"distillation episodes{label}", lambda share=share: distils(acting, share), batch
    several = {"minibatches": 2, "num_iterations": 2, "beta": 0.0, "reference": None}
    yield "sampled", lambda: make("grpo", **several, **online), sampled


def fit(folder: Path, strategy: str, which: Callable[[torch.nn.Module, Path], Iterator[Case]], base: Path) -> None:
    """Fits each case for one batch and saves the changes on rank 0."""
    devices = 1 if strategy == "auto" else 2
    L.seed_everything(0)
    for name, make, batch in which(build_policy(PolicyConfig(config=LLAMA)), base):
        if strategy == "fsdp2" and name in WHOLE:
            continue
        module = make()
        before = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, DataLoader(Batches(batch, devices), batch_size=None))
        extra = module.extra_state()  # which ranks may put together
        after = {key: whole(p.detach()) for key, p in module.named_parameters() if key in before}
        if trainer.is_global_zero:
            change = {key: after[key] - value for key, value in before.items()}
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            saved = {"change": change, "metrics": metrics, "extra": extra}
            torch.save(saved, folder / f"{name}.pt")


def main(folder: Path, which: Callable[[torch.nn.Module, Path], Iterator[Case]]) -> None:
    """All cases, first alone; the second rank begins here, too, once the first looks for it."""
    with tempfile.TemporaryDirectory() as made:  # by each rank for itself, and now: once they have met, one would write
        base = Path(made)
        L.seed_everything(0)
        build_policy(PolicyConfig(config=LLAMA)).save_pretrained(base)  # type: ignore[operator]
        export_policy(fresh(base, r=3), base / "saved", lora="adapter")
        for name, strategy in (("one", "auto"), ("ddp", "ddp"), ("fsdp2", "fsdp2")):
            if name == "one" and "LOCAL_RANK" in os.environ:
                continue
            (folder / name).mkdir(exist_ok=True)
            fit(folder / name, strategy, which, base)


if __name__ == "__main__":
    main(Path(sys.argv[1]), variants if sys.argv[2:] == ["variants"] else cases)
