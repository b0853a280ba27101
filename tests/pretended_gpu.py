"""A CUDA device that isn't there: tensors say ``cuda:0``, their values are computed on the CPU.

PyTorch, Lightning and transformers take it for a GPU, so that their branches for one run, and the
choices of CUDA's autocast are made::

    with PretendedGpu() as gpu:
        module.to("cuda")(torch.ones(3))  # RuntimeError: two devices
        gpu.stalls  # how often, by kind and place, the host would have waited for the device

What it can't show: kernels that a real device lacks, its arithmetic, memory, streams, several ranks.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft  # noqa: F401  # bitsandbytes, which it imports, asks a real device for its stream
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["DeviceTensor", "PretendedGpu"]

_ROOT = f"{Path(__file__).resolve().parents[1]}/"
_INSTALLED = f"{sys.prefix}/"  # may lie in the root, and is nobody's own code
_DEVICE = torch.device("cuda", 0)
_INNER = torch.device("lazy", 0)
"""What C++ takes it for: autograd in builds without CUDA has no streams of that, and needs none of this."""
_MEMORY = 80 * 2**30
_WAITS = {
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "boolean mask",
    "aten::repeat_interleave.Tensor": "repeat_interleave",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::histc": "histc",
}
"""Operations whose result the host reads, or whose size only the device knows."""
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
_TAKE_HOST_INDICES = (
    "aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor",
)  # fmt: skip
_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
        torch.einsum,
        Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm,
        torch.nn.functional.scaled_dot_product_attention,
    }
)  # fmt: skip

_PINNED: dict[int, StorageWeakRef] = {}
"""Storages in page-locked memory, by their place."""


class DeviceTensor(Tensor):
    """On the pretended device; ``values`` are on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        strided = values.layout == torch.strided
        self: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride() if strided else None,
            storage_offset=values.storage_offset() if strided else None,
            dtype=values.dtype,
            layout=values.layout,
            device=_INNER,
            dispatch_layout=not strided,
            dispatch_sizes_strides_policy=None if strided else "sizes",
        )
        self.values = values
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {_DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update({k: v for k, v in self.__dict__.items() if k != "values"})
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.detach().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.values.detach()!r} on {_DEVICE}"


class PretendedGpu:
    """While it is entered, there is one GPU.

    Args:
        float64: False refuses float64 and sparse tensors, as a Mac's GPU does.

    Attributes:
        stalls: number of waits for the device (results read, blocking copies), by kind and by the line
            of the package or its tests that asked.
        uploads: number of copies from pinned memory, which wait for nothing.
    """

    active: PretendedGpu | None = None

    def __init__(self, *, float64: bool = True) -> None:
        self.float64 = float64
        self.stalls: Counter[tuple[str, str]] = Counter()
        self.uploads = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGpu:
        assert PretendedGpu.active is None, "one pretended GPU at a time"
        assert not torch.cuda.is_available(), "there is a real one"
        self._stack.enter_context(_pretended_functions())
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is made here, then moved
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        PretendedGpu.active = self
        self._stack.callback(setattr, PretendedGpu, "active", None)
        self._stack.enter_context(_Devices())
        self._stack.enter_context(_Dispatch())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def stall(self, kind: str) -> None:
        """Count one wait for the device."""
        frame, place = sys._getframe(1), "elsewhere"
        while frame.f_back is not None:
            frame = frame.f_back
            name = frame.f_code.co_filename
            if name.startswith(_ROOT) and not name.startswith(_INSTALLED) and name != __file__:
                place = f"{name.removeprefix(_ROOT)}:{frame.f_lineno}"
                break
        self.stalls[kind, place] += 1

    def wrap(self, values: Tensor) -> DeviceTensor:
        if not self.float64 and values.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a tensor to {values.dtype}: the device doesn't support it.")
        if not self.float64 and values.layout != torch.strided:
            raise NotImplementedError("The device has no sparse tensors.")
        return DeviceTensor(values)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Devices(TorchFunctionMode):
    """Tells C++ its own name of the device, and casts matrix products as CUDA's autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], _DEVICE)
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = _INNER
        elif func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _INNER, *args[2:])
        if func in _PRODUCTS and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map_only(DeviceTensor, _cast, (args, kwargs))
        return func(*args, **kwargs)


def _cast(tensor: Tensor) -> Tensor:
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype("cuda")) if eligible else tensor


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, if the device would run it."""
    gpu = PretendedGpu.active
    assert gpu is not None, "a tensor outlived the pretended GPU"
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    asked = kwargs.get("device")
    if not ours and (asked is None or asked != _INNER):
        return func(*args, **kwargs)
    name = func.name()
    on_device = bool(ours) if asked is None else asked == _INNER
    if name.startswith(_COPIES):
        _count_copy(gpu, name, args, kwargs, on_device)
    else:
        if len(ours) < len(tensors) and ours:
            _check_devices(func, name, args, kwargs)
        if ours and name in _WAITS:
            gpu.stall(_WAITS[name])
        if name in _TAKE_HOST_INDICES:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                gpu.stall("boolean mask")
            if not all(isinstance(i, DeviceTensor) for i in indices):
                gpu.stall("copy to the device")
    changes = {"device": torch.device("cpu")} if asked is not None else {}
    if kwargs.get("pin_memory"):
        changes["pin_memory"] = False
    out = func(*_values(args), **{key: _values(value) for key, value in (kwargs | changes).items()})
    if not on_device:
        return out
    same = {id(t.values): t for t in ours} if func._schema.is_mutable else {}
    if isinstance(out, Tensor):
        return same[id(out)] if id(out) in same else gpu.wrap(out)
    return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else gpu.wrap(t), out)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in the arguments of an operation; these nest no deeper, and `torch.utils._pytree` is slow."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _values(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.values
    return type(value)(map(_values, value)) if type(value) in (tuple, list) else value


def _count_copy(gpu: PretendedGpu, name: str, args: Any, kwargs: dict[str, Any], on_device: bool) -> None:
    """Copies between the two: only those from pinned memory, and non-blocking ones, wait for nothing."""
    target, source = (None, args[0]) if name == "aten::_to_copy" else args[:2]
    to_device = on_device if target is None else any(isinstance(t, DeviceTensor) for t in _tensors(target))
    sources = list(_tensors(source))
    from_device = any(isinstance(t, DeviceTensor) for t in sources)
    if to_device == from_device:
        return
    non_blocking = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    if from_device and not non_blocking:
        gpu.stall("copy to the host")
    elif to_device and non_blocking and all(_is_pinned(t) for t in sources):
        gpu.uploads += 1
    elif to_device and any(t.numel() for t in sources):
        gpu.stall("copy to the device")


def _check_devices(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise as PyTorch does where tensors of both devices meet; numbers may."""
    if name in _TAKE_HOST_INDICES and isinstance(args[0], DeviceTensor):
        args = (*args[:1], *args[2:])  # indices may be on the host
    scalars_may = (
        torch.Tag.pointwise in func.tags or "fill" in name or "index_put" in name or "foreach" in name
    )
    for tensor in _tensors((args, tuple(kwargs.values()))):
        if not isinstance(tensor, DeviceTensor) and (tensor.dim() or not scalars_may):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{_DEVICE} and cpu! (in {name})"
            )


def _is_pinned(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    pinned = _PINNED.get(storage.data_ptr())
    return pinned is not None and not pinned.expired()


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    pinned = tensor.detach().clone()
    _PINNED[pinned.untyped_storage().data_ptr()] = StorageWeakRef(pinned.untyped_storage())
    return pinned


@contextlib.contextmanager
def _pretended_functions() -> Iterator[None]:
    """What PyTorch answers where there is one CUDA device."""
    properties = SimpleNamespace(
        name="Pretended GPU", major=8, minor=0, total_memory=_MEMORY, multi_processor_count=108,
        gcnArchName="", uuid="0", warp_size=32,
    )  # fmt: skip
    cuda: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: PretendedGpu.active and PretendedGpu.active.stall("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda _: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
    }
    idle = contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        for name, function in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stream = SimpleNamespace(is_capturing=lambda: False)
        accelerator: dict[str, Any] = {
            "is_available": True, "current_accelerator": _DEVICE, "device_count": 1, "current_stream": stream,
            "current_device_index": 0, "set_device_index": None,
        }  # fmt: skip
        for name, answer in accelerator.items():
            if hasattr(torch.accelerator, name):
                stack.enter_context(mock.patch.object(torch.accelerator, name, lambda *_, a=answer, **__: a))
        # Its tensors can't be wrapped; what it forbids, it forbids on a CPU, too.
        inference = mock.patch.object(torch._C, "_InferenceMode", lambda on: torch.no_grad() if on else idle)
        stack.enter_context(inference)
        # Parameters that others refer to weakly may move, as on a GPU.
        nobody = SimpleNamespace(getweakrefs=lambda _: [])
        stack.enter_context(mock.patch.object(torch.utils, "weakref", nobody))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", _pin))
        stack.enter_context(mock.patch.object(Tensor, "is_pinned", lambda t, *_: _is_pinned(t)))
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        yield
