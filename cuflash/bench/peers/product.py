"""The yardstick in every rotation: a square matrix product by cuBLAS, as fast as the card multiplies at that moment."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cuflash.bench.peers.torch import Torch
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Array, Inputs, Normals
from cuflash.cases.table import Case
from cuflash.dtypes import BF16, FP16, DType
from cuflash.problem import Problem

NAME = "gemm"
"""Its implementation's name; its rows say nothing about the case but when they were measured."""

SIDE = 8192
"""Rows and columns of both factors."""


class Product:
    """What both ways to cuBLAS share: factors of random normal numbers, made once, and the work of a launch."""

    name = NAME
    dtype: DType

    def __init__(self) -> None:
        self._factors: list[Array] = []

    def why_not(self, problem: Problem) -> str | None:
        """A yardstick for the tensor cores that 16-bit attention uses."""
        return None if problem.dtype.itemsize == 2 else "no yardstick for fp32 and fp64"

    def factors(self) -> list[Array]:
        """Two CuPy matrices."""
        if not self._factors:
            import cupy

            self._factors = Normals(cupy).tensors(self.dtype, [(SIDE, SIDE)] * 2)
        return self._factors

    def of_product(self, runner: Runner) -> Runner:
        """The runner with the work of the product."""
        runner.flops = 2.0 * SIDE**3
        runner.tensors = None
        runner.nbytes = 3 * SIDE**2 * self.dtype.itemsize
        return runner


class TorchProduct(Product, Torch):
    """bf16 by ``torch.matmul``."""

    family = "cublas-bf16"
    dtype = BF16

    def __init__(self) -> None:
        importlib.import_module("torch")
        super().__init__()

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Capture the product."""
        return self.of_product(super().prepare(case, inputs))

    def call(self, torch: Any, case: Case, inputs: Inputs) -> Callable[[], object]:
        """The product, whatever the case."""
        a, b = (torch.from_dlpack(x) for x in self.factors())
        out = torch.empty_like(a)
        return lambda: torch.matmul(a, b, out=out)


class CupyProduct(Product):
    """fp16 by ``cupy.matmul``; tensor cores multiply both types at one rate."""

    family = "cublas-fp16"
    dtype = FP16

    def __init__(self) -> None:
        import cupy

        self._library = cupy.cuda.cublas  # loaded when asked for: an ImportError where it is not installed
        super().__init__()

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Run once; a launch takes a millisecond, so that capture would gain nothing."""
        import cupy

        a, b = self.factors()
        out = cupy.empty_like(a)
        stream = cupy.cuda.get_current_stream()

        def call() -> object:
            return cupy.matmul(a, b, out=out)

        call()
        stream.synchronize()
        return self.of_product(Runner(self.name, self.family, call, call, "events", stream.synchronize))


def product() -> TorchProduct | CupyProduct:
    """By torch where it is installed, by CuPy elsewhere."""
    try:
        return TorchProduct()
    except ImportError:
        return CupyProduct()
