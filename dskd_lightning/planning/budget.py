"""What a run takes beside what there is: memory, network, disk and time, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.planning.calculator import REACHED, Estimate, Layout, ModelSize, estimate
from dskd_lightning.planning.finding import Finding
from dskd_lightning.planning.machine import Machine, free_disk
from dskd_lightning.planning.run_sizes import data_size, layout_of, losses_of
from dskd_lightning.planning.target import Target
from dskd_lightning.processor import FLOAT32_CONFIG
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.runs.text import byte_count

__all__ = ["Place", "budget", "calculate", "parts"]

_TIGHT = 0.85
_SPARE_DISK = 2e9
_HOST = 2**30  # less than that isn't worth a line
_SHOWN = 0.01  # causes below this share of all are left out


@dataclass(frozen=True)
class Place:
    """Where the run is planned for.

    Args:
        memory: bytes that are free for one rank.
        speed: operations a second of a large product on one; None where that isn't known.
        name: of the device.
        short: whether products run in 16 bits.
        here: this machine, or None.
    """

    memory: float
    speed: float | None
    name: str
    short: bool
    here: Machine | None = None


def calculate(run: DistillationCLI, sizes: Sequence[ModelSize], target: Target) -> tuple[Estimate, Place]:
    """The estimate of a parsed run whose data are prepared, and the place it is for.

    Raises:
        UserError: so many ranks can't share the weights as the config says.
    """
    student, *teachers = sizes
    mixed = "16" in str(run.trainer.precision)
    here = None
    if target.memory is None or not target.devices:
        here = Machine.measure("cpu" if run.trainer.strategy.root_device.type == "cpu" else "auto")
    cuda = target.devices or (here is not None and here.cuda)
    layout = layout_of(run.trainer, run.model, run.datamodule, mixed, cuda)
    data = data_size(run.datamodule)
    if target.examples is not None:
        data = data.scaled(target.examples)
    steps, together = run.trainer.max_steps, layout.ranks * layout.accumulate
    passes = float(max(run.trainer.max_epochs or 1, 1))  # -1 goes on for ever
    if steps > 0:
        passes = steps / max(1.0, data.batches / together)
    losses = losses_of(list(run.model.objectives), student, teachers)
    found = estimate(student, teachers, replace(data, epochs=passes), losses, layout)
    return found, _place(target, here, layout, mixed or student.weight_bytes == 2)


def _place(target: Target, here: Machine | None, layout: Layout, short: bool) -> Place:
    if target.devices:
        speed = None if target.tflops is None else target.tflops * 1e12
        memory = target.memory if target.memory is not None else here.memory if here else 0
        return Place(memory, speed, "other devices", short)
    assert here is not None
    shared = 1 if here.cuda else layout.ranks
    return Place(here.memory / shared, here.speed(short), here.name, short, here)


def budget(run: DistillationCLI, found: Estimate, place: Place) -> Iterator[Finding]:
    """Findings on what the run takes; memory that isn't there is one that keeps it from starting."""
    yield _memory(found, place)
    if sum(found.host.values()) > _HOST:
        text = (
            f"{byte_count(sum(found.host.values()))} of the host's memory for each rank ({parts(found.host)})"
        )
        yield Finding("look", "host", f"{text}: it grows with the examples.")
    if found.traffic:
        yield Finding("ok", "network", _network(found, place))
    yield _disk(found, None if place.here is None else free_disk(run.config.output), run.config.output)
    yield Finding("ok", "time", _time(found, place))
    if place.here is not None and place.short and place.here.prefers_32_bits:
        text = f"float32 is {place.here.flops / place.here.flops16:.1f} times as fast here"
        yield Finding("look", "precision", f"{text}: lay `--config {FLOAT32_CONFIG}` over yours.")


def _memory(found: Estimate, place: Place) -> Finding:
    free = f"{place.memory / 2**30:.1f} free" + (" for each rank" if found.ranks > 1 else "")
    text = f"about {found.bytes / 2**30:.1f} GiB of {free} ({_gib(found.memory)})"
    if found.bytes > place.memory:
        remedy = "lower `data.batch_size`, train `model.student.lora`, or quantise the teacher"
        return Finding("failed", "memory", f"{text}: {remedy}.")
    return Finding("ok" if found.bytes < _TIGHT * place.memory else "look", "memory", text)


def _network(found: Estimate, place: Place) -> str:
    text = f"{byte_count(found.sent)} a step and rank ({parts(found.traffic)})"
    if place.speed is None:
        return text
    return f"{text}: as long as the products at {byte_count(found.bandwidth(place.speed))}/s"


def _disk(found: Estimate, free: int | None, output: str) -> Finding:
    needed = sum(found.disk.values())
    text = f"about {byte_count(needed)} ({parts(found.disk)})"
    if free is None:
        return Finding("ok", "disk", text)
    text = f"{text}; {byte_count(free)} free for {output}"
    return Finding("ok" if free > needed + _SPARE_DISK else "look", "disk", text)


def _time(found: Estimate, place: Place) -> str:
    steps = f"{found.steps:,} steps"
    if found.ranks > 1:
        steps += f" on {found.ranks:,} ranks"
    if place.speed is None:
        return f"{sum(found.work.values()):.2g} operations in {steps}; --tflops says how long that takes"
    text = f"about {duration(found.seconds(place.speed))} for {steps}"
    if place.here is None:
        return f"{text} at {place.speed / 1e12:,.0f} TFLOP/s, of which {REACHED:.0%} is taken to be reached"
    return f"{text} on {place.name} ({place.speed / 1e9:,.0f} GFLOP/s measured)"


def parts(causes: Mapping[str, float]) -> str:
    """Causes with their sizes, the small ones left out."""
    least = _SHOWN * sum(causes.values())
    return ", ".join(f"{cause} {byte_count(count)}" for cause, count in causes.items() if count >= least)


def _gib(memory: Mapping[str, float]) -> str:
    return ", ".join(f"{cause} {count / 2**30:.1f}" for cause, count in memory.items() if count > 2**27)
