"""Type checkers see every public name: a user's mistake is found, and its right use is not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dskd_lightning

SCRIPT = Path(__file__).with_name("user_script.py")


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(dskd_lightning.__file__).read_text("utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.asname: (n.module, a.name) for g in guarded for n in g.body for a in n.names}
    assert seen == {name: (f"dskd_lightning.{home}", name) for name, home in dskd_lightning._HOMES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checker", [["mypy", "--strict"], ["pyright"]], ids=lambda words: words[0])
def test_a_users_script_is_clean(checker, tmp_path):
    """Of the library's own code and with nobody's settings; `make types` has mypy's flags for this file."""
    pytest.importorskip(checker[0])
    options = (
        ["--config-file=", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
        if checker[0] == "mypy"
        else []
    )
    done = subprocess.run(
        [sys.executable, "-m", *checker, *options, str(SCRIPT)],
        cwd=Path(dskd_lightning.__file__).parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
