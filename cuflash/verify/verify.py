"""Run one case and compare it with the same computation in float64, which is exact to all the digits compared.

The exact answer is the NumPy backend on float64 copies of the inputs; tests hold that backend to an oracle.
A result may be at most twice as far from it as the naive computation in the same element type, plus a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import ml_dtypes
import numpy as np

from cuflash import reference
from cuflash.cases import calls
from cuflash.cases.inputs import Array, Inputs, host, packed_kv
from cuflash.cases.table import Case
from cuflash.dropout import Dropout
from cuflash.reference.dropout import KeepMask
from cuflash.verify.naive import Extras, Naive, visible


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
    """Compute a case with cuflash and judge every output: out and lse, or the gradients."""
    names = [name for name in calls.results(case) if name != "rng_state"]
    results = [host(x) for x in calls.of(case, inputs)()][: len(names)]
    on_host = Inputs(*(host(getattr(inputs, name)) for name in Inputs.__slots__))
    on_host.k, on_host.v = packed_kv(case, inputs)
    exact = _exact(case, on_host)[: len(names)]
    naive = _naive(case, on_host)
    return [judge(*each, case) for each in zip(names, results, exact, naive, strict=True)]


def _exact(case: Case, inputs: Inputs) -> tuple[Array, ...]:
    """The outputs in float64."""
    problem = case.problem
    options = {
        "mask": problem.mask, "softmax_scale": problem.softmax_scale, "softcap": problem.softcap,
        "mask_tensor": inputs.mask_tensor, "alibi_slopes": inputs.alibi_slopes, "bias": inputs.bias,
        "sink": inputs.sink, "dropout": dropout_of(case), "rng_state": inputs.rng_state,
    }  # fmt: skip
    q, k, v, dout = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    if problem.layout == "varlen":
        lens = (inputs.cu_seqlens_q, inputs.cu_seqlens_kv)
        options |= {"seqused_q": inputs.seqused_q, "seqused_k": inputs.seqused_kv}
        out, lse = reference.forward_varlen(q, k, v, *lens, **options)
        if problem.direction == "forward":
            return out, lse
        grads = reference.backward_varlen(dout, q, k, v, out, lse, *lens, bias_grad=problem.bias_grad, **options)
        return tuple(x for x in grads if x is not None)
    out, lse = reference.forward(q, k, v, **options)
    if problem.direction == "forward":
        return out, lse
    grads = reference.backward(dout, q, k, v, out, lse, bias_grad=problem.bias_grad, **options)
    return tuple(x for x in grads if x is not None)


def dropout_of(case: Case) -> Dropout | None:
    """What a case does to probabilities after the softmax."""
    return Dropout(case.dropout_p, case.problem.dropout) if case.problem.dropout else None


def _naive(case: Case, inputs: Inputs) -> tuple[Array, ...]:
    """The outputs of the naive formula in the case's own element type."""
    problem = case.problem
    naive = Naive(problem.dtype, problem.softmax_scale, problem.softcap)
    varlen = problem.layout == "varlen"
    forward = problem.direction == "forward"
    shapes_of = (inputs.dout,) if forward else (inputs.q, inputs.k, inputs.v)
    outputs = [np.zeros(x.shape, problem.dtype.accumulator) for x in shapes_of]
    dbias = None if inputs.bias is None else np.zeros(inputs.bias.shape)
    dsink = None if inputs.sink is None else np.zeros(inputs.sink.shape)
    if forward:
        rows = (problem.total_q,) if varlen else (problem.len_q,)
        lead = () if varlen else (problem.batch,)
        outputs.append(np.full((*lead, problem.heads_q, *rows), -np.inf))
    starts_q = list(accumulate(case.lens_q, initial=0))
    starts_kv = list(accumulate(case.lens_kv, initial=0))

    for b, (len_q, len_kv) in enumerate(case.sequences):
        # One sequence of every tensor: packed rows, or one batch element.
        at_q = slice(starts_q[b], starts_q[b] + len_q) if varlen else b
        at_kv = slice(starts_kv[b], starts_kv[b] + len_kv) if varlen else b
        q, dout = (x[at_q].swapaxes(0, 1) for x in (inputs.q, inputs.dout))
        k, v = (x[at_kv].swapaxes(0, 1) for x in (inputs.k, inputs.v))
        keep = visible(problem.mask, len_q, len_kv)
        if inputs.mask_tensor is not None:
            tensor = _of_sequence(inputs.mask_tensor, b, len_q, len_kv)
            keep = tensor if keep is None else keep & tensor
        extras = _extras(case, inputs, b, len_q, len_kv)
        if forward:
            out, lse = naive.forward(q, k, v, keep, extras)
            outputs[0][at_q] = out.swapaxes(0, 1)
            outputs[1][(slice(None), at_q) if varlen else b] = lse
        else:
            grads = naive.backward(dout, 0.0, q, k, v, keep, extras)
            for output, at, grad in zip(outputs, (at_q, at_kv, at_kv), grads[:3], strict=True):
                output[at] = grad.swapaxes(0, 1)
            if dbias is not None:
                part = _of_sequence(dbias, b, len_q, len_kv)
                broadcast = tuple(axis for axis, n in enumerate(part.shape) if n == 1)
                part += grads.ds.sum(axis=broadcast, keepdims=True)
            if dsink is not None:
                dsink += grads.dsink
    if not forward:
        outputs += [dbias] if problem.bias_grad else []
        outputs += [dsink] if problem.sink else []
    return tuple(outputs)


def _of_sequence(pairs: Array, b: int, len_q: int, len_kv: int) -> Array:
    """The (1 or heads_q, 1 or len_q, 1 or len_kv) part of an array of pairs that one sequence reads."""
    part = pairs[b if len(pairs) > 1 else 0]
    return part[:, : len_q if part.shape[1] > 1 else 1, : len_kv if part.shape[2] > 1 else 1]


def _extras(case: Case, inputs: Inputs, b: int, len_q: int, len_kv: int) -> Extras:
    """What one sequence has beside its mask."""
    problem, added, dropped = case.problem, None, None
    if problem.alibi:
        off = problem.mask.offset(len_q, len_kv)
        distance = np.abs(np.arange(len_q)[:, None] + off - np.arange(len_kv)).astype(np.float64)
        added = -inputs.alibi_slopes.astype(np.float64)[:, None, None] * distance
    if problem.bias is not None:
        bias = _of_sequence(inputs.bias, b, len_q, len_kv).astype(np.float64)
        added = bias if added is None else added + bias
    if len_q and len_kv and (dropout := dropout_of(case)):
        heads = np.arange(problem.heads_q, dtype=np.uint64) + np.uint64(b * problem.heads_q)
        keep = KeepMask(dropout, *inputs.rng_state, heads, len_kv, problem.len_q * problem.len_kv)
        dropped = keep.tile((slice(None),), slice(0, len_q), slice(0, len_kv)) * dropout.keep_scale
    return Extras(added, inputs.sink, dropped)


def judge(tensor: str, result: Array, exact: Array, naive: Array, case: Case, spread: float = 0.0) -> Verdict:
    """Compare one tensor, on the host or a GPU; infinities must be where the exact answer has them, NaN nowhere.

    `spread` is the standard deviation of what chance makes of the naive error, where that is known.
    """
    # One rounding of the result's own type, and of the accumulator some more: another order of summation.
    ulp, roundings = (float(ml_dtypes.finfo(t).eps) for t in (result.dtype, case.problem.dtype.accumulator))
    if tensor in ("dbias", "dsink"):  # sums of rounded numbers, so few that chance decides between them and the naive
        ulp = max(ulp, float(ml_dtypes.finfo(case.problem.dtype.numpy).eps))
    if result.shape != exact.shape:
        raise AssertionError(f"{tensor} of {case.id} has shape {result.shape}, expected {exact.shape}")
    if not exact.size:
        return Verdict(tensor, 0.0, 0.0, 0.0, "empty")
    difference = _difference(result, exact)
    naive_error = float(_difference(naive, exact).max())
    largest = float(np.where(np.isfinite(exact), np.abs(exact), 0.0).max())
    allowed = 2 * max(naive_error, 3 * spread) + ulp * largest + 32 * roundings * max(largest, 1.0)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    where = f"[{', '.join(map(str, worst))}] {float(result[worst]):.6g}, exact {float(exact[worst]):.6g}"
    return Verdict(tensor, float(difference[worst]), naive_error, allowed, where)


def _difference(x: Array, exact: Array) -> Array:
    """Absolute differences; equal infinities do not differ, any other infinity or NaN does infinitely."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x == exact, 0.0, np.nan_to_num(np.abs(x - exact), nan=np.inf, posinf=np.inf))
