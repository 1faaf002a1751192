"""Measure how far the results of cuflash and its peers are from exact ones, instead of how long they take.

The unit is the error of rounding the exact result once to the element type, below which nothing can be. What q and k
are multiplied by matters most: the larger the scores, the more one key outweighs the rest of its row, as in real
models.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuflash.bench.peers.own import CuflashGpu
from cuflash.bench.run import Bench
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Array, Inputs, make
from cuflash.cases.table import Case
from cuflash.device import current
from cuflash.dropout import Dropout
from cuflash.dtypes import FP64, DType
from cuflash.plan import Step, choose
from cuflash.reference.dropout import KeepMask
from cuflash.verify.deviations import MODEL, Deviation
from cuflash.verify.flash import Flash, rounded_once
from cuflash.verify.naive import Extras, Naive, visible
from cuflash.verify.verify import dropout_of

NAME = "exactness"
"""The problem set whose cases are compared rather than timed."""

PEERS = "torch-flash,torch-efficient,torch-cudnn,fa3"
"""Those that are asked on a GPU unless others are named; some of the others take seconds to compile each case."""

OUTPUTS = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
"""What is compared, in the order that calls return it."""


class Exactness(Bench):
    """Compares cases on one device and collects what it finds in a report."""

    def _case(self, case: Case, seconds: float) -> None:
        inputs = make(case, self._normals)
        exact, model = ideal(case, inputs, self._normals.xp)
        found = {MODEL: model}
        for each in self._implementations:
            if case.problem.dropout and each.name != CuflashGpu.name:
                self._left_out[f"{each.name} (drops other pairs)"].append(self._label(case))
            elif runner := self._prepared(each, case, inputs):
                if runner.tensors is None:
                    self._left_out[f"{each.name} (does not compute the case)"].append(self._label(case))
                    continue
                try:
                    found[runner.impl] = self._results(runner, OUTPUTS[case.problem.direction])
                except Exception as error:  # a peer's failure is its own; the others go on
                    self._failed(case)(runner, error)
        for name, x in exact.items():
            unit = rounding(x, case.problem.dtype)
            errors = {impl: float(f"{rms(tensors[name] - x) / unit:.5g}") for impl, tensors in found.items()}
            self.report.deviations.append(Deviation(case.id, case.problem.direction, name, unit, errors))
        found.clear()
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


def ideal(case: Case, inputs: Inputs, xp: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """The exact outputs of a dense case with a band mask, and those of FlashAttention on paper; float64 arrays by name.

    Of what can be done to scores, the soft cap, sinks and dropout are known. On a GPU it needs cuBLAS.
    """
    problem = case.problem
    q, k, v, dout = (
        xp.ascontiguousarray(x.swapaxes(1, 2).astype(np.float64)) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    keep = visible(problem.mask, problem.len_q, problem.len_kv)
    keep = None if keep is None else xp.asarray(keep)
    extras = Extras(sink=inputs.sink, dropped=_dropped(case, inputs, xp))
    found = []
    for dtype, formula in ((FP64, Naive), (problem.dtype, Flash)):
        attention = formula(dtype, problem.softmax_scale, problem.softcap)
        if problem.direction == "forward":
            outputs = attention.forward(q, k, v, keep, extras)
        else:
            outputs = attention.backward(dout, 0.0, q, k, v, keep, extras)
        found.append({name: x.swapaxes(1, 2) for name, x in zip(OUTPUTS[problem.direction], outputs, strict=False)})
    return found[0], found[1]


def _dropped(case: Case, inputs: Inputs, xp: Any) -> Array | None:
    """What dropout multiplies probabilities by, (b, heads_q, len_q, len_kv)."""
    problem, dropout = case.problem, dropout_of(case)
    if dropout is None or inputs.rng_state is None:
        return None
    kept = _kept(dropout, inputs.rng_state, problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    return xp.asarray(kept) * dropout.keep_scale


@lru_cache(maxsize=2)
def _kept(
    dropout: Dropout, rng_state: tuple[int, int], batch: int, heads_q: int, len_q: int, len_kv: int
) -> np.ndarray:
    """Which pairs survive, (b, heads_q, len_q, len_kv) booleans; of each scheme alike in all cases of the set."""
    heads = np.arange(batch * heads_q, dtype=np.uint64).reshape(batch, heads_q)
    mask = KeepMask(dropout, *rng_state, heads, len_kv, len_q * len_kv)
    return mask.tile((slice(None),), slice(0, len_q), slice(0, len_kv))


def steps(cases: list[Case]) -> list[Step]:
    """The distinct kernels of the cases on this GPU, and of the forward that a backward needs first."""
    gpu = current(0)
    problems = [case.problem for each in cases for case in (each.turned("forward"), each)]
    found = {(step.kernel, step.params, step.config): step for x in problems for step in choose(x, gpu).steps}
    return list(found.values())


def rms(x: Array) -> float:
    """The root of the mean square of all elements."""
    return float((x**2).mean()) ** 0.5


def rounding(exact: Array, dtype: DType) -> float:
    """The unit: the root mean square error of rounding the exact result once."""
    return max(rms(rounded_once(exact, dtype) - exact), float(np.finfo(np.float64).tiny))
