"""The online softmax of a tile of query rows."""

from __future__ import annotations

import sys
from functools import cache
from math import e, gcd, log2
from typing import NamedTuple

import numpy as np

from cuflash.reference.pool import Scratch
from cuflash.reference.scores import Hidden
from cuflash.reference.tiles import stacked

LARGE_LOGIT = 20.0
"""Of larger ones a rounding tells in the result, and beside them exp of others may be beyond fp32's range."""

SMALL_LOGIT = -80.0
"""exp2 takes many times as long where results are no normal numbers."""

FEW_KEYS = 64
"""Rows that see fewer keys have weights relative to the largest: one key alone has weight 1, and its value is exact."""


class Power(NamedTuple):
    """How exp is computed of logits that are neither large nor hidden."""

    of: np.ufunc
    unit: float
    """What logits are multiplied by before."""


EXP, EXP2 = Power(np.exp, 1.0), Power(np.exp2, log2(e))


@cache
def fastest_power(real: np.dtype) -> Power:
    """exp, or exp2 where NumPy computes that faster: in fp32 on Linux where it has it for vectors, by AVX-512 (SVML).

    Not the clock decides, as results are to have the same bits in every process.
    """
    if real != np.float32 or sys.platform != "linux":
        return EXP
    info = np.lib.introspect.opt_func_info(func_name="^exp2$").get("exp2", {}).get("ff", {})
    return EXP if info.get("current", "baseline").startswith("baseline") else EXP2


class RowSoftmax:
    """Algorithm 1 of FlashAttention-2 for (..., rows) at once, and its inverse in the backward.

    Every case of "sees nothing" is decided here: such a row keeps m = -inf and l = 0.

    With an `unshifted` power weights are exp(s) itself, which spares two passes over each tile: m stays 0. Whether all
    went well says `sound` in the end.
    """

    def __init__(
        self, shape: tuple[int, ...], dim_v: int, real: np.dtype, scratch: Scratch, unshifted: Power | None = None
    ) -> None:
        self._scratch = scratch
        self.unshifted = unshifted
        self._empty = True
        # The largest logit so far.
        self.m = np.full((*shape, 1), -np.inf, real) if unshifted is None else np.zeros((), real)
        self.l = np.zeros((*shape, 1), real)  # sum of exp(s - m)
        self.acc = scratch("acc", (*shape, dim_v), real)  # sum of exp(s - m) v over what dropout keeps; 0 while empty

    def update(self, s: np.ndarray, v: np.ndarray, kept: np.ndarray | None) -> None:
        """Take in a tile of logits (overwritten) and its values; `kept` says what dropout keeps, None is everything."""
        self._add_weights(self._weights(s), v, kept)

    def update_unshifted(
        self, x: np.ndarray, v: np.ndarray, kept: np.ndarray | None, hidden: Hidden | None, group: int
    ) -> bool:
        """The same of logits times the unit of the power, hidden or not, of so many heads that share keys.

        False, and nothing done, if some rows of the first tile have logits that another way suits better.
        """
        assert self.unshifted is not None
        of, unit = self.unshifted
        if self._empty:
            some = x[..., ::32, :]
            large = np.fmax.reduce(some, axis=None) > LARGE_LOGIT * unit
            if large or np.fmin.reduce(some, axis=None) < SMALL_LOGIT * unit:
                return False
        p = of(x, out=x)
        if hidden is not None:
            hidden.fill(stacked(p, group), 0)
        self.l += row_sums(p)
        self._add_weights(p, v, kept)
        return True

    def _add_weights(self, p: np.ndarray, v: np.ndarray, kept: np.ndarray | None) -> None:
        if kept is not None:
            np.multiply(p, kept, out=p)
        self._add_values(p, v)

    def _weights(self, s: np.ndarray) -> np.ndarray:
        """exp(s - m), overwriting s, once m and l have taken these logits in."""
        np.subtract(s, self._rise_to(np.maximum.reduce(s, axis=-1, keepdims=True)), out=s)
        p = np.exp(s, out=s)
        self.l += row_sums(p)
        return p

    def _add_values(self, p: np.ndarray, v: np.ndarray) -> None:
        if self._empty:
            np.matmul(p, v, out=self.acc)
            self._empty = False
        else:
            self.acc += np.matmul(p, v, out=self._scratch("pv", self.acc.shape, p.dtype))

    def sound(self) -> bool:
        """Whether unshifted weights served as well as others would, before a sink is added.

        With sums from 1 on, of no more keys than others', products with values underflow no sooner. What overflowed
        shows; a row of NaN spoils no other one's, so it does not count.
        """
        if np.fmin.reduce(self.l.reshape(-1), initial=np.inf) < 1:
            return False
        if np.isfinite(np.vdot(self.acc, self.acc)):  # by BLAS, in a third of the time
            return True
        return not (~np.isfinite(self.acc).all(axis=-1, keepdims=True) & ~np.isnan(self.l)).any()

    def add_sink(self, logit: np.ndarray) -> np.ndarray:
        """Take in one logit a row that has no value; returns its weight."""
        weight = np.exp(logit - self._rise_to(logit))
        self.l += weight
        return weight

    def _rise_to(self, s_max: np.ndarray) -> np.ndarray:
        """Raise m; what was summed so far shrinks by exp(m_old - m). Returns what to subtract from logits."""
        m = np.maximum(self.m, s_max)
        shift = np.maximum(m, np.finfo(m.dtype).min)  # finite, so that exp(-inf - shift) is 0
        if not self._empty:
            self._shrink(np.exp(self.m - shift))
        self.m = m
        return shift

    def _shrink(self, factor: np.ndarray) -> None:
        self.l *= factor
        self.acc *= factor

    def finish(self, empty_lse: float, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the output rows acc / l and lse = m + log(l), or that of nothing.

        The rows are written to `out`, or lie in the scratch until it is used again.
        """
        if self._empty:
            self.acc.fill(0)
        l, lse = self.l, np.log(self.l, dtype=np.float64)
        if self.m.ndim:
            lse += self.m
        lse = lse.astype(l.dtype)
        if self.unshifted is None and np.count_nonzero(l) < l.size:
            lse[l == 0] = empty_lse
            l = np.maximum(l, np.finfo(l.dtype).tiny)
        return np.divide(self.acc, l, out=self.acc if out is None else out), lse

    def state(self, lse: np.ndarray) -> np.ndarray:
        """Every row's m and l, (..., rows, 2); lse, one number, rounds l away where m is large."""
        if self.m.ndim:
            return np.concatenate([self.m, self.l], axis=-1)
        # Where l is larger than one of so many keys relative to the largest, as if m were lse: what P is divided by in
        # the backward is then near 1, whatever it is multiplied with.
        large = self.l > 2.0**20
        l = np.exp(np.log(self.l, dtype=np.float64) - lse).astype(lse.dtype)
        return np.concatenate([np.where(large, lse, 0), np.where(large, l, self.l)], axis=-1, dtype=lse.dtype)


class RowTangents(RowSoftmax):
    """The same with the tangents of its results, along those of logits and values, in one pass.

    With a tangent s' of the logits, P has the tangent P * (s' - mean) where mean = sum_j P_j s'_j is that of lse, so

        out' = sum_j D_j P_j (v'_j + s'_j v_j) - mean out

    and two more sums do, which shrink like the others (Lu and Song 2024, arXiv 2410.11081, in an appendix).
    """

    def __init__(self, shape: tuple[int, ...], dim_v: int, real: np.dtype, scratch: Scratch) -> None:
        super().__init__(shape, dim_v, real, scratch)
        self._sum = np.zeros((*shape, 1), real)  # sum of exp(s - m) s'
        self._acc = scratch("acc tangent", (*shape, dim_v), real)  # of exp(s - m) (s' v + v') over what dropout keeps
        self._acc.fill(0)

    def update_along(
        self, s: np.ndarray, ds: np.ndarray, v: np.ndarray, dv: np.ndarray | None, kept: np.ndarray | None
    ) -> None:
        """Take in a tile of logits and their tangents (both overwritten), its values and theirs (None: zero)."""
        p = self._weights(s)
        np.multiply(ds, p, out=ds)
        self._sum += row_sums(ds)
        if kept is not None:
            np.multiply(p, kept, out=p)
            np.multiply(ds, kept, out=ds)
        self._add(ds, v)
        if dv is not None:
            self._add(p, dv)
        self._add_values(p, v)

    def _add(self, weight: np.ndarray, values: np.ndarray) -> None:
        self._acc += np.matmul(weight, values, out=self._scratch("pv", self._acc.shape, weight.dtype))

    def add_sink_along(self, logit: np.ndarray, tangent: np.ndarray | None) -> None:
        """Take in one logit a row that has no value, and its tangent."""
        weight = self.add_sink(logit)
        if tangent is not None:
            self._sum += weight * tangent

    def _shrink(self, factor: np.ndarray) -> None:
        super()._shrink(factor)
        self._sum *= factor
        self._acc *= factor

    def finish_along(self, empty_lse: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return what `finish` does, and the tangents of both; rows that see nothing have tangents 0."""
        l = np.maximum(self.l, np.finfo(self.l.dtype).tiny)
        out, lse = self.finish(empty_lse)
        mean = self._sum / l
        tangent = np.divide(self._acc, l, out=self._acc)
        tangent -= mean * out
        return out, lse, tangent, mean


def row_sums(p: np.ndarray) -> np.ndarray:
    """Sums along the last axis, kept: of pieces by BLAS, in half the time of a reduction and as exactly."""
    piece = gcd(p.shape[-1], 256)
    if piece < 32 or p.size < 2**14:
        return p.sum(axis=-1, keepdims=True)
    if piece == p.shape[-1]:
        return np.matmul(p, _ones(piece, p.dtype))[..., None]
    pieces = (p.reshape(-1, piece) @ _ones(piece, p.dtype)).reshape(*p.shape[:-1], -1)
    return pieces if pieces.shape[-1] == 1 else pieces.sum(axis=-1, keepdims=True)


@cache
def _ones(length: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(length, dtype)


def normalizers(lse: np.ndarray, state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | float]:
    """(shift, factor) with P = exp(s - shift) * factor; +inf and 1 in empty rows, whose P is 0.

    By the forward's `state` where it is there: then rows of P sum to 1 however large their scores are. `lse` alone does
    to within its rounding, and is -inf in empty rows or, by PyTorch, +inf.
    """
    if state is None:
        return np.where(lse == -np.inf, np.inf, lse), 1.0
    m, l = state[..., :1], state[..., 1:]
    empty = l == 0
    return np.where(empty, np.inf, m), 1 / np.where(empty, 1, l)


def weights(s: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """exp(s - shift), overwriting s."""
    return np.exp(np.subtract(s, shift, out=s), out=s)


def delta_of(dout: np.ndarray, out: np.ndarray, lse: np.ndarray, dlse: np.ndarray | float) -> np.ndarray:
    """The row term of the softmax's gradient, dS = P * (dP - delta); dlse enters through d(lse)/ds = P."""
    delta = np.vecdot(dout, out)[..., None] - dlse
    return np.where(np.isinf(lse), 0, delta)
