"""The documentation site: each page is in its menu, each public name and key on a page, each snippet runs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_configs import QUICKSTART, ParsedCLI, config_arguments

import dskd_lightning

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SNIPPETS = [
    (page.relative_to(DOCS).as_posix(), number, code)
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
]
DOCUMENTED = {
    name for page in PAGES for name in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)
}


def test_menu_and_pages_are_the_same() -> None:
    class Loader(yaml.SafeLoader):
        pass

    menu = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)
        ]

    assert sorted(files(menu)) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{p}-{n}" for p, n, _ in SNIPPETS])
def test_snippets_run(page, number, code) -> None:
    exec(compile(code, f"{page}, snippet {number}", "exec"), {})


def test_own_objective_of_the_page_is_smoothed_cross_entropy() -> None:
    import torch

    from dskd_lightning import Head, Side

    (code,) = (code for page, _, code in SNIPPETS if page == "howto/write_an_objective.md")
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    head, places = Head(torch.randn(7, 4)), (torch.randint(7, (5,)), torch.randint(7, (5,)), torch.zeros(5))
    ours, theirs = (Side(torch.randn(5, 4), head, head.weight, *places) for _ in range(2))
    output = names["LabelSmoothing"](0.3)(ours, theirs)
    soft = 0.7 * torch.nn.functional.one_hot(places[1], 7)
    soft = soft + 0.3 * torch.nn.functional.one_hot((theirs.hidden @ head.weight.T).argmax(-1), 7)
    expected = torch.nn.functional.cross_entropy(ours.hidden @ head.weight.T, soft, reduction="sum")
    torch.testing.assert_close(output.loss, expected)
    assert int(output.tokens) == 5


def test_every_public_name_is_on_a_page() -> None:
    homes = {name: getattr(dskd_lightning, name).__module__ for name in dskd_lightning.__all__}
    missing = [
        name
        for name, home in homes.items()
        if not any(
            home == shown or home.startswith(f"{shown}.") or f"{home}.{name}" == shown for shown in DOCUMENTED
        )
    ]
    assert missing == []
    for shown in DOCUMENTED:  # what isn't a module is a class of one
        module = shown if not shown.rpartition(".")[2][0].isupper() else shown.rpartition(".")[0]
        assert importlib.import_module(module)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_every_config_key_is_on_a_page() -> None:
    config = ParsedCLI(args=config_arguments(QUICKSTART), run=False).config
    text = (DOCS / "reference/config.md").read_text(encoding="utf-8")
    keys = {*config.as_dict(), "ckpt_path", "weights_only"} - {"config"}
    assert not [key for key in keys if f"`{key}`" not in text]


def test_the_site_builds_without_a_warning(tmp_path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "site/reference/objectives/index.html").read_text(encoding="utf-8")
    assert "DSKDCrossAttentionObjective" in page
    assert not re.findall(r'(?:src|rel="stylesheet" href)="https?://', page)  # nothing of other servers
