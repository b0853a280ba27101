"""The cores that a process may use: its affinity, and what its container is given of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dskd_lightning import cores
from dskd_lightning.cores import affine_cores, cpu_quota, usable_cores


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own"
    path.write_text(text)
    return path


def test_version_2_of_the_root_as_a_container_sees_it(tmp_path) -> None:
    write(tmp_path / "fs", cpu__max="150000 100000")
    assert cpu_quota(tmp_path / "fs", own(tmp_path, "0::/\n")) == 1.5
    write(tmp_path / "fs", cpu__max="max 100000")
    assert cpu_quota(tmp_path / "fs", own(tmp_path, "0::/\n")) is None


def test_version_2_takes_the_tightest_group_on_the_way_up(tmp_path) -> None:
    write(tmp_path / "fs" / "jobs" / "mine", cpu__max="max 100000")
    write(tmp_path / "fs" / "jobs", cpu__max="400000 100000")
    write(tmp_path / "fs" / "others", cpu__max="100000 100000")
    assert cpu_quota(tmp_path / "fs", own(tmp_path, "0::/jobs/mine\n")) == 4.0
    write(tmp_path / "fs" / "jobs" / "mine", cpu__max="50000 100000")
    assert cpu_quota(tmp_path / "fs", own(tmp_path, "0::/jobs/mine\n")) == 0.5


@pytest.mark.parametrize("controller", ["cpu", "cpu,cpuacct"])
def test_version_1(controller, tmp_path) -> None:
    lines = own(tmp_path, f"12:memory:/box\n4:{controller}:/box\n1:name=systemd:/init\n")
    group = tmp_path / "fs" / controller / "box"
    write(group, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cpu_quota(tmp_path / "fs", lines) is None
    write(group, cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cpu_quota(tmp_path / "fs", lines) == 3.0


def test_no_groups_or_an_unknown_form_are_no_limit(tmp_path) -> None:
    assert cpu_quota(tmp_path / "fs", tmp_path / "own") is None
    write(tmp_path / "fs", cpu__max="whatever")
    assert cpu_quota(tmp_path / "fs", own(tmp_path, "0::/\n")) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.0, 2), (2.9, 2), (0.3, 1), (64.0, 8)])
def test_usable_are_those_of_the_affinity_within_the_quota(quota, expected, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert affine_cores() == 8
    assert usable_cores() == expected


def test_a_mac_has_no_affinity(monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert affine_cores() == 6
