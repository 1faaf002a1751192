"""The yardstick where memory decides: a kernel that reads the keys and values and nothing else."""

from __future__ import annotations

from typing import Any

from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.problem import Problem

NAME = "read"
"""Its implementation's name; its rows say nothing about the case but how fast its bytes can come."""

_THREADS, _BLOCKS = 512, 4
"""Of a block, and blocks of a multiprocessor, which together have 256 KB under way."""

_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(512) read(const uint4* k, const uint4* v, long long count, unsigned* out) {
  const long long step = 1LL * gridDim.x * blockDim.x;
  unsigned sum = 0;
  for (long long first = 1LL * blockIdx.x * blockDim.x + threadIdx.x; first < count; first += 4 * step) {
    uint4 loaded[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long at = first + i * step;
      loaded[2 * i] = at < count ? __ldcs(k + at) : make_uint4(0, 0, 0, 0);
      loaded[2 * i + 1] = v && at < count ? __ldcs(v + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
  }
  if (sum == 0x9e3779b9u) *out = sum;  // so that nothing is left out
}
"""


class Read:
    """Every byte of a cache once, by as many loads as a GPU keeps under way."""

    name = NAME

    def __init__(self) -> None:
        import cupy

        self._kernel = cupy.RawKernel(_SOURCE, "read")

    def why_not(self, problem: Problem) -> str | None:
        """A yardstick for new queries over a longer cache."""
        few = problem.direction == "forward" and problem.len_q * problem.group < problem.len_kv
        return None if few else "no yardstick where products decide"

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Launched as it is: one kernel, whose launch takes less than it does."""
        import cupy

        k, v = inputs.k, inputs.v
        shared = k.data.ptr == v.data.ptr  # values that are the first columns of the keys
        if not shared and k.nbytes != v.nbytes:
            raise ValueError("keys and values differ in size")
        blocks = _BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
        arguments: tuple[Any, ...] = (k, 0 if shared else v, k.nbytes // 16, cupy.empty(1, cupy.uint32))
        stream = cupy.cuda.get_current_stream()

        def call() -> None:
            self._kernel((blocks,), (_THREADS,), arguments)

        call()
        stream.synchronize()
        stream.begin_capture()
        try:
            call()
        finally:
            graph = stream.end_capture()
        launch = lambda: graph.launch(stream)  # noqa: E731
        runner = Runner(NAME, "read", call, launch, "events", stream.synchronize, keep=[arguments, graph])
        runner.nbytes = k.nbytes * (1 if shared else 2)
        return runner
