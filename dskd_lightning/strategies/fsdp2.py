"""Shard student and teachers parameter by parameter: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dskd_lightning.checkpoints import WholeCheckpointIO
from dskd_lightning.errors import UserError
from dskd_lightning.strategies.checkpoints import WholeCheckpoints
from dskd_lightning.strategies.layers import decoder_layers

__all__ = ["DSKDModelParallelStrategy", "shard"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "as_step")


class DSKDModelParallelStrategy(WholeCheckpoints, ModelParallelStrategy):
    """FSDP2 over all devices: every rank keeps its slice of student, teachers and optimiser state.

    `DistillationModule.configure_model` calls `shard` under it. Each rank reads the whole models
    into host memory once; a device never holds more than one layer, the embeddings and the heads.

    Args:
        replicas: keep so many copies, each sharded over its part of the devices, best over the GPUs of one
            node (HSDP): layers are gathered within a copy, gradients alone go between copies.
        tensor_parallel_size: 1, for there is no tensor parallelism: heads are read whole.
        save_distributed_checkpoint: write a folder with one file per rank instead of a single file, which
            the first rank must hold in memory.
        process_group_backend: of `torch.distributed`; None takes the device's.
        timeout: of collective operations.
    """

    def __init__(
        self,
        replicas: int = 1,
        tensor_parallel_size: int = 1,
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
        self.replicas, self.tensor_parallel_size = replicas, tensor_parallel_size
        self.checkpoint_io = WholeCheckpointIO()

    def check(self) -> None:
        """Compare the number of copies with that of devices.

        Raises:
            UserError: they don't divide, or tensor parallelism is asked for.
        """
        if self.tensor_parallel_size != 1:
            raise UserError(
                f"trainer.strategy: tensor_parallel_size={self.tensor_parallel_size} isn't supported, since "
                "losses read whole heads; leave it out, and weights are sharded over all devices."
            )
        world = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            raise UserError(
                f"trainer.strategy: {world} devices can't hold replicas={self.replicas} copies; give a "
                "divisor, such as the number of nodes."
            )

    def setup_environment(self) -> None:
        self.check()
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        names: tuple[str, ...] = ("data_parallel",)
        shape: tuple[int, ...] = (self.world_size,)
        if self.replicas > 1:
            names, shape = ("replicate", "shard"), (self.replicas, self.world_size // self.replicas)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = init_device_mesh(  # type: ignore[assignment]
            self.root_device.type, shape, mesh_dim_names=names
        )

    def setup(self, trainer: L.Trainer) -> None:
        # What evaluation gathers may still be there in a later fit, where no inference tensor may be.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``module`` in place over ``mesh``.

    Units are the decoder layers, each part of ``module.objectives`` and, as the root, the rest:
    embeddings, final norms and heads, which a step reads whole. The root's parameters are
    gathered when a step method of ``module`` is entered and stay so until its backward pass,
    so that whatever a step reads are plain tensors, and all gradients are means over the ranks.

    Args:
        module: a `DistillationModule` with its models built.
        mesh: the ranks to shard over; with two dimensions, copies and the shards of each.

    Raises:
        UserError: a model without a list of decoder layers.
    """
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh)
    objectives: Any = module.objectives
    outer: list[Any] = [module]
    for objective in objectives:
        # Their type may differ from the student's, and one unit's gradients have one type.
        if any(True for _ in objective.parameters()):
            # Small, so that it stays gathered too: not every PyTorch since 2.6 finds the tensors in a
            # dataclass that a unit returns, before whose backward pass it would be gathered again.
            fully_shard(objective, mesh=mesh, reshard_after_forward=False)
            outer.append(objective)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    student: Any = module.student
    for unit in outer:
        # Backwards the student's last layer is next; by itself PyTorch gathers a teacher's, in vain.
        unit.set_modules_to_backward_prefetch(decoder_layers(student)[-1:])
    for step in _STEPS:
        register_fsdp_forward_method(module, step)
