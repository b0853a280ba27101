"""Two processes that share the weights do all that one does, in forks of this process."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loops import utilities

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from forked_ranks import dskd_ranks
from forked_runs import dskd_forked
from tiny_runs import write_config

from dskd_lightning.errors import UserError
from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.metrics_file import read_rows

STRATEGY = "dskd_lightning.strategies.DSKDModelParallelStrategy"
CROSS_ATTENTION = "DSKDCrossAttentionObjective"
ONE = ("--trainer.devices=1", "--trainer.strategy=auto")


def sharded(**options: Any) -> dict[str, Any]:
    strategy = {"class_path": STRATEGY, "init_args": options}
    return {"trainer.devices": 2, "trainer.strategy": strategy, "data.batch_size": 3}


def alone(*arguments: str, log: Path) -> None:
    """One process, which must succeed."""
    assert dskd_forked(*arguments, log=log) == 0, log.read_text(errors="replace")[-3000:]


def results(run: Path) -> dict[str, Any]:
    """What a test wrote, which is removed."""
    found = {name: json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "representation")}
    found["predictions"] = sorted((run / "predictions").glob("*.jsonl"))[0].read_text()
    for name in found:
        place = run / name
        shutil.rmtree(place) if place.is_dir() else place.with_suffix(".json").unlink()
    return found


def as_on_gpus(_: int) -> None:
    """Lightning evaluates in inference mode, unless ranks talk through gloo: weights gathered there would
    not be fit for training."""
    utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")  # type: ignore[attr-defined]
    step = DistillationModule._evaluation_step

    def checked(module: DistillationModule, batch: Any) -> None:
        step(module, batch)
        assert not module.student.get_input_embeddings().weight.is_inference()

    DistillationModule._evaluation_step = checked  # type: ignore[method-assign]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_sharded_run_is_tested_resumed_and_exported_as_another(
    tmp_path: Path, model_folder: Any, folder: bool
) -> None:
    changes = {
        **sharded(save_distributed_checkpoint=folder),
        "data.packing": folder,
        "monitor.check_every": 1,
        "responses.seeds": [10],
        "responses.max_new_tokens": 20,
        "data.test_split": 5,  # shares of 3 and 2 prompts
        "trainer.max_epochs": 1,
        "samples.prompts": 5,
        "validation": {"prompts": 3, "seeds": [1, 2], "max_new_tokens": 12},
    }
    if not folder:
        changes["model.objective"] = {"class_path": f"dskd_lightning.objectives.{CROSS_ATTENTION}"}
    teacher = model_folder(tokenizer="bpe" if folder else "unigram", hidden=24, seed=2)
    config = write_config(tmp_path, model_folder(seed=1), teacher, **changes)
    run, given = tmp_path / "run", ("--config", str(config))
    dskd_ranks("fit", *given, folder=tmp_path)
    assert (run / "checkpoints" / "last.ckpt").is_dir() == folder
    dskd_ranks("test", *given, folder=tmp_path, prepare=as_on_gpus)
    two = results(run)
    assert folder or json.loads(next((run / "alignments").iterdir()).read_text())["weights"]
    alone("test", *given, *ONE, log=tmp_path / "one.log")
    one = results(run)
    assert two["predictions"] == one["predictions"]
    assert two["metrics"].pop("model") == one["metrics"].pop("model")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert two["representation"]["after"] == pytest.approx(one["representation"]["after"], rel=1e-4)
    for name, spectrum in one["representation"]["projectors"].items():
        values = two["representation"]["projectors"][name]["singular_values"]
        assert values == pytest.approx(spectrum["singular_values"], rel=1e-3)
    if not folder:
        alone("validate", *given, *ONE, log=tmp_path / "one.log")
        rows = [row for row in read_rows(run / "metrics.csv") if row.get("val/response_tokens")]
        two, one = ({name: float(row[name]) for name in row if "val/" in name} for row in rows)
        assert two["val/teacher_nll_per_byte"] > 0
        assert two == pytest.approx(one, rel=1e-4)
    if folder:
        last = ("--ckpt_path", "last")
        data = ("--data.predict", str(tmp_path / "data.jsonl"), "--responses.limit", "5")
        dskd_ranks("predict", *given, *data, *last, folder=tmp_path)
        assert json.loads((run / "predict.json").read_text())["rougeL"] >= 0
        dskd_ranks("fit", *given, *last, "--trainer.max_epochs", "2", folder=tmp_path)
        dskd_ranks("validate", *given, folder=tmp_path)
        alone("export", str(run), str(tmp_path / "exported"), log=tmp_path / "export.log")
        assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_rank_alone_sees_ends_all(tmp_path: Path, model_folder: Any, rank: int) -> None:
    def prepare(own: int) -> None:
        def build(module: DistillationModule) -> None:
            raise UserError("model.student: this rank can't read it.")

        if own == rank:
            DistillationModule._build_student = build  # type: ignore[method-assign]

    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **sharded())
    ended = dskd_ranks(
        "fit", "--config", str(config), folder=tmp_path, prepare=prepare, expected=None, timeout=60
    )
    assert ended.statuses[rank] == 2
    assert 0 not in ended.statuses
    assert "model.student: this rank can't read it." in ended.logs[rank]


def test_sharded_projectors_warm_up_as_whole_ones_do(tmp_path: Path, model_folder: Any) -> None:
    changes = {
        **sharded(),
        "model.objective": {"class_path": "dskd_lightning.objectives.DSKDTokenAlignmentObjective"},
        "model.projector_warmup_steps": 2,
        "trainer.max_epochs": 1,
        "trainer.log_every_n_steps": 1,
        "completions": {"prompts": 0},
    }
    teacher = model_folder(tokenizer="unigram", hidden=24, seed=2)
    given = ("--config", str(write_config(tmp_path, model_folder(seed=1), teacher, **changes)))
    dskd_ranks("fit", *given, "--data.batch_size=2", f"--output={tmp_path / 'two'}", folder=tmp_path)
    one = (*ONE, "--data.batch_size=4", f"--output={tmp_path / 'one'}")
    alone("fit", *given, *one, log=tmp_path / "one.log")
    found = []
    for name in ("one", "two"):
        rows = read_rows(tmp_path / name / "metrics.csv")
        found.append([float(row["train/t2s_ce"]) for row in rows if "train/t2s_ce" in row])
    assert len(found[0]) > 2
    # The first step's scale of the inputs and means over pairs depend on how a step is split.
    assert found[1] == pytest.approx(found[0], rel=1e-2)
