"""Paradigms that take their own optimizer steps: several a batch, several optimizers, or a batch seen as a whole."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Annotated, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from alignment_modules.functional.ranges import Count, Positive, Range, check_options
from alignment_modules.functional.statistics import Statistic
from alignment_modules.functional.value import whiten
from alignment_modules.functional.waiting import tell
from alignment_modules.training.module import AlignmentModule
from alignment_modules.training.objective import Objective
from alignment_modules.training.pieces import SEGMENTS, count_rows, cut, empty_like, join, reads_as_carried
from alignment_modules.training.sources import of_sources, weigh_units

Units = Callable[[Any], "dict[str, Tensor] | None"]


class UpdateModule(AlignmentModule):
    """Base of paradigms that take their own optimizer steps, with `update`.

    Lightning then neither accumulates nor clips nor steps the schedule; this class does, and refuses the Trainer's own
    switches by name. A subclass whose objective does not need that may set `automatic_optimization = True` after the
    constructor: it is then trained as any other module, and this class's keywords are refused instead.

    Args:
        micro_batch_size: Rows in one forward and backward pass; None: a whole batch. It changes no result.
        max_grad_norm: Largest gradient norm, applied to the normalised gradients; None: no clipping.
        **common: Keywords of `AlignmentModule`.
    """

    def __init__(
        self, *, micro_batch_size: Count | None = None, max_grad_norm: Positive | None = 1.0, **common: Any
    ) -> None:
        check_options(UpdateModule.__init__, locals())
        super().__init__(**common)
        self.automatic_optimization = False
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm

    def before_updates(self, pieces: list[Any]) -> list[Any]:
        """Computes what couples the rows of one optimizer step, over all its pieces and ranks, without gradients.

        Args:
            pieces: The step's micro-batches on this rank, the same number on each rank; some may have no row.

        Returns:
            As many pieces, for `objective`.
        """
        return pieces

    def rows_of_step(self, pieces: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], slice]:
        """All rows of an optimizer step, for `before_updates`; outside training, this rank's: others may have none.

        Args:
            pieces: This rank's micro-batches, or what was found out about their rows.

        Returns:
            The rows of all pieces and ranks, and where this rank's stand among them.
        """
        own = join(pieces)
        ranks, rank = (self.all_gather_ragged(own), self.global_rank) if self.training else ([own], 0)
        start = sum(map(count_rows, ranks[:rank]))
        return join(ranks), slice(start, start + count_rows(own))

    def all_gather_ragged(self, values: Any) -> list[Any]:
        """Every rank's tensor or dictionary of tensors and lists, in rank order, whatever their lengths."""
        if self._trainer is None or self.trainer.world_size == 1:
            return [values]
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, move_data_to_device(values, "cpu"))
        return move_data_to_device(parts, self.device)

    def over_ranks(self, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What is computed of the rows of all ranks together: this rank's part of it.

        Args:
            rows: [rows, ...], another number of them on each rank.
            compute: From the rows of all ranks, in rank order, to as many.
        """
        ranks = self.all_gather_ragged(rows)
        start = sum(map(len, ranks[: self.global_rank]))
        return compute(torch.cat(ranks).to(rows.device))[start : start + len(rows)]

    def whiten_over_ranks(self, values: Tensor, mask: Tensor, *, ddof: Annotated[int, Range(0, 1)] = 1) -> Tensor:
        """`whiten` over the positions of all ranks: this rank's values, `[rows, time]` as given.

        Args:
            values: [rows, time], of other shapes on other ranks.
            mask: [rows, time] bool, on the same device.
            ddof: As in `whiten`.
        """
        white = self.over_ranks(
            values[mask], lambda every: whiten(every[None], torch.ones_like(every[None]), ddof=ddof)[0]
        )
        return torch.zeros_like(values).masked_scatter(mask, white)

    def units(self, piece: Any) -> dict[str, Tensor] | None:
        """The weight of each of the objective's terms in a piece, from masks alone; None: the objective has one term.

        With several terms every total is divided by its own units, and these must be known before the first backward
        pass. Each is [rows], or 0-dim where the weights of rows (`source_weights`) have no part in it.
        """
        return None

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Optimizer steps taken for each batch of the dataloader."""
        return 1

    @property
    def total_optimizer_steps(self) -> int | float:
        """Optimizer steps of the whole run: Lightning's own estimate counts one a batch."""
        if self.automatic_optimization:
            return super().total_optimizer_steps
        steps, limit = self.trainer.estimated_stepping_batches * self.optimizer_steps_per_batch, self.trainer.max_steps
        return steps if limit == -1 else min(steps, limit)

    def configure_callbacks(self) -> list[Any]:
        """Adds none; it is the only hook that runs before Lightning's own check, whose error knows no way out.

        Raises:
            ValueError: If the Trainer accumulates or clips gradients, which manual optimization would ignore, or this
                module should and leaves it to the Trainer.
        """
        trainer, name = self.trainer, type(self).__name__
        if self.automatic_optimization:
            given: dict[str, Any] = {"micro_batch_size": self.micro_batch_size}
            given |= {"max_grad_norm": self.max_grad_norm} if self.max_grad_norm != 1.0 else {}
            for option, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{option}={value} is not allowed with this {name}, whose steps the Trainer takes: remove it "
                        "and give the Trainer accumulate_grad_batches or gradient_clip_val"
                    )
            return []
        if trainer.training and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) is not allowed with {name}, "
                "which accumulates by itself: leave it at 1 and set micro_batch_size on the module"
            )
        if trainer.training and trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) is not allowed with {name}, "
                "which clips by itself: remove it and set max_grad_norm on the module"
            )
        return []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Also builds the `segments` of each piece, where a batch of rows is going to be cut."""
        trains = self._trainer is not None and self.trainer.training and not self.automatic_optimization
        size = self.micro_batch_size if trains else None
        if size is None or type(self).segments is AlignmentModule.segments or not reads_as_carried(self):
            return super().on_before_batch_transfer(batch, dataloader_idx)
        self.check_batch(batch)
        return {**batch, SEGMENTS: [self.segments(piece) for piece in cut(batch, size)]}

    def require_trainer(self) -> None:
        """Says what to do where there is no Trainer.

        Raises:
            RuntimeError: If the module is used without one.
        """
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self).__name__}.training_step takes optimizer steps of its own and needs a Trainer: call "
                "Trainer.fit(module, ...). In a loop of your own (L.Fabric), call objective() and step yourself"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """One optimizer step over a batch of rows."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        self.require_trainer()
        self.window.tokens = self.window.tokens + self.count_tokens(batch)["tokens"]
        self.update(cut(batch, self.micro_batch_size), empty_like(batch))
        return None

    def update(
        self,
        pieces: Sequence[Any],
        empty: Any,
        *,
        objective: Callable[[Any], Objective] | None = None,
        units: Units | None = None,
        of: str = "policy",
    ) -> None:
        """One optimizer step: the gradients of all micro-batches, normalised, clipped, applied; then the schedule.

        Args:
            pieces: Micro-batches: what the objective takes, each.
            empty: A micro-batch without a scored token, with which a rank that has fewer keeps step with the others.
            objective: What is minimised; None: the module's own `objective`, with its `before_updates` and `units`.
            units: The weights of the terms of another objective that has several.
            of: The entry of `trained` that is moved.

        Raises:
            ValueError: If there is no such entry, or the units do not fit the objective.
        """
        self.require_trainer()
        if of not in self.windows or len(self.trainer.optimizers) != len(self.windows):
            raise ValueError(
                f"of={of!r}: {type(self).__name__} trains {', '.join(self.windows)} with "
                f"{len(self.trainer.optimizers)} optimizers; each entry of trained() needs one"
            )
        started, position, entry = monotonic(), list(self.windows).index(of), self.trained()[of]
        count = int(self.reduce(torch.tensor(max(len(pieces), 1), device=self.device), "max"))
        padded = [*pieces, *[empty] * (count - len(pieces))]
        if objective is None:
            objective, units = self.objective, self.units
            with torch.no_grad():
                padded = self.before_updates(padded)
        self.windows[of].open(self._count(padded, units))
        for number, piece in enumerate(padded, start=1):
            tell("updating", number, count)
            with self._gradient_sync(last=number == count):
                self.manual_backward(self.record(piece, of_sources(objective(piece), piece), of))
        wrapped: Any = self.optimizers()  # as Lightning wraps them: their steps are the run's
        optimizer: Any = wrapped[position] if isinstance(wrapped, list) else wrapped
        if len(self.windows) > 1 and isinstance(self.trainer.strategy, DDPStrategy):
            average_gradients(entry)
        if of == "policy":
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)  # not a step of the run
        (optimizer if len(self.windows) == 1 else self).zero_grad()
        for config in self.trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer.optimizer:
                config.scheduler.step()
        name = "time/update" if of == "policy" else f"{of}/time/update"
        self._train_meters.update({name: Statistic(torch.tensor(monotonic() - started))})
        if of == "policy":
            self.log_step(self.global_step)

    def _count(self, pieces: Sequence[Any], units: Units | None) -> dict[str, Tensor] | None:
        """The weight of each term over all pieces and ranks; None where the objective has one."""
        counted = [None if units is None else units(piece) for piece in pieces]
        if counted[0] is None:
            return None
        names = list(counted[0])
        weighed = [weigh_units(found, piece) for found, piece in zip(counted, pieces, strict=True) if found]
        sums = [torch.as_tensor(sum(found[name] for found in weighed)) for name in names]
        weights = torch.stack([weight.to(self.device, torch.float32) for weight in sums])
        return dict(zip(names, self.reduce(weights, "sum").unbind(), strict=True))

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients with the last micro-batch of a step; with each where they hold shards alone."""
        # DDP waits for the gradients of all parameters; one of several optimizers averages its own.
        if (last and len(self.windows) == 1) or not hasattr(self.trainer.strategy, "block_backward_sync"):
            return nullcontext()
        return self.trainer.strategy.block_backward_sync()


def average_gradients(module: nn.Module) -> None:
    """Averages the gradients of a module's trainable parameters over all ranks, as DDP does for a whole model.

    A parameter that has a gradient on some ranks only counts as 0 on the others; one that has none anywhere keeps none.

    Args:
        module: Its parameters; the same on all ranks.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    held = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
    works, ranks = [], torch.distributed.get_world_size()
    for parameter, anywhere in zip(parameters, held.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.div_(ranks)
            works.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
    for work in works:
        work.wait()
