"""The online softmax of a tile of query rows."""

from __future__ import annotations

import numpy as np


class RowSoftmax:
    """Algorithm 1 of FlashAttention-2 for (..., rows) at once, and its inverse in the backward.

    Every case of "sees nothing" is decided here: such a row keeps m = -inf and l = 0.
    """

    def __init__(self, shape: tuple[int, ...], dim_v: int, real: np.dtype) -> None:
        self.m = np.full((*shape, 1), -np.inf, real)  # largest logit so far
        self.l = np.zeros((*shape, 1), real)  # sum of exp(s - m)
        self.acc = np.zeros((*shape, dim_v), real)  # sum of exp(s - m) v over what dropout keeps

    def update(self, s: np.ndarray, v: np.ndarray, kept: np.ndarray | None) -> None:
        """Take in a tile of logits (overwritten) and its values; `kept` says what dropout keeps, None is everything."""
        p = np.exp(np.subtract(s, self._rise_to(s.max(axis=-1, keepdims=True)), out=s), out=s)
        self.l += p.sum(axis=-1, keepdims=True)
        self.acc += (p if kept is None else np.multiply(p, kept, out=p)) @ v

    def add_sink(self, logit: np.ndarray) -> None:
        """Take in one logit a row that has no value."""
        self.l += np.exp(logit - self._rise_to(logit))

    def _rise_to(self, s_max: np.ndarray) -> np.ndarray:
        """Raise m; what was summed so far shrinks by exp(m_old - m). Returns what to subtract from logits."""
        m = np.maximum(self.m, s_max)
        shift = np.where(m == -np.inf, 0, m)
        shrink = np.exp(self.m - shift)
        self.m = m
        self.l *= shrink
        self.acc *= shrink
        return shift

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the output rows acc / l and lse = m + log(l)."""
        return self.acc / np.where(self.l == 0, 1, self.l), self.m + np.log(self.l)

    def state(self) -> np.ndarray:
        """Every row's m and l, (..., rows, 2); lse, one number, rounds l away where m is large."""
        return np.concatenate([self.m, self.l], axis=-1)


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
    delta = (dout * out).sum(axis=-1, keepdims=True) - dlse
    return np.where(np.isinf(lse), 0, delta)
