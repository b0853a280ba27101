"""A teacher whose weights follow the student's, for self-distillation."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from dskd_lightning.errors import UserError
from dskd_lightning.models.effective_weight import effective_bias, effective_weight
from dskd_lightning.models.output import base_model, decoder_layers
from dskd_lightning.models.spec import FollowSpec

__all__ = ["Follower"]

_WRAPPERS = (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)


class Follower:
    """Moves a teacher's weights towards the student's, adapters added in, every few optimiser steps.

    Args:
        settings: how often, and how far.
        student: that trains.
        teacher: frozen, of the same shape.
        name: of the teacher, for messages.

    Raises:
        UserError: the two models differ in shape, or the teacher's type is too narrow for an average.
    """

    def __init__(self, settings: FollowSpec, student: Any, teacher: Any, name: str) -> None:
        self.settings = settings
        self._at: int | None = None  # the optimiser step in front of which it last followed
        ours = base_model(student)
        same = len(decoder_layers(student)) == len(decoder_layers(teacher))
        self._pairs: dict[str, tuple[nn.Parameter, nn.Module, str]] = {}
        for place, parameter in base_model(teacher).named_parameters():
            path, _, attribute = place.rpartition(".")
            try:
                owner = ours.get_submodule(path)
                value = _value(owner, attribute)
            except AttributeError:
                value = None
            if not same or value is None or value.shape != parameter.shape:
                raise UserError(
                    f"model.teacher.follow: '{name}' has other weights than the student ('{place}'), which "
                    "it could not follow: give both the same source, without pruning or another vocabulary."
                )
            if _trains(owner, attribute):
                self._pairs[place] = parameter, owner, attribute
        narrow = any(p.dtype not in (torch.float32, torch.float64) for p, _, _ in self._pairs.values())
        if settings.decay and narrow:
            raise UserError(
                "model.teacher.follow.decay: small changes drown in a teacher of 16 bits: set "
                "model.teacher.dtype to float32."
            )

    @property
    def names(self) -> list[str]:
        """Of the teacher's parameters that follow: those that the student trains."""
        return list(self._pairs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student as it is in front of optimiser step ``step``, where that is due.

        The first update copies, so that the teacher starts where the student does.
        """
        due = step - step % self.settings.every
        if self._at is not None and due <= self._at:
            return
        keep = 0.0 if self._at is None else self.settings.decay
        for parameter, owner, attribute in self._pairs.values():
            value = _value(owner, attribute)
            assert value is not None
            parameter.lerp_(value.to(parameter), 1 - keep) if keep else parameter.copy_(value)
        self._at = due

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a run needs to go on from optimiser step ``step``: nothing where it copies anew."""
        if not self.settings.decay and step % self.settings.every == 0:
            return {"at": None, "weights": {}}
        weights = {name: parameter.detach().clone() for name, (parameter, _, _) in self._pairs.items()}
        return {"at": self._at, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: another teacher's weights were saved.
        """
        weights = state["weights"]
        if weights and weights.keys() != self._pairs.keys():
            raise UserError(
                "The checkpoint's teacher followed other weights: resume with the student's settings that it "
                "was trained with, or start from its weights alone with `--model.weights_from`."
            )
        self._at = state["at"]
        for name, value in weights.items():
            self._pairs[name][0].copy_(value)


def _value(owner: nn.Module, attribute: str) -> Tensor | None:
    if isinstance(owner, _WRAPPERS):
        return effective_weight(owner) if attribute == "weight" else effective_bias(owner)
    value: Tensor | None = getattr(owner, attribute)
    return value


def _trains(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, _WRAPPERS):
        return any(parameter.requires_grad for parameter in owner.parameters())
    return bool(getattr(owner, attribute).requires_grad)
