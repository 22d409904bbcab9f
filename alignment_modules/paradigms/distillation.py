"""Distillation (arXiv:1503.02531, arXiv:2306.13649): a student learns a teacher's whole next-token distribution."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from alignment_modules.functional import Divergence
from alignment_modules.functional.divergence import JsdBeta
from alignment_modules.functional.ranges import Count, Positive, Seed, Share, check_options
from alignment_modules.functional.statistics import RowSums
from alignment_modules.policies.divergence import divergence
from alignment_modules.policies.frozen import Frozen, frozen_companion
from alignment_modules.policies.load import PolicyConfig
from alignment_modules.policies.reading import Reading, read
from alignment_modules.policies.scoring import Ask, score
from alignment_modules.policies.segments import Segments
from alignment_modules.policies.tokenizers import compared_ids, tokenizer_path
from alignment_modules.rollouts.parameters import SamplingOptions
from alignment_modules.training.episodes import EpisodeModule
from alignment_modules.training.loss_weights import LOSS_WEIGHTS, label_segments, row_weights, weigh
from alignment_modules.training.objective import Objective
from alignment_modules.training.own_rows import OwnRows

Teacher = str | PolicyConfig | nn.Module


class DistillationModule(EpisodeModule):
    r"""Training towards a teacher on batches of `input_ids`, `labels` (-100 where not supervised), `attention_mask`.

    The loss of a step is the divergence between the student's and the teacher's distributions of the next token, over
    the whole vocabulary, averaged over the supervised tokens of the step: which tokens are supervised, and what comes
    before them, is all that is taken of the data. Both models read the same tokens, each with its own head. Logits are
    made chunk by chunk and never held for all positions.

    Where batches bring `loss_weights` `[batch, time]`, the mean is weighted, as `SFTModule` says; so are `loss` and
    `divergence/NAME` as logged, and the other metrics are not.

    With several teachers a batch's `teacher`, a list of names `[batch]`, says whom each row is to be learnt from.

    With `on_policy_share` above 0 the policy writes that share of a training batch's rows itself, as it is at that step
    (on-policy distillation, arXiv:2306.13649, whose `lambda` it is): what stands before a row's first supervised token
    is its prompt, what follows is replaced. Samples are drawn, and both models compared, at `temperature`. The samples
    are constants of the loss. With a share of 1 batches may hold prompts alone (`prompts`, `prompt_attention_mask`).

    With `environments` or `tools` what the policy writes are episodes of several turns, which begin with a row's column
    `prompt`: its own tokens are learnt, those of tools are read by both models and left out. Rewards are not asked for;
    an episode whose environment failed teaches nothing.

    Args:
        teacher: Who is learnt from: a folder or hub id (loaded in the policy's dtype), a `PolicyConfig` or a module,
            which is frozen in place; or several by name. It must have the policy's vocabulary; where the tokenizer is
            known, heads may be padded to different sizes.
        divergence: "reverse", `KL(student || teacher)`, seeks a mode of the teacher (arXiv:2306.08543); "forward",
            `KL(teacher || student)`, covers all of them (arXiv:1503.02531); "jsd" is between (arXiv:2306.13649).
        jsd_beta: Share of the teacher in the mixture of "jsd".
        temperature: Divides the logits of both. The loss is not multiplied by its square.
        on_policy_share: Share of the rows whose completion the policy writes itself.
        max_completion_length: Longest such completion in tokens; None: 256.
        seed: Of these samples, and of which rows they are; None: the global seed. What a row gets depends on this seed,
            the optimizer step and the row's index alone.
        **common: Keywords of `EpisodeModule` (environments, tools, engine; not with `on_policy_share` 0) and
            `AlignmentModule` (policy, optimizer, lr_scheduler, tokenizer, evaluation).

    Raises:
        ValueError: If an option has a value that is not allowed, or a teacher cannot be built.
    """

    paradigm = "distillation"
    batch_keys = ("input_ids", "labels")
    compares_log_probs = True
    bar = ("loss", "mean_token_accuracy")

    def __init__(
        self,
        *,
        teacher: Teacher | dict[str, Teacher],
        divergence: Divergence = "reverse",
        jsd_beta: JsdBeta = 0.5,
        temperature: Positive = 1.0,
        on_policy_share: Share = 0.0,
        max_completion_length: Count | None = None,
        seed: Seed | None = None,
        **common: Any,
    ) -> None:
        check_options(DistillationModule.__init__, locals())
        if jsd_beta != 0.5 and divergence != "jsd":
            raise ValueError(f"jsd_beta={jsd_beta} is of divergence='jsd', got divergence={divergence!r}")
        of_samples: dict[str, Any] = {"max_completion_length": max_completion_length, "seed": seed}
        of_samples |= {option: common.get(option) for option in ("engine", "environments", "tools")}
        for option, value in of_samples.items():
            if value is not None and not on_policy_share:
                shown = type(value).__name__ if option == "engine" else value
                raise ValueError(
                    f"{option}={shown} is of the policy's own samples, and on_policy_share=0 asks for none"
                )
        super().__init__(**common)
        self.options: Any = {"kind": divergence, "jsd_beta": jsd_beta, "temperature": temperature}
        self.own_rows: OwnRows | None = None
        if on_policy_share:
            sampling = SamplingOptions(max_completion_length or 256, temperature)
            self.engine.check("", sampling)
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
            self.own_rows = OwnRows(on_policy_share, sampling, seed, episodes=self.episodes)
        self._written: dict[str, Any] | None = None
        several = _by_name(teacher)
        self.teacher: Frozen | nn.ModuleDict
        if several is None:
            self.teacher = frozen_companion(teacher, self.policy, name="teacher")  # type: ignore[arg-type]
        else:
            found = {k: frozen_companion(v, self.policy, name=f"teacher.{k}") for k, v in several.items()}
            self.teacher = nn.ModuleDict(found)
        given = {"": teacher} if several is None else several
        self._paths = {name: tokenizer_path(model) for name, model in given.items()}
        self._compared: dict[str, int | None] = {}

    def setup(self, stage: str) -> None:
        """Also checks that the teachers' tokens are the policy's.

        Raises:
            ValueError: If a teacher's tokenizer gives another id to a token, or its head has another size and no
                tokenizer tells which of its tokens count.
        """
        super().setup(stage)
        for name, companion in self._teachers():
            what, model = f"teacher.{name}".rstrip("."), companion.module or self.policy
            self._compared[name] = compared_ids(self.policy, model, self.tokenizer, self._paths[name], name=what)

    def segments(self, batch: Mapping[str, Any]) -> Segments | None:
        """What both models read of a batch; on the host when it comes from the loader, and carried over with it.

        None in training, where the policy is yet to write some rows.
        """
        return None if self.training and self.own_rows is not None else label_segments(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """A micro-batch's mean, of rows some of which the policy may write first."""
        if self.own_rows is not None:
            batch, told = self.own_rows.write(self.policy, self.engine, self.codec, batch, self.global_step)
            self._written = batch
            self._train_meters.update(told)
            self.engine.sleep()
        return super().training_step(batch, batch_idx)

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """How much a batch holds, with what the policy has written of it."""
        return super().count_tokens(batch if self._written is None else self._written)

    def objective(self, batch: dict[str, Any]) -> Objective:
        """Divergence summed over the supervised tokens, by their weights."""
        segments, weights = batch.get("segments") or label_segments(batch), batch.get(LOSS_WEIGHTS)
        lessons: dict[str, Reading] = {}
        for name, companion in self._teachers():  # before the policy, whose graph would be held meanwhile
            with companion.reading() as model:
                lessons[name] = read(model, self._lesson(name, batch, segments) if name else segments)
        reading = read(self.policy, segments)
        mask = segments.mask()
        parts = {
            name: weigh(divergence(reading, lesson, vocabulary=self._compared.get(name), **self.options), mask, weights)
            for name, lesson in lessons.items()
        }
        losses = torch.stack([part.sum(dim=1) for part in parts.values()]).sum(dim=0)
        statistics = {
            f"divergence/{name}": RowSums(part.sum(dim=1), row_weights(lessons[name].segments.mask(), weights)).mean
            for name, part in parts.items()
            if name
        }
        rows: dict[str, RowSums] = {}
        if not self.training or self.logging_due:
            asked: tuple[Ask, ...] = ("entropy", "accuracy")
            with torch.no_grad():
                scores = score(reading, ask=asked)
            told = {"nll_loss": -scores.token_logps, "mean_token_accuracy": scores.correct, "entropy": scores.entropy}
            rows = {name: RowSums(values.sum(dim=1), mask.sum(dim=1)) for name, values in told.items()}  # type: ignore[union-attr]
        return Objective.of_rows(losses, row_weights(mask, weights), statistics, rows)

    def describe(self) -> dict[str, str]:
        """Adds the divergence and its normaliser."""
        kind, beta, temperature = self.options.values()
        what = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)"}.get(kind, f"JSD, beta {beta}")
        found = super().describe() | {
            "loss": f"{what}, temperature {temperature}",
            "normaliser": "supervised tokens of the optimizer step (their loss_weights, where batches have some), over "
            "all micro-batches and ranks",
        }
        return found if self.own_rows is None else found | {"samples": self.own_rows.describe()}

    def check_batch(self, batch: Any) -> None:
        """Also checks that each row of several teachers' batches names one, and that the policy can write its own.

        Raises:
            ValueError: If a row names none, or one that is not there, or the policy cannot.
        """
        writes = self.training and self.own_rows is not None and self.own_rows.check(batch, type(self).__name__)
        if not writes:
            super().check_batch(batch)
        elif self.episodes is not None:
            self.episodes.check(batch)
        if not isinstance(self.teacher, nn.ModuleDict):
            return
        known = ", ".join(map(repr, self.teacher))
        if "teacher" not in batch:
            raise ValueError(
                f"a batch for {type(self).__name__} with the teachers {known} must hold `teacher`, a name for each "
                "row: give the rows a column `teacher`, and the data module carry=['teacher']"
            )
        if len(batch["teacher"]) != (rows := len(batch["prompts" if writes else "input_ids"])):
            raise ValueError(f"`teacher` has {len(batch['teacher'])} names for {rows} rows")
        for row, name in enumerate(batch["teacher"]):
            if name not in self.teacher:
                raise ValueError(f"row {row} of a batch has teacher={name!r}; allowed: {known}")

    def acts_on(self, batch: Mapping[str, Any]) -> bool:
        """In training; validation takes rows with completions as they are."""
        return self.training

    def _teachers(self) -> Iterator[tuple[str, Frozen]]:
        """The teachers by name; one alone has none."""
        if isinstance(self.teacher, nn.ModuleDict):
            yield from self.teacher.items()  # type: ignore[misc]
        else:
            yield "", self.teacher

    def _lesson(self, name: str, batch: Mapping[str, Any], segments: Segments) -> Segments:
        """What one of several teachers reads: the rows that name it."""
        return segments.of_rows(torch.tensor([whose == name for whose in batch["teacher"]]))


def _by_name(teacher: Any) -> dict[str, Teacher] | None:
    """Several teachers by name; None where it is one, which a checkpoint's hyperparameters may hold as a mapping."""
    if teacher is None:
        raise ValueError("teacher=None: give a folder, a PolicyConfig or a module, or several by name")
    if not isinstance(teacher, Mapping):
        return None
    options = {field.name for field in fields(PolicyConfig)}
    if not teacher or set(teacher) <= options:
        if teacher:
            return None
        raise ValueError("teacher={} names no teacher; give one, or several by name")
    for name in teacher:
        if not isinstance(name, str) or not name or "." in name or name in options:
            raise ValueError(
                f"teacher={name!r}: a teacher's name is not empty, has no dot and is no option of PolicyConfig"
            )
    return dict(teacher)
