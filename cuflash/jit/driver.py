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


def starter(cluster: int, function: int, num_blocks: int, threads: int, smem_bytes: int) -> Callable[..., None]:
    """``cuLaunchKernelEx`` of a function, so many blocks of which are a cluster.

    What it returns takes the handle of a stream, the address of that of the parameter block, and 0. All that a launch
    says besides is laid out here, once.
    """
    import cupy

    address = ctypes.addressof(_attribute(cluster))
    launch = library("cuLaunchKernelEx").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    sizes = struct.pack("<7I4x", num_blocks, 1, 1, threads, 1, 1, smem_bytes)  # CUlaunchConfig
    attributes = struct.pack("<QI4x", address, 1)

    def start(stream: int, arguments: int, extra: int) -> None:
        if status := launch(sizes + stream.to_bytes(8, "little") + attributes, function, arguments, extra):
            raise cupy.cuda.driver.CUDADriverError(status)

    return start


@cache
def _attribute(cluster: int) -> ctypes.Array:
    """CUlaunchAttribute of clusters of so many blocks, which stays where it is."""
    content = struct.pack("<I4x3I52x", _CLUSTER_DIMENSION, cluster, 1, 1)
    return (ctypes.c_uint64 * 9).from_buffer_copy(content)
