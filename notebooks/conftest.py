"""Notebooks that say ``"slow": true`` in their metadata run with the slow tests."""

from __future__ import annotations

import json

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb" and json.loads(item.path.read_text("utf-8"))["metadata"].get("slow"):
            item.add_marker("slow")
