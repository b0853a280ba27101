"""Training from the cache: what it gives, what it loads, and how it is asked for."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tiny_runs import write_config, write_data

import dskd_lightning as dl
from dskd_lightning.cli import main
from dskd_lightning.errors import UserError
from dskd_lightning.objectives import DSKDCrossAttentionObjective, DSKDTokenAlignmentObjective
from dskd_lightning.teacher_cache import TeacherCacheSettings, TeacherHead, build, ensure_caches
from dskd_lightning.teacher_cache.build import StateBuilder


def make(model_folder, tmp_path: Path, objective=None, cache=None, teacher=None, **data):
    student = dl.StudentSpec(model_folder(seed=1))
    teacher = teacher or dl.TeacherSpec(model_folder(hidden=24, seed=2))
    torch.manual_seed(0)  # the projectors' first weights
    module = dl.DistillationModule(
        student, objective or dl.DSKDObjective(), teacher, lambda p: torch.optim.SGD(p, lr=0.1)
    )
    defaults = {"val_split": 4, "test_split": 4, "max_length": 96, "max_prompt_length": 40, "batch_size": 4}
    datamodule = dl.InstructionDataModule(
        str(write_data(tmp_path / "data.jsonl")), student=student, teacher=teacher,
        cache_dir=str(tmp_path / "cache"), teacher_cache=cache, **{**defaults, **data},
    )  # fmt: skip
    return module, datamodule


def trainer(**options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 2, **options},
    )  # fmt: skip


def fit(module, datamodule, **options) -> dict[str, float]:
    run = trainer(**options)
    run.fit(module, datamodule=datamodule)
    return {name: float(value) for name, value in run.callback_metrics.items()}


CASES = {
    "same tokens": ({}, lambda: dl.DSKDObjective(), {}),
    "packed": ({}, lambda: dl.DSKDObjective(), {"packing": True, "batch_size": 2}),
    "two tokenizers": (
        {"tokenizer": "sentencepiece", "add_bos": True}, lambda: DSKDTokenAlignmentObjective(),
        {"max_tokens_per_batch": 256},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_with_and_without(model_folder, tmp_path, monkeypatch, case) -> None:
    monkeypatch.setattr(build, "_SHARD_TOKENS", 200)
    model, objective, data = CASES[case]
    teacher = dl.TeacherSpec(model_folder(hidden=24, seed=2, **model))
    results = []
    for cache in (
        None,
        TeacherCacheSettings(dtype="float32"),
        TeacherCacheSettings(dtype="float32", build=False),
    ):
        module, datamodule = make(model_folder, tmp_path, objective(), cache, teacher, **data)
        metrics = fit(module, datamodule)
        metrics = {
            name: value for name, value in metrics.items() if not name.startswith("monitor/")
        }  # clocks
        assert module.complete_teachers == (cache is None)
        results.append((metrics, {k: v.clone() for k, v in module.state_dict().items()}))
    for metrics, state in results[1:]:
        assert metrics.keys() == results[0][0].keys()
        for name, value in metrics.items():
            assert value == pytest.approx(results[0][0][name], rel=1e-4, abs=1e-5), name
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-4, atol=1e-5, msg=name)
    for name, value in results[1][1].items():  # cold and warm cache: the very same bits
        assert torch.equal(value, results[2][1][name]), name


class _Gone(L.Callback):
    """Asserts that nothing keeps the teacher that built the cache once the student is there."""

    def __init__(self) -> None:
        self.layer: weakref.ref[torch.nn.Module] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.layer is not None
        assert self.layer() is None


def test_a_warm_cache_loads_no_decoder(model_folder, tmp_path, monkeypatch) -> None:
    cache = TeacherCacheSettings(dtype="float32")
    gone, construct = _Gone(), StateBuilder.build

    def watched(self, teacher, *ranks):
        gone.layer = weakref.ref(teacher.model.layers[0])
        return construct(self, teacher, *ranks)

    monkeypatch.setattr(StateBuilder, "build", watched)
    fit(*make(model_folder, tmp_path, cache=cache), callbacks=[gone])

    def forbidden(*_):
        raise AssertionError("a whole teacher was loaded")

    for place in ("models.loading", "teacher_cache.attach", "teacher_cache.head"):
        monkeypatch.setattr(f"dskd_lightning.{place}.load_teacher", forbidden)
    monkeypatch.setattr(StateBuilder, "build", forbidden)
    module, datamodule = make(model_folder, tmp_path, cache=cache)
    fit(module, datamodule)
    (teacher,) = module.teachers
    assert isinstance(teacher, TeacherHead)
    assert sum(p.numel() for p in teacher.parameters()) == 2 * 400 * 24 * len(teacher.head.weight) // 400
    assert not any("teacher" in name for name in module.state_dict())
    trainer().test(module, datamodule=datamodule)  # a split of the same file: cached as well


def test_two_teachers(model_folder, tmp_path) -> None:
    teachers = [
        dl.TeacherSpec(model_folder(hidden=24, seed=2)),
        dl.TeacherSpec(model_folder(hidden=8, seed=3)),
    ]
    states = []
    for cache in (None, TeacherCacheSettings(dtype="float32")):
        objectives = [dl.DSKDObjective(), dl.DSKDObjective()]
        module, datamodule = make(model_folder, tmp_path, objectives, cache, teachers)
        fit(module, datamodule)
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_builds_nothing(model_folder, tmp_path) -> None:
    other = str(write_data(tmp_path / "test.jsonl", 5))
    module, datamodule = make(
        model_folder, tmp_path, cache=TeacherCacheSettings(dtype="float32"), test=other, test_split=0
    )
    fit(module, datamodule)
    folders = sorted((tmp_path / "cache" / "teacher-states").iterdir())
    assert not module.complete_teachers
    metrics = trainer().test(module, datamodule=datamodule)[0]
    assert module.complete_teachers
    assert metrics["test/kl"] > 0
    assert sorted((tmp_path / "cache" / "teacher-states").iterdir()) == folders


def test_supervised_training_caches_what_validation_compares_with(model_folder, tmp_path) -> None:
    val = str(write_data(tmp_path / "val.jsonl", 5))
    module, datamodule = make(
        model_folder, tmp_path, dl.SFTObjective(), TeacherCacheSettings(), val=val, val_split=0
    )
    assert fit(module, datamodule)["val/kl"] > 0
    assert datamodule.teacher_hidden.keys() == {"val"}


def test_padded_statistics_are_refused_before_training(model_folder, tmp_path) -> None:
    objective = DSKDCrossAttentionObjective()
    objective.needs_padded_statistics = True
    with pytest.raises(UserError, match="padded layout"):
        fit(*make(model_folder, tmp_path, objective, TeacherCacheSettings()))


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.01), ("int4", 0.1)])
def test_small_types_train_close_to_exact(model_folder, tmp_path, dtype, bound) -> None:
    exact = fit(*make(model_folder, tmp_path, cache=TeacherCacheSettings(dtype="float32")))
    small = fit(*make(model_folder, tmp_path, cache=TeacherCacheSettings(dtype=dtype)))
    assert small["val/kl"] == pytest.approx(exact["val/kl"], rel=bound)


class SaveState(L.Callback):
    """Rank 0's weights at the end, out of a forked process, and the shards that each rank wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


def test_two_processes_build_together_and_train_alike(model_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_SHARD_TOKENS", 200)
    write = build.write_shard

    def noted(path, tensors, key):
        (tmp_path / f"{path.name}.by{torch.distributed.get_rank()}").touch()
        write(path, tensors, key)

    module, datamodule = make(model_folder, tmp_path)
    fit(module, datamodule, max_epochs=1)
    monkeypatch.setattr(build, "write_shard", noted)
    cached, datamodule = make(
        model_folder, tmp_path, cache=TeacherCacheSettings(dtype="float32"), batch_size=2
    )
    two = {"devices": 2, "strategy": "ddp_fork", "callbacks": [SaveState(tmp_path)], "max_epochs": 1}
    trainer(**two).fit(cached, datamodule=datamodule)
    writers = {path.name.split(".")[0]: path.suffix for path in tmp_path.glob("shard-*")}
    assert len(writers) > 3
    assert {name: f".by{int(name[-5:]) % 2}" for name in writers} == writers
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt")
        assert state.keys() == module.state_dict().keys()
        for key, value in module.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_the_command_builds_and_training_needs_no_more(model_folder, tmp_path, capsys) -> None:
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2),
        **{"data.teacher_cache": {"dtype": "float32", "build": False}, "trainer.max_epochs": 1},
    )  # fmt: skip
    assert main(["fit", "--config", str(config)]) == 2
    assert "dskd cache" in capsys.readouterr().err
    assert main(["cache", str(config)]) == 0
    said = capsys.readouterr()
    assert "teacher cache complete in" in said.out
    assert re.search(r"^Teacher cache: ([\d,]+) of \1 response tokens \(100%\), ", said.err, re.M)
    assert main(["fit", "--config", str(config)]) == 0
    other = tmp_path / "elsewhere"
    assert main(["cache", str(config), "--output", str(other), "--dtype", "int8"]) == 0
    (folder,) = [path for path in other.iterdir() if path.is_dir()]
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == "int8"
    assert main(["cache", str(config), "--dtype", "int3"]) == 2
    assert "int3" in capsys.readouterr().err
    plain = yaml.safe_load(config.read_text())
    del plain["model"]["teacher"]
    plain["model"]["objective"] = {"class_path": "dskd_lightning.objectives.SFTObjective"}
    config.write_text(yaml.safe_dump(plain))
    assert main(["cache", str(config)]) == 2
    assert "names no teacher" in capsys.readouterr().err


def test_a_cache_is_built_on_the_cpu_whatever_the_default_device(model_folder, tmp_path) -> None:
    """Trainer builds models with the training device as the default, where nothing may end up by chance."""
    module, datamodule = make(model_folder, tmp_path, cache=TeacherCacheSettings(dtype="float32"))
    datamodule.prepare_data()
    datamodule.setup("fit")
    with torch.device("meta"):
        heads = ensure_caches(datamodule, module.teacher_specs, ["train", "val"])
    assert heads is not None
    assert all(p.device.type == "cpu" for p in heads[0].parameters())
    assert next(iter(datamodule.train_dataloader())).teacher_hidden[0].isfinite().all()
