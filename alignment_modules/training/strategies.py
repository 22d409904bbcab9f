"""Strategies of the Trainer: `fsdp2`, and those that are refused, with what to use."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from alignment_modules.training.sharded_checkpoints import ShardedCheckpoints

FSDP2 = "fsdp2"
_REFUSED: dict[str, type] = {"fsdp": FSDPStrategy, "deepspeed": DeepSpeedStrategy}


class FSDP2Strategy(ShardedCheckpoints):
    """Weights, gradients and optimizer states in shards over all processes (torch's `fully_shard`).

    Lightning's own strategy for it, with one data-parallel process for each device of each node, as with `ddp`. Its
    name for the Trainer is `fsdp2`.

    Args:
        save_distributed_checkpoint: Whether each process writes its shards into a checkpoint that is a folder;
            otherwise the first one gathers all into a single file.
        process_group_backend: As in Lightning; None: "nccl" on GPUs, "gloo" on CPUs.
        timeout: Of a collective.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.saves_folder = save_distributed_checkpoint

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the rows this process reads; known before the processes have met."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Takes the data-parallel size from devices and nodes, which are not known before."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shards_weights(strategy: Any) -> bool:
    """Whether a strategy, by its name or class path, is the one that shards."""
    return isinstance(strategy, str) and strategy.rpartition(".")[2] in (FSDP2, FSDP2Strategy.__name__)


def refuse_strategy(strategy: Any) -> None:
    """Refuses strategies that this library is not made for.

    Args:
        strategy: A name, a class path, or a strategy of Lightning.

    Raises:
        ValueError: If it is one of FSDP 1 or DeepSpeed, or splits tensors over processes.
    """
    text = strategy.rpartition(".")[2] if isinstance(strategy, str) else ""
    for name, cls in _REFUSED.items():
        if isinstance(strategy, cls) or text == cls.__name__ or text.partition("_")[0] == name:
            raise ValueError(
                f"trainer.strategy={text or type(strategy).__name__!r} is not supported: its wrapper hides the model's "
                f"parts and weights, which are read here. Use strategy={FSDP2!r}, which shards the same three things "
                "(weights, gradients, optimizer states), or 'ddp'"
            )
    if isinstance(strategy, ModelParallelStrategy) and (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} splits each weight over tensor_parallel_size={size} processes "
            f"(Lightning's default is all devices of a node), which is not supported. Use strategy={FSDP2!r}, or "
            "ModelParallelStrategy(data_parallel_size=<devices x nodes>, tensor_parallel_size=1)"
        )


if FSDP2 not in StrategyRegistry.available_strategies():
    StrategyRegistry.register(FSDP2, FSDP2Strategy, "Weights, gradients and optimizer states in shards (FSDP2)")
