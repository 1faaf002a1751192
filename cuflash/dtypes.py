"""The four element types: their NumPy, CUDA and accumulator names; and what numbers are rounded to when multiplied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type an attention call can have."""

    name: str
    """Short name, used in case ids, file names and tables: ``fp16``, ``bf16``, ``fp32``, ``fp64``."""
    cuda: str
    """The type's name in ``kernels/element.cuh``."""
    numpy: np.dtype = field(compare=False)
    """The NumPy (or ml_dtypes) dtype that arrays carry."""
    accumulator: np.dtype = field(compare=False)
    """The dtype of scores, sums and the log-sum-exp."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    def rounded(self, x: Any) -> Any:
        """An array of accumulators, each as near as numbers of this type come to it; NumPy's or CuPy's."""
        if self.name != "tf32":
            return x.astype(self.numpy, copy=False).astype(self.accumulator, copy=False)
        dropped = 13  # of the 23 bits behind the point
        bits = x.astype(self.numpy, copy=False).view(np.uint32)
        even = (bits >> dropped) & 1  # of two that are as near the even one
        kept = (bits + ((1 << dropped - 1) - 1 + even)) & np.uint32(2**32 - (1 << dropped))
        return np.where(np.isfinite(x), kept.view(self.numpy), x)

    def __str__(self) -> str:
        return self.name


Precision = Literal["full", "tf32"]
"""What products take of the numbers in fp32 tensors: all 24 bits, or the 11 of TF32."""

FP16 = DType("fp16", "fp16", np.dtype(np.float16), np.dtype(np.float32))
BF16 = DType("bf16", "bf16", np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
FP32 = DType("fp32", "float", np.dtype(np.float32), np.dtype(np.float32))
FP64 = DType("fp64", "double", np.dtype(np.float64), np.dtype(np.float64))

TF32 = DType("tf32", "float", np.dtype(np.float32), np.dtype(np.float32))
"""fp32 in memory, whose products take 11 bits of every number."""

DTYPES: dict[str, DType] = {d.name: d for d in (FP16, BF16, FP32, FP64)}
"""Those of arrays."""
KINDS: dict[str, DType] = DTYPES | {"tf32": TF32}
"""Those of problems."""
BY_NUMPY_NAME: dict[str, DType] = {d.numpy.name: d for d in DTYPES.values()}
"""The same by the names that NumPy has for them, and views carry: ``float16``, ``bfloat16``, ..."""
_BY_NUMPY: dict[np.dtype, DType] = {d.numpy: d for d in DTYPES.values()}


def of(dtype: np.dtype) -> DType | None:
    """The element type that a NumPy dtype stands for, or None when attention does not know it."""
    return _BY_NUMPY.get(dtype)
