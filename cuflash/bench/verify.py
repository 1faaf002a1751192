"""Run one case and compare it with the same computation in float64, which is exact to all the digits compared.

The exact answer is the NumPy backend on float64 copies of the inputs; tests hold that backend to an oracle.
A result may be at most twice as far from it as the naive computation in the same element type, plus a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import ml_dtypes
import numpy as np

from cuflash import reference
from cuflash.bench import calls
from cuflash.bench.cases import Case
from cuflash.bench.inputs import Array, Inputs, host
from cuflash.bench.naive import Naive, visible


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one output tensor compares; errors are the largest absolute differences from the exact answer."""

    tensor: str
    error: float
    naive_error: float
    allowed: float
    worst: str
    """Where the largest difference is, with both values."""

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def verify(case: Case, inputs: Inputs) -> list[Verdict]:
    """Compute a case with cuflash and judge every output: out and lse, or dq, dk and dv."""
    names = ("out", "lse") if case.problem.direction == "forward" else ("dq", "dk", "dv")
    results = [host(x) for x in calls.of(case, inputs)()]
    on_host = Inputs(*(host(getattr(inputs, name)) for name in Inputs.__slots__))
    exact = _exact(case, on_host)[: len(names)]
    naive = _naive(case, on_host)
    return [_judge(*each, case) for each in zip(names, results, exact, naive, strict=True)]


def _exact(case: Case, inputs: Inputs) -> tuple[Array, ...]:
    """The outputs in float64."""
    problem = case.problem
    options = {"mask": problem.mask, "softmax_scale": problem.softmax_scale, "softcap": problem.softcap}
    q, k, v, dout = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    if problem.layout == "varlen":
        lens = (inputs.cu_seqlens_q, inputs.cu_seqlens_kv)
        options["seqused_k"] = inputs.seqused_kv
        out, lse = reference.forward_varlen(q, k, v, *lens, **options)
        if problem.direction == "forward":
            return out, lse
        return reference.backward_varlen(dout, q, k, v, out, lse, *lens, **options)
    options["mask_tensor"] = inputs.mask_tensor
    out, lse = reference.forward(q, k, v, **options)
    if problem.direction == "forward":
        return out, lse
    return reference.backward(dout, q, k, v, out, lse, **options)


def _naive(case: Case, inputs: Inputs) -> tuple[Array, ...]:
    """The outputs of the naive formula in the case's own element type."""
    problem = case.problem
    naive = Naive(problem.dtype, problem.softmax_scale, problem.softcap)
    varlen = problem.layout == "varlen"
    forward = problem.direction == "forward"
    shapes_of = (inputs.dout,) if forward else (inputs.q, inputs.k, inputs.v)
    outputs = [np.zeros(x.shape, problem.dtype.accumulator) for x in shapes_of]
    if forward:
        rows = (problem.total_q,) if varlen else (problem.len_q,)
        lead = () if varlen else (problem.batch,)
        outputs.append(np.full((*lead, problem.heads_q, *rows), -np.inf))
    starts_q = list(pairwise(accumulate(case.lens_q, initial=0)))
    starts_kv = list(accumulate(case.lens_kv, initial=0))

    for b, (len_q, len_kv) in enumerate(case.sequences):
        # One sequence of every tensor: packed rows, or one batch element.
        at_q = slice(*starts_q[b]) if varlen else b
        at_kv = slice(starts_kv[b], starts_kv[b] + len_kv) if varlen else b
        q, dout = (x[at_q].swapaxes(0, 1) for x in (inputs.q, inputs.dout))
        k, v = (x[at_kv].swapaxes(0, 1) for x in (inputs.k, inputs.v))
        keep = visible(problem.mask, len_q, len_kv) if inputs.mask_tensor is None else inputs.mask_tensor[b]
        if forward:
            out, lse = naive.forward(q, k, v, keep)
            outputs[0][at_q] = out.swapaxes(0, 1)
            outputs[1][(slice(None), at_q) if varlen else b] = lse
        else:
            grads = naive.backward(dout, 0.0, q, k, v, keep)
            for output, at, grad in zip(outputs, (at_q, at_kv, at_kv), grads, strict=True):
                output[at] = grad.swapaxes(0, 1)
    return tuple(outputs)


def _judge(tensor: str, result: Array, exact: Array, naive: Array, case: Case) -> Verdict:
    """Compare one tensor; infinities must be where the exact answer has them, and there may be no NaN."""
    # One rounding of the result's own type, and of the accumulator some more: another order of summation.
    ulp, roundings = (float(ml_dtypes.finfo(t).eps) for t in (result.dtype, case.problem.dtype.accumulator))
    if result.shape != exact.shape:
        raise AssertionError(f"{tensor} of {case.id} has shape {result.shape}, expected {exact.shape}")
    if not exact.size:
        return Verdict(tensor, 0.0, 0.0, 0.0, "empty")
    difference = _difference(result, exact)
    naive_error = float(_difference(naive, exact).max())
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
    allowed = 2 * naive_error + ulp * largest + 32 * roundings * max(largest, 1.0)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    where = f"[{', '.join(map(str, worst))}] {float(result[worst]):.6g}, exact {exact[worst]:.6g}"
    return Verdict(tensor, float(difference[worst]), naive_error, allowed, where)


def _difference(x: Array, exact: Array) -> Array:
    """Absolute differences; equal infinities do not differ, any other infinity or NaN does infinitely."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x == exact, 0.0, np.nan_to_num(np.abs(x - exact), nan=np.inf, posinf=np.inf))
