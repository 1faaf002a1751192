"""How far a result may be from the exact answer, and the verdicts on all results of one case.

It may be at most twice as far off as the naive formula in the same element type, plus a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cuflash.cases import calls
from cuflash.cases.inputs import Array, Inputs, host
from cuflash.cases.table import Case
from cuflash.verify.answers import Answer, Answers


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one output tensor compares; errors are the largest absolute differences from the exact answer."""

    tensor: str
    error: float
    naive_error: float
    """In fp64 there is none: the exact answer is the naive one."""
    allowed: float
    worst: str
    """Where the largest difference is, with both values."""

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        """What a complaint says."""
        return f"{self.tensor} is {self.error:.3g} off, {self.allowed:.3g} is allowed; {self.worst}"


def verdicts(case: Case, inputs: Inputs) -> list[Verdict]:
    """Compute a case with cuflash and judge every output, on the host: out and lse, or the gradients."""
    results = dict(zip(calls.results(case), calls.of(case, inputs)(), strict=True))
    on_host = Inputs(*(host(getattr(inputs, name)) for name in Inputs.__slots__))
    answers = Answers(case, on_host, np).answers()
    return [judge(name, host(result), answers[name], case) for name, result in results.items() if name != "rng_state"]


def judge(tensor: str, result: Array, answer: Answer, case: Case) -> Verdict:
    """Compare one tensor, on the host or a GPU; infinities must be where the exact answer has them, NaN nowhere."""
    exact = answer.exact
    # One rounding of the result's own type, and of the accumulator some more: another order of summation.
    ulp, roundings = (float(ml_dtypes.finfo(t).eps) for t in (result.dtype, case.problem.dtype.accumulator))
    if tensor in ("dbias", "dsink"):  # sums of rounded numbers, so few that chance decides between them and the naive
        ulp = max(ulp, float(ml_dtypes.finfo(case.problem.dtype.numpy).eps))
    if result.shape != exact.shape:
        raise AssertionError(f"{tensor} of {case.id} has shape {result.shape}, expected {exact.shape}")
    if not exact.size:
        return Verdict(tensor, 0.0, 0.0, 0.0, "empty")
    difference = _difference(result, exact)
    naive_error = float(_difference(answer.naive, exact).max())
    largest = float(np.where(np.isfinite(exact), np.abs(exact), 0.0).max())
    allowed = 2 * max(naive_error, 3 * answer.spread) + ulp * largest + 32 * roundings * max(largest, 1.0)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    where = f"[{', '.join(map(str, worst))}] {float(result[worst]):.6g}, exact {float(exact[worst]):.6g}"
    return Verdict(tensor, float(difference[worst]), naive_error, min(allowed, answer.most), where)


def _difference(x: Array, exact: Array) -> Array:
    """Absolute differences; equal infinities do not differ, any other infinity or NaN does infinitely."""
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x == exact, 0.0, np.nan_to_num(np.abs(x - exact), nan=np.inf, posinf=np.inf))
