"""What a module's checkpoints hold: what was trained, never the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from torch import nn

from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.projection import LinearProjector

__all__ = ["alike_on_all_ranks", "drop_untrained", "miss_trained_alone", "trained_names"]


def trained_names(module: Any) -> frozenset[str]:
    """Names of what a module's checkpoints hold."""
    adapter_only = isinstance(module.student, PeftModel)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    parts = ("objectives",) if adapter_only else ("objectives", "student")
    kept = {f"{part}.{name}" for part in parts for name in getattr(module, part).state_dict()}
    return frozenset(trained | kept)


def alike_on_all_ranks(module: Any, teachers: Sequence[TeacherSpec | Loaded]) -> list[str]:
    """Names of tensors that each rank has from the same files, or computes as all others do."""
    read = [f"teachers.{i}." for i, spec in enumerate(teachers) if isinstance(spec, TeacherSpec)]
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    saved = module.checkpoint_names
    computed = {f"student.{name}" for name, _ in module.student.named_buffers(remove_duplicate=False)} - saved
    measured = {f"{name}.input_rms" for name, m in module.named_modules() if isinstance(m, LinearProjector)}
    return [name for name, _ in tensors if name.startswith(tuple(read)) or name in computed | measured]


def drop_untrained(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: a checkpoint holds what was trained, never the teacher."""
    kept = cast("Any", module).checkpoint_names
    for key in [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in kept]:
        del state_dict[key]


def miss_trained_alone(module: nn.Module, incompatible: Any) -> None:
    """Hook after loading: what a checkpoint never holds isn't missing, however strict the loading.

    Lightning's weight averaging loads a copy of the module strictly.
    """
    kept = cast("Any", module).checkpoint_names
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}

    def is_missing(key: str) -> bool:
        while key not in names and "." in key:
            key = key.partition(".")[2]  # of a module that holds this one
        return key in kept or key not in names

    incompatible.missing_keys[:] = filter(is_missing, incompatible.missing_keys)
