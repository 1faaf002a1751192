"""What FlashAttention computes, in float64 but for the roundings that it is known for: the yardstick of exactness.

Its forward keeps scores and sums wide and rounds each probability once, relative to the largest of its row, which is 1
exactly; its backward rounds probabilities and the gradients of scores, and takes delta from the rounded output. Arrays
are those of :mod:`cuflash.verify.naive`; there must be a key.
"""

from __future__ import annotations

import numpy as np

from cuflash.dtypes import FP64, DType
from cuflash.verify.naive import NOTHING, Extras, Gradients, Naive


class Flash(Naive):
    """FlashAttention on inputs of one element type, whatever its tiles and their order."""

    def __init__(self, dtype: DType, softmax_scale: float, softcap: float) -> None:
        super().__init__(FP64, softmax_scale, softcap, dtype)
        self._element = dtype

    def forward(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray | None, extras: Extras = NOTHING
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return out (heads_q, len_q, dim_v) and lse (heads_q, len_q), both in float64."""
        heads_q = q.shape[-3]
        _, p, _, lse = self._probabilities(q, self._wide(k, heads_q), keep, extras)
        return self._output(p, self._wide(v, heads_q), extras), lse

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
        """All gradients; query heads of a group are summed into their kv head before anything is rounded."""
        heads_q, heads_kv = q.shape[-3], k.shape[-3]
        q, k, v, dout = (self._wide(x, heads_q) for x in (q, k, v, dout))
        s, p, p_sink, lse = self._probabilities(q, k, keep, extras)
        out = self._output(p, v, extras)
        dlse = np.where(lse == -np.inf, 0, dlse)[..., None] if np.ndim(dlse) else dlse
        delta = (dout * out).sum(axis=-1, keepdims=True) - dlse
        ds = dx = p * (self._dropped(dout @ v.swapaxes(-1, -2), extras) - delta)
        if self._softcap:
            dx = dx * (1 - (s / self._softcap) ** 2)
        dx, p = self._once(dx), self._dropped(self._once(p), extras)
        dq = dx @ k * self._scale
        dk, dv = dx.swapaxes(-1, -2) @ q * self._scale, p.swapaxes(-1, -2) @ dout
        dk, dv = (x.reshape(*x.shape[:-3], heads_kv, heads_q // heads_kv, *x.shape[-2:]).sum(axis=-3) for x in (dk, dv))
        dq, dk, dv = (self._stored(x) for x in (dq, dk, dv))
        return Gradients(dq, dk, dv, ds, -(p_sink * delta)[..., 0], out, lse)

    def _output(self, p: np.ndarray, v: np.ndarray, extras: Extras) -> np.ndarray:
        """The product of the probabilities that dropout leaves, rounded relative to each row's largest, with v."""
        most = p.max(axis=-1, keepdims=True)
        most = np.where(most == 0, 1, most)
        return self._stored(self._dropped(self._once(p / most), extras) @ v * most)

    def _once(self, x: np.ndarray) -> np.ndarray:
        """Rounded as what is multiplied."""
        return rounded_once(x, self._element)

    def _stored(self, x: np.ndarray) -> np.ndarray:
        """Rounded as what is left in memory, which has TF32's numbers as fp32."""
        return x.astype(self._element.accumulator).astype(self._element.numpy).astype(np.float64)


def rounded_once(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Float64 numbers rounded to the element type, by way of its accumulator type, as kernels and ml_dtypes do."""
    return dtype.rounded(x.astype(dtype.accumulator)).astype(np.float64)
