"""Find by measurement where a model's hidden states come out and what it does to its head's products.

Architectures name their factors and caps in many ways, and some multiply by what others divide by:
a model is asked itself, by a few tokens and by known numbers put in the place of its head's products.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["HeadReading", "measure_head", "named_scaling", "stored_reading"]

_ATTRIBUTE = "_head_reading"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class HeadReading:
    """What stands between a model's decoder and its logits.

    Args:
        decoder: name of the submodule whose last hidden states the head reads.
        scale: `Head.scale`.
        softcap: `Head.softcap`.
    """

    decoder: str
    scale: float
    softcap: float | None


def stored_reading(model: Any) -> HeadReading | None:
    """What `measure_head` found, None where it wasn't called or found nothing that it could express."""
    reading: HeadReading | None = getattr(model, _ATTRIBUTE, None)
    return reading


def named_scaling(config: Any) -> tuple[float, float | None]:
    """Scale and cap by their usual names, for models that can't be measured (weights on no device)."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    cap = next((value for name in _CAPS if (value := getattr(config, name, None))), None)
    return float(scale) / float(getattr(config, "logits_scaling", None) or 1.0), cap


@torch.no_grad()  # in float64, which not every device has, on the CPU
def measure_head(model: PreTrainedModel, ids: Tensor) -> HeadReading | None:
    """Run ``model``, in eval mode, on ``ids`` ``[1, tokens]`` and keep with it how its head is read.

    Numbers that the config holds, as they are or as divisors, are taken from there to the last digit.
    """
    setattr(model, _ATTRIBUTE, None)
    seen = _Run(model, ids)
    factor = None if seen.head_input is None else _decoder_and_factor(model, seen)
    if factor is None:
        return None
    ramp = _Run(model, ids, replace=_ramp)
    if ramp.products is None or ramp.logits.shape != ramp.products.shape:
        return None
    tolerance = 1e-4 if seen.logits.dtype == ramp.products.dtype == torch.float32 else 1e-2
    numbers = _numbers(model.config.get_text_config())
    fitted = _fit(
        ramp.products.cpu().double().flatten(), ramp.logits.cpu().double().flatten(), numbers, tolerance
    )
    if fitted is None:
        return None
    scale, cap = fitted
    before = _snap(factor[1], numbers, tolerance)
    reading = HeadReading(factor[0], before * scale, cap)
    named = named_scaling(model.config.get_text_config())
    if cap == named[1] and math.isclose(named[0], reading.scale, rel_tol=1e-6):
        reading = HeadReading(factor[0], *named)
    setattr(model, _ATTRIBUTE, reading)
    return reading


class _Run:
    """One run with what went into the head, came out of it, and the submodules' last hidden states."""

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, replace: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.head_input: Tensor | None = None
        self.products: Tensor | None = None
        self.hidden: dict[str, Tensor] = {}

        def head_in(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.head_input = inputs[0]

        def head_out(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            self.products = output if replace is None else replace(output)
            return self.products

        head: Any = model.get_output_embeddings()
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(_removed(head.register_forward_pre_hook(head_in)))
            hooks.enter_context(_removed(head.register_forward_hook(head_out)))
            for name, module in model.named_modules():
                if name:
                    hook = module.register_forward_hook(self._keep(name))
                    hooks.enter_context(_removed(hook))
            self.logits: Tensor = model(input_ids=ids, use_cache=False).logits

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            hidden = getattr(output, "last_hidden_state", None)
            if isinstance(hidden, Tensor):
                self.hidden.pop(name, None)
                self.hidden[name] = hidden

        return keep


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _decoder_and_factor(model: PreTrainedModel, seen: _Run) -> tuple[str, float] | None:
    """The module whose states are the head's input up to a factor: `get_decoder` if it is one."""
    assert seen.head_input is not None
    target = seen.head_input.cpu().double()
    usual = next((name for name, module in model.named_modules() if module is model.get_decoder()), "")
    names = [usual, *reversed(seen.hidden)]  # the outermost ends last
    for name in names:
        if name not in seen.hidden or seen.hidden[name].shape != target.shape:
            continue
        hidden = seen.hidden[name].cpu().double()
        factor = float((hidden * target).sum() / hidden.square().sum())
        tolerance = 1e-5 if target.dtype == seen.hidden[name].dtype == torch.float32 else 1e-2
        if torch.allclose(factor * hidden, target, rtol=tolerance, atol=tolerance * float(target.std())):
            return name, factor
    return None


def _ramp(products: Tensor) -> Tensor:
    """Numbers of both signs and all sizes, in the shape of ``products``."""
    sizes = torch.logspace(-3, 4, products.numel(), device="cpu", dtype=torch.float64)
    signs = 1 - 2 * (torch.arange(products.numel(), device="cpu") % 2)
    return (sizes * signs).to(products).reshape(products.shape)


def _fit(
    products: Tensor, logits: Tensor, numbers: list[float], tolerance: float
) -> tuple[float, float | None] | None:
    """``logits = cap * tanh(scale * products / cap)``, or without a cap; None if they are neither."""
    highest = float(logits.abs().max())
    half = products.abs() > products.abs().max() / 4
    cap = None
    if float(logits[half].abs().min()) > 0.99 * highest:
        cap = _snap(highest, numbers, tolerance)
        inside = (logits.abs() < 0.9 * cap) & (logits.abs() > 0.05 * cap)
        if not inside.any():
            return None
        ratios = torch.atanh(logits[inside] / cap) * cap / products[inside]
    else:
        ratios = logits / products
    scale = _snap(float(ratios.median()), numbers, tolerance)
    expected = scale * products if cap is None else cap * torch.tanh(scale * products / cap)
    close = torch.allclose(expected, logits, rtol=5 * tolerance, atol=5 * tolerance * 1e-3)
    return (scale, cap) if close else None


def _numbers(config: Any) -> list[float]:
    values = [v for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool)]
    positive = [float(value) for value in values if value > 0 and math.isfinite(value)]
    return [1.0, *positive, *(1 / value for value in positive)]


def _snap(value: float, numbers: list[float], tolerance: float) -> float:
    """The number nearest to ``value`` if it is within rounding of it."""
    best = min(numbers, key=lambda number: abs(number - value))
    return best if math.isclose(best, value, rel_tol=tolerance) else value
