"""Low-rank adapters on a student, by peft."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dskd_lightning.errors import UserError

if TYPE_CHECKING:
    from dskd_lightning.models.spec import LoraSpec

__all__ = ["add_lora"]

_LEAVE_WEIGHTS = ("gaussian", "eva", "orthogonal")
"""Initialisations by name that change nothing but the adapter."""


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """``model`` with trainable adapters, everything else frozen.

    ``all-linear`` leaves the language-model head out. Adapters are float32 whatever the type
    of the weights under them, so that small updates aren't rounded away.

    Raises:
        UserError: targets that match nothing, or fields that peft refuses.
    """
    arguments: dict[str, Any] = {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": spec.targets,
        "task_type": "CAUSAL_LM",
    }
    repeated = sorted(arguments.keys() & spec.config.keys())
    if repeated:
        raise UserError(
            f"`lora.config.{repeated[0]}` repeats a field of `lora` itself: use `lora.rank`, `lora.alpha`, "
            "`lora.dropout` or `lora.targets`."
        )
    targets = _matches(model, spec.targets)
    if targets and all(isinstance(module, Conv1D) for module in targets):
        arguments["fan_in_fan_out"] = True  # GPT-2 stores its weights transposed
    head = model.get_output_embeddings()
    if spec.dropout and any(module is head for module in targets):
        raise UserError(
            "`lora.dropout` cannot apply to the head, whose adapter is added to its weight: set it to 0 or "
            "leave the head out of `lora.targets`."
        )
    try:
        config = LoraConfig(**(arguments | spec.config))
        if _keeps_weights(config):
            return get_peft_model(model, config)  # type: ignore[return-value]
        return _rewritten(model, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft refuses `student.lora`: {' '.join(str(error).split())}") from error


def _keeps_weights(config: LoraConfig) -> bool:
    kind = config.init_lora_weights
    return not isinstance(kind, str) or kind.lower() in _LEAVE_WEIGHTS


def _rewritten(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Adapters whose initialisation changes the weights under them (PiSSA and its like).

    Checkpoints hold the adapter alone: whoever resumes or exports builds what lies under it again,
    on whatever device. So it is made on the CPU from one fixed seed. An adapter that is saved gets
    its base beside it, and must not be initialised like that again.
    """
    device = model.device
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        if device.type != "meta":
            model.cpu()  # type: ignore[call-arg]
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    if device.type != "meta":
        adapted.to(device)
    model.name_or_path = model.config.name_or_path = ""
    for known in adapted.peft_config.values():
        known.base_model_name_or_path = ""
        known.init_lora_weights = True  # type: ignore[attr-defined]
    return adapted


def _matches(model: PreTrainedModel, targets: list[str] | str) -> list[nn.Module]:
    """The modules that ``targets`` name, as peft matches them; each name must match something."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    if targets == "all-linear":
        return [m for m in modules.values() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"`lora.targets: {targets}` is no regular expression: {error}.") from error
        found = [module for name, module in modules.items() if pattern.fullmatch(name)]
        missing = [] if found else [targets]
    else:
        named = {
            target: [m for name, m in modules.items() if name == target or name.endswith(f".{target}")]
            for target in targets
        }
        found = [module for group in named.values() for module in group]
        missing = [target for target, group in named.items() if not group]
    if missing or not found:
        linear = sorted(
            {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
        )
        raise UserError(
            f"`lora.targets` {missing} match no module of {type(model).__name__}: its linear layers are "
            f"{', '.join(linear)}."
        )
    return found
