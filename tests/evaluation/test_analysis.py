"""Analysis of a trained pair, against the plain formulas on its own tensors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import dskd_fork, write_config

from dskd_lightning.cli import main
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.analysis import projector_spectra, representation_distances, token_maps
from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.launch.trained import open_run
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.vocab import run_vocab

CMA = {"class_path": "dskd_lightning.objectives.DSKDCrossAttentionObjective"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder) -> Path:
    """A tested cross-tokenizer run."""
    folder = tmp_path_factory.mktemp("analysis")
    student, teacher = (
        model_folder(seed=1),
        model_folder(hidden=24, tokenizer="sentencepiece", vocab_size=500, seed=2),
    )
    changes = {"model.objective": CMA, "trainer.max_epochs": 1, "analysis": {"before": True, "maps": 3}}
    changes["responses"] = {"seeds": [], "max_new_tokens": 4, "max_length": None, "teacher_efficiency": True}
    config = write_config(folder, student, teacher, **changes)
    dskd_fork("fit", "--config", str(config))
    (folder / "run/alignments").mkdir()
    (folder / "run/alignments/99.json").write_text("{}")  # an earlier test's, which drew more
    dskd_fork("test", "--config", str(folder / "run/config.yaml"))
    return folder / "run"


def test_a_changed_digit_in_any_result_is_seen(run, tmp_path) -> None:
    """A digit for another leaves text that is valid, and may well be a better result."""
    files = [path.relative_to(run) for kind in ("json", "jsonl", "csv") for path in run.rglob(f"*.{kind}")]
    assert {"metrics.json", "training.json", "greedy.jsonl", "settings.json", "1.json", "metrics.csv"} <= {
        file.name for file in files
    }
    whole = RunFolder.read(run, "r")
    assert not whole.mixtures()
    for file in files:
        folder = tmp_path / file.name
        shutil.copytree(run, folder)
        good = (folder / file).read_bytes()
        digits = [found.start() for found in re.finditer(rb"(?<=[ ,.0-9])[1-8](?=[^:\"]*\n)", good)]
        for at in digits[:: len(digits) // 5 + 1]:
            bad = good[:at] + b"%d" % (int(good[at : at + 1]) + 1) + good[at + 1 :]
            if _numbers(bad) == _numbers(good):  # the seventeenth digit of a float may mean nothing
                continue
            (folder / file).write_bytes(bad)
            with pytest.raises(UserError, match=rf"{file.name}.* isn't as it was written"):
                RunFolder.read(folder, "r").mixtures()
        assert digits, file


def _numbers(content: bytes) -> list[float]:
    return [float(number) for number in re.findall(rb"\d+(?:\.\d+)?(?:e-?\d+)?", content)]


def built(run: Path) -> DistillationCLI:
    cli = open_run(run, data__teacher_cache=None)
    cli.datamodule.setup("test")
    return cli


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:Found .* in eval mode")
def test_numbers_on_disk_equal_formulas(run) -> None:
    cli = built(run)
    batch = next(iter(cli.datamodule.test_dataloader()))
    with torch.no_grad():
        student = cli.model.student_side(batch.student)
        teacher = cli.model.teacher_side(0, batch.teachers[0])
    cosine = []
    for example in range(len(batch)):
        pairs = [(i, j) for i, j in batch.alignments[0].pairs.tolist() if student.sequence[i] == example]
        if len(pairs) < 2:
            continue
        grams = []
        for side, place in ((student, 0), (teacher, 1)):
            x = side.hidden[[pair[place] for pair in pairs]].double()
            x = x / x.norm(dim=1, keepdim=True)
            grams.append(x @ x.T)
        cosine.append(float((grams[0] - grams[1]).abs().mean()))
    written = json.loads((run / "representation.json").read_text())
    assert written["after"]["structure_distance_cosine"] == pytest.approx(np.mean(cosine), rel=1e-4)
    assert written["before"]["structure_distance_cosine"] != written["after"]["structure_distance_cosine"]
    assert representation_distances(cli.model, [batch]) == pytest.approx(written["after"], rel=1e-4)
    spectra = projector_spectra(cli.model)
    state = cli.model.objectives.state_dict()
    weight = state["0.t2s.weight"] / state["0.t2s.input_rms"]  # what hidden states are multiplied with
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectra["0.t2s.weight"]["singular_values"], expected, rtol=1e-3, atol=1e-5)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["cka"] == pytest.approx(written["after"]["cka"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:Found .* in eval mode")
def test_maps_hold_each_examples_tokens_and_attention(run) -> None:
    cli = built(run)
    batch = next(iter(cli.datamodule.test_dataloader()))
    maps = token_maps(cli.model, batch, cli.datamodule.teacher_tokenizers[0])
    counts = torch.bincount(batch.student.sequence).tolist()
    assert [len(example.student) for example in maps] == counts
    assert sum(len(example.groups.pairs) for example in maps) == len(batch.alignments[0].pairs)
    for example in maps:
        assert example.attention is not None
        np.testing.assert_allclose(example.attention.sum(1), 1.0, rtol=1e-4)
        for i, j in example.groups.pairs:
            assert example.groups.student_group[i] == example.groups.teacher_group[j] >= 0


def test_the_run_folder_holds_it_for_the_report(run) -> None:
    folder = RunFolder.read(run)
    assert len(folder.alignments) == 3
    assert "cross-model attention" in folder.alignments[0].title
    assert folder.representation is not None
    assert folder.efficiency is not None
    assert folder.teacher_efficiency is not None
    assert folder.teacher_efficiency["parameters"] != folder.efficiency["parameters"]
    assert {"before", "after", "projectors", "model"} == folder.representation.keys()


def test_vocab_draws_a_runs_attention_on_given_examples(run, tmp_path) -> None:
    data = tmp_path / "examples.jsonl"
    data.write_text(json.dumps({"prompt": "Count.", "response": "1 2 3 four"}) + "\n")
    spec = yaml.safe_load((run.parent / "config.yaml").read_text())["model"]
    models = spec["teacher"]["source"], spec["student"]["source"]
    picture = tmp_path / "attention.png"
    result = main(["vocab", *models, "--data", str(data), "--heatmap", str(picture), "--run", str(run)])
    assert result == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_needs_examples_and_a_run(run, tmp_path, model_folder) -> None:
    model = model_folder(seed=1)
    with pytest.raises(UserError, match="--data"):
        run_vocab(model, model, run=str(run))
    data = tmp_path / "examples.jsonl"
    data.write_text(json.dumps({"prompt": "Count.", "response": "1 2"}) + "\n")
    with pytest.raises(UserError, match="finished run"):
        run_vocab(model, model, str(data), heatmap=str(tmp_path / "a.png"), run=str(tmp_path))
