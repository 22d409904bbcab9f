"""Training modules whose models are sharded where the Trainer's strategy does that."""

from contextlib import ExitStack

import lightning as L
from torch import nn

from alignment_modules.policies.frozen import companions
from alignment_modules.policies.offloading import check_offloading
from alignment_modules.policies.sharded import free, gathered
from alignment_modules.policies.sharding import compute_dtype, shard_children
from alignment_modules.training.strategies import refuse_strategy


class ShardedModule(L.LightningModule):
    """Shards all models of the module, once, where the strategy has a mesh of processes (`fsdp2`)."""

    policy: nn.Module
    _held: ExitStack | None = None

    def configure_model(self) -> None:
        """Shards policy, critic, references and teachers; with a strategy that shards nothing they stay as they are.

        Raises:
            ValueError: If the strategy is one that is not supported, a model cannot be sharded, or its activations
                cannot be offloaded there.
        """
        if self._trainer is not None:
            refuse_strategy(self._trainer.strategy)
            if self.trainer.training:
                device = self.trainer.strategy.root_device
                check_offloading(self, device, sharded=self.device_mesh is not None)
        if self.device_mesh is not None:
            gather = compute_dtype(str(self.trainer.precision))
            shard_children(self, self.device_mesh["data_parallel"], gather=gather)
        absent = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        if absent:
            raise ValueError(
                f"{absent[0]!r} and {len(absent) - 1} more parameters have no weights: what is built in "
                "`on_first_process` or on the meta device needs a strategy that shards ('fsdp2')"
            )

    def free_companions(self) -> None:
        """Frees what is gathered of frozen models, once an objective has read them: a backward pass needs the room."""
        for companion in companions(self).values() if self.device_mesh is not None else ():
            if companion.module is not None:
                free(companion.module)

    def on_predict_start(self) -> None:
        """Gathers a sharded policy once: processes may have different numbers of batches to predict."""
        self._held = ExitStack()
        self._held.enter_context(gathered(self.policy))

    def on_predict_end(self) -> None:
        """Frees it."""
        if self._held is not None:
            self._held.close()
            self._held = None
