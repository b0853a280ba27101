"""What a module's checkpoints hold: what was trained, never the teacher."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn

__all__ = ["drop_untrained", "miss_trained_alone", "trained_names"]


def trained_names(module: Any) -> frozenset[str]:
    """Names of what a module's checkpoints hold."""
    adapter_only = isinstance(module.student, PeftModel)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    parts = ("objectives",) if adapter_only else ("objectives", "student")
    kept = {f"{part}.{name}" for part in parts for name in getattr(module, part).state_dict()}
    return frozenset(trained | kept)


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
