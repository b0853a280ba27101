"""Sizes against built models, and estimates against sums by hand."""

from __future__ import annotations

import pytest

from dskd_lightning.models.spec import LoraSpec, ModelSpec, PruneSpec, StudentSpec, TeacherSpec
from dskd_lightning.models.student import build_student
from dskd_lightning.planning import Machine, ModelSize, estimate, model_size

MACHINE = Machine("test", memory=8 * 2**30, flops=1e11, flops16=2e11, cuda=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_embeddings": True},
        {"lora": LoraSpec(rank=4)},
        {"prune": PruneSpec(layers=1, by="even")},
        {"prune": PruneSpec(layers=[1], by="even"), "lora": LoraSpec(rank=2)},
    ],
    ids=str,
)
def test_sizes_are_those_of_the_built_student(model_folder, kind, options) -> None:
    spec = StudentSpec(source=model_folder(kind), dtype="float32", **options)
    size, (model, _) = model_size(spec), build_student(spec)
    parameters = {id(p): p for p in model.parameters()}.values()
    assert size.trained == pytest.approx(sum(p.numel() for p in parameters if p.requires_grad), rel=0.02)
    assert size.parameters == pytest.approx(sum(p.numel() for p in parameters), rel=0.02)
    assert size.weight_bytes == 4


def test_types_and_quantisation_of_weights(model_folder) -> None:
    source = model_folder()
    assert model_size(ModelSpec(source=source, dtype="bfloat16")).weight_bytes == 2
    assert model_size(ModelSpec(source=source)).weight_bytes == 4
    assert model_size(TeacherSpec(source=source, quantization="4bit")).weight_bytes == 0.55
    assert model_size(TeacherSpec(source=source)).trained == 0


def test_an_estimate_is_the_sum_of_its_causes() -> None:
    student = ModelSize(100_000_000, 100_000_000, 10, 512, 1000, 4)
    teacher = ModelSize(1_000_000_000, 0, 20, 2048, 1000, 2)
    options = {"sequences": 160, "tokens": 100_000, "batch": 4, "longest": 256, "accumulate": 4, "epochs": 2}
    found = estimate(student, [teacher], MACHINE, mixed=False, budget=0, **options)
    assert found.memory["student's weights"] == 4e8
    assert found.memory["gradients and optimizer"] == 1.2e9
    assert found.memory["teacher's weights"] == 2e9
    assert found.memory["activations"] == 4 * 256 * 512 * 34 * 2 * 10
    assert found.bytes == sum(found.memory.values())
    assert found.steps == 20
    work = 2 * 100_000 * (6 * 1e8 + 2 * 1e9)
    assert found.seconds == pytest.approx(work / (1e11 * 0.35))
    cached = estimate(student, [teacher], MACHINE, mixed=False, budget=0, cached=True, **options)
    assert cached.seconds < found.seconds
    assert cached.bytes < found.bytes
    thrifty = estimate(student, [teacher], MACHINE, mixed=False, budget=0, checkpointing=True, **options)
    assert thrifty.memory["activations"] < found.memory["activations"] / 3
    assert thrifty.seconds > found.seconds


def test_this_machine_has_memory_and_speed() -> None:
    machine = Machine.measure("cpu")
    assert machine.memory > 2**28
    assert min(machine.flops, machine.flops16) > 1e7
    assert not machine.cuda
