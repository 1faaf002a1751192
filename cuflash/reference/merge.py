"""Merging results of the same queries over different keys, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def merge(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of all keys, in the dtype of lse: (..., heads, rows) lse of (..., rows, heads, dim) out.

    Parts whose lse is infinite saw no key; what their out holds is not looked at.
    """
    with np.errstate(all="ignore"):
        hidden = [np.where(np.isinf(lse), -np.inf, lse) for lse in lses]
        largest = np.max(hidden, axis=0)
        largest = np.where(np.isneginf(largest), 0, largest)
        shares = [np.exp(x - largest) for x in hidden]
        total = np.sum(shares, axis=0)
        lse = (largest + np.log(total)).astype(lses[0].dtype)
        out = np.zeros(outs[0].shape, lse.dtype)
        for part, share in zip(outs, shares, strict=True):
            # Not by `_weights`: lse is rounded as a number far from 0 is, and they would not add up to 1.
            weight = np.where(share == 0, 0, share / total).astype(lse.dtype).swapaxes(-1, -2)[..., None]
            out += np.where(weight == 0, 0, weight * part.astype(lse.dtype))
    return out, lse


def merge_backward(
    outs: Sequence[np.ndarray],
    lses: Sequence[np.ndarray],
    out: np.ndarray,
    lse: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gradients of every part's out and lse, given what `merge` returned and the gradients of that."""
    douts, dlses = [], []
    with np.errstate(all="ignore"):
        upstream = dout.astype(lse.dtype)
        for part, part_lse in zip(outs, lses, strict=True):
            weight = _weights(part_lse, lse)
            sees = weight != 0
            douts.append(np.where(sees, weight * upstream, 0).astype(part.dtype))
            dots = np.where(sees, upstream * (part.astype(lse.dtype) - out), 0).sum(axis=-1).swapaxes(-1, -2)
            by_row = sees[..., 0].swapaxes(-1, -2)
            total = dots if dlse is None else dots + dlse
            dlses.append(np.where(by_row, weight[..., 0].swapaxes(-1, -2) * total, 0).astype(lse.dtype))
    return douts, dlses


def _weights(lse: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A part's share of each row's probability, (..., rows, heads, 1)."""
    return np.where(np.isinf(lse), 0, np.exp(lse - whole)).astype(whole.dtype).swapaxes(-1, -2)[..., None]
