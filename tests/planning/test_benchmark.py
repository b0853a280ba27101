"""`dskd benchmark`: the same steps for all that fit, gone on with, and a recommendation with its reason."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import dskd_fork, write_data

from dskd_lightning.errors import UserError
from dskd_lightning.planning import benchmark as planning
from dskd_lightning.planning.benchmark import Benchmark, parse_duration
from dskd_lightning.planning.objectives import CROSS, SAME
from dskd_lightning.planning.pace import Pace
from dskd_lightning.planning.verdict import recommended
from dskd_lightning.study import Study
from dskd_lightning.study.failures import VariantsFailed, WorkerFailed


@pytest.mark.slow
def test_all_that_fit_get_the_same_steps_and_it_goes_on(model_folder, tmp_path) -> None:
    data = write_data(tmp_path / "data.jsonl", 40)
    models = model_folder(hidden=24, seed=2), model_folder(seed=1)
    output = tmp_path / "b"
    command = [
        "benchmark", "--teacher", models[0], "--student", models[1], "--data", str(data), "--budget", "4m",
        "--output", str(output), "--rates", "[0.003]", "--objectives", "SFT", "DSKD",
    ]  # fmt: skip
    done = dskd_fork(*command, timeout=400)
    assert done.stdout.splitlines()[-1].startswith("take ")
    rows = json.loads((output / "table.json").read_text())
    assert list(rows) == ["teacher", "before training", "SFT", "DSKD"]
    steps = {
        name: json.loads((output / name / "training.json").read_text())["steps"] for name in ("SFT", "DSKD")
    }
    assert len(set(steps.values())) == 1
    study = yaml.safe_load((output / "benchmark.study.yaml").read_text())
    assert study["grid"] == {"model.optimizer.init_args.lr": [0.003]}
    verdict = json.loads((output / "recommendation.json").read_text())
    assert verdict["objective"] in ("SFT", "DSKD")

    written = {path: path.stat().st_mtime_ns for path in output.rglob("*.ckpt")}
    again = dskd_fork(*command, timeout=100)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.ckpt")} == written
    command[command.index("4m")] = "5m"
    refused = dskd_fork(*command, check=False)
    assert refused.returncode == 2
    assert "another budget" in refused.stderr


def benchmark(tmp_path: Path, **changes: Any) -> Benchmark:
    values = {"teacher": "t", "student": "s", "data": "d", "output": tmp_path, "budget": 3600.0}
    return Benchmark(**{**values, **changes})


class Planned:
    """Stands in for models, data and the probe, which finds a step of some seconds and nothing else."""

    def __init__(self, monkeypatch, identical: bool, seconds: float, objective: str = "") -> None:
        values = {"trainer": {"accumulate_grad_batches": 2}, "data": {"max_length": 128}}
        known = {"text": yaml.safe_dump(values), "examples": 500, "ratio": 2.0, "identical": identical}
        known["objective"] = objective
        plan = type("Plan", (), known)
        pace = Pace(start=0.0, step=seconds, validation=0.0, test=0.0, responses=0.0, batches=200)
        monkeypatch.setattr("dskd_lightning.planning.benchmark.plan", lambda *_: plan)
        monkeypatch.setattr("dskd_lightning.planning.benchmark.measure_pace", lambda *_: pace)


def planned(tmp_path: Path, **changes: Any) -> None:
    benchmark(tmp_path, **changes)._plan(time.monotonic())


@pytest.mark.parametrize(("identical", "known"), [(True, SAME), (False, CROSS)])
def test_budget_is_shared_by_objectives_and_rates(tmp_path, monkeypatch, identical, known) -> None:
    Planned(monkeypatch, identical, 10.0)
    planned(tmp_path, rates=(1e-4, 3e-4, 1e-3))
    trainer = yaml.safe_load((tmp_path / "budget.yaml").read_text())["trainer"]
    most = int((3600 - 15) / (len(known) * 3 * 10.0))
    assert most - 3 < trainer["max_steps"] <= most
    assert 3 * trainer["val_check_interval"] == 2 * trainer["max_steps"]  # the last one at the end
    variants = yaml.safe_load((tmp_path / "benchmark.study.yaml").read_text())["variants"]
    assert list(variants) == ["teacher", "before training", *known]


def test_the_objective_that_vocab_names_is_among_them(tmp_path, monkeypatch) -> None:
    Planned(monkeypatch, False, 10.0, "dskd_lightning.objectives.GOLDObjective")
    planned(tmp_path)
    variants = yaml.safe_load((tmp_path / "benchmark.study.yaml").read_text())["variants"]
    assert variants["GOLD"] == {"configs": ["dskd:objective/gold"]}


def test_the_end_is_told(tmp_path, monkeypatch, caplog) -> None:
    Planned(monkeypatch, True, 10.0)
    with caplog.at_level(logging.INFO):
        planned(tmp_path)
    assert re.search(r"expected to end at \d\d:\d\d, after 5[6-9] min \d+ s of 1 h 0 min", caplog.text)


def test_a_benchmark_that_took_longer_says_so(tmp_path, monkeypatch, caplog) -> None:
    Planned(monkeypatch, True, 0.001)
    clock = iter((0.0, 0.0, 100.0))
    monkeypatch.setattr("dskd_lightning.planning.benchmark.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(
        Study,
        "run",
        lambda self, overwrite: results(self.output, {"A": ("worse", 2.0)}, {"SFT": 1.5, "A": 1.4}),
    )
    benchmark(tmp_path, budget=90.0).run()
    assert "It took 1 min 40 s, more than the budget of 1 min 30 s" in caplog.text


def test_mistakes(tmp_path, monkeypatch) -> None:
    Planned(monkeypatch, True, 1000.0)
    with pytest.raises(UserError, match=r"one step of each 8000\.0 s; give at least 2 h"):
        planned(tmp_path)
    with pytest.raises(UserError, match="there is no 'Alm'"):
        planned(tmp_path, objectives=("SFT", "Alm"))
    for text in ("2", "h", "-1h", "2 weeks", "nanh"):
        with pytest.raises(UserError, match="--budget"):
            parse_duration(text)
    assert [parse_duration(text) for text in ("90s", "45m", "2h", "1.5d")] == [90, 2700, 7200, 129600]


def results(folder: Path, outcomes: dict[str, tuple[str, float]], likelihood: dict[str, float]) -> Path:
    candidates = [
        {
            "name": name,
            "outcome": outcome,
            "mean": mean,
            "difference": {"mean": mean - 20},
            "adjusted_p_value": 0.01,
        }
        for name, (outcome, mean) in outcomes.items()
    ]
    (folder / "report").mkdir()
    summary = {"baseline": "SFT", "candidates": candidates}
    (folder / "report" / "comparison.json").write_text(json.dumps(summary))
    table = {name: {"perplexity_per_byte": value} for name, value in likelihood.items()}
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def test_the_best_of_those_that_are_better(tmp_path) -> None:
    outcomes = {
        "teacher": ("better", 40.0),
        "A": ("better", 22.0),
        "B": ("better", 24.0),
        "C": ("undecided", 30.0),
    }
    found = recommended(results(tmp_path, outcomes, dict.fromkeys(("SFT", *outcomes), 1.5)))
    assert (found.objective, found.significant) == ("B", True)
    assert "+4.0 from SFT's" in found.reason


def test_likelihood_where_responses_don_t_tell(tmp_path) -> None:
    outcomes = {"A": ("undecided", 22.0), "B": ("worse", 10.0), "before training": ("worse", 1.0)}
    values = {"SFT": 1.5, "A": 1.4, "B": 1.45, "before training": 1.1}
    found = recommended(results(tmp_path, outcomes, values))
    assert (found.objective, found.significant) == ("A", False)
    assert "no method's ROUGE-L is significantly above" in found.reason


def test_no_recommendation_where_every_training_diverged(tmp_path) -> None:
    (tmp_path / "report").mkdir()
    candidate = {"name": "before training", "outcome": "worse", "mean": 1.0}
    summary = {"baseline": "teacher", "candidates": [candidate]}
    (tmp_path / "report" / "comparison.json").write_text(json.dumps(summary))
    rows = {"teacher": {"perplexity_per_byte": 1.1}, "SFT": {"outcome": "diverged"}}
    (tmp_path / "table.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="lower --rates"):
        recommended(tmp_path)


def test_what_the_others_tell_is_told_where_a_run_failed(tmp_path, monkeypatch, caplog) -> None:
    Planned(monkeypatch, True, 5.0)

    def run(self: Study, overwrite: bool) -> None:
        results(self.output, {"A": ("better", 24.0)}, {"SFT": 1.5, "A": 1.4})
        raise VariantsFailed([WorkerFailed("B", "exit status 1, see B/variant.log")], 3)

    monkeypatch.setattr(Study, "run", run)
    with caplog.at_level(logging.INFO), pytest.raises(VariantsFailed, match="1 of 3 variants failed"):
        benchmark(tmp_path).run()
    assert "of the others: take A: its ROUGE-L is +4.0" in caplog.text
    assert json.loads((tmp_path / "recommendation.json").read_text())["objective"] == "A"


def test_what_can_t_be_told_apart_goes_to_the_cheapest(tmp_path) -> None:
    outcomes = {"A": ("undecided", 22.0), "B": ("undecided", 20.0), "C": ("worse", 10.0)}
    values = {"SFT": 9.3841, "A": 9.3840, "B": 9.3839, "C": 15.0}
    folder = results(tmp_path, outcomes, values)
    table = json.loads((folder / "table.json").read_text())
    for name, seconds in {"SFT": 30.0, "A": 21.0, "B": 20.0, "C": 1.0}.items():
        table[name]["training_seconds"] = seconds
    (folder / "table.json").write_text(json.dumps(table))
    found = recommended(folder)
    assert (found.objective, found.significant) == ("A", False)
    assert (
        "SFT, A and B cannot be told apart (nats within 1%), and of these it is the cheapest" in found.reason
    )
    for row in table.values():
        del row["training_seconds"]
    (folder / "table.json").write_text(json.dumps(table))
    assert recommended(folder).objective == "SFT"


def test_the_config_trains_beside_the_study(tmp_path, monkeypatch) -> None:
    asked = []
    Planned(monkeypatch, True, 5.0)
    stand_in = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *given: asked.append(given) or stand_in(*given))
    planned(tmp_path, output=tmp_path / "b")
    assert asked == [("t", "s", "d", str(tmp_path / "b_fit"))]


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_changed_digit_of_what_the_folder_is_of_is_seen(tmp_path, monkeypatch) -> None:
    Planned(monkeypatch, True, 5.0)
    benchmark(tmp_path)._claim(overwrite=False)
    planned(tmp_path)
    benchmark(tmp_path)._claim(overwrite=False)
    path = tmp_path / "benchmark.json"
    path.write_text(path.read_text().replace("3600", "3700"))
    with pytest.raises(UserError, match=r"benchmark\.json: isn't as it was written .* start over with"):
        benchmark(tmp_path)._claim(overwrite=False)


def test_a_corrected_mistake_is_no_other_benchmark(tmp_path, monkeypatch) -> None:
    Planned(monkeypatch, True, 5.0)
    monkeypatch.setattr("dskd_lightning.planning.benchmark.Study.read", _killed)
    with pytest.raises(UserError, match="there is no 'Alm'"):
        benchmark(tmp_path, objectives=("SFT", "Alm")).run()
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, objectives=("SFT",)).run()
    with pytest.raises(UserError, match="another objectives"):
        benchmark(tmp_path, objectives=("DSKD",)).run()


def test_a_kill_while_starting_over_leaves_no_old_plan_under_a_new_name(tmp_path, monkeypatch) -> None:
    Planned(monkeypatch, True, 5.0)
    monkeypatch.setattr("dskd_lightning.planning.benchmark.Study.read", _killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, objectives=("SFT",)).run()
    with monkeypatch.context() as patch:
        patch.setattr(Benchmark, "_plan", _killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark(tmp_path, objectives=("DSKD",)).run(overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path, objectives=("DSKD",)).run()
    variants = yaml.safe_load((tmp_path / "benchmark.study.yaml").read_text())["variants"]
    assert list(variants) == ["teacher", "before training", "DSKD"]
