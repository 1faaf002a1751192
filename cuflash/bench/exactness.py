"""Measure how far the results of cuflash and its peers are from exact ones, instead of how long they take.

The unit is the error of rounding the exact result once to the element type, below which nothing can be. What q and k
are multiplied by matters most: the larger the scores, the more one key outweighs the rest of its row, as in real
models.
"""

from __future__ import annotations

import numpy as np

from cuflash.bench.peers.own import CuflashGpu
from cuflash.bench.run import Bench
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Array, make
from cuflash.cases.table import Case
from cuflash.device import current
from cuflash.dtypes import TF32
from cuflash.plan import Step, choose
from cuflash.verify.deviations import MODEL, OUTPUTS, Deviation, ideal, rms, rounding

NAME = "exactness"
"""The problem set whose cases are compared rather than timed."""

PEERS = "torch-flash,torch-efficient,torch-cudnn,fa3"
"""Those that are asked on a GPU unless others are named; some of the others take seconds to compile each case."""


class Exactness(Bench):
    """Compares cases on one device and collects what it finds in a report."""

    def _case(self, case: Case, seconds: float) -> None:
        inputs = make(case, self._normals)
        exact, model = ideal(case, inputs, self._normals.xp)
        results = {MODEL: model}
        for implementation in self._implementations:
            name = implementation.name
            if case.problem.dropout and name != CuflashGpu.name:
                self._left_out[f"{name} (drops other pairs)"].append(self._label(case))
            elif case.problem.dtype == TF32 and name != CuflashGpu.name:
                self._left_out[f"{name} (multiplies all bits of fp32)"].append(self._label(case))
            elif runner := self._prepared(implementation, case, inputs):
                if runner.tensors is None:
                    self._left_out[f"{name} (does not compute the case)"].append(self._label(case))
                    continue
                try:
                    results[runner.impl] = self._results(runner, OUTPUTS[case.problem.direction])
                except Exception as error:  # a peer's failure is its own; the others go on
                    self._failed(case)(runner, error)
        for name, x in exact.items():
            unit = rounding(x, case.problem.dtype)
            errors = {impl: float(f"{rms(tensors[name] - x) / unit:.5g}") for impl, tensors in results.items()}
            self.report.deviations.append(Deviation(case.id, case.problem.direction, name, unit, errors))
        results.clear()
        self._release()

    def _results(self, runner: Runner, names: tuple[str, ...]) -> dict[str, Array]:
        """What one call returns, by name, in float64."""
        assert runner.tensors is not None
        with runner.scope():
            tensors = runner.tensors(runner.call())
            runner.wait()
            arrays = [self._normals.xp.from_dlpack(x).astype(np.float64) for x in tensors]
            runner.wait()
        return dict(zip(names, arrays, strict=False))


def steps(cases: list[Case]) -> list[Step]:
    """The distinct kernels of the cases on this GPU, and of the forward that a backward needs first."""
    gpu = current(0)
    both = [direction for case in cases for direction in (case.turned("forward"), case)]
    plans = [choose(each.problem, gpu, each.family) for each in both]
    kernels = {(step.kernel, step.params, step.config): step for plan in plans for step in plan.steps}
    return list(kernels.values())
