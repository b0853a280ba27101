"""What a checkpoint was trained with, and trained weights to start anew from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dskd_lightning.checkpoints import read_checkpoint
from dskd_lightning.errors import UserError

__all__ = [
    "StartingWeights",
    "check_origin",
    "check_tensors",
    "optimization_origin",
    "parts_of",
    "weight_sample",
]

logger = logging.getLogger(__name__)

_SAMPLES = 4096


def parts_of(objectives: nn.Module) -> list[str]:
    """Names and types of the objectives and their projectors."""
    return [f"{name} {type(part).__name__}" for name, part in objectives.named_modules() if name]


def optimization_origin(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """How a run trains, in plain types and by name."""
    return {
        "optimizer": type(optimizer).__name__,
        "lr_scheduler": type(scheduler).__name__,
        "learning rates": [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups],
    }


def weight_sample(weight: Tensor) -> str:
    """A digest of evenly spaced values, by which another model is told; a narrower type changes nothing."""
    if weight.is_meta:
        return ""
    values = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLES)].to("cpu", torch.bfloat16)
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def check_origin(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: object) -> None:
    """Compare what both name.

    Raises:
        UserError: the checkpoint at ``path`` was trained with something else.
    """
    for name in theirs:
        if name not in ours or theirs[name] == ours[name]:
            continue
        if name == "learning rates":
            logger.warning(
                "resuming with the checkpoint's learning rates %s, not %s: to change them, start from its "
                "weights alone with --model.weights_from %s", theirs[name], ours[name], path,
            )  # fmt: skip
            continue
        detail = ""
        if name not in ("student", "teacher"):
            old, new = (_shown(side[name], other[name]) for side, other in ((theirs, ours), (ours, theirs)))
            detail = f" ({old}, not {new})"
        raise UserError(
            f"{path} was trained with another {name}{detail}: resume with that, or start from its weights "
            f"alone with `--model.weights_from {path}`."
        )


def _shown(value: Any, other: Any) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(part for part in value if part not in other) or "less"


def check_tensors(state: Mapping[str, Tensor], module: nn.Module, names: Iterable[str], path: object) -> None:
    """Compare a checkpoint's tensors with those of a module.

    Args:
        state: the checkpoint's.
        module: what it is for.
        names: of the module's tensors that a checkpoint holds.
        path: of the checkpoint.

    Raises:
        UserError: some are missing, have another shape or have no place.
    """
    own = {name: tensor.shape for name, tensor in _tensors(module)}
    lacking = sorted(set(names) - state.keys())
    there = {name: value for name, value in state.items() if value is not None}  # all, on the first rank
    other = [name for name, value in there.items() if name in own and own[name] != value.shape]
    strange = [name for name in state if name not in own]
    if not (lacking or other or strange):
        return
    first = (lacking or other or strange)[0]
    if lacking:
        fault = f"lacks {first!r}, which this configuration trains"
    elif other:
        fault = f"holds {first!r} with the shape {_shape(state[first])}, here it has {tuple(own[first])}"
    else:
        fault = f"holds {first!r}, which this configuration doesn't have"
    raise UserError(f"{path} {fault}: resume with what it was trained with, or {_remedy(first, path)}.")


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Under all of their names, as in a state dict."""
    return [
        *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    ]  # fmt: skip


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _remedy(name: str, path: object) -> str:
    if name.startswith("student."):
        return "write its student with `dskd export` and train on from that folder as `model.student.source`"
    return f"start from its weights alone with `--model.weights_from {path}`"


class StartingWeights:
    """The trained weights of an earlier run, for one that shares its student.

    Args:
        place: a checkpoint, or a run folder, whose best checkpoint is taken and without one its last.

    Raises:
        UserError: there is none, or it can't be read.
    """

    def __init__(self, place: str | Path) -> None:
        found = [Path(place) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        candidates = found if Path(place).is_dir() else [Path(place)]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            raise UserError(f"model.weights_from: {place} is neither a checkpoint nor a run folder with one.")
        self.path = path
        try:
            self._state: dict[str, Tensor] = dict(read_checkpoint(path, mmap=True)["state_dict"])
        except UserError as error:
            raise UserError(f"model.weights_from: {error}") from error

    def load(self, module: nn.Module, part: str) -> None:
        """Copy the tensors under ``student.`` or ``objectives.`` into that part of the module.

        The student must take all of them; of the objectives, what doesn't fit starts anew.
        """
        prefix = f"{part}."
        state = {k.removeprefix(prefix): v for k, v in self._state.items() if k.startswith(prefix)}
        own = dict(_tensors(module))
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        if part == "student" and (len(fitting) < len(state) or not state):
            first = next((name for name in state if name not in fitting), "no student")
            raise UserError(
                f"model.weights_from: {self.path} holds {first!r}, which has no place in this student: keep "
                "its source, pruning, vocabulary and LoRA, or write it with `dskd export` and take that "
                "folder as `model.student.source`."
            )
        module.load_state_dict(fitting, strict=False)
        if anew := sorted(own.keys() - fitting.keys()) if part == "objectives" else []:
            logger.info("%s: %d tensors start anew, the first is %s", part, len(anew), anew[0])
        logger.info("%s: %d trained tensors from %s", part, len(fitting), self.path)
