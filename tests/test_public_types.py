"""Type checkers see every public name: a user's mistake is found, and its right use is not."""

from __future__ import annotations

import ast
from pathlib import Path

import dskd_lightning


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(dskd_lightning.__file__).read_text("utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.asname: (n.module, a.name) for g in guarded for n in g.body for a in n.names}
    assert seen == {name: (f"dskd_lightning.{home}", name) for name, home in dskd_lightning._HOMES.items()}
