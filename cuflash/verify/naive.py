"""Naive attention that writes down the whole score matrix: the yardstick of every check, and the peer on the CPU.

Every product and every stage is rounded to the element type, as the same formula written with arrays of that type is;
products accumulate wide. Arrays are (heads, len, dim), with more axes in front or none; NumPy's or CuPy's alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuflash.dtypes import TF32, DType
from cuflash.masks import Mask


def visible(mask: Mask, len_q: int, len_kv: int) -> np.ndarray | None:
    """The boolean (len_q, len_kv) matrix of a band mask, True = take part; None when it hides nothing."""
    if mask.kind == "none":
        return None
    return within(mask, np.arange(len_kv) - np.arange(len_q)[:, None] - mask.offset(len_q, len_kv))


def within(mask: Mask, distance: np.ndarray) -> np.ndarray:
    """Whether keys so far right of the diagonal are inside a band mask; on NumPy or CuPy."""
    keep = distance == distance
    if mask.left is not None:
        keep &= distance >= -mask.left
    if mask.right is not None:
        keep &= distance <= mask.right
    return keep


class Extras(NamedTuple):
    """What one sequence has beside its mask; None where there is nothing."""

    added: np.ndarray | None = None
    """Added to the logits, (1 or heads_q, len_q, len_kv)."""
    sink: np.ndarray | None = None
    """(heads_q,) logits of a key without a value."""
    dropped: np.ndarray | None = None
    """What dropout multiplies the probabilities by, (heads_q, len_q, len_kv)."""


NOTHING = Extras()


class Gradients(NamedTuple):
    """Gradients in the accumulator type; further axes in front as the inputs have them."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    ds: np.ndarray
    """(heads_q, len_q, len_kv), of the logits after everything has been added to them."""
    sink_rows: np.ndarray
    """(heads_q, len_q), what each row adds to the gradient of its head's sink; 0 without one."""
    out: np.ndarray
    lse: np.ndarray
    """What the forward returns, which the gradients are made of."""

    @property
    def dsink(self) -> np.ndarray:
        """(heads_q,)."""
        return self.sink_rows.sum(axis=-1)


class Naive:
    """Attention in one element type, of one sequence or of several that are equally long.

    `inputs` says what q, k, v and dout are rounded to first, where that is TF32.
    """

    def __init__(self, dtype: DType, softmax_scale: float, softcap: float, inputs: DType | None = None) -> None:
        self._dtype = dtype
        self._inputs = inputs or dtype
        self._scale = softmax_scale
        self._softcap = softcap

    def forward(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray | None, extras: Extras = NOTHING
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return out (heads_q, len_q, dim_v) and lse (heads_q, len_q), both in the accumulator type."""
        heads_q = q.shape[-3]
        _, p, _, lse = self._probabilities(q, self._wide(k, heads_q), keep, extras)
        return self._rounded(self._dropped(p, extras) @ self._wide(v, heads_q)), lse

    def backward(
        self,
        dout: np.ndarray,
        dlse: np.ndarray | float,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        keep: np.ndarray | None,
        extras: Extras = NOTHING,
    ) -> Gradients:
        """All gradients; query heads of a group are summed into their kv head, and empty rows have no dlse."""
        heads_q, heads_kv = q.shape[-3], k.shape[-3]
        k, v = self._wide(k, heads_q), self._wide(v, heads_q)
        q, dout = self._wide(q, heads_q), self._wide(dout, heads_q)
        s, p, p_sink, lse = self._probabilities(q, k, keep, extras)
        dp = self._dropped(self._rounded(dout @ _turned(v)), extras)
        out = self._rounded(self._dropped(p, extras) @ v)
        dlse = np.where(lse == -np.inf, 0, dlse)[..., None] if np.ndim(dlse) else dlse
        delta = (dout * out).sum(axis=-1, keepdims=True) - dlse
        ds = dx = self._rounded(p * (dp - delta))
        if self._softcap:
            dx = self._rounded(dx * (1 - (s / self._softcap) ** 2))
        dx = self._rounded(dx * self._scale)
        dq, dk, dv = dx @ k, _turned(dx) @ q, _turned(self._dropped(p, extras)) @ dout
        dk, dv = (x.reshape(*x.shape[:-3], heads_kv, heads_q // heads_kv, *x.shape[-2:]).sum(axis=-3) for x in (dk, dv))
        dq, dk, dv = (self._rounded(x) for x in (dq, dk, dv))
        return Gradients(dq, dk, dv, ds, -(p_sink * delta)[..., 0], out, lse)

    def _probabilities(
        self, q: np.ndarray, k: np.ndarray, keep: np.ndarray | None, extras: Extras
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | float, np.ndarray]:
        """Scores after the soft cap, probabilities of keys and sink, lse; a row with neither has p = 0, lse = -inf."""
        s = self._rounded(self._rounded(self._wide(q, q.shape[-3]) @ _turned(k)) * self._scale)
        if self._softcap:
            s = self._rounded(self._softcap * np.tanh(s / self._softcap))
        logits = s if extras.added is None else self._rounded(s + self._rounded(extras.added))
        seen = logits if keep is None else np.where(keep, logits, -np.inf)
        sink = -np.inf if extras.sink is None else extras.sink[:, None, None]
        # CuPy has no maximum of nothing: there must be a key on a GPU.
        m = seen.max(axis=-1, keepdims=True) if seen.shape[-1] else np.full((*seen.shape[:-1], 1), -np.inf)
        m = np.maximum(m, sink).astype(s.dtype)
        shift = np.where(m == -np.inf, 0, m)
        e, e_sink = np.exp(seen - shift), np.exp(sink - shift)
        l = e.sum(axis=-1, keepdims=True) + e_sink
        with np.errstate(divide="ignore"):
            lse = (m + np.log(l))[..., 0]
        l = np.where(l == 0, 1, l)
        return s, self._rounded(e / l), e_sink / l, lse

    def _dropped(self, x: np.ndarray, extras: Extras) -> np.ndarray:
        """Probabilities, or their gradients, after dropout."""
        return x if extras.dropped is None else self._rounded(x * extras.dropped)

    def _wide(self, x: np.ndarray, heads_q: int) -> np.ndarray:
        """The same values in the accumulator type, each kv head repeated for the query heads of its group."""
        x = self._inputs.rounded(x) if self._inputs == TF32 else x
        x = x.astype(self._dtype.accumulator, copy=False)
        *batch, heads_kv, length, dim = x.shape
        if heads_kv == heads_q:
            return x
        grouped = np.broadcast_to(x[..., None, :, :], (*batch, heads_kv, heads_q // heads_kv, length, dim))
        return grouped.reshape(*batch, heads_q, length, dim)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        """Rounded to the element type."""
        return self._dtype.rounded(x)


def _turned(x: np.ndarray) -> np.ndarray:
    """Every matrix transposed."""
    return x.swapaxes(-1, -2)
