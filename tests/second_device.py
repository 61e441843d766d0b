"""A stand-in for a GPU: the CPU under another device's name, which refuses to mix with tensors of the CPU.

A tensor "elsewhere" has torch's device "meta" and holds a tensor of the CPU inside. Every operation is done on the tensors inside, so
results are those of the CPU, to the last bit. What CUDA refuses is refused here too: operations on tensors of both devices, unless one
is a number or an index.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import run_exp1b_kaggle as exp

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class Elsewhere(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        shape, layout = inner.shape, {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, shape, **layout, dtype=inner.dtype, device=DEVICE)  # type: ignore[attr-defined]
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While this lasts, tensors can be made on the second device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == DEVICE or any(
            isinstance(leaf, Elsewhere) for leaf in tree_leaves((args, kwargs))
        ):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation of which a part is elsewhere, or its result. Raises what CUDA raises where devices are mixed."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    allowed = func in COPIES or (func in INDEXING and isinstance(args[0], Elsewhere))
    if elsewhere and here and not allowed:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")

    stays = bool(elsewhere)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not stays:
        return result
    result = tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if elsewhere else result


@contextlib.contextmanager
def second_device() -> Iterator[None]:
    """While this lasts, every `Device` of the script is the second device."""
    make_tensor, autocast = torch.tensor, torch.autocast

    def tensor(values: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make_tensor(values, **options).to(device or "cpu")  # torch.tensor itself dispatches nothing

    def autocast_here(kind: str, **options: Any) -> Any:
        return contextlib.nullcontext() if kind == DEVICE.type else autocast(kind, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp.Device, "torch", property(lambda self: DEVICE))
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "autocast", autocast_here)
        patch.setattr(sys.modules["torch.optim.sgd"], "_device_dtype_check_for_fused", lambda *_: None)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with SecondDevice():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
