"""Forward mode: how attention changes along changes of what it reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from doubles.arrays import as_cupy, as_torch, needs_cupy, to_numpy
from doubles.launch import Launches, needs_compiler
from inputs import BF16, FP16, FP32, FP64, random

import cuflash
from cuflash import mods
from cuflash.errors import InvalidArgument, UnsupportedProblem

WORDS = {
    "bias": "attn_bias", "mask": "attn_mask", "window": "window_size", "scale": "softmax_scale",
    "dropout_unbiased": "unbiased_dropout", "rng_state": "generator",
}  # fmt: skip
"""The functions' words for what the oracle calls otherwise."""
OF = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias", "dsink": "sink"}
STARTS_Q, STARTS_K = np.array([0, 9, 9, 21], np.int32), np.array([0, 14, 20, 20], np.int32)
HIDING = random(1, 4, 23, 41, dtype=FP64)
HIDING[HIDING < -1] = -np.inf
HIDING[:, 1, 4] = HIDING[:, :, 9] = -np.inf
"""A bias of which whole rows are -inf."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal-cap": {"causal": True, "softcap": 0.8, "sink": random(4, dtype=FP32)},
    "window": {"window": (5, 2), "alignment": "top-left", "alibi_slopes": random(2, 4, dtype=FP32) ** 2},
    "bias": {"bias": random(2, 1, 23, 41, dtype=FP64), "softcap": 2.0},
    "hiding": {"bias": HIDING, "sink": np.float32([0.3, -np.inf, 2, -1])},
    "mask": {"mask": random(2, 4, 23, 41) > 0.5, "bias": random(41, dtype=FP64)[None]},
    "bytes": {"dropout_p": 0.3, "rng_state": (7, 4), "bias": random(4, 23, 1, dtype=FP64)},
    "words": {"dropout_p": 0.6, "dropout_scheme": "word", "rng_state": (3, 0), "scale": -0.4},
    "packed": {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "causal": True, "sink": random(4, dtype=FP32)},
    "used": {
        "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_q": np.array([4, 0, 12], np.int32),
        "seqused_k": np.array([11, 3, 0], np.int32),
    },
}  # fmt: skip


def tensors(packed: bool, dtype: Any = FP64) -> dict[str, np.ndarray]:
    rows = {"q": (23, 4, 8), "k": (41, 2, 8), "v": (41, 2, 5)}
    return {name: random(*(() if packed else (2,)), *shape, dtype=dtype) for name, shape in rows.items()}


def changed(case: str, seed: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """What a case reads and may change, how it does, and its other words for the oracle."""
    options = dict(CASES[case])
    read = tensors("cu_seqlens_q" in options)
    read |= {name: options.pop(name) for name in ("bias", "sink") if name in options}
    return read, {name: random(*x.shape, dtype=x.dtype, seed=seed) for name, x in read.items()}, options


def pushed(read: dict[str, Any], changes: dict[str, Any], options: dict[str, Any]) -> tuple[np.ndarray, ...]:
    words = {WORDS.get(name, name): x for name, x in {**read, **options}.items()}
    return cuflash.flash_attn_jvp(**words, **{name: changes[of] for name, of in OF.items() if of in changes})


@pytest.mark.parametrize("case", CASES)
def test_tangents_are_finite_differences_of_the_oracle(case: str) -> None:
    read, changes, options = changed(case)

    def moved(step: float) -> oracle.Attention:
        there = {name: x.astype(FP64) + step * changes[name] for name, x in read.items()}
        return oracle.attention(**there, **options)

    exact, step = moved(0), 1e-6
    after, before = moved(step), moved(-step)
    out, lse, tangent_out, tangent_lse = pushed(read, changes, options)
    np.testing.assert_allclose(out, exact.out, atol=1e-12)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-12)
    sees = np.isfinite(exact.lse)
    assert np.abs(tangent_out).max() > 0.1 and not tangent_lse[~sees].any()
    np.testing.assert_allclose(tangent_out, (after.out - before.out) / (2 * step), atol=1e-8)
    np.testing.assert_allclose(tangent_lse[sees], (after.lse[sees] - before.lse[sees]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_change_is_left_out(case: str) -> None:
    """Each tangent alone; together they are the sum. Pulled back, the product with a gradient is the same."""
    read, changes, options = changed(case)
    alone = [pushed(read, {name: change}, options)[2:] for name, change in changes.items()]
    out, lse, *together = pushed(read, changes, options)
    for i, whole in enumerate(together):
        np.testing.assert_allclose(sum(parts[i] for parts in alone), whole, atol=1e-12)
    dout, dlse = random(*out.shape, dtype=FP64), random(*lse.shape, dtype=FP64)
    words = {WORDS.get(name, name): x for name, x in {**read, **options}.items()}
    _, pullback = cuflash.flash_attn_vjp(**words, bias_grad="bias" in read)
    gradients = zip(OF.values(), pullback(dout, dlse), strict=False)
    for (name, gradient), (of_out, of_lse) in zip(gradients, alone, strict=False):
        if name in changes and name != "sink":  # the gradient of which is rounded to fp32
            np.testing.assert_allclose((gradient * changes[name]).sum(), (dout * of_out).sum() + (dlse * of_lse).sum())


@pytest.mark.parametrize("packed", [False, True])
def test_written_scores_and_masks(packed: bool) -> None:
    table, ids = random(4, 30, dtype=FP64), np.arange(41) // 5

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return mods.where(ids[q] == ids[k], 2 * mods.tanh(s + table[h, q]), s * s - b / 3)

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q != 4) & ((q + k + h) % 3 != 0)

    read = tensors(packed)
    options = {"score_mod": score, "mask_mod": seen, "causal": True, "softcap": 1.5}
    if packed:
        options |= {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 12, "max_seqlen_k": 14}
    changes = {name: random(*x.shape, dtype=FP64, seed=1) for name, x in read.items()}
    call = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func

    def moved(step: float) -> tuple[np.ndarray, np.ndarray]:
        return call(**{name: x + step * changes[name] for name, x in read.items()}, **options, return_lse=True)

    step = 1e-6
    (after, lse_after), (before, lse_before) = moved(step), moved(-step)
    out, lse, tangent_out, tangent_lse = pushed(read, changes, options)
    sees = np.isfinite(lse)
    assert not sees.all() and not tangent_lse[~sees].any() and np.abs(tangent_out).max() > 0.1
    np.testing.assert_allclose(out, moved(0)[0], atol=1e-12)
    np.testing.assert_allclose(tangent_out, (after - before) / (2 * step), atol=1e-8)
    np.testing.assert_allclose(tangent_lse[sees], (lse_after[sees] - lse_before[sees]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
def test_types(dtype: Any) -> None:
    names = ("q", "k", "v")
    read = tensors(packed=False, dtype=dtype)
    changes = {name: random(*x.shape, dtype=dtype, seed=3) for name, x in read.items()}
    results = pushed(read, changes, {"causal": True, "softcap": 3.0})
    wide = [{name: given[name].astype(FP64) for name in names} for given in (read, changes)]
    exact = pushed(*wide, {"causal": True, "softcap": 3.0})
    real = np.dtype(FP32)
    assert [x.dtype for x in results] == [dtype, real, dtype, real]
    unit = {FP16: 2.0**-11, BF16: 2.0**-8, FP32: 2.0**-18}[dtype]
    for x, y in zip(results, exact, strict=True):
        seen = np.isfinite(y)
        within = unit if x.dtype == dtype else 2.0**-18
        assert np.abs(x[seen].astype(FP64) - y[seen]).max() <= 2 * within * np.abs(y[seen]).max()


def test_large_logits_and_many_tiles() -> None:
    """Sums shrink by e to a large power from one tile of keys to the next."""
    q, k, v = (random(1, 700, 1, 16, dtype=FP64, seed=i) for i in range(3))
    k = k * np.linspace(1, 300, 700)[None, :, None, None]
    changes = {name: random(1, 700, 1, 16, dtype=FP64, seed=i + 3) for i, name in enumerate("qkv")}
    *_, tangent_out, tangent_lse = pushed({"q": q, "k": k, "v": v}, changes, {})
    s = np.einsum("qd,kd->qk", q[0, :, 0], k[0, :, 0]) / 4
    ds = (np.einsum("qd,kd->qk", changes["q"][0, :, 0], k[0, :, 0]) + q[0, :, 0] @ changes["k"][0, :, 0].T) / 4
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * ds).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(tangent_lse[0, 0], mean[:, 0], rtol=1e-9)
    expected = p @ changes["v"][0, :, 0] + (p * (ds - mean)) @ v[0, :, 0]
    np.testing.assert_allclose(tangent_out[0, :, 0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("len_q", "len_kv"), [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_attend_to(len_q: int, len_kv: int) -> None:
    q, k = random(2, len_q, 4, 8), random(2, len_kv, 4, 8)
    out, lse, tangent_out, tangent_lse = cuflash.flash_attn_jvp(q, k, k, q, k, k)
    assert tangent_out.shape == out.shape == q.shape and tangent_lse.shape == lse.shape == (2, 4, len_q)
    assert not tangent_out.any() and not tangent_lse.any() and np.isneginf(lse).all()


def test_numbers_of_hidden_keys_do_not_matter() -> None:
    read = tensors(packed=False)
    changes = {name: random(*x.shape, dtype=FP64, seed=1) for name, x in read.items()}
    mask = np.ones((1, 1, 1, 41), bool)
    mask[..., 30:] = False
    clean = pushed(read, changes, {"mask": mask, "bias": np.zeros((1, 41))})
    changes = changes | {"bias": np.where(mask[0, 0], 0, np.inf)}
    changes["k"][:, 30:] = np.nan
    spoiled = pushed(read, changes, {"mask": mask, "bias": np.zeros((1, 41))})
    for a, b in zip(spoiled, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refusals() -> None:
    x = random(2, 6, 4, 8)
    for given, message in (
        ({"dq": x[:, :5]}, r"^dq has shape \(2, 5, 4, 8\); expected \(2, 6, 4, 8\)\.$"),
        ({"dv": x.astype(FP32)}, r"^dv is float32; expected float16\.$"),
        ({"dbias": x}, r"^dbias is given but attn_bias is not; pass both, or neither\.$"),
        ({"dsink": np.ones(4, FP32)}, r"^dsink is given but sink is not; pass both, or neither\.$"),
        ({"dk": [1.0]}, r"^dk is a list; expected an array"),
        ({"softcap": -1}, r"^softcap is -1"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            cuflash.flash_attn_jvp(x, x, x, **given)


@needs_compiler
@pytest.mark.parametrize(
    "put", [pytest.param(as_cupy, marks=needs_cupy, id="cupy"), pytest.param(as_torch, id="torch")]
)
def test_arrays_on_a_gpu(launches: Launches, put: Any) -> None:
    q, k, v, dq, dv = (random(1, n, h, 16, seed=i) for i, (n, h) in enumerate([(9, 4), (7, 2), (7, 2), (9, 4), (7, 2)]))
    sink, dsink = random(2, 4, dtype=FP32)
    words: dict[str, Any] = {"causal": True, "dropout_p": 0.3, "generator": (7, 4)}
    expected = cuflash.flash_attn_jvp(q, k, v, dq, dv=dv, sink=sink, dsink=dsink, **words)
    results = cuflash.flash_attn_jvp(
        *map(put, (q, k, v, dq)), dv=put(dv), sink=put(sink), dsink=put(dsink), **words
    )  # fmt: skip
    assert launches.take() == ["fwd_rng", "jvp_sm80"]
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(to_numpy(x), y, rtol=2e-3, atol=2e-3)
    with pytest.raises(InvalidArgument, match=r"^dq has shape"):
        cuflash.flash_attn_jvp(*map(put, (q, k, v, dq[:, :1])))
    results = cuflash.flash_attn_jvp(*map(put, (q, k, v, dq)), score_mod=lambda s, b, h, i, j: 2 * s)
    assert launches.take() == ["jvp_sm80"]
    expected = cuflash.flash_attn_jvp(q, k, v, dq, softmax_scale=2 * 16**-0.5)
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(to_numpy(x), y, rtol=2e-3, atol=2e-3)
    blocks = cuflash.create_block_mask(cuflash.mods.prefix_lm(2), len_q=9, len_kv=7)
    with pytest.raises(UnsupportedProblem, match=r"no tangents of lists of blocks"):
        cuflash.flash_attn_jvp(*map(put, (q, k, v, dq)), block_mask=blocks)


@needs_compiler
def test_nothing_to_attend_to_on_a_gpu(launches: Launches) -> None:
    q, k = as_torch(random(2, 4, 4, 8)), as_torch(random(2, 0, 4, 8))
    out, lse, *tangents = map(to_numpy, cuflash.flash_attn_jvp(q, k, k, q))
    assert not launches.take() and not out.any() and np.isneginf(lse).all() and not any(x.any() for x in tangents)
