"""A run beside its teacher, against counts made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dskd_lightning.comparison.against_teacher import against_teacher, resolve_teacher, teacher_columns
from dskd_lightning.errors import UserError
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder

TEACHER = {0: "the cat sat on the mat", 1: "seven", 2: "blue and green", 3: "it rains in spring"}
STUDENT = {0: "the cat lay on the mat", 1: "seven", 2: "red", 3: "spring it rains"}
REFERENCE = "the cat sat on a mat"


def folder(name: str, answers: dict[int, str], seeds=(None,), **costs: float) -> RunFolder:
    rows = {
        seed: [
            Prediction(index=i, prompt="p", references=(REFERENCE,), response=text, seed=seed, tokens=3,
                       finished=True)
            for i, text in answers.items()
        ]
        for seed in seeds
    }  # fmt: skip
    return RunFolder(Path(name), name, rows, efficiency=costs or None)


def rouge(reference: str, text: str) -> float:
    return 100 * RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].fmeasure


def test_shares_and_consistency() -> None:
    teacher = folder("teacher", TEACHER, parameters=200, decode_tokens_per_second=10.0, peak_bytes=None)
    student = folder("small", STUDENT, parameters=50, decode_tokens_per_second=35.0, peak_bytes=7)
    (found,) = against_teacher([student, teacher])
    between = {i: rouge(TEACHER[i], STUDENT[i]) for i in TEACHER}
    assert (found.run, found.parameters, found.speed) == ("small", 0.25, 3.5)
    assert found.memory is None
    assert found.energy is None
    assert found.exact == 25.0
    assert found.consistency == pytest.approx(sum(between.values()) / 4)
    assert found.close == 100 * sum(score >= 50 for score in between.values()) / 4
    furthest = sorted(between, key=lambda i: (between[i], i))
    assert [far.index for far in found.furthest] == furthest
    worst = found.furthest[0]
    assert (worst.prompt, worst.response, worst.teachers) == ("p", STUDENT[furthest[0]], TEACHER[furthest[0]])
    assert worst.consistency == pytest.approx(between[furthest[0]])
    assert (found.choices, found.same_choice) == (None, None)
    own, whole = (sum(rouge(REFERENCE, text) for text in a.values()) for a in (STUDENT, TEACHER))
    assert found.quality == pytest.approx(own / whole)
    labels, ((*row,),) = teacher_columns([found])
    assert "energy, %" not in labels
    assert row[labels.index("parameters, %")] == 25.0


def test_the_same_choice_is_counted_where_the_teacher_chooses() -> None:
    choices = ["cat", "dog", "guinea pig"]
    answers = {  # teacher's, student's
        0: ("A cat.", "The cat, not the dog"),
        1: ("dog", "Guinea pig!"),
        2: ("a catfish", "cat"),  # no choice of the teacher's
        3: ("guinea pig", "none of them"),
        4: ("dog", "dog"),  # whose record has no choices
    }
    folders = []
    for name, side in (("teacher", 0), ("small", 1)):
        run = folder(name, {index: texts[side] for index, texts in answers.items()})
        run.predictions[None] = [
            replace(p, fields={} if p.index == 4 else {"choices": choices}) for p in run.predictions[None]
        ]
        folders.append(run)
    (found,) = against_teacher(folders)
    assert found.choices == 3
    assert found.same_choice == pytest.approx(100 / 3)
    labels, ((*row,),) = teacher_columns([found])
    assert row[labels.index("same choice, %")] == found.same_choice


def test_answers_of_one_seed_are_compared_with_each_other() -> None:
    teacher = folder("teacher", {0: "a b", 1: "c d"}, seeds=(1, 2))
    teacher.predictions[2] = [p.__class__(**{**vars(p), "response": "x"}) for p in teacher.predictions[2]]
    (found,) = against_teacher([teacher, folder("small", {0: "a b"}, seeds=(1, 2, 3))])
    assert (found.exact, found.close) == (50.0, 50.0)


def test_without_a_teacher_or_anything_in_common() -> None:
    assert against_teacher([folder("a", STUDENT), folder("b", STUDENT)]) == []
    with pytest.raises(UserError, match="no prompt and seed in common"):
        against_teacher([folder("teacher", {9: "x"}), folder("a", {1: "x"})])


def test_the_word_teacher_is_the_folder_of_the_others_teacher(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=r"dskd test --config .*run/config\.yaml --model teacher"):
        resolve_teacher(["teacher", str(run)])
    (run / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()  # a model's folder of that name is no run
    assert resolve_teacher(["teacher", f"mine={run}"]) == [f"teacher={run / 'teacher'}", f"mine={run}"]
    assert resolve_teacher([str(run), "other"]) == [str(run), "other"]
    (tmp_path / "teacher/predictions").mkdir()
    assert resolve_teacher(["teacher", str(run)]) == ["teacher", str(run)]
