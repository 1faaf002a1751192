"""The kernels that merge results of the same queries over different keys, and those of its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from cuflash.dtypes import DType
from cuflash.plan.config import HEADER, Config
from cuflash.plan.plan import Step

_THREADS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeBackwardConfig(Config):
    """``bwd_merge``."""

    element: str = field(metadata={HEADER: "element.cuh"})
    """Of the parts."""
    across: int
    """Threads of a warp that share a row; a power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig(MergeBackwardConfig):
    """``fwd_merge``."""

    result: str = field(metadata={HEADER: "element.cuh"})
    """Of what they are merged into: the element type, or its accumulator where it is merged on."""
    copy_bytes: int


def forward(dtype: DType, result: DType, rows: int, dim: int, copy_bytes: int) -> Step:
    """The launch that merges rows of `dim` columns into those of another type."""
    across = _across(-(-dim * dtype.itemsize // copy_bytes))
    config = MergeConfig(
        element=dtype.cuda,
        result=result.cuda,
        across=across,
        threads=_THREADS,
        copy_bytes=max(copy_bytes, dtype.itemsize),
    )
    return Step("fwd_merge", "MergeParams", config, -(-rows * across // _THREADS))


def backward(dtype: DType, rows: int, dim: int) -> Step:
    """The launch of the gradients of every part."""
    across = _across(dim)
    config = MergeBackwardConfig(element=dtype.cuda, across=across, threads=_THREADS)
    return Step("bwd_merge", "MergeParams", config, -(-rows * across // _THREADS))


def _across(vectors: int) -> int:
    """Threads that share a row of so many vectors: a power of two, up to a warp."""
    return min(32, 1 << max(vectors - 1, 0).bit_length())
