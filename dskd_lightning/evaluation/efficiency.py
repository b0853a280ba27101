"""What a model costs to run: size, memory, speed and energy on this machine."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.energy import EnergyMeter
from dskd_lightning.memory import PeakMemory

__all__ = ["Efficiency", "disk_bytes", "measure_efficiency"]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class Efficiency:
    """Costs of one model; medians over repeats, batch size 1.

    Args:
        parameters: number of parameters, shared ones once.
        weight_bytes: memory of the weights.
        disk_bytes: the weight files that it was read from; without any, what its weights take as
            safetensors.
        peak_bytes: memory of the weights and the peak above it while generating; None where a
            process can't read its own peak.
        prompt_tokens: length of the measured prompt.
        new_tokens: decoded tokens.
        prefill_tokens_per_second: speed of reading the prompt.
        decode_tokens_per_second: speed of writing the response.
        time_to_first_token: seconds.
        joules_per_token: energy per decoded token, prefill included; None where not readable.
        energy_sources: where the energy was read.
        device: what it ran on.
        threads: CPU threads of PyTorch.
    """

    parameters: int
    weight_bytes: int
    disk_bytes: int
    peak_bytes: int | None
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    joules_per_token: float | None
    energy_sources: tuple[str, ...]
    device: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in ``efficiency.json``."""
        return asdict(self)


def disk_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of a weight file, or of the weight files in a model's folder."""
    if Path(folder).is_file():
        return Path(folder).stat().st_size
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.suffix in _WEIGHT_SUFFIXES)


@torch.inference_mode()
def measure_efficiency(
    model: Any,
    *,
    folder: str | os.PathLike[str] | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
) -> Efficiency:
    """Measure a causal language model with a random prompt and greedy decoding.

    Args:
        model: a Hugging Face causal model in evaluation mode, on its device.
        folder: where its weights lie on disk; a folder or a file.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to decode; end tokens do not stop it.
        repeats: timed repetitions after one warm-up.

    Raises:
        UserError: a number is not positive or the model's context is too short.
    """
    if min(prompt_tokens, repeats) < 1 or new_tokens < 2:
        raise UserError("efficiency: prompt_tokens and repeats must be at least 1, new_tokens at least 2.")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and prompt_tokens + new_tokens > context:
        raise UserError(
            f"efficiency: {prompt_tokens} + {new_tokens} tokens exceed the model's context of {context}; "
            "lower prompt_tokens or new_tokens."
        )
    embeddings = model.get_input_embeddings().weight
    device: torch.device = embeddings.device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, embeddings.shape[0], (1, prompt_tokens), generator=generator).to(device)
    cuda = device.type == "cuda"
    memory = PeakMemory(device)
    _decode(model, prompt, new_tokens)
    with EnergyMeter(gpu=cuda) as meter:
        times = [_decode(model, prompt, new_tokens) for _ in range(repeats)]
    extra, weights = memory.extra, sum(p.numel() * p.element_size() for p in model.parameters())
    first = statistics.median(prefill for prefill, _ in times)
    rest = statistics.median(decode for _, decode in times)
    return Efficiency(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weights,
        disk_bytes=weights if folder is None else disk_bytes(folder),
        peak_bytes=None if extra is None else weights + extra,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=prompt_tokens / first,
        decode_tokens_per_second=(new_tokens - 1) / rest,
        time_to_first_token=first,
        joules_per_token=None if meter.joules is None else meter.joules / (repeats * new_tokens),
        energy_sources=tuple(meter.sources),
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        threads=torch.get_num_threads(),
    )


def _decode(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and for the ``new_tokens - 1`` after it."""
    start = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    first = _now(prompt.device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, cache=output.cache, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return first - start, _now(prompt.device) - first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
