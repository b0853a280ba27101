"""The share by which the fullest rank exceeds the mean, summed beside other figures."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.training.rank_loads import RankLoads


def test_loads_travel_beside_the_sums_and_change_none() -> None:
    sent: list[Tensor] = []

    def others(sums: Tensor) -> Tensor:
        """Two more ranks, with 30 and 20 tokens, and the same sums."""
        sent.append(sums.clone())
        total = sums.clone()
        total[:4] *= 3
        total[4] += 30
        total[6] += 20
        return total

    loads, sums = RankLoads(), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    loads.add(60)
    loads.add(40)
    assert torch.equal(loads.beside(others, 1, 3)(sums), 3 * sums)
    assert sent[0].tolist() == [1, 2, 3, 4, 0, 100, 0]
    assert loads.figures()["train/slowest_rank"] == 100 / 50 - 1
    loads.add(20)
    loads.beside(others, 1, 3)(sums)
    assert sent[1].tolist()[4:] == [0, 20, 0]  # of this step alone
    torch.testing.assert_close(loads.figures()["train/slowest_rank"].item(), 30 / (70 / 3) - 1)


def test_one_rank_sends_nothing_more_and_has_no_such_figure() -> None:
    loads = RankLoads()
    loads.add(5)

    def alone(sums: Tensor) -> Tensor:
        return sums

    assert loads.beside(alone, 0, 1) is alone
    assert loads.figures() == {}
