"""A training step on forked ranks, its tensors, traffic and operations counted, beside the calculator."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cli")]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from conftest import make_tokenizer  # noqa: E402
from forked_ranks import in_ranks  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed import ProcessGroup  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.objectives import Objective  # noqa: E402
from dskd_lightning.planning.calculator import Estimate, estimate  # noqa: E402
from dskd_lightning.planning.run_sizes import data_size, layout_of, losses_of  # noqa: E402
from dskd_lightning.planning.sizes import model_size  # noqa: E402
from dskd_lightning.strategies import DSKDModelParallelStrategy  # noqa: E402

PROGRAM = "program"
"""The one part of the calculated memory that isn't tensors."""
_STEPS, _MEASURED = 3, 1
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""Which PyTorch doesn't count: two products forward and five backward, of which half is computed."""
_SENT_BYTES = 200
"""Where Linux's ``struct tcp_info`` has the bytes that a connection has sent."""


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        hidden: size of the student's hidden states; the teacher's is half as large again.
        layers: of both.
        vocabulary: of both.
        kind: of the student, ``llama`` or ``gpt2``.
        ranks: processes.
        strategy: ``auto``, ``ddp`` or ``fsdp2``.
        replicas: of a sharded run.
        objective: ``sft``, ``logits`` or ``dskd``.
        options: of the student's `StudentSpec`.
        precision: of the Trainer.
        batch: rows of a micro-batch.
        words: of a response, by four.
        accumulate: micro-batches of a step.
    """

    hidden: int
    layers: int = 4
    vocabulary: int = 2048
    kind: str = "llama"
    ranks: int = 1
    strategy: str = "auto"
    replicas: int = 1
    objective: str = "dskd"
    options: tuple[tuple[str, Any], ...] = ()
    precision: str = "32-true"
    batch: int = 4
    words: int = 30
    accumulate: int = 1


SIZES = {
    "small": Case(64, layers=4, vocabulary=1024),
    "middle": Case(128, layers=6, vocabulary=2048),
    "large": Case(256, layers=8, vocabulary=4096),
}


@dataclass(frozen=True)
class Counted:
    """Of one rank and one optimizer step.

    Args:
        weights: bytes of student, teacher and projectors that the rank keeps.
        gradients: bytes at the end of the backward pass.
        optimizer: bytes of its states.
        peak: the most bytes that all tensors took together.
        sent: bytes that collectives must send, each once.
        wire: bytes that the kernel says went out over the rank's connections.
        operations: floating-point operations.
        estimate: what the calculator says.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    sent: float
    wire: int
    operations: float
    estimate: Estimate

    @property
    def expected_peak(self) -> float:
        """The calculator's memory without the program's own."""
        return self.estimate.bytes - self.estimate.memory[PROGRAM]

    @property
    def expected_operations(self) -> float:
        """The calculator's operations of one rank and step."""
        return sum(self.estimate.work.values()) / (self.estimate.steps * self.estimate.ranks)


class Tracker(TorchDispatchMode):
    """Knows every tensor that an operation has read or made, for as long as its memory lives."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, StorageWeakRef] = {}
        self.reset()

    def reset(self) -> None:
        """Count anew; tensors that are there stay known."""
        self.peak, self.sent, self.operations = 0, 0.0, 0.0

    def see(self, tree: Any) -> None:
        """Get to know the tensors in ``tree``."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = _local(leaf).untyped_storage()
                known = self._alive.get(storage._cdata)
                if known is None or known.expired():
                    self._alive[storage._cdata] = StorageWeakRef(storage)

    def living(self) -> int:
        """Bytes of all tensors that are there; sharding gives memory back by making it 0 bytes long."""
        self._alive = {key: reference for key, reference in self._alive.items() if not reference.expired()}
        storages = (torch.UntypedStorage._new_with_weak_ptr(r.cdata) for r in self._alive.values())
        return sum(storage.nbytes() for storage in storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self.sent += _sent_bytes(name, args)
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        elif name.startswith(_ATTENTION):
            backward = name.endswith("_backward")
            rows, heads, length, width = args[int(backward)].shape
            self.operations += (5 if backward else 2) * rows * heads * length**2 * width
        self.see((args, kwargs, out))
        self.peak = max(self.peak, self.living())
        return out


def _sent_bytes(name: str, args: Any) -> float:
    """Of one collective on one rank, as a ring sends them."""
    if name == "_allgather_base_":
        return float(args[0].nbytes - args[1].nbytes)
    if name == "_reduce_scatter_base_":
        return float(args[1].nbytes - args[0].nbytes)
    if name != "allreduce_":
        return 0.0
    ranks = ProcessGroup.unbox(args[1]).size()
    return 2 * (ranks - 1) / ranks * sum(t.nbytes for t in args[0])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(_local(t).nbytes for t in {id(t): t for t in tensors}.values())


def wire_bytes() -> dict[str, int]:
    """Connection -> bytes that it has sent so far."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):
            name = os.readlink(f"/proc/self/fd/{number}")
            if name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                found[name] = struct.unpack_from("Q", info, _SENT_BYTES)[0]
    return found


class _Watch(L.Callback):
    def __init__(self) -> None:
        self.tracker = Tracker()
        self.found: dict[str, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if index == 0:
            self.tracker.__enter__()
            self.tracker.see([*module.parameters(), *module.buffers()])
        if trainer.global_step == _MEASURED and index % trainer.accumulate_grad_batches == 0:
            self.tracker.see([list(state.values()) for state in trainer.optimizers[0].state.values()])
            self.tracker.reset()
            self.wire = wire_bytes()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients = _bytes(p.grad for p in module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, index: int) -> None:
        if trainer.global_step != _MEASURED + 1 or self.found:
            return
        self.tracker.__exit__(None, None, None)
        states = trainer.optimizers[0].state.values()
        self.found = {
            "weights": _bytes(module.parameters()),
            "gradients": self.gradients,
            "optimizer": _bytes(v for state in states for v in state.values()),
            "peak": self.tracker.peak,
            "sent": self.tracker.sent,
            "wire": sum(sent - self.wire[c] for c, sent in wire_bytes().items() if c in self.wire),
            "operations": self.tracker.operations,
        }


def count(case: Case, folder: Path) -> Counted:
    """Train three steps in forks of this process and count the second."""
    torch.manual_seed(0)
    student = dl.StudentSpec(_source(case, folder / "student"), dtype="float32", **dict(case.options))
    wider = Case(case.hidden * 3 // 2, case.layers, case.vocabulary)
    teacher = None
    if case.objective != "sft":
        teacher = dl.TeacherSpec(_source(wider, folder / "teacher"), dtype="float32")
    in_ranks(
        lambda rank: _train(case, folder, student, teacher),
        folder=folder / "logs",
        ranks=case.ranks,
        timeout=300,
    )
    found = json.loads((folder / "counted.json").read_text())
    return Counted(**{**found, "estimate": Estimate(**found["estimate"])})


def _source(case: Case, folder: Path) -> str:
    make_tokenizer().save_pretrained(folder)
    config: Any = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0,
    )  # fmt: skip
    if case.kind == "gpt2":
        config = GPT2Config(
            vocab_size=case.vocabulary, n_embd=case.hidden, n_layer=case.layers, n_head=4, n_positions=512,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def _train(case: Case, folder: Path, student: dl.StudentSpec, teacher: dl.TeacherSpec | None) -> None:
    warnings.filterwarnings("ignore")
    kinds: dict[str, type[Objective]] = {
        "sft": dl.SFTObjective, "logits": dl.LogitKDObjective, "dskd": dl.DSKDObjective
    }  # fmt: skip
    module = dl.DistillationModule(student, kinds[case.objective](), teacher)
    rows = [
        {"prompt": f"Say {n % 10}.", "response": "one two three four " * case.words}
        for n in range(_STEPS * case.batch * case.ranks * case.accumulate)
    ]
    data = dl.InstructionDataModule(
        rows, student=student, teacher=teacher, max_length=512, max_prompt_length=64, batch_size=case.batch,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    watch = _Watch()
    strategy: Any = DSKDModelParallelStrategy(case.replicas) if case.strategy == "fsdp2" else case.strategy
    trainer = L.Trainer(
        accelerator="cpu", devices=case.ranks, strategy=strategy, precision=case.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=case.accumulate, max_epochs=1, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data.setup("fit")
    sizes = model_size(student), *([] if teacher is None else [model_size(teacher)])
    losses = losses_of(module._objectives(), sizes[0], sizes[1:])
    layout = layout_of(trainer, module, data, "mixed" in case.precision, cuda=False)
    expected = estimate(sizes[0], sizes[1:], data_size(data), losses, layout)
    trainer.fit(module, datamodule=data)
    if trainer.global_rank == 0:
        (folder / "counted.json").write_text(json.dumps({**watch.found, "estimate": vars(expected)}))
