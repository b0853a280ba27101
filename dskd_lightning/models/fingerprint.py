"""A name for a model's exact weights, for caches of what it computed."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dskd_lightning.ranks import whole

__all__ = ["weights_fingerprint"]

_CHUNK_BYTES = 64 * 2**20
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype")


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and over name, type, shape and content of every weight.

    Every byte counts, so that one changed weight changes the result; the place that a model
    was loaded from and the version of transformers don't. Of a sharded model all ranks ask for it.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest.update(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:  # tied
            digest.update(f"\n{name} tied".encode())
            continue
        seen.add(id(tensor))
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _update(digest, whole(tensor))
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    for chunk in content.split(_CHUNK_BYTES):
        digest.update(memoryview(chunk.cpu().numpy()))
