"""The NumPy backend against the float64 oracle, and the oracle against finite differences."""

from __future__ import annotations

import tracemalloc

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import BF16, FP16, FP32, FP64, arrays
from numpy_backend import check, run

from cuflash import masks, reference
from cuflash.masks import Mask
from cuflash.reference import operands, pool, tiles
from cuflash.reference.scores import Scores

FIELDS = oracle.Attention._fields[:5]  # what every call gives


SHAPES = {
    "square": {"b": 2, "h": 3, "hk": 3, "sq": 48, "sk": 48, "d": 16, "dv": 16},
    "gqa": {"b": 2, "h": 6, "hk": 2, "sq": 29, "sk": 53, "d": 24, "dv": 24},
    "mqa-dv-longer": {"b": 1, "h": 4, "hk": 1, "sq": 33, "sk": 70, "d": 8, "dv": 40},
    "more-queries": {"b": 2, "h": 2, "hk": 2, "sq": 61, "sk": 23, "d": 40, "dv": 8},
    "decode": {"b": 3, "h": 4, "hk": 2, "sq": 1, "sk": 77, "d": 16, "dv": 16},
    "one-key": {"b": 1, "h": 2, "hk": 1, "sq": 9, "sk": 1, "d": 5, "dv": 3},
    "wide-group": {"b": 1, "h": 32, "hk": 2, "sq": 7, "sk": 19, "d": 8, "dv": 8},
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "causal-top-left": {"causal": True, "alignment": "top-left"},
    "window": {"window": (9, 4)},
    "window-left": {"window": (11, -1)},
    "window-right-top-left": {"window": (-1, 6), "alignment": "top-left"},
    "sliding-causal": {"causal": True, "window": (12, -1)},
    "diagonal": {"window": (0, 0)},
    "softcap": {"softcap": 0.8},
    "softcap-causal-large-scale": {"softcap": 3.0, "scale": 2.0, "causal": True},
    "negative-scale": {"scale": -0.4, "causal": True},
    "zero-scale": {"scale": 0.0, "window": (5, 20)},
    "softcap-negative-scale": {"softcap": 2.0, "scale": -0.7},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_matches_the_oracle(shape: dict, options: dict, dtype: type) -> None:
    check(arrays(shape, dtype), **options)


STATE = {
    "full": {},
    "causal": {"causal": True},
    "rows that see nothing": {"window": (3, -1), "scale": 2.0},
    "softcap": {"softcap": 0.8},
    "negative scale": {"scale": -0.4, "window": (5, 20)},
    "sink": {"sink": np.linspace(-3, 9, 4, dtype=FP32), "causal": True},
    "dropout": {"dropout_p": 0.3, "rng_state": (5, 8)},
    "bias": {"bias": np.linspace(-2000, 2000, 31, dtype=FP32)},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("options", STATE.values(), ids=STATE)
def test_gradients_by_the_state_that_the_forward_keeps(options: dict, dtype: type) -> None:
    check(arrays({"b": 2, "h": 4, "hk": 2, "sq": 40, "sk": 31, "d": 16, "dv": 8}, dtype), keep_state=True, **options)
    lens_q, lens_kv = [7, 0, 24, 9], [20, 3, 0, 8]
    starts = {f"cu_seqlens_{x}": np.cumsum([0, *n], dtype=np.int32) for x, n in (("q", lens_q), ("k", lens_kv))}
    inputs = [x[0] for x in arrays({"b": 1, "h": 4, "hk": 2, "sq": 40, "sk": 31, "d": 16, "dv": 8}, dtype)]
    options = options | ({"bias": options["bias"][:20]} if "bias" in options else {})
    check(inputs, keep_state=True, **options, **starts)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("softcap", [2.0**-126, 1e-30, 50.0, 1e4, 1e9, 1e30, 2.0**126])
def test_soft_caps_of_every_size(softcap: float, dtype: type) -> None:
    with np.errstate(over="ignore"):  # of scores over tiny caps, in the naive formula
        check(arrays(SHAPES["decode"], dtype), softcap=softcap, scale=3.0)


@pytest.mark.parametrize("softcap", [2.0**-1022, 1e-300, 1e300, 2.0**1022])
def test_soft_caps_of_every_size_in_double_precision(softcap: float) -> None:
    with np.errstate(over="ignore"):
        check(arrays(SHAPES["decode"], FP64), softcap=softcap, scale=3.0)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}, {"softcap": 2.0, "causal": True}])
def test_dense_matches_the_oracle_with_the_real_tiles(options: dict) -> None:
    shape = {"b": 2, "h": 4, "hk": 2, "sq": 300, "sk": 1100, "d": 32, "dv": 24}
    check(arrays(shape, FP32), **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("broadcast", ["bhqk", "b11k", "1hq1", "11qk", "111k", "b1q1", "qk", "k"])
def test_mask_tensors_broadcast(broadcast: str, dtype: type) -> None:
    shape = {"b": 2, "h": 6, "hk": 3, "sq": 30, "sk": 41, "d": 16, "dv": 8}
    extent = {"b": shape["b"], "h": shape["h"], "q": shape["sq"], "k": shape["sk"], "1": 1}
    mask = np.random.default_rng(1).random([extent[axis] for axis in broadcast]) < 0.4
    actual = check(arrays(shape, dtype), mask=mask)
    if broadcast == "1hq1":
        hidden = ~np.broadcast_to(mask[..., 0], actual.lse.shape)
        assert hidden.any() and not actual.out.transpose(0, 2, 1, 3)[hidden].any()


@pytest.mark.usefixtures("small_tiles")
def test_mask_tensor_that_hides_whole_tiles() -> None:
    shape = {"b": 1, "h": 2, "hk": 2, "sq": 40, "sk": 64, "d": 8, "dv": 8}
    mask = np.zeros((1, 1, 40, 64), bool)
    mask[..., 8:32, 16:32] = True
    q, k, v, dout, dlse = arrays(shape, FP32)
    clean = check([q, k, v, dout, dlse], mask=mask)
    for x in (k, v):
        x[:, :16] = x[:, 32:] = np.nan
    for a, b in zip(run(q, k, v, dout, dlse, mask=mask), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def packed(lens_q: list[int], lens_k: list[int], tail: tuple[int, int], dtype: type, h: int, hk: int) -> dict:
    shape = {"b": 1, "h": h, "hk": hk, "sq": sum(lens_q) + tail[0], "sk": sum(lens_k) + tail[1], "d": 16, "dv": 24}
    return {
        "inputs": [x[0] for x in arrays(shape, dtype, seed=len(lens_q))],
        "cu_seqlens_q": np.cumsum([0, *lens_q], dtype=np.int32),
        "cu_seqlens_k": np.cumsum([0, *lens_k], dtype=np.int32),
    }


PACKED = {
    "plain": ([5, 31, 12], [7, 40, 12], (0, 0)),
    "empty-and-tails": ([0, 17, 9, 0, 22], [12, 0, 30, 0, 3], (6, 11)),
    "all-queries-empty": ([0, 0], [5, 9], (4, 0)),
    "all-keys-empty": ([3, 8], [0, 0], (0, 2)),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "alignment": "top-left"}, {"window": (6, 2), "softcap": 1.5}],
    ids=["full", "causal", "causal-top-left", "window-softcap"],
)
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_varlen_matches_the_oracle(lengths: tuple, options: dict, dtype: type) -> None:
    problem = packed(*lengths, dtype, h=4, hk=2)
    check(problem.pop("inputs"), **problem, **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [False, True])
def test_seqused_cuts_keys_and_moves_the_diagonal(causal: bool) -> None:
    problem = packed([11, 6, 8, 14], [20, 16, 9, 33], (2, 5), FP32, h=4, hk=4)
    inputs, seqused_k = problem.pop("inputs"), np.array([20, 0, 4, 17], np.int32)
    actual = check(inputs, **problem, causal=causal, seqused_k=seqused_k)
    unused = np.ones(len(inputs[1]), bool)
    for start, used in zip(problem["cu_seqlens_k"], seqused_k, strict=False):
        unused[start : start + used] = False
    assert not actual.dk[unused].any() and not actual.dv[unused].any()


def test_varlen_equals_dense_calls_bit_for_bit() -> None:
    shape = {"b": 3, "h": 4, "hk": 2, "sq": 20, "sk": 35, "d": 16, "dv": 16}
    inputs = arrays(shape, FP32)
    q, k, v, dout, dlse = inputs
    dense = run(*inputs, causal=True)
    flat = run(
        *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout)),
        dlse.transpose(1, 0, 2).reshape(4, -1),
        causal=True,
        cu_seqlens_q=np.arange(0, 61, 20, dtype=np.int32),
        cu_seqlens_k=np.arange(0, 106, 35, dtype=np.int32),
    )
    for name, a, b in zip(FIELDS, flat, dense, strict=False):
        b = b.transpose(1, 0, 2).reshape(a.shape) if name == "lse" else b.reshape(a.shape)
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_16_bit_is_fp32_inside_and_rounded_once(dtype: type) -> None:
    shape = {"b": 2, "h": 4, "hk": 2, "sq": 70, "sk": 90, "d": 32, "dv": 32}
    q, k, v, dout, dlse = arrays(shape, dtype)
    options = {"band": masks.band(True, (-1, -1)), "softmax_scale": 0.2, "softcap": 5.0}
    out, lse = reference.forward(q, k, v, **options)
    grads = reference.backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    q, k, v, dout, out_wide = (x.astype(FP32) for x in (q, k, v, dout, out))
    out_fp32, lse_fp32 = reference.forward(q, k, v, **options)
    np.testing.assert_array_equal(out, out_fp32.astype(dtype))
    np.testing.assert_array_equal(lse, lse_fp32)
    wide = reference.backward(dout, q, k, v, out_wide, lse, dlse=dlse, **options)
    for narrow, expected in zip(grads[:3], wide[:3], strict=True):
        np.testing.assert_array_equal(narrow, expected.astype(dtype))


def test_merging_two_halves_by_their_lse_gives_the_whole() -> None:
    shape = {"b": 1, "h": 2, "hk": 2, "sq": 12, "sk": 40, "d": 16, "dv": 16}
    q, k, v, *_ = arrays(shape, FP64)
    whole, lse = reference.forward(q, k, v, band=Mask(right=0, alignment="top-left"), softmax_scale=0.25)
    seen = np.tril(np.ones((12, 40), bool))
    parts = [
        reference.forward(q, k[:, s], v[:, s], band=Mask(tensor=True), softmax_scale=0.25, mask=seen[:, s])
        for s in (slice(0, 5), slice(5, 40))
    ]
    merged_lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * np.exp(part_lse - merged_lse).transpose(0, 2, 1)[..., None] for o, part_lse in parts)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-13)
    np.testing.assert_allclose(merged, whole, rtol=1e-12, atol=1e-14)


def scrambled(x: np.ndarray, order: list[int], flips: list[bool], gap: int) -> np.ndarray:
    """The same values with another memory order, some axes reversed and a gap between elements of the last axis."""
    shape = [x.shape[axis] for axis in order]
    shape[-1] *= gap
    memory = np.full(shape, np.nan, x.dtype)[..., ::gap]
    view = memory.transpose(np.argsort(order))[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    view[...] = x
    return view


@given(data=st.data())
def test_any_sizes_strides_and_masks(data: st.DataObject) -> None:
    draw = data.draw
    size = st.integers(1, 40)
    hk = draw(st.integers(1, 3), "hk")
    shape = {"b": draw(st.integers(1, 3), "b"), "hk": hk, "h": hk * draw(st.integers(1, 4), "group")}
    shape |= {"sq": draw(size, "sq"), "sk": draw(size, "sk"), "d": draw(st.integers(1, 20), "d")}
    shape |= {"dv": draw(st.integers(1, 20), "dv")}
    alignment = draw(st.sampled_from(["bottom-right", "top-left"]), "alignment")
    window = draw(st.tuples(st.integers(-1, 45), st.integers(-1, 45)), "window")
    options = {"causal": draw(st.booleans(), "causal"), "window": window, "alignment": alignment}
    options |= {"softcap": draw(st.sampled_from([0.0, 0.5, 10.0]), "softcap")}
    dtype = draw(st.sampled_from([FP16, BF16, FP32, FP64]), "dtype")
    inputs = arrays(shape, dtype)
    views = [
        scrambled(
            x,
            draw(st.permutations(range(x.ndim)), "order"),
            draw(st.lists(st.booleans(), min_size=x.ndim, max_size=x.ndim), "flips"),
            draw(st.integers(1, 3), "gap"),
        )
        for x in inputs
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", draw(st.integers(1, 16), "tile rows"))
        patch.setattr(tiles, "KEYS", draw(st.integers(1, 16), "tile keys"))
        patch.setattr(tiles, "SCORES", draw(st.integers(1, 1024), "tile scores"))
        contiguous = check(inputs, **options)
        strided = run(*views, **options)
        for name, a, b in zip(FIELDS, strided, contiguous, strict=False):
            np.testing.assert_array_equal(a, b, err_msg=name)


@given(data=st.data())
def test_out_is_filled_in_place_through_any_strides(data: st.DataObject) -> None:
    shape = {"b": 2, "h": 4, "hk": 2, "sq": 11, "sk": 13, "d": 8, "dv": 6}
    q, k, v, *_ = arrays(shape, FP32)
    options = {"band": Mask(right=0), "softmax_scale": 0.3}
    expected, _ = reference.forward(q, k, v, **options)
    order = data.draw(st.permutations(range(4)))
    flips = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    target = scrambled(np.full(expected.shape, np.nan, FP32), order, flips, gap=2)
    out, _ = reference.forward(q, k, v, out=target, **options)
    assert out is target
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(out.base).sum() == out.base.size - out.size


@given(
    len_q=st.integers(1, 40),
    len_kv=st.integers(1, 40),
    left=st.none() | st.integers(0, 45),
    right=st.none() | st.integers(0, 45),
    alignment=st.sampled_from(["bottom-right", "top-left"]),
    rows=st.integers(1, 12),
    tile_kv=st.integers(1, 12),
)
def test_only_tiles_with_something_visible_are_visited_and_only_boundaries_masked(
    len_q: int, len_kv: int, left: int | None, right: int | None, alignment: str, rows: int, tile_kv: int
) -> None:
    scores = Scores(Mask(left, right, alignment), len_q, len_kv, 1.0)
    window = tuple(-1 if side is None else side for side in (left, right))
    visible = oracle._visible(len_q, len_kv, False, window, alignment)
    kept = np.zeros_like(visible)
    one = slice(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "KEYS", tile_kv)
        for start in range(0, len_q, rows):
            row_tile = slice(start, min(start + rows, len_q))
            for (*_, keys), hidden in scores.kv_tiles(one, one, row_tile):
                assert keys.stop - keys.start <= 2 * tile_kv
                expected = visible[row_tile, keys]
                assert expected.any()
                assert (hidden is None) == expected.all()
                assert not kept[row_tile, keys].any()
                kept[row_tile, keys] = True
                if hidden is not None:
                    assert hidden.pairs[:, 0].any() and hidden.pairs[:, -1].any()
                    kept[row_tile, keys][:, hidden.columns] = ~hidden.pairs
    np.testing.assert_array_equal(kept, visible)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "mask-tensor"])
def test_memory_grows_with_the_lengths_only(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "1")  # each has tiles of its own, and those of which calls is chance
    monkeypatch.setattr(pool, "tile_scratch", pool.SpareScratch())
    monkeypatch.setattr(operands, "key_scratch", pool.SpareScratch())
    length = 8192
    shape = {"b": 1, "h": 1, "hk": 1, "sq": length, "sk": length, "d": 16, "dv": 16}
    inputs = arrays(shape, FP32)
    mask = np.arange(length)[None, None, None] % 3 > 0 if masked else None
    tracemalloc.start()
    try:
        run(*inputs, mask=mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Results, fp32 sums and a few tiles of scores come to about 6 MiB; one boolean score matrix would be 64 MiB.
    assert peak < length * length / 8, f"peak {peak / 2**20:.1f} MiB"


@pytest.mark.parametrize(("sq", "sk"), [(64, 64), (1, 512)])
def test_memory_of_many_short_heads_is_bounded(sq: int, sk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "1")
    shape = {"b": 64, "h": 16, "hk": 16, "sq": sq, "sk": sk, "d": 4, "dv": 4}
    inputs = arrays(shape, FP32)
    tracemalloc.start()
    try:
        results = run(*inputs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All heads together would have 16 MiB of scores (64 x 64), or fp32 sums of dk and dv (1 x 512).
    assert peak - sum(x.nbytes for x in results if x is not None) < 6 * 2**20, f"peak {peak / 2**20:.1f} MiB"


def test_heads_share_what_their_keys_are_copied_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")
    shape = {"b": 1, "h": 48, "hk": 48, "sq": 1024, "sk": 1024, "d": 64, "dv": 64}
    q, k, v, *_ = arrays(shape, FP16)
    monkeypatch.setattr(operands, "key_scratch", pool.SpareScratch())
    tracemalloc.start()
    try:
        out, lse = reference.forward(q, k, v, band=Mask(), softmax_scale=0.125)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Keys, turned as well, and values of all heads in fp32 would be 37 MiB.
    assert peak - out.nbytes - lse.nbytes < 8 * 2**20, f"peak {peak / 2**20:.1f} MiB"
    tracemalloc.start()
    try:
        few = q[:, :64], k, v, out[:, :64], lse[..., :64]
        gradients = reference.backward(q[:, :64], *few, band=Mask(), softmax_scale=0.125)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Without the turned ones, 24 MiB.
    assert peak - sum(x.nbytes for x in gradients[:3]) < 8 * 2**20, f"peak {peak / 2**20:.1f} MiB"


TINY = {"b": 2, "h": 4, "hk": 2, "sq": 5, "sk": 7, "d": 3, "dv": 4}
ORACLE_OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window-top-left": {"window": (2, 1), "alignment": "top-left"},
    "softcap": {"softcap": 0.9, "scale": 1.1},
    "negative-scale": {"scale": -0.6},
    "mask": {"mask": np.arange(35).reshape(1, 1, 5, 7) % 4 != 1},
}


@pytest.mark.parametrize("options", ORACLE_OPTIONS.values(), ids=ORACLE_OPTIONS)
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_oracle_gradients_are_finite_differences(options: dict, through: str) -> None:
    q, k, v, dout, dlse = arrays(TINY, FP64, seed=3)
    dout = np.zeros_like(dout) if through == "lse" else dout
    dlse = np.zeros_like(dlse) if through == "out" else dlse
    gradients = oracle.attention(q, k, v, dout, dlse, **options)[2:5]
    assert any(np.abs(g).max() > 0.1 for g in gradients)

    def loss(*tensors: np.ndarray) -> float:
        out, lse, *_ = oracle.attention(*tensors, **options)
        assert np.isfinite(lse).all()
        return (out * dout).sum() + (lse * dlse).sum()

    step = 1e-5
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            sides = []
            for sign in (1, -1):
                tensors = [q.copy(), k.copy(), v.copy()]
                tensors[which][index] += sign * step
                sides.append(loss(*tensors))
            numeric[index] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_oracle_on_a_problem_worked_by_hand() -> None:
    # Logits 0 and log 3 with values 0 and 8: weights 1/4 and 3/4.
    q, k = np.array([[[[1.0]]]]), np.array([[[[0.0]], [[np.log(3.0)]]]])
    v, dout = np.array([[[[0.0]], [[8.0]]]]), np.array([[[[1.0]]]])
    out, lse, dq, dk, dv, *_ = oracle.attention(q, k, v, dout, scale=1.0)
    np.testing.assert_allclose(out.ravel(), [6.0])
    np.testing.assert_allclose(lse.ravel(), [np.log(4.0)])
    np.testing.assert_allclose(dv.ravel(), [0.25, 0.75])
    np.testing.assert_allclose(dk.ravel(), [-1.5, 1.5])
    np.testing.assert_allclose(dq.ravel(), [1.5 * np.log(3.0)])


def test_assert_close_refuses_what_it_should() -> None:
    exact = np.array([1.0, -2.0, 3.0])
    naive = exact + 1e-3
    oracle.assert_close((exact + 1.9e-3).astype(FP32), exact, naive, "inside")
    with pytest.raises(AssertionError, match=r"out: worst at \(0,\): got 1\.003\d*, expected 1;"):
        oracle.assert_close(np.array([1.003, -2.0, 3.0], FP32), exact, naive, "out")
    with pytest.raises(AssertionError, match="isnan differs at 1 of 3 places"):
        oracle.assert_close(np.array([1.0, np.nan, 3.0], FP32), exact, naive, "out")
    with pytest.raises(AssertionError, match="isneginf differs"):
        oracle.assert_close(np.array([1.0, -2.0, 3.0], FP32), np.array([1.0, -np.inf, 3.0]), naive, "lse")
    with pytest.raises(AssertionError, match="shape"):
        oracle.assert_close(np.zeros((3, 1), FP32), exact, naive, "out")


@pytest.mark.parametrize("field", range(5), ids=FIELDS)
def test_a_wrong_result_is_noticed_in_every_dtype(field: int) -> None:
    """An error of three parts in a hundred of the largest value lies outside every tolerance of the suite."""
    for dtype in (FP16, BF16, FP32, FP64):
        inputs = arrays(SHAPES["gqa"], dtype)
        actual, exact = run(*inputs), oracle.attention(*inputs)
        naive = oracle.naive_in_dtype(*inputs)
        broken = list(actual)
        broken[field] = actual[field].copy()
        broken[field].flat[7] += np.abs(exact[field]).max() * 0.03
        with pytest.raises(AssertionError, match=f"{FIELDS[field]}: worst"):
            oracle.assert_all_close(oracle.Attention(*broken), exact, naive)
