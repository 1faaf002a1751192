"""Parts that are merged, and the gradients of what they are merged into."""

from __future__ import annotations

from collections.abc import Sequence

from cuflash.arrays import View
from cuflash.dtypes import BY_NUMPY_NAME, DType
from cuflash.errors import InvalidArgument
from cuflash.ops.check.array import is_aligned


def dtype_of_parts(outs: Sequence[View], lses: Sequence[View]) -> DType:
    """The element type of parts, which must fit each other."""
    first = outs[0]
    if first.dtype not in BY_NUMPY_NAME:
        raise InvalidArgument(
            f"{first.name} is {first.dtype}; expected {', '.join(BY_NUMPY_NAME)}. Convert every part."
        )
    if len(first.shape) not in (3, 4):
        raise InvalidArgument(
            f"{first.name} has {len(first.shape)} dimensions, shape {first.shape}; expected (b, s, h, d), or "
            "(total, h, d) of packed sequences."
        )
    dtype = BY_NUMPY_NAME[first.dtype]
    *batch, length, heads, dim = first.shape
    if dim == 0:
        raise InvalidArgument(f"{first.name} has head dimension 0, shape {first.shape}; expected at least 1.")
    for out in outs:
        _check_part(out, first, first.shape, first.dtype)
        _check_columns(out)
    for lse in lses:
        _check_part(lse, first, (*batch, heads, length), dtype.accumulator.name)
    return dtype


def check_gradient(view: View, of: View) -> None:
    """A gradient of an out or an lse has its shape and element type."""
    _check_part(view, of, of.shape, of.dtype)
    if view.name == "dout":
        _check_columns(view)


def _check_part(view: View, first: View, shape: tuple[int, ...], dtype: str) -> None:
    """An array must be where the first one is, of this shape and element type, and aligned."""
    if view.device != first.device:
        raise InvalidArgument(
            f"{view.name} is on {view.device} but {first.name} is on {first.device}; move one of them."
        )
    if view.shape != shape:
        raise InvalidArgument(f"{view.name} has shape {view.shape}; expected {shape}, by that of {first.name}.")
    if view.dtype != dtype:
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected {dtype}, by that of {first.name}.")
    if not is_aligned(view):
        raise InvalidArgument(f"{view.name} is misaligned; pass a contiguous copy of it.")


def _check_columns(view: View) -> None:
    """The columns of a row must be neighbours."""
    if not view.empty and view.shape[-1] > 1 and view.strides[-1] != view.itemsize:
        raise InvalidArgument(f"{view.name} is not contiguous along its last dimension; pass a contiguous copy of it.")
