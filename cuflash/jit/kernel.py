"""Cubin -> launchable kernel. The only module that names RawModule."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuflash import device
from cuflash.errors import UnsupportedProblem
from cuflash.jit.compile import Cubin, compile_kernel
from cuflash.plan.plan import Config, Step

MAX_BLOCKS = 2**31 - 1
"""The largest one-dimensional grid CUDA launches."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled variant on one GPU."""

    name: str
    cubin: Cubin
    config: Config
    function: Any
    """The CuPy kernel, of this GPU."""
    argument: Callable[[int], Any]
    """CuPy's words for the address of an argument; those for a NumPy array take 1 us more to find."""

    def launch(self, num_blocks: int, params: ctypes.Array) -> None:
        """Launch on the current CuPy stream; ``params`` is the parameter struct, read before this returns."""
        arguments = (self.argument(ctypes.addressof(params)),)
        self.function((num_blocks,), (self.config.threads,), arguments, shared_mem=self.config.smem_bytes)


def load(step: Step, device_index: int) -> Kernel:
    """The kernel of a step on a GPU, compiled or read from disk on the first call.

    Raises
    ------
    UnsupportedProblem
        If the grid is larger than CUDA launches.
    CompileError
        If the kernel cannot be compiled.
    """
    if step.num_blocks > MAX_BLOCKS:
        raise UnsupportedProblem(
            f"{step.kernel} would need {step.num_blocks} blocks, more than the {MAX_BLOCKS} one launch can have. "
            "Split the call along the batch."
        )
    return _load(step.kernel, step.config, step.params, device_index)


@cache
def _load(kernel: str, config: Config, params: str, device_index: int) -> Kernel:
    import cupy
    from cupy.cuda.function import CPointer

    cubin = compile_kernel(kernel, config, params, device.current(device_index).arch)
    with cupy.cuda.Device(device_index):
        function = cupy.RawModule(path=str(cubin.path)).get_function(kernel)
        if config.smem_bytes > 48 * 1024:  # more has to be asked for
            function.max_dynamic_shared_size_bytes = config.smem_bytes
        return Kernel(kernel, cubin, config, function.kernel, CPointer)
