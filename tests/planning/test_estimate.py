"""Sizes against built models, and the calculator's formulas against sums by hand."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import LoraSpec, ModelSpec, PruneSpec, StudentSpec, TeacherSpec
from dskd_lightning.models.student import build_student
from dskd_lightning.planning import DataSize, Layout, Losses, Machine, ModelSize, estimate, model_size

GB = 1e9
STUDENT = ModelSize(
    100_000_000, 100_000_000, 10, 512, 20_000, 4, layered=80_000_000, attention=512, keys=128, wide=2048
)
TEACHER = ModelSize(
    1_000_000_000, 0, 20, 2048, 20_000, 2, layered=900_000_000, attention=2048, keys=2048, wide=8192
)
DATA = DataSize(examples=160, tokens=80_000, responses=40_000, padded=100_000, batches=40, largest=1024)


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
    layers = [p for name, p in model.named_parameters() if ".0." in name and "lora" not in name]
    assert size.trained == pytest.approx(sum(p.numel() for p in parameters if p.requires_grad), rel=0.02)
    assert size.parameters == pytest.approx(sum(p.numel() for p in parameters), rel=0.02)
    assert size.layered == pytest.approx(size.layers * sum(p.numel() for p in layers), rel=0.02)
    assert size.bytes == pytest.approx(4 * size.parameters)
    assert size.trains_head == (set(options) <= {"prune"})
    assert size.weight_bytes == 4


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("llama", (16, 8, 32, 4, 5, True)), ("gpt2", (16, 16, 64, 5, 2, False))],
)
def test_widths_within_a_layer(model_folder, kind, widths) -> None:
    size = model_size(ModelSpec(source=model_folder(kind)))
    assert (size.attention, size.keys, size.wide, size.kept, size.readers, size.rms) == widths


def test_types_and_quantisation_of_weights(model_folder) -> None:
    source = model_folder()
    assert model_size(ModelSpec(source=source, dtype="bfloat16")).weight_bytes == 2
    assert model_size(ModelSpec(source=source)).weight_bytes == 4
    assert model_size(TeacherSpec(source=source, quantization="4bit")).weight_bytes == 0.55
    assert model_size(TeacherSpec(source=source)).trained == 0


def test_memory_of_whole_models_is_the_sum_of_its_causes() -> None:
    found = estimate(STUDENT, [TEACHER], DATA, Losses(projectors=2 * 512 * 2048))
    assert found.memory["student's weights"] == 0.4 * GB
    assert found.memory["teacher's weights"] == 2 * GB
    assert found.memory["gradients"] == 4 * (100_000_000 + 2 * 512 * 2048)
    assert found.memory["optimizer"] == 2 * found.memory["gradients"]
    # Six of norms, queries, what attention gives, keys and values, four in the feed-forward part.
    layer = 4 * 1024 * (6 * 512 + 2 * 512 + 2 * 128 + 4 * 2048)
    rows = 4 * 512 * (3 * 512 + 2 * 2048)
    assert found.memory["activations"] == 10 * layer + 3 * 4 * 1024 * 512 + rows + 4 * 20_000 * 512
    assert found.bytes == sum(found.memory.values())
    assert "gradient buckets" not in found.memory
    assert found.traffic == {}
    cached = estimate(STUDENT, [TEACHER], DATA, layout=Layout(cached=True))
    assert cached.memory["teacher's weights"] == 0.2 * GB
    again = estimate(STUDENT, [TEACHER], DATA, layout=Layout(checkpointing=True))
    kept = found.memory["activations"] - 10 * layer + 10 * 4 * 1024 * 512
    assert again.memory["activations"] == pytest.approx(kept)


def test_an_offloaded_teacher_visits_a_gpu_layer_by_layer() -> None:
    away, quiet = replace(TEACHER, offloaded=True), Losses("logits", budget=2**20)
    found, whole = (estimate(STUDENT, [model], DATA, quiet) for model in (away, TEACHER))
    assert found.memory["teacher's weights"] == 0.2 * GB
    assert found.host["teacher's layers"] == 1.8 * GB
    passing = 1024 * 2 * (4 * 2048 + 3 * 8192)
    assert found.memory["for a moment"] == max(0.4 * GB, passing + 0.09 * GB)
    on_a_cpu = estimate(STUDENT, [away], DATA, quiet, Layout(cuda=False))
    assert on_a_cpu.memory["teacher's weights"] == whole.memory["teacher's weights"] == 2 * GB
    assert "teacher's layers" not in on_a_cpu.host


def test_copies_hold_all_and_shards_their_part() -> None:
    one, copied, sharded, both = (
        estimate(STUDENT, [TEACHER], DATA, layout=layout)
        for layout in (Layout(), Layout(8), Layout(8, True), Layout(8, True, 2))
    )
    assert copied.memory["student's weights"] == one.memory["student's weights"]
    assert copied.memory["gradient buckets"] == one.memory["gradients"]
    for name in ("student's weights", "teacher's weights", "gradients", "optimizer"):
        assert sharded.memory[name] == one.memory[name] / 8
        assert both.memory[name] == one.memory[name] / 4
    assert sharded.memory["embeddings and heads, gathered"] == 4 * 20_000_000 + 2 * 100_000_000


def test_traffic_of_every_layout() -> None:
    gradients, layers, outer = 0.4 * GB, 2 * 0.32 * GB + 1.8 * GB, 0.08 * GB + 0.2 * GB
    assert estimate(STUDENT, [TEACHER], DATA, layout=Layout(4)).traffic == {"gradients": 1.5 * gradients}
    assert estimate(STUDENT, [TEACHER], DATA, layout=Layout(4, True, accumulate=2)).traffic == pytest.approx(
        {
            "layers gathered": 2 * 0.75 * layers,
            "embeddings and heads gathered": 2 * 0.75 * outer,
            "gradients scattered": 2 * 0.75 * gradients,
        }
    )
    hybrid = estimate(STUDENT, [TEACHER], DATA, layout=Layout(8, True, 4, cached=True)).traffic
    assert hybrid["layers gathered"] == pytest.approx(0.5 * 2 * 0.32 * GB)
    assert hybrid["gradients between copies"] == pytest.approx(2 * 3 / 4 * gradients / 2)


def test_work_and_time() -> None:
    found = estimate(STUDENT, [TEACHER], replace(DATA, epochs=2), layout=Layout(4, accumulate=5))
    assert found.steps == 2 * 40 / (4 * 5)
    assert found.work["student"] == 2 * 100_000 * 6 * (80_000_000 + 500 * 512 * 10)
    assert found.work["losses"] == 2 * 40_000 * 2 * (5 * 20_000 * 512 + 3 * 20_000 * 2048)
    assert found.work["teacher"] == 2 * 100_000 * 2 * (900_000_000 + 625 * 2048 * 20)
    assert found.seconds(1e14) == pytest.approx(sum(found.work.values()) / (4 * 1e14 * 0.35))
    assert found.bandwidth(1e14) == pytest.approx(found.sent / (found.seconds(1e14) / found.steps))
    cached = estimate(STUDENT, [TEACHER], replace(DATA, epochs=2), layout=Layout(cached=True))
    assert cached.work["teacher"] == found.work["teacher"] / 2
    frozen = replace(STUDENT, adapted=1_000_000, trained=1_000_000)
    again = estimate(frozen, [], DATA, Losses("sft"), Layout(checkpointing=True)).work["student"]
    assert again == 100_000 * (3 * 2 * (80_000_000 + 500 * 512 * 10) + 6 * 1_000_000)


def test_half_precision_halves_what_products_leave() -> None:
    mixed = estimate(STUDENT, [], DATA, Losses("sft"), Layout(mixed=True)).memory
    half = estimate(replace(STUDENT, weight_bytes=2), [], DATA, Losses("sft")).memory
    products = 2 * (2 * (512 + 128) + 4 * 2048)
    ends = 4 * 512 * 512 + 4 * 20_000 * 512
    for found, norms, width in ((mixed, 2 * 8 * 512 + 5 * 2 * 512, 4), (half, 2 * 8 * 512, 2)):
        expected = 10 * 1024 * (norms + products) + 3 * width * 1024 * 512 + ends
        assert found["activations"] == expected
    assert mixed["weights in 16 bits"] == 2 * (80_000_000 + 20_000 * 512)
    assert "weights in 16 bits" not in half
    again = estimate(STUDENT, [], DATA, Losses("sft"), Layout(mixed=True, checkpointing=True)).memory
    assert again["weights in 16 bits"] == 2 * 20_000 * 512


@pytest.mark.parametrize(("ranks", "replicas"), [(0, 1), (8, 3), (8, 0)])
def test_ranks_that_cannot_be_shared_out_are_refused(ranks: int, replicas: int) -> None:
    with pytest.raises(UserError, match=f"{ranks} ranks"):
        Layout(ranks, True, replicas)


def test_scaled_data_keep_their_lengths() -> None:
    many = replace(DATA, raw_bytes=1000).scaled(1_600_000)
    assert (many.examples, many.tokens, many.batches) == (1_600_000, 800_000_000, 400_000)
    assert (many.largest, many.length, many.raw_bytes) == (1024, DATA.length, 10_000_000)


def test_this_machine_has_memory_and_speed() -> None:
    machine = Machine.measure("cpu")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert whole / 512 < machine.memory <= whole  # in bytes, whatever other programs hold
    assert min(machine.flops, machine.flops16) > 1e7
    assert not machine.cuda
