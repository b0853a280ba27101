"""What a benchmark compares: the usual objectives, what `dskd vocab` would name, or any that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import dskd_fork, write_config

import dskd_lightning
from dskd_lightning.errors import UserError
from dskd_lightning.planning.objectives import CROSS, OBJECTIVES, SAME, compared, objective_names
from dskd_lightning.study import Study
from dskd_lightning.study.names import check_name

GOLD = "dskd_lightning.objectives.GOLDObjective"
ETA = "dskd_lightning.objectives.DSKDTokenAlignmentObjective"


def test_every_shipped_objective_has_a_name() -> None:
    shipped = Path(dskd_lightning.__file__).parents[1] / "configs" / "objective"
    assert sorted(OBJECTIVES.values()) == sorted(path.stem for path in shipped.glob("*.yaml"))
    for name in OBJECTIVES:
        check_name(Path("study.yaml"), name)


def test_what_is_recommended_is_always_compared() -> None:
    assert objective_names(None, False, ETA) == CROSS
    assert set(objective_names(None, False, GOLD)) == {*CROSS, "GOLD"}
    assert objective_names(None, True, "dskd_lightning.objectives.DSKDv2Objective") == SAME


def test_any_that_fits_can_be_chosen_and_the_baseline_comes_first() -> None:
    assert objective_names(["ULD", "X-Token P-KL"], False, GOLD) == ("ULD", "X-Token P-KL")
    assert objective_names(["DSKD", "SFT", "top-k"], True, GOLD) == ("SFT", "DSKD", "top-k")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "DSKD",
            "'DSKD' needs models of one vocabulary, and these two have different ones; take some of SFT",
        ),
        ("dskd", "there is no 'dskd'; for this pair there are SFT, shared vocabulary, ULD"),
        ("ULD", "'ULD' is there twice"),
    ],
)
def test_what_can_t_be_chosen_is_told_with_the_true_reason(given, message) -> None:
    with pytest.raises(UserError, match=f"--objectives: {message}"):
        objective_names(["ULD", given], False, GOLD)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_cross"])
def test_the_quickstarts_are_instances(name) -> None:
    """Their rows are a benchmark's, so that what recommends of one recommends of them."""
    rows = [variant.name for variant in Study.read(f"dskd:{name}.study").variants]
    assert rows == list(compared(rows[2:]))


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "identical"), [("bpe", True), ("sentencepiece", False)])
def test_all_that_can_be_chosen_train(model_folder, tmp_path, tokenizer, identical) -> None:
    teacher = model_folder(tokenizer=tokenizer, hidden=24, seed=2)
    config = write_config(tmp_path, model_folder(seed=1), teacher, **{"trainer.max_steps": 2})
    names = [name for name in OBJECTIVES if identical or name not in set(SAME) - set(CROSS) | {"top-k"}]
    for name in objective_names(names, identical, GOLD):
        objective = f"dskd:objective/{OBJECTIVES[name]}"
        output = tmp_path / OBJECTIVES[name]
        dskd_fork("fit", "--config", str(config), "--config", objective, "--output", str(output))
