"""Written scores and masks on NumPy arrays, against float64 attention written out here and against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inputs import FP32, FP64

import cuflash
from cuflash import mods

Score = Callable[..., Any]
RNG = np.random.default_rng(7)
TABLE, FACTOR, NUMBERS = RNG.standard_normal((4, 15)), RNG.standard_normal(3), np.arange(40) % 7


def relative(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s * FACTOR[b] + TABLE[h, q - k + 7]


def bent(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return mods.tanh(s * TABLE[h, k]) + 0.1 * s * s - mods.abs(q - k) * FACTOR[b] ** 2


def hiding(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return mods.where((NUMBERS[q] < NUMBERS[k]) | (q == 2), -np.inf, s + FACTOR[h])


def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
    return ((q * 5 + k * 3 + h + b) % 4 != 0) & (q != 3)


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, score: Score | None, mask: Score | None, *, first: int = 0,
    causal: bool = False, sink: np.ndarray | None = None, bias: Any = 0.0, softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(out, lse) in float64 of dense arrays, b from `first` on."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s = np.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if softcap:
        s = softcap * np.tanh(s / softcap)
    at = np.ogrid[first : first + len(q), : q.shape[2], : q.shape[1], : k.shape[1]]
    if score is not None:
        s = _computed("score_mod", score, at, s)
    s = s + bias
    if mask is not None:
        s = np.where(_computed("mask_mod", mask, at, s), s, -np.inf)
    if causal:
        s = np.where(at[3] <= at[2] + k.shape[1] - q.shape[1], s, -np.inf)
    logits = s if sink is None else np.concatenate([s, np.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], -1)
    top = logits.max(-1, keepdims=True, initial=-np.inf)
    with np.errstate(divide="ignore"):
        total = np.exp(logits - np.where(top == -np.inf, 0, top)).sum(-1, keepdims=True)
        lse = (top + np.log(total))[..., 0]
    p = np.exp(s - np.where(top == -np.inf, 0, top)) / np.where(total == 0, 1, total)
    return np.einsum("bhij,bjhd->bihd", p, v), lse


def _computed(argument: str, function: Score, at: Any, s: np.ndarray) -> np.ndarray:
    """Closed forms by NumPy of the functions above."""
    b, h, i, j = at
    far = np.clip(i - j + 7, 0, 14)
    if function is relative:
        return s * FACTOR[np.clip(b, 0, 2)] + TABLE[h, far]
    if function is bent:
        return np.tanh(s * TABLE[h, np.clip(j, 0, 14)]) + 0.1 * s * s - abs(i - j) * FACTOR[np.clip(b, 0, 2)] ** 2
    if function is hiding:
        return np.where((NUMBERS[i] < NUMBERS[j]) | (i == 2), -np.inf, s + FACTOR[np.clip(h, 0, 2)])
    assert function is seen
    return ((i * 5 + j * 3 + h + b) % 4 != 0) & (i != 3)


def tensors(b: int, sq: int, sk: int, heads: int = 4, heads_kv: int = 2, dtype: Any = FP64) -> list[np.ndarray]:
    shapes = (b, sq, heads, 8), (b, sk, heads_kv, 8), (b, sk, heads_kv, 5)
    return [np.random.default_rng(b + sq).standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("mask", [None, seen], ids=["all", "seen"])
@pytest.mark.parametrize("score", [None, relative, bent, hiding])
def test_forward(score: Score | None, mask: Score | None, dtype: Any) -> None:
    q, k, v = tensors(2, 11, 13, dtype=dtype)
    sink, bias = np.array([0.5, -1, 0, 2], FP32), RNG.standard_normal((4, 11, 13)).astype(dtype)
    for options in ({}, {"causal": True}, {"sink": sink, "softcap": 2.0}, {"bias": bias, "causal": True}):
        called = {"attn_bias" if name == "bias" else name: x for name, x in options.items()}
        results = cuflash.flash_attn_func(q, k, v, score_mod=score, mask_mod=mask, return_lse=True, **called)
        expected = exact(q, k, v, score, mask, **options)
        for one, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(one, other, *((1e-12, 1e-12) if dtype is FP64 else (2e-5, 2e-5)))


@pytest.mark.parametrize("mask", [None, seen], ids=["all", "seen"])
@pytest.mark.parametrize("score", [relative, bent, hiding])
def test_packed_sequences_count_from_0(score: Score, mask: Score | None) -> None:
    q, k, v = (x[0] for x in tensors(1, 20, 25))
    starts_q, starts_k = np.array([0, 7, 7, 20], np.int32), np.array([0, 4, 13, 25], np.int32)
    out, lse = cuflash.flash_attn_varlen_func(
        q, k, v, starts_q, starts_k, score_mod=score, mask_mod=mask, causal=True, return_lse=True
    )
    for b in (0, 2):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        one = exact(q[None, rows], k[None, keys], v[None, keys], score, mask, first=b, causal=True)
        np.testing.assert_allclose(out[rows], one[0][0], 1e-12, 1e-12)
        np.testing.assert_allclose(lse[:, rows], one[1][0], 1e-12, 1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("score", "captured"), [(relative, (FACTOR, TABLE)), (bent, (TABLE, FACTOR)), (hiding, (NUMBERS, FACTOR))]
)
def test_gradients_are_those_of_differences(score: Score, captured: tuple[np.ndarray, ...], packed: bool) -> None:
    q, k, v = tensors(2, 6, 7)
    options: dict[str, Any] = {"score_mod": score, "mask_mod": seen, "causal": True, "softcap": 3.0}
    options |= {"sink": np.array([0.5, -1, 0, 2], FP32), "dropout_p": 0.25, "generator": (3, 4)}
    if packed:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        options |= {"cu_seqlens_q": np.array([0, 5, 12], np.int32), "cu_seqlens_k": np.array([0, 8, 14], np.int32)}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, captured_grad=True, return_lse=True, **options)
    rng = np.random.default_rng(1)
    dout, dlse = rng.standard_normal(out.shape), np.where(np.isinf(lse), 0, rng.standard_normal(lse.shape))
    gradients = pullback(dout, dlse)

    def value() -> float:
        (out, lse), _ = cuflash.flash_attn_vjp(q, k, v, return_lse=True, **options)
        return float((out * dout).sum() + np.where(np.isinf(lse), 0, lse * dlse).sum())

    assert gradients.dcaptured is not None and len(gradients.dcaptured) == len(captured)
    computed = zip(("q", "k", "v", 0, 1), (q, k, v, *captured), (*gradients[:3], *gradients.dcaptured), strict=True)
    for name, x, dx in computed:
        if x.dtype.kind == "i":
            assert dx is None
            continue
        assert dx.shape == x.shape and dx.dtype == np.float64
        for place in rng.choice(x.size, min(x.size, 12), replace=False):
            index = np.unravel_index(place, x.shape)
            kept, step, ends = x[index], 1e-5, []
            for sign in (1, -1):
                x[index] = kept + sign * step
                ends.append(value())
            x[index] = kept
            np.testing.assert_allclose(
                dx[index], (ends[0] - ends[1]) / (2 * step), 1e-6, 1e-7, err_msg=f"{name}{index}"
            )
