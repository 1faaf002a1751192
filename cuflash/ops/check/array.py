"""One array by itself: its shape, element type, strides and alignment, and whether it can be written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cuflash.arrays import View
from cuflash.errors import InvalidArgument


def check_like(view: View, shape: tuple[int, ...], dtype: str) -> None:
    """An array must have this shape and element type."""
    if view.shape != shape:
        raise InvalidArgument(f"{view.name} has shape {view.shape}; expected {shape}.")
    if view.dtype != dtype:
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected {dtype}.")


def check_rows(view: View) -> None:
    """Rows must be contiguous; the other strides are free."""
    if not view.empty and view.shape[-1] > 1 and view.strides[-1] != view.itemsize:
        raise InvalidArgument(
            f"{view.name} is not contiguous along its last dimension, whose stride is {view.strides[-1]} bytes; "
            f"expected {view.itemsize}. Pass a contiguous copy of it."
        )
    check_alignment(view)


def check_alignment(view: View) -> None:
    """Elements must start at multiples of their size."""
    if not is_aligned(view):
        raise misaligned(view)


def is_aligned(view: View) -> bool:
    """Whether all elements start at multiples of their size."""
    strides = [stride for n, stride in zip(view.shape, view.strides, strict=True) if n > 1]
    return view.empty or not any(n % view.itemsize for n in (view.pointer, *strides))


def misaligned(view: View) -> InvalidArgument:
    """What is raised where elements do not start at multiples of a size."""
    return InvalidArgument(
        f"{view.name} is misaligned: not all of its elements start at a multiple of their {view.itemsize} bytes. "
        "Pass a contiguous copy of it."
    )


def check_int32(view: View) -> None:
    """Numbers of sequences, rows and pages must be of this type."""
    if view.dtype != "int32":
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected int32. Convert it.")


def check_contiguous(view: View) -> None:
    """Numbers along one dimension must be neighbours."""
    if (view.shape[0] > 1 and view.strides[0] != view.itemsize) or view.pointer % view.itemsize:
        raise InvalidArgument(f"{view.name} is not contiguous; pass a contiguous copy of it.")


def check_writeable(view: View) -> None:
    """An output must be writeable, and no two of its elements may be one."""
    if not view.writeable:
        raise InvalidArgument(f"{view.name} is read-only; pass an array that can be written.")
    if view.empty:
        return
    reach = 0
    for stride, n in sorted((abs(stride), n) for n, stride in zip(view.shape, view.strides, strict=True) if n > 1):
        if stride < reach + view.itemsize:
            raise InvalidArgument(
                f"{view.name} has elements that share memory, shape {view.shape} with strides of {view.strides} bytes; "
                "pass an array without overlap."
            )
        reach += stride * (n - 1)


def check_output(view: View, like: View) -> None:
    """Check an output that has the shape, dtype and device of another array."""
    if view.device != like.device:
        raise InvalidArgument(f"{view.name} is on {view.device} but {like.name} is on {like.device}; move one of them.")
    if view.shape != like.shape:
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; expected {like.shape}, that of {like.name} with size 1 along the "
            "axes that it is expanded over."
        )
    check_like(view, like.shape, like.dtype)
    check_alignment(view)
    check_writeable(view)


def check_pairs(view: View, scores: tuple[int, int, int, int]) -> None:
    """A tensor of pairs must broadcast to the shape of the scores."""
    padded = (1,) * (4 - len(view.shape)) + view.shape
    if len(padded) != 4 or any(n not in (1, size) for n, size in zip(padded, scores, strict=True)):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; "
            f"expected one that broadcasts to (b, heads_q, len_q, len_kv) = {scores}."
        )


def pair_strides(view: View) -> tuple[int, int, int, int]:
    """Strides in elements along batch, head, row and column of a tensor of pairs, 0 where it broadcasts."""
    steps = [stride // view.itemsize if n > 1 else 0 for n, stride in zip(view.shape, view.strides, strict=True)]
    batch, head, row, column = [0] * (4 - len(steps)) + steps
    return batch, head, row, column


def outer_strides(view: View) -> list[int]:
    """Strides in bytes of all axes but the last along which there is more than one element."""
    return [stride for n, stride in zip(view.shape[:-1], view.strides[:-1], strict=True) if n > 1]


def copy_bytes_of(tensors: Sequence[View], dims: Sequence[int]) -> int:
    """The widest access, up to 16 bytes, that every row of every tensor starts and ends on."""
    addresses = [n for view in tensors if not view.empty for n in (view.pointer, *outer_strides(view))]
    return math.gcd(16, *(dim * tensors[0].itemsize for dim in dims), *addresses)
