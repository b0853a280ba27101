"""What a Trainer reads: tensor subclasses, as 8-bit optimizers keep them, and never code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.testing._internal.two_tensor import TwoTensor

from dskd_lightning.checkpoints import WholeCheckpointIO
from dskd_lightning.errors import UserError


def test_tensor_subclasses_are_read(tmp_path: Path) -> None:
    state = {"exp_avg": TwoTensor(torch.arange(3.0), torch.ones(3)), "step": torch.tensor(4)}
    WholeCheckpointIO().save_checkpoint({"state_dict": {}, "optimizer": state}, tmp_path / "last.ckpt")
    with torch.serialization.safe_globals([TwoTensor]):
        found = WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["optimizer"]
        with pytest.raises(RuntimeError, match="map_location"):  # why Lightning's own isn't enough
            TorchCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(found["exp_avg"].a, torch.arange(3.0))
    assert torch.equal(found["exp_avg"].b, torch.ones(3))
    assert found["step"] == 4


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["last.ckpt", ".temp.ckpt"])
@pytest.mark.parametrize("weights_only", [False, None, True])
def test_nothing_is_run_whatever_a_config_says_of_weights_only(tmp_path, name, weights_only) -> None:
    torch.save({"state_dict": {}, "more": Bomb(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises((UserError, pickle.UnpicklingError), match=r"can't be used|Weights only load failed"):
        WholeCheckpointIO().load_checkpoint(tmp_path / name, weights_only=weights_only)
    assert not (tmp_path / "ran").exists()
