"""Array libraries on a GPU."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
import pytest
from inputs import BF16


class Library(Protocol):
    """An array library on the GPU."""

    def put(self, x: np.ndarray) -> Any: ...
    def get(self, x: Any) -> np.ndarray: ...
    def pointer(self, x: Any) -> int: ...
    def owns(self, x: Any) -> bool: ...


class WithCuPy:
    def __init__(self) -> None:
        import cupy

        self.cupy = cupy

    def put(self, x: np.ndarray) -> Any:
        return self.cupy.asarray(x)

    def get(self, x: Any) -> np.ndarray:
        return x.get()

    def pointer(self, x: Any) -> int:
        return x.data.ptr

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.cupy.ndarray)


class WithTorch:
    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        if not self.torch.cuda.is_available():
            pytest.skip("torch sees no GPU")

    def put(self, x: np.ndarray) -> Any:
        if x.dtype == BF16:
            return self.torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).cuda().view(self.torch.bfloat16)
        return self.torch.from_numpy(np.array(x)).cuda()

    def get(self, x: Any) -> np.ndarray:
        if x.dtype == self.torch.bfloat16:
            return x.cpu().view(self.torch.int16).numpy().view(BF16)
        return x.cpu().numpy()

    def pointer(self, x: Any) -> int:
        return x.data_ptr()

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.torch.Tensor) and x.is_cuda


class WithJax:
    def __init__(self) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.jax = pytest.importorskip("jax", reason="JAX is not installed")
        if self.jax.default_backend() != "gpu":
            pytest.skip("JAX sees no GPU")

    def put(self, x: np.ndarray) -> Any:
        return self.jax.device_put(x)

    def get(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def pointer(self, x: Any) -> int:
        return x.unsafe_buffer_pointer()

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.jax.Array)


LIBRARIES = {"cupy": WithCuPy, "torch": WithTorch, "jax": WithJax}
