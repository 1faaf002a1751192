"""The four checks of arguments that PyTorch's attention makes before it launches a kernel."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from cuflash.arrays import Guest, View, framework_in_memory
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import integer, is_array, shown


def check_contiguous(name: str, x: Any) -> None:
    """Check that an array is on a CUDA device, dense and contiguous in row-major order.

    Parameters
    ----------
    name : str
        What the message calls it.
    x : array
        Of CuPy, torch, JAX or another library that speaks DLPack.

    Raises
    ------
    InvalidArgument
        If it is not.
    """
    try:
        view = _on_device(name, x)
        sizes = [view.itemsize * prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
        wrong = any(n > 1 and stride != size for n, stride, size in zip(view.shape, view.strides, sizes, strict=True))
        if wrong and not view.empty:
            raise InvalidArgument(
                f"{name} has shape {view.shape} with strides of {view.strides} bytes; "
                "expected a contiguous array. Pass a contiguous copy of it."
            )
    except REFUSALS as error:
        shorten(error)
        raise


def check_last_contiguous(name: str, x: Any) -> None:
    """Check that an array is on a CUDA device, dense and contiguous along its last dimension.

    Parameters
    ----------
    name : str
        What the message calls it.
    x : array
        Of CuPy, torch, JAX or another library that speaks DLPack.

    Raises
    ------
    InvalidArgument
        If it is not, or has no dimension.
    """
    try:
        view = _on_device(name, x)
        if not view.shape:
            raise InvalidArgument(f"{name} has no dimension; expected at least one.")
        if view.shape[-1] > 1 and not view.empty and view.strides[-1] != view.itemsize:
            raise InvalidArgument(
                f"{name} is not contiguous along its last dimension, whose stride is {view.strides[-1]} bytes; "
                f"expected {view.itemsize}. Pass a contiguous copy of it."
            )
    except REFUSALS as error:
        shorten(error)
        raise


def check_aligned(name: str, pointer: Any, alignment: int) -> None:
    """Check that an address, or that of an array's first element, is a multiple of `alignment` bytes.

    Parameters
    ----------
    name : str
        What the message calls it.
    pointer : int or array
        The address, or any array.
    alignment : int
        In bytes.

    Raises
    ------
    InvalidArgument
        If it is not a multiple.
    """
    try:
        address = _view(name, pointer).pointer if is_array(pointer) else integer(pointer)
        if address is None:
            raise InvalidArgument(f"{name} is {shown(pointer)}; expected an address or an array.")
        if address % alignment:
            raise InvalidArgument(
                f"{name} is at {address:#x}, which is no multiple of {alignment} bytes. "
                "Pass a copy of it: fresh arrays are aligned."
            )
    except REFUSALS as error:
        shorten(error)
        raise


def check_range(name: str, value: Any, dtype: Any = np.int32) -> int:
    """Check that an integer is below the largest one of an integer type, and not below its least.

    Parameters
    ----------
    name : str
        What the message calls it.
    value : int
        The number.
    dtype : dtype
        An integer type of NumPy.

    Returns
    -------
    int
        The number.

    Raises
    ------
    InvalidArgument
        If it is no integer or out of range.
    """
    try:
        limits = np.iinfo(dtype)
        number = integer(value)
        if number is None or not limits.min <= number < limits.max:
            raise InvalidArgument(
                f"{name} is {shown(value)}; "
                f"expected an integer from {limits.min} to {limits.max - 1}, as {limits.dtype} holds."
            )
        return number
    except REFUSALS as error:
        shorten(error)
        raise


def _on_device(name: str, x: Any) -> View:
    """The array spelled out, if it is dense and on a CUDA device."""
    layout = str(getattr(x, "layout", ""))  # which other libraries' arrays may have, too, and mean something else
    if layout.startswith("torch.") and layout != "torch.strided":
        raise InvalidArgument(f"{name} has layout {layout}; expected a dense array. Pass {name}.to_dense().")
    view = _view(name, x)
    if not view.device.startswith("cuda"):
        raise InvalidArgument(f"{name} is on {view.device}; expected an array on a CUDA device. Move it there.")
    return view


def _view(name: str, x: Any) -> View:
    if x is None:
        raise InvalidArgument(f"{name} is None; expected an array.")
    framework = framework_in_memory([name], [x])
    if isinstance(framework, Guest):
        framework, (x,) = framework.borrow([name], [x])
    return framework.view(name, x)
