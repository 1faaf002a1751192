"""CuPy arrays and torch tensors over the memory of NumPy arrays."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

needs_cupy = pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")


def memory(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at an address."""
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first, end = sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps) + dtype.itemsize
    if 0 in shape:
        return np.empty(shape, dtype)
    raw = np.frombuffer((ctypes.c_char * (end - first)).from_address(pointer + first), np.uint8)
    return np.ndarray(shape, dtype, raw, -first, strides)


def as_cupy(x: np.ndarray, ordinal: int = 0) -> Any:
    """A CuPy array over the memory of a NumPy array."""
    import cupy

    owner = cupy.cuda.UnownedMemory(x.ctypes.data, max(x.nbytes, 1), x, ordinal)
    return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(owner, 0), x.strides)


@dataclass(frozen=True)
class FakeDtype:
    """What ``torch.float16`` is."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


def to_numpy_dtype(dtype: np.dtype | FakeDtype) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype.name, dtype.name)) if isinstance(dtype, FakeDtype) else np.dtype(dtype)


class FakeTensor:
    """As much of a torch tensor as cuflash touches."""

    layout, is_nested = "torch.strided", False

    def __init__(
        self, x: np.ndarray, where: str = "cuda:0", requires_grad: bool = False, negated: bool = False
    ) -> None:
        self.x, self.device, self.requires_grad, self.negated = x, FakeDevice(where), requires_grad, negated
        self.shape, self.dtype = x.shape, FakeDtype(x.dtype.name)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.x.itemsize for stride in self.x.strides)

    def data_ptr(self) -> int:
        return self.x.ctypes.data

    def element_size(self) -> int:
        return self.x.itemsize

    def is_neg(self) -> bool:
        return self.negated

    def tolist(self) -> list:
        return self.x.tolist()

    def __setitem__(self, index: Any, value: float) -> None:
        self.x[index] = value

    def __getitem__(self, index: Any) -> FakeTensor:
        return FakeTensor(self.x[index])

    def view(self, dtype: FakeDtype) -> FakeTensor:
        return FakeTensor(self.x.view(to_numpy_dtype(dtype)))

    def reshape(self, *shape: Any) -> FakeTensor:
        return FakeTensor(self.x.reshape(*shape))


@dataclass(frozen=True)
class FakeDevice:
    name: str

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]

    @property
    def index(self) -> int:
        return int(self.name.partition(":")[2])

    def __str__(self) -> str:
        return self.name


def as_torch(x: np.ndarray) -> FakeTensor:
    return FakeTensor(x)


FAKE_TORCH = ModuleType("torch")
FAKE_TORCH.Tensor = FakeTensor
FAKE_TORCH.is_grad_enabled = lambda: True
FAKE_TORCH.strided = FakeTensor.layout
FAKE_TORCH.no_grad = nullcontext
FAKE_TORCH.full = lambda shape, value, dtype, device: as_torch(np.full(shape, value, to_numpy_dtype(dtype)))
FAKE_TORCH.cuda = SimpleNamespace(
    is_available=lambda: False, is_initialized=lambda: False, default_generators=[SimpleNamespace()]
)
FAKE_TORCH.compiler = SimpleNamespace(is_dynamo_compiling=lambda: False)
FAKE_TORCH._C = SimpleNamespace(
    _are_functorch_transforms_active=lambda: False, _len_torch_dispatch_stack=lambda: 0,
    _is_any_autocast_enabled=lambda: False,
)  # fmt: skip
FAKE_TORCH.autograd = SimpleNamespace(forward_ad=SimpleNamespace(_current_level=-1))
for _name in ("float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "uint64", "bool"):
    setattr(FAKE_TORCH, _name, FakeDtype(_name))


def to_numpy(x: Any) -> np.ndarray:
    """The values of a result."""
    if isinstance(x, FakeTensor):
        return x.x
    return memory(x.data.ptr, x.shape, x.strides, x.dtype).copy(order="K")  # x may be its only owner
