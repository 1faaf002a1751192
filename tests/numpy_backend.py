"""The NumPy backend asked in the words of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import oracle
from inputs import FP32, FP64

from cuflash import masks, reference
from cuflash.dropout import Dropout


class Reference(NamedTuple):
    """The backend's functions for dense or packed tensors, with what the oracle's arguments are to both of them."""

    functions: tuple[Callable, Callable]
    lengths: tuple[np.ndarray, ...]
    options: dict[str, Any]

    def forward(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **given: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.functions[0](q, k, v, *self.lengths, **self.options | given)

    def backward(self, dout: np.ndarray, *tensors: np.ndarray, **given: Any) -> reference.Gradients:
        given["bias_grad"] = self.options.get("bias") is not None
        return self.functions[1](dout, *tensors, *self.lengths, **self.options | given)


def translated(
    q: np.ndarray, *, causal=False, window=(-1, -1), alignment="bottom-right", scale=None, mask=None, alibi_slopes=None,
    dropout_p=0.0, dropout_scheme="byte", dropout_unbiased=False, rng_state=(0, 0), cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, **features,
) -> Reference:  # fmt: skip
    """The backend, from the oracle's arguments."""
    options = {
        "band": replace(masks.band(causal, window, alignment), tensor=mask is not None),
        "mask": mask,
        "softmax_scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "dropout": Dropout(dropout_p, dropout_scheme, dropout_unbiased) if dropout_p else None,
        "rng_state": rng_state,
        "alibi": alibi_slopes,
        **features,
    }
    if cu_seqlens_q is None:
        return Reference((reference.forward, reference.backward), (), options)
    options |= {"seqused_q": seqused_q, "seqused_kv": seqused_k, "len_q": max_seqlen_q, "len_kv": max_seqlen_k}
    return Reference((reference.forward_varlen, reference.backward_varlen), (cu_seqlens_q, cu_seqlens_k), options)


def run(q, k, v, dout, dlse, *, keep_state=False, **options) -> oracle.Attention:
    """The backend's forward and backward, from the oracle's arguments."""
    backend = translated(q, **options)
    row_state = None
    if keep_state:
        real = FP64 if q.dtype == FP64 else FP32
        shape = (*q.shape[1::-1], 2) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1], 2)
        row_state = np.full(shape, np.nan, real)
    out, lse = backend.forward(q, k, v, row_state=row_state)
    gradients = backend.backward(dout, q, k, v, out, lse, dlse=dlse, row_state=row_state)
    return oracle.Attention(out, lse, *gradients[:5])


def check(inputs: list[np.ndarray], keep_state: bool = False, **options) -> oracle.Attention:
    actual = run(*inputs, keep_state=keep_state, **options)
    oracle.assert_all_close(
        actual, oracle.attention(*inputs, **options), oracle.naive_in_dtype(*inputs, **options), str(options)
    )
    real = FP64 if inputs[0].dtype == FP64 else FP32
    expected = [inputs[0].dtype, real, *(x.dtype for x in inputs[:3]), real, real]
    assert [x.dtype for x in actual if x is not None] == [
        dtype for x, dtype in zip(actual, expected, strict=True) if x is not None
    ]
    return actual


def in_head_order(x: np.ndarray) -> np.ndarray:
    """(b, s, h, d) as (b, h, s, d), the order of the LSE."""
    return x.transpose(0, 2, 1, 3)
