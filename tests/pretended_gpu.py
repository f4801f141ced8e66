"""A GPU that is not there: its tensors hold their values on the CPU, say that they lie elsewhere, and refuse a CPU's beside them, as a GPU's would.

What runs on it runs on a GPU as far as devices go: nothing that stays behind on the CPU, nothing that is read there without a copy. Speed, streams,
a GPU's own rounding and its want of memory are not pretended. planish's operators are launched as on CUDA where Triton interprets
(TRITON_INTERPRET=1), else they are the CPU's.

Importing this registers the device, for good: only in a process of its own.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from planish.quant.kernels import gpu

NAME = "pretended"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ATEN = torch.ops.aten
# Operators that take a CPU's tensors beside a GPU's: copies, and places that are looked up.
LOOKUPS = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
MIXING = {ATEN.copy_.default, ATEN._to_copy.default, *LOOKUPS}
PRODUCTS = {ATEN.mm, ATEN.bmm, ATEN.addmm, ATEN.baddbmm, ATEN.mv, ATEN.dot, ATEN.addmv}  # of floats only, on a GPU
LOOPED = {ATEN._linalg_svd, ATEN._linalg_eigh}  # of a batch one after the other on a GPU, in hundreds of launches each
CROSSINGS: list[str] = []  # every operator that took values from the CPU or gave it some: a GPU waits for it, and no CUDA graph can hold it


class Pretended(Tensor):
    """A tensor of the pretended GPU."""

    held: Tensor
    is_cuda = True  # so that weights are laid out for Triton's kernels
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        assert type(held) is Tensor
        assert held.device.type == "cpu"
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=f"{NAME}:0"
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: None, _size: object, _stride: object) -> "Pretended":
        return Pretended(inner["held"])

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "Pretended") -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self) -> Any:
        CROSSINGS.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, Pretended)]
        strange = [tuple(x.shape) for x in flat if isinstance(x, Tensor) and not isinstance(x, Pretended) and x.dim()]
        looked_up = func in LOOKUPS and not isinstance(args[0], Pretended)  # a CPU's tensor at a GPU's places
        if strange and (func not in MIXING or looked_up):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {NAME}:0 and cpu: {strange}")
        if any(isinstance(x, torch.Generator) for x in flat):
            raise RuntimeError(f"{func}: Expected a '{NAME}' device type for generator but found 'cpu'")
        if func.overloadpacket in PRODUCTS and not all(x.is_floating_point() for x in ours):
            raise NotImplementedError(f"{func} is not implemented on CUDA for {ours[0].dtype}")
        if func.overloadpacket in LOOPED and ours[0].dim() > 2:
            raise NotImplementedError(f"{func} of a batch is slow on a GPU")
        if any(mark in func.name() for mark in ("cpu", "mkldnn", "onednn", "_int_mm")):
            raise NotImplementedError(f"{func} is of the CPU, or takes other shapes on CUDA")
        held_args, held_kwargs = tree_unflatten([x.held if isinstance(x, Pretended) else x for x in flat], spec)
        where = held_kwargs.get("device")
        counted = func in LOOKUPS and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])  # how many, the CPU must know
        from_here = (func in LOOKUPS and bool(strange)) or (func is ATEN.copy_.default and not isinstance(args[1], Pretended))
        if (
            func in (ATEN._local_scalar_dense.default, ATEN.nonzero.default)
            or counted
            or from_here
            or (where is not None and torch.device(where).type == "cpu")
        ):
            CROSSINGS.append(str(func))
        if where is not None:
            held_kwargs["device"] = torch.device("cpu")
        out = 0 if func is ATEN._fused_sdp_choice.default else launched(func)(*held_args, **held_kwargs)  # 0: of plain products
        if where is not None and torch.device(where).type == "cpu":
            return out
        out = tree_map_only(Tensor, Pretended, out)
        out = return_and_correct_aliasing(func, args, kwargs, out) if func.namespace == "aten" else out
        assert all(x.shape == x.held.shape for x in ours), f"{func} resizes"
        return out


def launched(func: Any) -> Callable[..., Any]:
    """The operator; one of planish's as on CUDA where Triton interprets."""
    return partial(gpu._call, func.name().partition("::")[2]) if func.namespace == "planish" and INTERPRETED else func


class _Backend(_DummyBackendModule):
    """What torch and planish ask of a device's module."""

    free = 1 << 40

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return not including_emulation

    def mem_get_info(self, _device: object) -> tuple[int, int]:
        return self.free, 1 << 41

    def memory_reserved(self, _device: object) -> int:
        return 0

    def memory_allocated(self, _device: object) -> int:
        return 0

    def max_memory_allocated(self, _device: object) -> int:
        return 123_000_000


def _factory(operator: Any) -> Callable[..., Tensor]:
    def make(*args: Any, device: object = None, pin_memory: object = None, **kwargs: Any) -> Tensor:
        assert "generator" not in kwargs
        return Pretended(operator(*args, **kwargs))

    return make


def _copy_from(source: Tensor, target: Pretended, _non_blocking: bool = False) -> Tensor:
    target.held.copy_(source.held if isinstance(source, Pretended) else source)
    return target


BACKEND = _Backend()
_setup_privateuseone_for_python_backend(NAME, BACKEND)
torch.cuda.get_device_capability = lambda _device=None: (9, 0)
LIBRARY = torch.library.Library("aten", "IMPL")
for _made in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm"):
    _packet, _, _overload = _made.partition(".")
    LIBRARY.impl(_made, _factory(getattr(getattr(ATEN, _packet), _overload or "default")), "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
