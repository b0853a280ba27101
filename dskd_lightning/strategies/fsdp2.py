"""Shard student and teachers parameter by parameter: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dskd_lightning.checkpoints import WholeCheckpointIO
from dskd_lightning.strategies.checkpoints import WholeCheckpoints
from dskd_lightning.strategies.layers import decoder_layers

__all__ = ["DSKDModelParallelStrategy", "shard"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class DSKDModelParallelStrategy(WholeCheckpoints, ModelParallelStrategy):
    """FSDP2 over all devices: every rank keeps its slice of student, teachers and optimiser state.

    `DistillationModule.configure_model` calls `shard` under it. Each rank reads the whole models
    into host memory once; a device never holds more than one layer, the embeddings and the heads.

    Args:
        save_distributed_checkpoint: write a folder with one file per rank instead of the single
            file that `dskd generate`, `compare` and `export` read.
        process_group_backend: of `torch.distributed`; None takes the device's.
        timeout: of collective operations.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.checkpoint_io = WholeCheckpointIO()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``module`` in place over the one-dimensional ``mesh``.

    Units are the decoder layers, each part of ``module.objectives`` and, as the root, the rest:
    embeddings, final norms and heads, which a step reads whole. The root's parameters are
    gathered when a step method of ``module`` is entered and stay so until its backward pass,
    so that whatever a step reads are plain tensors, and all gradients are means over the ranks.

    Args:
        module: a `DistillationModule` with its models built.
        mesh: the ranks to shard over.

    Raises:
        UserError: a model without a list of decoder layers.
    """
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh)
    objectives: Any = module.objectives
    for objective in objectives:
        # Their type may differ from the student's, and one unit's gradients have one type.
        if any(True for _ in objective.parameters()):
            fully_shard(objective, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for step in _STEPS:
        register_fsdp_forward_method(module, step)
