"""What an expression can be at all positions of a block, without computing it at each: interval arithmetic.

A block in which a mask must be True is full, and one in which it cannot be is empty, whatever its size. Bounds are
sound and need not be tight: of real numbers, which are rounded, and of integers that may not fit there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash.mods.expression import Node, in_order


class Bounds(NamedTuple):
    """The least and the greatest value at the positions of each block, whole numbers in float64; truth is 0 or 1."""

    low: np.ndarray
    high: np.ndarray


_EXACT = 2.0**52
"""Integers up to it are exact in float64, and far from where those of 64 bits end."""
_ANY = Bounds(np.array(-np.inf), np.array(np.inf))
_MAYBE = Bounds(np.array(0.0), np.array(1.0))


def bounds(
    result: Node, positions: Mapping[str, Bounds], captured: Sequence[np.ndarray], known: dict[Node, Bounds]
) -> Bounds:
    """Bounds of an expression.

    Parameters
    ----------
    positions : mapping of str to Bounds
        The first and the last ``b``, ``h``, ``q`` and ``k`` of each block, of shapes that broadcast.
    captured : sequence of ndarray
        By number.
    known : dict
        The bounds of some nodes, which are not computed again; those of the others are added.
    """
    with np.errstate(invalid="ignore"):  # inf - inf, which is refused as a bound
        for node in in_order(result):
            if node not in known:
                known[node] = _of(node, [known[x] for x in node.args], positions, captured)
    return known[result]


def _of(node: Node, args: list[Bounds], positions: Mapping[str, Bounds], captured: Sequence[np.ndarray]) -> Bounds:
    """Bounds of a node from those of its operands."""
    if node.kind == "real":
        return _ANY
    if node.op == "position":
        return positions[node.value]
    if node.op == "constant":
        return _within(np.array(float(node.value)), np.array(float(node.value)))
    if node.op == "load":
        return _loaded(captured[node.value], args)
    if node.op in ("less", "less_equal", "equal", "not_equal") and node.args[0].kind == "real":
        return _MAYBE
    rule = (_OF_TRUTHS if node.kind == "bool" else _OF_INTEGERS).get(node.op)
    if rule is None:
        return _MAYBE if node.kind == "bool" else _ANY
    return rule(*args)


def _within(low: Any, high: Any) -> Bounds:
    """Bounds of an integer, none where it may not be exact."""
    fits = (low >= -_EXACT) & (high <= _EXACT)
    return Bounds(np.where(fits, low, -np.inf), np.where(fits, high, np.inf))


def _add(a: Bounds, b: Bounds) -> Bounds:
    return _within(a.low + b.low, a.high + b.high)


def _subtract(a: Bounds, b: Bounds) -> Bounds:
    return _within(a.low - b.high, a.high - b.low)


def _multiply(a: Bounds, b: Bounds) -> Bounds:
    products = [x * y for x in a for y in b]
    low, high = products[0], products[0]
    for product in products[1:]:
        low, high = np.minimum(low, product), np.maximum(high, product)
    return _within(low, high)


def _negative(a: Bounds) -> Bounds:
    return _within(-a.high, -a.low)


def _abs(a: Bounds) -> Bounds:
    return _within(np.maximum(np.maximum(a.low, -a.high), 0), np.maximum(-a.low, a.high))


def _minimum(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(np.minimum(a.low, b.low), np.minimum(a.high, b.high))


def _maximum(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(np.maximum(a.low, b.low), np.maximum(a.high, b.high))


def _divisor(b: Bounds) -> np.ndarray:
    """A positive number to divide by, NaN where it is not known to be one."""
    return np.where((b.low == b.high) & (b.low > 0), b.low, np.nan)


def _floor_divide(a: Bounds, b: Bounds) -> Bounds:
    return _within(np.floor_divide(a.low, _divisor(b)), np.floor_divide(a.high, _divisor(b)))


def _remainder(a: Bounds, b: Bounds) -> Bounds:
    by = _divisor(b)
    together = np.floor_divide(a.low, by) == np.floor_divide(a.high, by)
    return _within(np.where(together, np.remainder(a.low, by), 0 * by),
                   np.where(together, np.remainder(a.high, by), by - 1))  # fmt: skip


def _shift(b: Bounds) -> Bounds:
    """The power of 2 that a shift multiplies or divides by."""
    known = (b.low == b.high) & (b.low >= 0) & (b.low < 32)
    power = np.exp2(np.where(known, b.low, np.nan))
    return Bounds(power, power)


def _where(condition: Bounds, a: Bounds, b: Bounds) -> Bounds:
    yes, no = condition.low == 1, condition.high == 0
    low = np.where(yes, a.low, np.where(no, b.low, np.minimum(a.low, b.low)))
    return Bounds(low, np.where(yes, a.high, np.where(no, b.high, np.maximum(a.high, b.high))))


def _bitwise_and(a: Bounds, b: Bounds) -> Bounds:
    positive = (a.low >= 0) & (b.low >= 0)
    return Bounds(np.where(positive, 0, -np.inf), np.where(positive, np.minimum(a.high, b.high), np.inf))


def _truth(must: Any, may: Any) -> Bounds:
    return Bounds(np.asarray(must, np.float64), np.asarray(may, np.float64))


def _equal(a: Bounds, b: Bounds) -> Bounds:
    must = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return _truth(must, (a.low <= b.high) & (b.low <= a.high))


def _invert(a: Bounds) -> Bounds:
    return Bounds(1 - a.high, 1 - a.low)


def _xor(a: Bounds, b: Bounds) -> Bounds:
    known = (a.low == a.high) & (b.low == b.high)
    return _truth(known & (a.low != b.low), ~known | (a.low != b.low))


_OF_INTEGERS: dict[str, Any] = {
    "add": _add, "subtract": _subtract, "multiply": _multiply, "negative": _negative, "abs": _abs,
    "minimum": _minimum, "maximum": _maximum, "floor_divide": _floor_divide, "remainder": _remainder,
    "bitwise_and": _bitwise_and, "invert": lambda a: _within(-1 - a.high, -1 - a.low), "where": _where,
    "left_shift": lambda a, b: _multiply(a, _shift(b)), "right_shift": lambda a, b: _floor_divide(a, _shift(b)),
    "int": lambda a: a,
}  # fmt: skip
_OF_TRUTHS: dict[str, Any] = {
    "less": lambda a, b: _truth(a.high < b.low, a.low < b.high),
    "less_equal": lambda a, b: _truth(a.high <= b.low, a.low <= b.high),
    "equal": _equal, "not_equal": lambda a, b: _invert(_equal(a, b)),
    "bitwise_and": _minimum, "bitwise_or": _maximum, "bitwise_xor": _xor, "invert": _invert, "where": _where,
}  # fmt: skip


def _loaded(array: np.ndarray, index: list[Bounds]) -> Bounds:
    """Bounds of an element of a captured array, the nearest one where there is none."""
    if array.size == 0:
        return _ANY
    within = [Bounds(*(np.clip(x, 0, n - 1) for x in i)) for i, n in zip(index, array.shape, strict=True)]
    fixed = [i.low.size == 1 and i.low.item() == i.high.item() for i in within]
    elements = array[tuple(int(i.low.item()) if one else slice(None) for i, one in zip(within, fixed, strict=True))]
    ranging = [i for i, one in zip(within, fixed, strict=True) if not one]
    elements = elements.astype(np.int8) if elements.dtype == bool else elements
    if len(ranging) == 1 and elements.size:
        first, last = (x.astype(np.int64) for x in np.broadcast_arrays(*ranging[0]))
        # One pass over the elements between the first of a range, its end, the first of the next, ...
        cuts = np.stack([first.ravel(), last.ravel() + 1], axis=-1).ravel()
        if np.clip(np.diff(cuts), 1, None).sum() <= 4 * (elements.size + cuts.size):
            ended = np.append(elements, elements[-1:])
            low, high = (reduce.reduceat(ended, cuts)[::2].reshape(first.shape) for reduce in (np.minimum, np.maximum))
            return _within(low.astype(np.float64), high.astype(np.float64))
    return _within(np.float64(elements.min()), np.float64(elements.max()))
