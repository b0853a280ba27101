"""The files that a stranger reads first say what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dskd_lightning

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
YAML = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


@pytest.fixture(scope="module")
def own_divergence() -> Any:
    """The class that CONTRIBUTING.md shows."""
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["Hellinger"]()


def test_the_divergence_that_contributing_shows_works_in_an_objective(own_divergence) -> None:
    from dskd_lightning import Head, LogitKDObjective, ModelSpace, Side

    torch.manual_seed(0)
    head = Head(torch.randn(11, 6))
    objective = LogitKDObjective(divergence=own_divergence, kd_ratio=1.0, temperature=1.0)
    objective.configure(ModelSpace(head, head.weight), ModelSpace(head, head.weight))
    labels = torch.randint(11, (5,))
    student, teacher = torch.randn(5, 6).requires_grad_(), torch.randn(5, 6)
    places = {"ids": labels, "labels": labels, "sequence": torch.zeros(5, dtype=torch.long)}
    output = objective(
        *(Side(hidden=h, head=head, embeddings=head.weight, **places) for h in (student, teacher))
    )
    p, q = ((h @ head.weight.T).softmax(-1).sqrt() for h in (teacher, student))
    torch.testing.assert_close(output.loss, 0.5 * (p - q).square().sum())
    (gradient,) = torch.autograd.grad(output.loss, student)
    assert gradient.abs().sum() > 0


def test_paths_that_contributing_names_exist() -> None:
    named = re.findall(r"`((?:tests|docs|dskd_lightning|configs)/[\w./]*)`", CONTRIBUTING)
    assert named
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]


def test_every_room_and_every_folder_of_tests_is_on_the_map() -> None:
    rooms = [path.parent.name for path in ROOT.glob("dskd_lightning/*/__init__.py")]
    assert not [room for room in rooms if room != "demo" and f"`{room}/`" not in CONTRIBUTING]


def test_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == dskd_lightning.__version__


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_of_the_repository_reads(path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_targets_that_workflows_and_pages_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for line in re.findall(r"(?:^|run: |`)make ((?:[\w-]+ ?)+)", path.read_text("utf-8"), re.MULTILINE):
            assert line.split()[0] in targets, f"{path.name}: make {line}"


def test_image_uses_the_pinned_torch() -> None:
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    version = re.search(r"TORCH \?= torch==([\d.]+)", (ROOT / "Makefile").read_text("utf-8"))
    used = re.search(r"torch==([\d.]+)", (ROOT / "Dockerfile").read_text("utf-8"))
    assert used is not None
    assert version is not None
    assert used[1] == version[1]
    assert pinned is None or pinned[1] == used[1]
