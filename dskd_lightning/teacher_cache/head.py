"""The part of a teacher that training from a complete cache needs: head and embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from dskd_lightning.models.loading import load_config, load_teacher
from dskd_lightning.models.output import input_embeddings, language_head
from dskd_lightning.models.sources import resolve_source
from dskd_lightning.models.spec import TeacherSpec

__all__ = ["TeacherHead", "head_fingerprint", "load_teacher_head"]

_SHARD_INDEX = "model.safetensors.index.json"


class TeacherHead(nn.Module):
    """A frozen head and input embeddings that `language_head` and `side` read like a whole model.

    Args:
        config: the teacher's configuration.
        embeddings: ``[vocab, hidden]``.
        weight: ``[vocab, hidden]`` of the head; ``embeddings`` itself where they are tied.
        bias: ``[vocab]`` of the head, or None.
    """

    def __init__(
        self, config: PretrainedConfig, embeddings: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding.from_pretrained(embeddings.detach(), freeze=True)
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        tied = weight.data_ptr() == embeddings.data_ptr() and weight.shape == embeddings.shape
        self.head.weight = self.embeddings.weight if tied else nn.Parameter(weight.detach(), False)
        if bias is not None:
            self.head.bias = nn.Parameter(bias.detach(), False)
        self.eval()

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> TeacherHead:
        """Head and embeddings of a loaded teacher; the rest can then be freed."""
        head = language_head(model)
        return cls(model.config, input_embeddings(model), head.weight, head.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@torch.no_grad()
def head_fingerprint(model: TeacherHead | PreTrainedModel) -> str:
    """SHA-256 over type, shape and content of head weight, head bias and embeddings."""
    head = language_head(model)  # type: ignore[arg-type]
    embeddings = input_embeddings(model)  # type: ignore[arg-type]
    digest = hashlib.sha256(repr((head.scale, head.softcap)).encode())
    for tensor in (head.weight, head.bias, embeddings):
        if tensor is None or (tensor is embeddings and head.weight.data_ptr() == embeddings.data_ptr()):
            digest.update(b"none or tied")
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for rows in tensor.detach().split(4096):
            digest.update(memoryview(rows.contiguous().flatten().view(torch.uint8).cpu().numpy()))
    return digest.hexdigest()


def load_teacher_head(spec: TeacherSpec, dtype: torch.dtype | None = None) -> TeacherHead:
    """Read head and embeddings alone from safetensors files.

    Pickled weights, adapters and quantised teachers are loaded whole, and all but head
    and embeddings is freed.

    Args:
        spec: the teacher.
        dtype: of the tensors; None takes what ``spec.dtype`` means.

    Raises:
        UserError: the model can't be loaded.
    """
    head = None
    if spec.adapter is None and spec.quantization is None:
        head = _from_safetensors(spec, dtype)
    if head is None:
        model = load_teacher(spec)
        head = TeacherHead.from_model(model)
    return head


def _from_safetensors(spec: TeacherSpec, dtype: torch.dtype | None) -> TeacherHead | None:
    """The head, or None where the files don't hold it under the names that the model gives it."""
    config = load_config(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    find = _tensor_reader(spec)
    output = model.get_output_embeddings()
    if find is None or output is None:
        return None
    prefix = f"{model.base_model_prefix}."
    names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=False)}

    def read(tensor: Tensor) -> Tensor | None:
        name = names[id(tensor)]
        found = find(name)
        if found is None:
            found = find(name.removeprefix(prefix))  # saved from the model without its head
        return found if found is None or found.shape == tensor.shape else None

    embedding = model.get_input_embeddings().weight
    embeddings = read(embedding)
    if embeddings is None:
        return None
    if dtype is None:
        dtype = _dtype(spec, config, embeddings)
    embeddings = embeddings.to(dtype)
    tied = output.weight is embedding or config.get_text_config().tie_word_embeddings
    weight = embeddings if tied else read(output.weight)
    bias = getattr(output, "bias", None)
    stored_bias = None if bias is None else read(bias)
    if weight is None or (bias is None) != (stored_bias is None):
        return None
    return TeacherHead(
        config, embeddings, weight.to(dtype), None if stored_bias is None else stored_bias.to(dtype)
    )


def _dtype(spec: TeacherSpec, config: PretrainedConfig, stored: Tensor) -> torch.dtype:
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)  # type: ignore[no-any-return]
    return config.dtype if isinstance(config.dtype, torch.dtype) else stored.dtype


def _tensor_reader(spec: TeacherSpec) -> Callable[[str], Tensor | None] | None:
    """A function from a tensor's name to the tensor, or None without safetensors files."""
    import json

    files: dict[str, Path] = {}
    if (index := _file(spec, _SHARD_INDEX)) is not None:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: Path(file) for name, file in weight_map.items()}
    elif (single := _file(spec, "model.safetensors")) is not None:
        with safe_open(single, "pt") as stream:
            files = dict.fromkeys(stream.keys(), single)
    else:
        return None

    def read(name: str) -> Tensor | None:
        path = files.get(name)
        path = path if path is None or path.is_absolute() else _file(spec, str(path))
        if path is None:
            return None
        with safe_open(path, "pt") as stream:
            return stream.get_tensor(name).clone()  # type: ignore[no-any-return]

    return read


def _file(spec: TeacherSpec, name: str) -> Path | None:
    source: Any = resolve_source(spec.source)
    if source.local:
        path = Path(source.location).absolute() / name
        return path if path.is_file() else None
    found = cached_file(
        source.location,
        name,
        revision=spec.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).absolute()
