"""How far results are from exact ones on average: what they are compared with, what is recorded of it, and its table.

The unit is the error of rounding the exact result once to the element type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuflash.cases.inputs import Array, Inputs
from cuflash.cases.table import Case
from cuflash.dtypes import FP64, DType
from cuflash.verify.answers import Answers
from cuflash.verify.flash import Flash, rounded_once
from cuflash.verify.naive import Naive

OWN = "cuflash"
"""The column of the library's own results."""

MODEL = "model"
"""What FlashAttention computes on paper (:mod:`cuflash.verify.flash`), a column of its own."""

_NO_RIVALS = (OWN, MODEL, "torch-efficient", "flex")
"""Columns that cuflash is not held to: itself, kernels that are made for memory or generality, and the model where a
rival computes the case."""


OUTPUTS = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
"""What is compared, in the order that calls return it."""


def ideal(case: Case, inputs: Inputs, xp: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """The exact outputs of a case, and those of FlashAttention on paper; float64 arrays by name.

    On a GPU it needs cuBLAS. What a caller wrote is computed by the options that say the same.
    """
    if case.built_in is not None:
        slopes = inputs.captured[0] if case.built_in.alibi else None
        case, inputs = replace(case, problem=case.built_in, blocks=None), replace(inputs, alibi_slopes=slopes)
    problem, answers = case.problem, Answers(case, inputs, xp)
    terms = problem.softmax_scale, problem.softcap
    exact, model = (
        answers.computed(formula).outputs for formula in (Naive(FP64, *terms), Flash(problem.dtype, *terms))
    )
    names = OUTPUTS[problem.direction]
    return {name: exact[name] for name in names}, {name: model[name] for name in names}


def rms(x: Array) -> float:
    """The root of the mean square of all elements."""
    return float((x**2).mean()) ** 0.5


def rounding(exact: Array, dtype: DType) -> float:
    """The unit: the root mean square error of rounding the exact result once."""
    return max(rms(rounded_once(exact, dtype) - exact), float(np.finfo(np.float64).tiny))


@dataclass(frozen=True, slots=True)
class Deviation:
    """The errors of one output of one case."""

    case: str
    phase: str
    """``forward`` or ``backward``."""
    tensor: str
    """``out``, ``dq``, ``dk`` or ``dv``."""
    unit: float
    """What rounding the exact result once to the element type makes of it: a root mean square over all elements."""
    errors: dict[str, float]
    """Root mean square differences from the exact result, in units, by implementation and of the model."""

    @property
    def rivals(self) -> dict[str, float]:
        """The errors that cuflash is held to; the model's where no rival computes the case."""
        rivals = {impl: error for impl, error in self.errors.items() if impl not in _NO_RIVALS}
        return rivals or {MODEL: self.errors[MODEL]}

    @property
    def beside_the_best(self) -> float | None:
        """How many times the least of those errors cuflash's is; None where cuflash did not compute the case."""
        own = self.errors.get(OWN)
        return None if own is None else own / min(self.rivals.values())


def cells(deviations: Iterable[Deviation]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: a line for each case, in which the outputs follow each other, then the worst."""
    cases: dict[str, list[Deviation]] = {}
    for deviation in deviations:
        cases.setdefault(deviation.case, []).append(deviation)
    rows = [row for case in cases.values() for row in case]
    impls = dict.fromkeys(impl for row in rows for impl in row.errors if impl not in (OWN, MODEL))

    def line(of: str, *group: Deviation) -> list[str]:
        beside = _joined(row.beside_the_best for row in group)
        beside += " (model)" if any(MODEL in row.rivals for row in group) else ""
        own, *errors = (_joined(row.errors.get(impl) for row in group) for impl in (OWN, *impls, MODEL))
        return [group[0].case, of, own, beside, *errors]

    lines = [line(" ".join(row.tensor for row in group), *group) for group in cases.values()]
    for by_model in (False, True):
        ratios = [(row.beside_the_best, row) for row in rows if (MODEL in row.rivals) == by_model]
        known = [(math.isnan(ratio), ratio, row) for ratio, row in ratios if ratio is not None]
        if known:  # the largest, or one that is not a number
            *_, worst = max(known, key=lambda ratio: ratio[:2])
            lines.append(line(f"worst: {worst.tensor}", worst))
    return ["case", "of", OWN, "beside the best", *impls, MODEL], lines


def _joined(numbers: Iterable[float | None]) -> str:
    """Two decimals each; nothing after the last that is known."""
    texts = ["–" if number is None else f"{number:.2f}" for number in numbers]
    while len(texts) > 1 and texts[-1] == "–":
        texts.pop()
    return " ".join(texts)
