"""Scores and masks as Python functions: what may be used in them, and ready ones.

A `score_mod` is a function ``(score, b, h, q, k)`` of a scaled score, the batch element, the query head, the query and
the key, that returns the score to use; a `mask_mod` is a function ``(b, h, q, k)`` that returns whether the query sees
the key. They are written with Python's operators, the functions below and numbers, which are compiled in, and may index
arrays by any integers; each is called once, with symbols. An index outside an array reads its nearest element.
Whole numbers have 64 bits; in kernels, positions and numbers of arrays of at most 32 bits have 32, as have their sums,
differences and multiples by up to 256. Real numbers are of float32, of float64 for float64 tensors; for tensors of 16
bits `tanh` errs by 2^-23 there.
Ready ones, from `alibi` to `tree`, are made by functions that take their numbers; masks compose by `both`, `either` and
`negated`.

>>> import numpy as np
>>> from cuflash import mods
>>> table = np.zeros((4, 63), np.float32)
>>> def relative(score, b, h, q, k):
...     return score + table[h, mods.minimum(mods.maximum(q - k, -31), 31) + 31]
>>> print(mods.trace("score_mod", relative).mod)
score + captured0[h, (minimum(maximum((q - k), -31), 31) + 31)]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.mods.library import (
    alibi,
    block_window,
    both,
    causal,
    dilated_window,
    distance_decay,
    document,
    either,
    negated,
    prefix_lm,
    relative_bias,
    sliding_window,
    softcap,
    t5_bias,
    tree,
)
from cuflash.mods.symbols import CAPTURABLE, Captured, Symbol, operation
from cuflash.mods.tracing import Mod, Traced, trace

__all__ = [
    "CAPTURABLE", "Captured", "Mod", "Symbol", "Traced", "abs", "alibi", "block_window", "both", "captured", "causal",
    "cos", "dilated_window", "distance_decay", "document", "either", "exp", "floor", "log", "maximum", "minimum",
    "negated", "prefix_lm", "relative_bias", "sin", "sliding_window", "softcap", "sqrt", "t5_bias", "tanh", "trace",
    "tree", "where",
]  # fmt: skip


def captured(array: Any) -> Captured:
    """An array, or a number that may change without another compilation, that a mod reads.

    Arrays that a function finds by name need no wrapping; those in objects, modules and containers do.

    Parameters
    ----------
    array : array or number
        On the device of the call's tensors, or on the host.
    """
    if isinstance(array, Captured):  # as an array of a closure is, inside of its function
        return array
    return Captured(array if hasattr(array, "shape") and hasattr(array, "dtype") else np.asarray(array, np.float32))


def exp(x: Any) -> Symbol:
    """The exponential."""
    return operation("exp", x)


def log(x: Any) -> Symbol:
    """The natural logarithm."""
    return operation("log", x)


def sqrt(x: Any) -> Symbol:
    """The square root."""
    return operation("sqrt", x)


def tanh(x: Any) -> Symbol:
    """The hyperbolic tangent."""
    return operation("tanh", x)


def sin(x: Any) -> Symbol:
    """The sine of radians."""
    return operation("sin", x)


def cos(x: Any) -> Symbol:
    """The cosine of radians."""
    return operation("cos", x)


def floor(x: Any) -> Symbol:
    """The largest whole number that is not larger, as a real number."""
    return operation("floor", x)


def abs(x: Any) -> Symbol:
    """The absolute value."""
    return operation("abs", x)


def minimum(a: Any, b: Any) -> Symbol:
    """The smaller of two numbers."""
    return operation("minimum", a, b)


def maximum(a: Any, b: Any) -> Symbol:
    """The larger of two numbers."""
    return operation("maximum", a, b)


def where(condition: Any, a: Any, b: Any) -> Symbol:
    """One of two numbers, the first where the condition holds."""
    return operation("where", condition, a, b)
