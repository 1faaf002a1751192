"""Plan -> running code: sources, config.cuh, NVRTC, the cubin cache, and kernels to launch."""

from cuflash.jit import cache, params, render, sources, tensormap
from cuflash.jit.compile import Cubin, compile_kernel, compile_many, compile_together
from cuflash.jit.graph import record
from cuflash.jit.kernel import Kernel, Launch, clear, load, parameters

__all__ = [
    "Cubin", "Kernel", "Launch", "cache", "clear", "compile_kernel", "compile_many", "compile_together", "load",
    "parameters", "params", "record", "render", "sources", "tensormap",
]  # fmt: skip
