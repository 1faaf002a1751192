"""Cuflash itself, on either device, and naive NumPy attention, its peer on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cuflash.bench.peers.implementation import beyond
from cuflash.bench.timing import Runner
from cuflash.cases import calls
from cuflash.cases.inputs import Array, Inputs
from cuflash.cases.table import Case
from cuflash.errors import UnsupportedProblem
from cuflash.plan import choose
from cuflash.problem import Problem
from cuflash.verify.naive import Naive, visible


class CuflashGpu:
    """The public functions on CuPy arrays; the launches of one call are captured and replayed as a graph."""

    name = "cuflash"

    def why_not(self, problem: Problem) -> str | None:
        """Nothing: what no family runs raises."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Compile, warm up and capture."""
        import cupy

        from cuflash.device import current

        call = calls.of(case, inputs)
        family = choose(case.problem, current(cupy.cuda.Device().id), case.family).family
        stream = cupy.cuda.get_current_stream()
        # A pool of its own: another allocation must not get the scratch memory that the graph keeps writing to.
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            call()
            stream.synchronize()
            stream.begin_capture()
            try:
                outputs = call()
            finally:
                graph = stream.end_capture()
        return Runner(
            self.name,
            family,
            call,
            launch=lambda: graph.launch(stream),
            clock="events",
            wait=stream.synchronize,
            keep=[pool, outputs, graph],
            tensors=_wide,
        )


class BuiltIn(CuflashGpu):
    """The same functions, asked by their options for what a caller wrote out."""

    name = "built-in"

    def why_not(self, problem: Problem) -> str | None:
        """Something must be written out."""
        return None if problem.written else "nothing is written"

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Compile, warm up and capture."""
        if case.built_in is None:
            raise UnsupportedProblem("no option says the same")
        slopes = inputs.captured[0] if case.built_in.alibi else None
        own = replace(inputs, captured=(), alibi_slopes=slopes)
        return super().prepare(replace(case, problem=case.built_in, captured=(), blocks=None, built_in=None), own)


class CuflashCpu:
    """The public functions on NumPy arrays."""

    name = "cuflash"

    def why_not(self, problem: Problem) -> str | None:
        """Nothing: the NumPy backend runs every problem."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Nothing to prepare but the forward's results, where the case is a backward."""
        call = calls.of(case, inputs)
        return Runner(self.name, "reference", call, call, clock="wall", wait=lambda: None, tensors=_wide)


class NumpyNaive:
    """Attention as a NumPy user writes it: the whole score matrix, one sequence after the other."""

    name = "numpy-naive"

    def why_not(self, problem: Problem) -> str | None:
        """It has bands and soft caps, on dense tensors."""
        return beyond(problem, "causal", "window", "softcap", "deterministic")

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Views in (heads, len, dim) order and the mask, outside the clock."""
        problem = case.problem
        naive = Naive(problem.dtype, problem.softmax_scale, problem.softcap)
        keep = visible(problem.mask, problem.len_q, problem.len_kv)
        sequences = [
            [x[b].swapaxes(0, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)] for b in range(problem.batch)
        ]

        def forward() -> object:
            return [naive.forward(q, k, v, keep) for q, k, v, _ in sequences]

        def backward() -> object:
            return [naive.backward(dout, 0.0, q, k, v, keep) for q, k, v, dout in sequences]

        def tensors(results: Any) -> list[Array]:
            return [np.stack(output).swapaxes(1, 2) for output in zip(*(x[:3] for x in results), strict=True)]

        call = forward if problem.direction == "forward" else backward
        return Runner(self.name, "naive", call, call, clock="wall", wait=lambda: None, tensors=tensors)


def _wide(results: tuple[Array, ...]) -> list[Array]:
    """The first outputs of a call in float64; behind them are others, which no peer returns."""
    return [x.astype(np.float64) for x in results[:3] if not isinstance(x, tuple)]
