"""An exponential moving average of the policy's weights, which validation, export and checkpoints get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from alignment_modules.functional.ranges import Count, Natural, Range, check_options
from alignment_modules.training.checkpoint import AVERAGE


class PolicyAverage(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` of what is trained of the policy alone, at each of its optimizer steps.

    After an optimizer step of the policy `average = decay * average + (1 - decay) * weights`; the first update takes
    the weights as they are. It is one a step, also where a module takes several a batch or has a critic beside. Frozen
    weights, references, teachers, critics and buffers are neither averaged nor copied; of a policy with adapters the
    adapters' factors are averaged. Weights of 16 bits have an average in float32.

    While the Trainer validates and after the fit the policy holds the average, so that `val/...` and the export are
    the average's. A checkpoint's weights are the average, too; those of the training go beside it, and a run that
    resumes goes on with both, bit for bit.

    Args:
        decay: What the average keeps of itself at an update; 0.999 looks back about a thousand updates.
        update_every_n_steps: Optimizer steps from one update to the next.
        update_starting_at_step: Optimizer step, counted from 0, from which it is updated; None: from the first.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        decay: Annotated[float, Range(0, 1, "()")] = 0.999,
        update_every_n_steps: Count = 1,
        update_starting_at_step: Natural | None = None,
    ) -> None:
        check_options(PolicyAverage.__init__, locals())
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )
        self.decay = decay
        self.updates = 0
        """Updates so far."""
        self._mix = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}
        self._training: dict[str, Tensor] = {}  # the weights' own values while the policy holds the average
        self._hook: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begins anew with each fit.

        Raises:
            ValueError: If the strategy shards weights, or a checkpoint without the training's state is to be written.
        """
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"PolicyAverage is not allowed with strategy {type(trainer.strategy).__name__}, which shards weights: "
                "use one device or strategy ddp, or leave the callback out"
            )
        savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        if any(saver.save_weights_only for saver in savers):
            raise ValueError(
                "ModelCheckpoint(save_weights_only=True) is not allowed with PolicyAverage: Lightning asks no callback "
                "there, and the file would hold the weights that are not averaged. Leave save_weights_only out"
            )
        self.updates, self._average, self._training = 0, {}, {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to the policy's optimizer."""
        trained: Any = getattr(pl_module, "trained", lambda: {"policy": pl_module})
        entries = list(trained())
        optimizer = trainer.optimizers[entries.index("policy")]

        def after_step(*_: Any) -> None:
            if self.should_update(step_idx=trainer.global_step):  # counted only after this
                self._update(pl_module)

        self._hook = optimizer.register_step_post_hook(after_step)
        own = dict(pl_module.named_parameters())
        self._average = {name: value.to(own[name].device) for name, value in self._average.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says what is averaged, and whose numbers will be logged."""
        held = _averaged(pl_module)
        start = f", from step {self.update_starting_at_step}" if self.update_starting_at_step else ""
        rank_zero_info(
            f"  average   {len(held)} tensors of the policy ({sum(p.numel() for p in held.values()):,} parameters), "
            f"decay {self.decay:g}, every {self.update_every_n_steps} optimizer steps{start}, {self.updates} updates "
            "so far; val/..., the weights in checkpoints and the export are the average's"
        )

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Nothing: a batch may be several steps of the policy, or none."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the average follows steps."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the policy the average, where there is one."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._take(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives it its own weights again."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._give_back(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the policy with the average."""
        self._take(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves a fit that broke off with the training's own weights."""
        self._give_back(pl_module)
        self._stop_listening()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listens no more. The average stays, for a checkpoint that is written now."""
        self._stop_listening()

    @contextmanager
    def unaveraged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Runs a block with the weights as training left them."""
        held = bool(self._training)
        self._give_back(pl_module)
        try:
            yield
        finally:
            if held:
                self._take(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How often the average was updated; its tensors are in the checkpoint's own entry."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the whole state is loaded with the tensors."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the average the checkpoint's weights, and keeps the training's beside it."""
        if not self._average:
            return
        own = dict(pl_module.named_parameters())
        training = self._training or {name: own[name].detach() for name in self._average}
        checkpoint[AVERAGE] = {
            "callback": self.state_key,
            "updates": self.updates,
            "average": dict(self._average),
            "training": dict(training),
        }
        values = {id(own[name]): value.to(own[name].dtype) for name, value in self._average.items()}
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):  # a tied weight has two entries
            if id(parameter) in values:
                checkpoint["state_dict"][name] = values[id(parameter)]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the average, and gives the policy the weights of the training.

        Raises:
            ValueError: If the average is one of other parameters.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get(AVERAGE)
        if saved is None:
            rank_zero_info("PolicyAverage: the checkpoint holds no average yet; it begins with this run")
            return
        held = _averaged(pl_module)
        if other := [*(held.keys() ^ saved["average"].keys())]:
            raise ValueError(
                f"the checkpoint's average and what this policy trains differ in {len(other)} tensors, such as "
                f"{min(other)!r}: build the policy as in the run that wrote it"
            )
        self.updates = saved["updates"]
        self._average = {name: value.to(held[name].device, copy=True) for name, value in saved["average"].items()}
        _copy(saved["training"], held)

    def _update(self, module: L.LightningModule) -> None:
        held = _averaged(module) if not self._average else dict(module.named_parameters())
        with torch.no_grad():
            if not self._average:
                self._average = {name: p.to(_precise(p.dtype), copy=True) for name, p in held.items()}
            else:
                values = [held[name].to(value.dtype) for name, value in self._average.items()]
                self._mix(list(self._average.values()), values, self.updates)
        self.updates += 1

    def _take(self, module: L.LightningModule) -> None:
        if self._average and not self._training:
            held = dict(module.named_parameters())
            self._training = {name: held[name].detach().clone() for name in self._average}
            _copy(self._average, held)

    def _give_back(self, module: L.LightningModule) -> None:
        _copy(self._training, dict(module.named_parameters()))
        self._training = {}

    def _stop_listening(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _averaged(module: L.LightningModule) -> dict[str, nn.Parameter]:
    """What is trained of a module's policy, by its name in the module; of a module without one, all that is trained."""
    policy = getattr(module, "policy", module)
    inside = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in inside}


def _copy(values: dict[str, Tensor], into: dict[str, nn.Parameter]) -> None:
    """In place, as PyTorch counts changes: who keeps something computed of weights sees that they are others."""
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """In 16 bits a share of 0.001 of a difference is rounded away."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
