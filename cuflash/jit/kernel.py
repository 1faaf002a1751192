"""Cubin -> launchable kernel. The only module that names RawModule."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cuflash import device
from cuflash.errors import UnsupportedProblem
from cuflash.jit import driver, params
from cuflash.jit.compile import Cubin, compile_together
from cuflash.plan.config import Config, Written
from cuflash.plan.plan import Step

MAX_BLOCKS = 2**31 - 1
"""The largest one-dimensional grid CUDA launches."""


Launch = Callable[[Any, int], None]
"""Launches a kernel with a block of `parameters`, which is read before it returns, on a stream by its handle."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled variant on one GPU."""

    name: str
    cubin: Cubin
    config: Config
    function: Any
    """The CuPy kernel, of this GPU, which keeps its machine code loaded."""
    start: Callable[..., None]
    """``cuLaunchKernel`` as CuPy has it, which takes 0.6 us less than a call of the function."""
    cluster: int = 1
    """How many of its blocks share their memory."""
    first_byte: int = 0
    """Where its arguments begin in a parameter block (:func:`cuflash.jit.params.first_byte`)."""

    def of(self, num_blocks: int) -> Launch:
        """What launches so many blocks."""
        start, first_byte = self._starter(num_blocks), self.first_byte

        def launch(block: Any, stream: int) -> None:
            arguments = block.arguments
            if first_byte:
                moved = ctypes.c_uint64(ctypes.addressof(block) + first_byte)
                arguments = ctypes.addressof(moved)
            try:
                start(stream, arguments, 0)
            except Exception as error:
                if getattr(error, "status", None) != _INVALID_CONTEXT:
                    raise
                import cupy

                cupy.cuda.runtime.free(0)  # has the device's context be that of a thread which has had none
                start(stream, arguments, 0)

        launch.kernel = self  # type: ignore[attr-defined]  # keeps the machine code loaded
        return launch

    def launch(self, num_blocks: int, block: Any, stream: int) -> None:
        """Launch blocks once."""
        self.of(num_blocks)(block, stream)

    def _starter(self, num_blocks: int) -> Callable[..., None]:
        """A launch by the driver, which is told all but the stream, the address of the arguments' address, and 0."""
        function, threads, smem_bytes = self.function.ptr, self.config.threads, self.config.smem_bytes
        if self.cluster > 1:
            return driver.starter(self.cluster, function, num_blocks, threads, smem_bytes)
        return partial(self.start, function, num_blocks, 1, 1, threads, 1, 1, smem_bytes)


_INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT."""


def parameters(struct: bytes) -> Callable[[], Any]:
    """What makes copies of a kernel's one parameter, by words; `arguments` of each is where its address is kept.

    A launch reads that address, so it lies behind the words.
    """
    content = struct + bytes(8)
    words = ctypes.c_uint64 * (len(content) // 8)

    def copy() -> Any:
        made: Any = words.from_buffer_copy(content)
        address = ctypes.addressof(made)
        made[-1], made.arguments = address, address + len(struct)
        return made

    return copy


def clear(pointer: int, nbytes: int, stream: int) -> None:
    """Fill device memory with zeros on a stream."""
    import cupy

    cupy.cuda.runtime.memsetAsync(pointer, 0, nbytes, stream)


_loaded: dict[tuple[str, Config, str, int], Kernel] = {}
"""Every kernel of this process by kernel, config, params and GPU."""


def load(steps: Sequence[Step], device_index: int, written: Written | None = None) -> list[Kernel]:
    """The kernels of a plan's steps on a GPU; read from disk or compiled, side by side, on the first call.

    `written` is what some of them are for besides.

    Raises
    ------
    UnsupportedProblem
        If a grid is larger than CUDA launches.
    CompileError
        If a kernel cannot be compiled; that of the first such step.
    """
    for step in steps:
        if step.num_blocks > MAX_BLOCKS:
            raise UnsupportedProblem(
                f"{step.kernel} would need {step.num_blocks} blocks, more than the {MAX_BLOCKS} one launch can have. "
                "Split the call along the batch."
            )
    keys = [(step.kernel, step.config, step.params, device_index) for step in steps]
    missing = [key for key in keys if key not in _loaded]
    if missing:
        arch = device.current(device_index).arch
        cubins = compile_together([(kernel, config, struct, arch) for kernel, config, struct, _ in missing])
        for key, cubin in zip(missing, cubins, strict=True):
            _loaded[key] = _load(cubin, key[1], device_index)
    kernels = [_of_step(_loaded[key], step) for key, step in zip(keys, steps, strict=True)]
    if written is None:
        return kernels
    return [replace(kernel, first_byte=params.first_byte(kernel.config, written)) for kernel in kernels]


def _load(cubin: Cubin, config: Config, device_index: int) -> Kernel:
    import cupy

    with cupy.cuda.Device(device_index):
        function = cupy.RawModule(path=str(cubin.path)).get_function(cubin.kernel)
        if config.smem_bytes > 48 * 1024:  # more has to be asked for
            function.max_dynamic_shared_size_bytes = config.smem_bytes
        return Kernel(cubin.kernel, cubin, config, function.kernel, cupy.cuda.driver.launchKernel)


def _of_step(kernel: Kernel, step: Step) -> Kernel:
    """The kernel as the step launches it."""
    return kernel if step.cluster == 1 else replace(kernel, cluster=step.cluster)
