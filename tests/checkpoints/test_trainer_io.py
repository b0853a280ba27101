"""Checkpoints with tensor subclasses, as 8-bit optimizers keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.testing._internal.two_tensor import TwoTensor

from dskd_lightning.checkpoints import WholeCheckpointIO


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
