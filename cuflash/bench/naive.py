"""Naive attention that writes down the whole score matrix: the peer on the CPU and the yardstick of ``check``.

Every product and every stage is rounded to the element type, as the same formula written with arrays of that type is;
products accumulate wide. One sequence at a time: arrays are (heads, len, dim).
"""

from __future__ import annotations

import numpy as np

from cuflash.dtypes import DType
from cuflash.masks import Mask


def visible(mask: Mask, len_q: int, len_kv: int) -> np.ndarray | None:
    """The boolean (len_q, len_kv) matrix of a band mask, True = take part; None when it hides nothing."""
    if mask.left is None and mask.right is None:
        return None
    distance = np.arange(len_kv) - np.arange(len_q)[:, None] - mask.offset(len_q, len_kv)
    keep = np.ones((len_q, len_kv), bool)
    if mask.left is not None:
        keep &= distance >= -mask.left
    if mask.right is not None:
        keep &= distance <= mask.right
    return keep


class Naive:
    """Attention of one sequence in one element type."""

    def __init__(self, dtype: DType, softmax_scale: float, softcap: float) -> None:
        self._dtype = dtype
        self._scale = softmax_scale
        self._softcap = softcap

    def forward(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return out (heads_q, len_q, dim_v) and lse (heads_q, len_q), both in the accumulator type."""
        _, p, lse = self._probabilities(q, self._wide(k, len(q)), keep)
        return self._rounded(p @ self._wide(v, len(q))), lse

    def backward(
        self,
        dout: np.ndarray,
        dlse: np.ndarray | float,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        keep: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dq, dk and dv in the accumulator type; query heads of a group are summed into their kv head."""
        heads_q, heads_kv = len(q), len(k)
        k, v = self._wide(k, heads_q), self._wide(v, heads_q)
        q, dout = self._wide(q, heads_q), self._wide(dout, heads_q)
        s, p, _ = self._probabilities(q, k, keep)
        dp = self._rounded(dout @ v.swapaxes(1, 2))
        delta = (dp * p).sum(axis=2, keepdims=True) - np.asarray(dlse)[..., None]
        ds = self._rounded(p * (dp - delta))
        if self._softcap:
            ds = self._rounded(ds * (1 - (s / self._softcap) ** 2))
        ds = self._rounded(ds * self._scale)
        dq, dk, dv = ds @ k, ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ dout
        dk, dv = (x.reshape(heads_kv, heads_q // heads_kv, *x.shape[1:]).sum(axis=1) for x in (dk, dv))
        return self._rounded(dq), self._rounded(dk), self._rounded(dv)

    def _probabilities(
        self, q: np.ndarray, k: np.ndarray, keep: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores after the soft cap, probabilities and log-sum-exp; a row that sees nothing has p = 0, lse = -inf."""
        s = self._rounded(self._rounded(self._wide(q, len(q)) @ k.swapaxes(1, 2)) * self._scale)
        if self._softcap:
            s = self._rounded(self._softcap * np.tanh(s / self._softcap))
        seen = s if keep is None else np.where(keep, s, -np.inf)
        m = seen.max(axis=2, keepdims=True, initial=-np.inf)
        e = np.exp(seen - np.where(np.isneginf(m), 0, m))
        l = e.sum(axis=2, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (m + np.log(l))[..., 0]
        return s, self._rounded(e / np.where(l == 0, 1, l)), lse

    def _wide(self, x: np.ndarray, heads_q: int) -> np.ndarray:
        """The same values in the accumulator type, each kv head repeated for the query heads of its group."""
        x = x.astype(self._dtype.accumulator)
        return x if len(x) == heads_q else np.repeat(x, heads_q // len(x), axis=0)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        """Rounded to the element type."""
        return x.astype(self._dtype.numpy).astype(self._dtype.accumulator)
