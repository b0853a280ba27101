"""Several nodes, with a disk that they share or with disks of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import dskd_ranks
from forked_runs import dskd_forked
from ports import free_port
from tiny_runs import environment, write_config

NODES = ("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp")
CACHED = {
    "data.teacher_cache": {},
    "data.cache_dir": None,
    "data.batch_size": 3,
    "completions": {"prompts": 0},
    "trainer.max_epochs": 1,
}


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]


def test_nodes_without_a_shared_disk_say_so_instead_of_waiting(tmp_path: Path, model_folder: Any) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **CACHED)

    def own_disk(rank: int) -> None:
        os.environ["DSKD_CACHE_DIR"] = str(tmp_path / f"node {rank}")

    arguments = ("fit", "--config", str(config), *NODES)
    ended = dskd_ranks(
        *arguments, folder=tmp_path, nodes=2, prepare=own_disk, expected=2, timeout=60
    )  # both would build one
    assert all("name a folder on a disk that they share" in log for log in ended.logs)

    def one_has_it(rank: int) -> None:
        os.environ["DSKD_CACHE_DIR"] = str(tmp_path / f"{rank}")

    os.environ["DSKD_CACHE_DIR"], before = str(tmp_path / "0"), os.environ["DSKD_CACHE_DIR"]
    try:
        assert dskd_forked("cache", str(config), log=tmp_path / "cache.log") == 0
    finally:
        os.environ["DSKD_CACHE_DIR"] = before
    ended = dskd_ranks(*arguments, folder=tmp_path, nodes=2, prepare=one_has_it, expected=2, timeout=60)
    assert all("name a folder on a disk that they share" in log for log in ended.logs)


def test_two_rendezvous_agents_train_as_one_process(tmp_path: Path, model_folder: Any) -> None:
    """`torchrun --nnodes 2` on the loopback: data are prepared and the cache is built by both at once."""
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **CACHED)
    shipped = Path(__file__).resolve().parents[2] / "configs" / "strategy" / "fsdp2.yaml"
    port = free_port()
    agent = (
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test",
        "--local-addr", "127.0.0.1", "-m", "dskd_lightning", "fit", "--config", str(config),
        "--config", str(shipped), "--trainer.num_nodes", "2", "--trainer.devices", "1",
    )  # fmt: skip
    disk = {**environment(), "DSKD_CACHE_DIR": str(tmp_path / "shared")}
    logs = [tmp_path / f"node {node}.log" for node in range(2)]
    agents = []
    for log in logs:
        with log.open("wb") as out:
            agents.append(subprocess.Popen(agent, stdout=out, stderr=subprocess.STDOUT, env=disk))
    try:
        statuses = [process.wait(timeout=180) for process in agents]
    finally:
        for process in agents:
            process.kill()
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert len(list((tmp_path / "shared" / "data" / "teacher-states").glob("*/manifest.json"))) == 1
    one = ("--data.teacher_cache", "null", "--data.batch_size", "6", "--output", str(tmp_path / "one"))
    log = tmp_path / "one.log"
    assert dskd_forked("fit", "--config", str(config), *one, "--trainer.devices", "1", log=log) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
