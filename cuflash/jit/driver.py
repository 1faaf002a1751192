"""What CuPy has no function for: the CUDA driver's own. The only module that names libcuda."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from cuflash.errors import UnsupportedProblem

_CLUSTER_DIMENSION = 4
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION."""


@cache
def library(function: str) -> Any:
    """The driver, which has a function.

    Raises
    ------
    UnsupportedProblem
        If there is none, or one that is too old for the kernels of sm_90.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        getattr(driver, function)
    except (OSError, AttributeError) as error:
        raise UnsupportedProblem(
            f"the kernels of sm_90 need {function} of the CUDA driver, which is not there ({error}). "
            "Install driver 525 or newer, which CUDA 12 asks for."
        ) from error
    return driver


@cache
def starter(cluster: int) -> Callable[..., None]:
    """``cuLaunchKernelEx`` with the arguments of ``cuLaunchKernel`` as CuPy has it: so many blocks are a cluster."""
    import cupy

    attribute = (ctypes.c_uint64 * 9).from_buffer_copy(struct.pack("<I4x3I52x", _CLUSTER_DIMENSION, cluster, 1, 1))
    address = ctypes.addressof(attribute)
    launch = library("cuLaunchKernelEx").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    pack = struct.Struct("<7I4xQQI4x").pack  # CUlaunchConfig

    def start(function: int, *given: int) -> None:
        *sizes, stream, arguments, extra = given
        if status := launch(pack(*sizes, stream, address, 1), function, arguments, extra):
            raise cupy.cuda.driver.CUDADriverError(status)

    start.attribute = attribute  # type: ignore[attr-defined]
    return start
