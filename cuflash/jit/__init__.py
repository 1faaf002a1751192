"""Plan -> running code: sources, config.cuh, NVRTC, the cubin cache, and kernels to launch."""

from cuflash.jit import cache, params, render, sources, tensormap
from cuflash.jit.compile import Cubin, compile_kernel, compile_many, compile_together
from cuflash.jit.kernel import Kernel, Stream, clear, load

__all__ = [
    "Cubin", "Kernel", "Stream", "cache", "clear", "compile_kernel", "compile_many", "compile_together", "load",
    "params", "render", "sources", "tensormap",
]  # fmt: skip
