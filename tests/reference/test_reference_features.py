"""ALiBi, bias, sink, dropout, mask tensors, used lengths and pages of the NumPy backend, in any combination."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import oracle
import pytest
from covering import every_pair, pairs_of
from grid import DTYPES, FACTORS, features
from hypothesis import given
from hypothesis import strategies as st
from inputs import BF16, FP16, FP32, FP64, arrays
from numpy_backend import check, in_head_order, run, translated

from cuflash import reference
from cuflash.dropout import Dropout
from cuflash.masks import Mask
from cuflash.reference import tiles

NAN, INF = np.nan, np.inf

BANDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "sliding": {"causal": True, "window": (7, -1)},
    "right": {"window": (-1, 3)},
}
DIMS = {"even": (8, 8), "longer-v": (16, 24), "odd": (5, 3)}
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (4, 1)}
PACKED = {
    # Lengths, tails, used queries and used keys.
    "varlen": ([0, 17, 9, 22], [12, 20, 0, 30], (3, 5), None, None),
    "varlen-used": ([19, 4, 11, 8], [24, 10, 9, 31], (0, 2), [12, 4, 0, 7], [24, 3, 9, 17]),
}
CASES = every_pair(FACTORS)


def problem(case: dict) -> tuple[list[np.ndarray], dict]:
    """Inputs and the oracle's arguments of one case of the grid."""
    h, hk = HEADS[case["heads"]]
    d, dv = DIMS[case["dims"]]
    dtype = DTYPES[case["dtype"]]
    bias_dtype = dtype if case["bias_dtype"] == "same" else DTYPES[case["bias_dtype"]]
    options = {**BANDS[case["band"]], "alignment": case["alignment"], "softcap": float(case["softcap"])}
    options["scale"] = None if case["scale"] == "default" else float(case["scale"])
    if case["layout"] in PACKED:
        lens_q, lens_k, tail, used_q, used_k = PACKED[case["layout"]]
        batch, max_q, max_k = len(lens_q), max(lens_q), max(lens_k)
        rows = {"b": 1, "sq": sum(lens_q) + tail[0], "sk": sum(lens_k) + tail[1]}
        inputs = [x[0] for x in arrays(rows | {"h": h, "hk": hk, "d": d, "dv": dv}, dtype)]
        options |= {"cu_seqlens_q": np.cumsum([0, *lens_q]), "cu_seqlens_k": np.cumsum([0, *lens_k])}
        options |= {
            name: np.array(used) for name, used in (("seqused_q", used_q), ("seqused_k", used_k)) if used is not None
        }
    else:
        batch = 2
        max_q, max_k = {"dense": (21, 37), "more-queries": (37, 19), "decode": (1, 33)}[case["layout"]]
        inputs = arrays({"b": batch, "h": h, "hk": hk, "sq": max_q, "sk": max_k, "d": d, "dv": dv}, dtype)
    if case["dlse"] == "none":
        inputs[4] = None
    sizes = {"b": batch, "h": h, "q": max_q, "k": max_k, "1": 1}
    patterns = {name: case[name] for name in ("alibi", "bias", "mask", "sink", "dropout")}
    return inputs, options | features(np.random.default_rng(1), bias_dtype, sizes, **patterns)


def name_of(case: dict) -> str:
    return "-".join(f"{name}={level}" for name, level in case.items() if level != FACTORS[name][0]) or "plain"


def test_the_grid_holds_every_pair() -> None:
    pairs = set().union(*map(pairs_of, CASES))
    names = sorted(FACTORS)
    wanted = sum(len(FACTORS[a]) * len(FACTORS[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    assert len(pairs) == wanted and len(CASES) < 90


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_pair_of_features_matches_the_oracle(case: dict) -> None:
    inputs, options = problem(case)
    actual = check(inputs, **options)
    if "bias" in options:
        assert actual.dbias.shape == options["bias"].shape
    if "sink" in options:
        assert actual.dsink.shape == options["sink"].shape


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.sample(6)
def test_every_pair_of_features_has_tangents(case: dict) -> None:
    """Of results, <u, J t> = <J^T u, t>; of gradients, they are finite differences."""
    (q, k, v, dout, dlse), options = problem(case | {"dtype": "fp64", "bias_dtype": "same"})
    backend = translated(q, **options)
    read = {
        name: x for name, x in {"q": q, "k": k, "v": v, **options}.items() if name in ("q", "k", "v", "bias", "sink")
    }
    rng = np.random.default_rng(5)
    changes = {name: rng.standard_normal(x.shape) for name, x in read.items() if rng.random() < 0.75}
    out, lse = backend.forward(q, k, v)
    places = {"out": np.full_like(out, NAN), "lse": np.full_like(lse, NAN)}
    results = backend.forward(q, k, v, along=reference.Tangents(**changes, **places))
    for a, b in zip(results, (out, lse), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    dlse = np.ones(lse.shape) if dlse is None else dlse
    gradients = backend.backward(dout, q, k, v, out, lse, dlse=dlse)
    pulled = sum((getattr(gradients, f"d{name}") * change).sum() for name, change in changes.items())
    pushed = dout * places["out"], dlse * places["lse"]
    assert abs(pulled - sum(x.sum() for x in pushed)) <= 1e-13 * (1 + sum(np.abs(x).sum() for x in pushed))

    of_upstream = {"out": rng.standard_normal(dout.shape), "lse": rng.standard_normal(lse.shape)}
    along = reference.Tangents(**changes, **of_upstream)
    tangents = backend.backward(dout, q, k, v, out, lse, dlse=dlse, along=along)

    def moved(step: float) -> reference.Gradients:
        there = {name: x + step * changes.get(name, 0) for name, x in read.items()}
        q, k, v = (there.pop(name) for name in ("q", "k", "v"))
        out, lse = backend.forward(q, k, v, **there)
        upstream = dout + step * of_upstream["out"], dlse + step * of_upstream["lse"]
        return backend.backward(upstream[0], q, k, v, out, lse, dlse=upstream[1], **there)

    step = 1e-6
    for name, tangent, after, before in zip(tangents._fields, tangents, moved(step), moved(-step), strict=True):
        if tangent is not None and name != "dcaptured":  # of which there are no tangents
            numeric = (after - before) / (2 * step)
            np.testing.assert_allclose(
                tangent, numeric, rtol=1e-6, atol=1e-7 * (1 + np.abs(tangent).max()), err_msg=name
            )


@given(data=st.data())
def test_any_sizes_and_features(data: st.DataObject) -> None:
    def draw(values: st.SearchStrategy | list, name: str):
        return data.draw(st.sampled_from(values) if isinstance(values, list) else values, name)

    size = st.integers(1, 30)
    sizes = {"b": draw(st.integers(1, 3), "b"), "hk": draw(st.integers(1, 3), "hk"), "1": 1}
    sizes["h"] = sizes["hk"] * draw(st.integers(1, 3), "group")
    shape = sizes | {name: draw(size, name) for name in ("sq", "sk", "d", "dv")}
    dtype = draw(list(DTYPES.values()), "dtype")
    options = dict(draw(list(BANDS.values()), "band")) | {"alignment": draw(FACTORS["alignment"], "alignment")}
    options["softcap"] = draw([0.0, 2.0], "softcap")
    patterns = {name: draw(FACTORS[name], name) for name in ("alibi", "bias", "mask", "sink", "dropout")}
    rng = np.random.default_rng(draw(st.integers(0, 9), "seed"))
    options |= features(rng, dtype, sizes | {"q": shape["sq"], "k": shape["sk"]}, **patterns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", draw(st.integers(1, 16), "tile rows"))
        patch.setattr(tiles, "KEYS", draw(st.integers(1, 40), "tile keys"))
        patch.setattr(tiles, "SCORES", draw(st.integers(1, 1024), "tile scores"))
        check(arrays(shape, dtype), **options)


BASE = {"b": 2, "h": 4, "hk": 2, "sq": 10, "sk": 14, "d": 8, "dv": 6}
TINY = {"b": 2, "h": 4, "hk": 2, "sq": 5, "sk": 7, "d": 3, "dv": 4}
DIFFERENTIATED = {
    "plain": {},
    "causal-softcap": {"causal": True, "softcap": 0.9},
    "byte": {"dropout_p": 0.4, "rng_state": (5, 0)},
    "word-unbiased-window": {"dropout_p": 0.2, "dropout_scheme": "word", "rng_state": (1, 8), "window": (3, 1)},
    "alibi": {"alibi_slopes": np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.1, 0.05]])},
}


@pytest.mark.parametrize("options", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
@pytest.mark.parametrize("pattern", ["bhqk", "1h1k", "qk", "b1q1", "1111"])
def test_gradients_are_finite_differences(pattern: str, options: dict) -> None:
    """Of the oracle and of the backend, through out and lse, for every input."""
    q, k, v, dout, dlse = arrays(TINY, FP64, seed=3)
    rng = np.random.default_rng(4)
    sizes = {"b": 2, "h": 4, "q": 5, "k": 7, "1": 1}
    bias, sink = rng.standard_normal([sizes[axis] for axis in pattern]), rng.standard_normal(4)
    inputs = [q, k, v, bias, sink]

    def loss(q, k, v, bias, sink) -> float:
        out, lse, *_ = oracle.attention(q, k, v, bias=bias, sink=sink, **options)
        return (out * dout).sum() + (lse * dlse).sum()

    exact = oracle.attention(q, k, v, dout, dlse, bias=bias, sink=sink, **options)[2:]
    actual = run(q, k, v, dout, dlse, bias=bias, sink=sink, **options)[2:]
    step = 1e-5
    for which, x in enumerate(inputs):
        assert np.abs(exact[which]).max() > 0.02
        numeric = np.zeros_like(x)
        for index in list(np.ndindex(x.shape))[:: max(1, x.size // 12)]:
            sides = []
            for sign in (1, -1):
                moved = [y.copy() for y in inputs]
                moved[which][index] += sign * step
                sides.append(loss(*moved))
            numeric[index] = (sides[0] - sides[1]) / (2 * step)
            np.testing.assert_allclose(exact[which][index], numeric[index], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(actual[which], exact[which], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [FP16, FP32, FP64])
def test_rows_whose_bias_is_all_minus_inf_see_nothing(dtype: type) -> None:
    bias = np.random.default_rng(0).standard_normal((1, 4, 10, 14)).astype(dtype)
    bias[0, 1, 3] = bias[0, :, 7] = -INF
    out, lse, dq, _, _, dbias, _ = check(arrays(BASE, dtype), bias=bias, softcap=2.0)
    empty = np.isneginf(lse)
    np.testing.assert_array_equal(empty, np.broadcast_to(np.isneginf(bias).all(axis=-1), lse.shape))
    assert not in_head_order(out)[empty].any() and not in_head_order(dq)[empty].any()
    assert not dbias[np.isneginf(bias)].any() and np.isfinite(dbias).all()


def test_minus_inf_in_the_bias_is_a_mask() -> None:
    mask = np.random.default_rng(0).random((2, 1, 10, 14)) < 0.5
    mask[:, :, 4] = False
    inputs = arrays(BASE, FP32)
    masked = run(*inputs, mask=mask)
    biased = run(*inputs, bias=np.where(mask, 0, -INF).astype(FP16))
    for a, b in zip(masked[:5], biased[:5], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_stands_in_the_bias_of_hidden_pairs_does_not_matter(value: float) -> None:
    rng = np.random.default_rng(2)
    shape = BASE | {"sq": 30, "sk": 41}
    mask = rng.random((1, 4, 30, 41)) < 0.6
    mask[:, :, 11] = False
    options = {"causal": True, "window": (9, -1), "mask": mask, "sink": np.ones(4, FP32), "dropout_p": 0.3}
    bias = rng.standard_normal((2, 4, 30, 41)).astype(FP32)
    visible = mask & oracle._visible(30, 41, True, (9, -1), "bottom-right")
    inputs = arrays(shape, FP32)
    clean = check(inputs, bias=bias, **options)
    spoiled = run(*inputs, bias=np.where(visible, bias, FP32(value)), **options)
    for name, a, b in zip(oracle.Attention._fields, spoiled, clean, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not spoiled.dbias[~np.broadcast_to(visible, bias.shape)].any()


def test_rows_that_see_nothing_belong_to_the_sink() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sq": 14, "sk": 6}, FP32)
    sink = np.float32([0.5, -2.0, 30.0, -INF])
    out, lse, dq, _, _, _, dsink = check([q, k, v, dout, dlse], causal=True, sink=sink)
    np.testing.assert_array_equal(lse[:, :, :8], np.broadcast_to(sink[:, None], (2, 4, 8)))
    assert not out[:, :8].any() and not dq[:, :8].any() and out[:, 8:, :2].all()
    assert np.isfinite(dsink).all() and dsink[3] == 0
    # Where there are no keys at all, all that moves is lse = sink.
    out, lse, *_, dsink = check([q, k[:, :0], v[:, :0], dout, dlse], sink=sink[:3].repeat(2)[:4])
    assert not out.any()
    np.testing.assert_allclose(dsink, dlse.sum(axis=(0, 2)), rtol=1e-5)


def test_a_sink_of_minus_inf_is_none() -> None:
    inputs = arrays(BASE | {"sq": 14, "sk": 6}, FP32)
    plain, sunk = run(*inputs, causal=True), run(*inputs, causal=True, sink=np.full(4, -INF, FP32))
    for a, b in zip(plain[:5], sunk[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not sunk.dsink.any()


@pytest.mark.parametrize("sink", [-3.0e4, 3.0e4])
def test_sinks_far_from_the_logits_neither_vanish_nor_overflow(sink: float) -> None:
    inputs = arrays(BASE, FP32)
    out, lse, *grads = run(*inputs, sink=np.full(4, sink, FP32))
    plain = run(*inputs)
    if sink < 0:
        np.testing.assert_array_equal(out, plain.out)
        np.testing.assert_array_equal(lse, plain.lse)
    else:
        assert not out.any() and (lse == sink).all()
    assert all(np.isfinite(g).all() for g in grads if g is not None)


def test_sink_is_a_key_without_a_value() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"h": 2}, FP64)
    bias = np.zeros((1, 2, 1, 15))
    bias[0, :, 0, 14] = sink = np.array([0.7, -0.3])
    k1, v1 = (np.concatenate([x, np.zeros_like(x[:, :1])], axis=1) for x in (k, v))
    wide = run(q, k1, v1, dout, dlse, bias=bias)
    sunk = run(q, k, v, dout, dlse, sink=sink)
    np.testing.assert_allclose(sunk.out, wide.out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(sunk.lse, wide.lse, rtol=1e-12)
    np.testing.assert_allclose(sunk.dq, wide.dq, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(sunk.dk, wide.dk[:, :14], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(sunk.dsink, wide.dbias[0, :, 0, 14], rtol=1e-11, atol=1e-13)


def test_alibi_is_a_bias_of_the_distance_from_the_diagonal() -> None:
    slopes = np.float32([0.5, 0.25, 0.125, 1.0])
    for alignment, off in ("bottom-right", 4), ("top-left", 0):
        distance = np.abs(np.arange(10)[:, None] + off - np.arange(14))
        inputs = arrays(BASE, FP32)
        expected = run(*inputs, bias=-slopes[:, None, None] * distance.astype(FP32), alignment=alignment)
        actual = run(*inputs, alibi_slopes=slopes, alignment=alignment)
        for a, b in zip(actual[:5], expected[:5], strict=True):
            np.testing.assert_array_equal(a, b)


def test_lse_is_the_textbook_one_with_alibi_and_causal() -> None:
    q, k, v, dout, dlse = arrays(BASE, FP32)
    _, lse, *_ = run(q * 0, k, v, dout, dlse, causal=True, alibi_slopes=np.full(4, np.log(2), FP32))
    seen = np.arange(5, 15)
    np.testing.assert_allclose(lse[0, 0], np.log(2 - 2.0 ** (1 - seen)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_a_wide_bias_is_not_rounded_to_the_dtype_of_the_call(dtype: type) -> None:
    """One is lost next to 4096 in fp16; the logits are computed in fp32."""
    inputs = arrays(BASE, dtype)
    bias = np.full((1, 1, 1, 14), 4096, FP32)
    bias[..., 3] += 1
    out, *_ = run(inputs[0] * 0, *inputs[1:], bias=bias)
    weights = np.where(np.arange(14) == 3, np.e, 1) / (13 + np.e)
    expected = np.einsum("bkhd,k->bhd", inputs[2].astype(FP64), weights).repeat(2, axis=1)
    np.testing.assert_allclose(out[:, 0].astype(FP64), expected, rtol=2e-3, atol=1e-3)


def test_bias_gradients_are_summed_in_fp32() -> None:
    shape = BASE | {"sq": 64, "sk": 64, "h": 32, "hk": 32}
    inputs = arrays(shape, BF16)
    full, reduced = (run(*inputs, bias=np.zeros(axes, BF16)).dbias for axes in ((2, 32, 64, 64), (1, 1, 1, 64)))
    assert full.dtype == reduced.dtype == FP32
    np.testing.assert_allclose(reduced, full.astype(FP64).sum(axis=(0, 1, 2), keepdims=True), rtol=1e-5, atol=1e-4)


def test_bias_gradient_is_only_made_when_wanted() -> None:
    q, k, v, dout, _ = arrays(BASE, FP32)
    options = {"band": Mask(), "softmax_scale": 0.3, "bias": np.zeros((1, 1, 10, 14), FP32)}
    out, lse = reference.forward(q, k, v, **options)
    assert reference.backward(dout, q, k, v, out, lse, **options).dbias is None
    assert reference.backward(dout, q, k, v, out, lse, bias_grad=True, **options).dbias.shape == (1, 1, 10, 14)


def test_unknown_features_are_refused() -> None:
    q, k, v, *_ = arrays(BASE, FP32)
    with pytest.raises(TypeError, match="alibi_slope"):
        reference.forward(q, k, v, band=Mask(), softmax_scale=0.3, alibi_slope=np.ones(4, FP32))


@pytest.mark.parametrize("scheme", ["byte", "word"])
def test_dropout_of_probability_zero_is_none(scheme: str) -> None:
    q, k, v, *_ = arrays(BASE, FP32)
    plain = reference.forward(q, k, v, band=Mask(), softmax_scale=0.3)
    dropped = reference.forward(q, k, v, band=Mask(), softmax_scale=0.3, dropout=Dropout(0.0, scheme), rng_state=(1, 0))
    for a, b in zip(plain, dropped, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scheme", ["byte", "word"])
def test_one_hot_values_show_the_mask(scheme: str) -> None:
    """Forward through out, backward through dv, against the scheme's formula; lse is that of no dropout."""
    b, h, sq, sk = 2, 3, 19, 40
    q, k, v, dout, _ = arrays({"b": b, "h": h, "hk": h, "sq": sq, "sk": sk, "d": 4, "dv": sk}, FP32)
    v[...] = np.eye(sk)[:, None]
    options = {"band": Mask(), "softmax_scale": 0.3, "dropout": Dropout(0.4, scheme), "rng_state": np.uint64([9, 4])}
    out, lse = reference.forward(q, k, v, **options)
    i, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
    for batch, head in np.ndindex(b, h):
        at = 9, 4, *((0.4,) if scheme == "byte" else ()), batch, head, h, i, j
        kept = oracle.flash_keep(*at) if scheme == "byte" else oracle.word_uniform(*at, sk, sq * sk) > np.float32(0.4)
        np.testing.assert_array_equal(out[batch, :, head] != 0, kept)
        dout_one = np.zeros_like(dout)
        dout_one[batch, :, head, :sq] = np.eye(sq)
        dv = reference.backward(dout_one, q, k, v, out, lse, **options).dv
        np.testing.assert_array_equal(dv[batch, :, head, :sq].T != 0, kept)
    np.testing.assert_array_equal(lse, reference.forward(q, k, v, band=Mask(), softmax_scale=0.3)[1])


def test_rng_state_is_taken_as_ints_or_an_array_and_signed_seeds_as_their_bits() -> None:
    q, k, v, *_ = arrays(BASE, FP32)

    def out(state: object) -> np.ndarray:
        dropout = Dropout(0.4)
        return reference.forward(q, k, v, band=Mask(), softmax_scale=0.3, dropout=dropout, rng_state=state)[0]

    expected = out((2**64 - 3, 8))
    for state in np.uint64([2**64 - 3, 8]), np.int64([-3, 8]), (-3, 8):
        np.testing.assert_array_equal(out(state), expected)
    assert (out((2**64 - 3, 12)) != expected).any()


@pytest.mark.parametrize("dropout", [Dropout(0.9, unbiased=True), Dropout(0.9, "word"), Dropout(0.9)])
def test_dropout_keeps_the_mean_but_for_the_rounding_of_bytes(dropout: Dropout) -> None:
    """Equal probabilities and values of one: the mean over all rows is the kept share times its scale."""
    q, k, v = (np.zeros((8, 512, 8, d), FP32) for d in (2, 2, 1))
    v[...] = 1
    out, _ = reference.forward(q, k, v, band=Mask(), softmax_scale=1.0, dropout=dropout, rng_state=(3, 0))
    spread = 3 / np.sqrt(8 * 8 * 512 * 512)  # sqrt((1 - keep) / keep) = 3
    biased = dropout.scheme == "byte" and not dropout.unbiased
    assert (abs(out.astype(FP64).mean() - 1) > 4 * spread) == biased


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scheme", ["byte", "word"])
def test_packed_sequences_draw_the_mask_of_their_batch_element(scheme: str) -> None:
    """Equal lengths: packed is dense, bit for bit, with every feature on."""
    shape = {"b": 3, "h": 4, "hk": 2, "sq": 20, "sk": 35, "d": 16, "dv": 16}
    inputs = arrays(shape, FP32)
    sizes = {"b": 3, "h": 4, "q": 20, "k": 35, "1": 1}
    rng = np.random.default_rng(0)
    patterns = {"alibi": "bh", "bias": "bhqk", "mask": "b11k", "sink": "h", "dropout": scheme}
    options = {"causal": True, **features(rng, FP32, sizes, **patterns)}
    dense = run(*inputs, **options)
    q, k, v, dout, dlse = inputs
    flat = run(
        *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout)),
        dlse.transpose(1, 0, 2).reshape(4, -1),
        **options,
        cu_seqlens_q=np.arange(0, 61, 20),
        cu_seqlens_k=np.arange(0, 106, 35),
    )
    for name, a, b in zip(oracle.Attention._fields[:6], flat, dense, strict=False):
        b = b.transpose(1, 0, 2) if name == "lse" else b
        np.testing.assert_array_equal(a, b.reshape(a.shape), err_msg=name)
    np.testing.assert_allclose(flat.dsink, dense.dsink, rtol=1e-5, atol=1e-6)


def test_word_numbers_count_the_longest_lengths_that_are_given() -> None:
    inputs = [x[0] for x in arrays({"b": 1, "h": 2, "hk": 2, "sq": 13, "sk": 20, "d": 4, "dv": 4}, FP32)]
    options = {"cu_seqlens_q": np.array([0, 5, 13]), "cu_seqlens_k": np.array([0, 11, 20])}
    options |= {"dropout_p": 0.5, "dropout_scheme": "word", "rng_state": (2, 0)}
    derived = check(inputs, **options)
    given_same = run(*inputs, **options, max_seqlen_q=8, max_seqlen_k=11)
    np.testing.assert_array_equal(given_same.out, derived.out)
    longer = check(inputs, **options, max_seqlen_q=16, max_seqlen_k=32)
    np.testing.assert_array_equal(longer.out[:5, 0], derived.out[:5, 0])
    assert (longer.out[:5, 1] != derived.out[:5, 1]).any() and (longer.out[5:] != derived.out[5:]).any()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_that_are_not_used_are_not_read_and_get_zeros(dtype: type) -> None:
    inputs = [x[0] for x in arrays(BASE | {"b": 1, "sq": 20, "sk": 34}, dtype)]
    options = {"cu_seqlens_q": np.array([0, 6, 15]), "cu_seqlens_k": np.array([0, 12, 30]), "causal": True}
    options |= {"seqused_q": np.array([4, 50]), "seqused_k": np.array([7, 0]), "sink": np.float32([1, 2, 3, 4])}
    clipped = options | {"seqused_q": np.array([4, 9])}
    clean = check(inputs, **clipped)
    used = np.isin(np.arange(20), [0, 1, 2, 3, *range(6, 15)])
    for x in inputs[0], inputs[3]:
        x[~used] = NAN
    inputs[4][:, ~used] = NAN
    actual = run(*inputs, **options)
    for name, a, b in zip(oracle.Attention._fields, actual, clean, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not actual.out[~used].any() and not actual.dq[~used].any() and np.isneginf(actual.lse[:, ~used]).all()
    # The second sequence has no key: its used rows belong to the sink.
    np.testing.assert_array_equal(actual.lse[:, 6:15], options["sink"][:, None].repeat(9, axis=1))


def pages_of(rows: list[np.ndarray], page_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A cache of shuffled pages that holds each of (len, heads, d), and its table; NaN wherever no row lies."""
    counts = [-(-len(x) // page_size) for x in rows]
    order = rng.permutation(sum(counts) + 3)
    pages = np.full((len(order), page_size, *rows[0].shape[1:]), NAN, rows[0].dtype)
    table = np.full((len(rows), max(counts) + 1), 2**30, np.int32)
    for b, x in enumerate(rows):
        table[b, : counts[b]] = order[sum(counts[:b]) :][: counts[b]]
        for start in range(0, len(x), page_size):
            part = x[start : start + page_size]
            pages[table[b, start // page_size], : len(part)] = part
    return pages, table


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["dense-queries", "packed-queries"])
@pytest.mark.parametrize("extra", ["plain", "features"])
def test_paged_is_packed_bit_for_bit(page_size: int, packed: bool, extra: str) -> None:
    rng = np.random.default_rng(page_size)
    lens_q, lens_k = ([5, 0, 9, 3] if packed else [4, 4, 4, 4]), [33, 7, 0, 50]
    shape = {"b": 1, "h": 4, "hk": 2, "sq": sum(lens_q), "sk": sum(lens_k), "d": 8, "dv": 6}
    q, k, v, *_ = (x[0] for x in arrays(shape, FP32))
    cu_q, cu_k = np.cumsum([0, *lens_q]), np.cumsum([0, *lens_k])
    options = {"band": Mask(right=0), "softmax_scale": 0.4}
    if extra == "features":
        options |= {"alibi": rng.random((4, 4)).astype(FP32), "sink": rng.random(4).astype(FP32)}
        options |= {"bias": rng.random((4, 1, 9, 50)).astype(FP16), "dropout": Dropout(0.2, "word")}
        options |= {"rng_state": (1, 4), "seqused_q": np.array([4, 0, 2, 3]), "len_q": 9}
    expected, expected_lse = reference.forward_varlen(q, k, v, cu_q, cu_k, **options)
    (k_pages, table), (v_pages, _) = (
        pages_of([x[a:b] for a, b in pairwise(cu_k)], page_size, np.random.default_rng(7)) for x in (k, v)
    )
    cache = k_pages, v_pages, table, np.array(lens_k)
    if packed:
        out, lse = reference.forward_paged(q, *cache, cu_seqlens_q=cu_q, **options)
    elif extra == "plain":
        target = np.full((4, 4, 4, 12), NAN, FP32)[..., ::2]
        out, lse = reference.forward_paged(q.reshape(4, 4, 4, 8), *cache, out=target, **options)
        assert out is target
    else:
        # Dense queries number pairs by their own length.
        options["len_q"] = 4
        expected, expected_lse = reference.forward_varlen(q, k, v, cu_q, cu_k, **options)
        out, lse = reference.forward_paged(q.reshape(4, 4, 4, 8), *cache, **options)
    if not packed:
        lse = lse.transpose(1, 0, 2)
    np.testing.assert_array_equal(out.reshape(expected.shape), expected)
    np.testing.assert_array_equal(lse.reshape(expected_lse.shape), expected_lse)


def test_a_cache_without_pages_has_one_page_a_sequence() -> None:
    q, k, v, *_ = arrays(BASE | {"b": 3, "sq": 2}, FP32)
    used = np.array([14, 5, 99])
    out, lse = reference.forward_paged(q, k, v, np.arange(3)[:, None], used, band=Mask(right=0), softmax_scale=0.3)
    for b, length in enumerate((14, 5, 14)):
        one = slice(b, b + 1)
        expected = reference.forward(q[one], k[one, :length], v[one, :length], band=Mask(right=0), softmax_scale=0.3)
        np.testing.assert_array_equal(out[one], expected[0])
        np.testing.assert_array_equal(lse[one], expected[1])


def peak_of(function, *args, **kwargs) -> int:
    tracemalloc.start()
    try:
        function(*args, **kwargs)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scheme", ["byte", "word"])
def test_memory_grows_with_the_lengths_only_with_every_feature(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 64)
    monkeypatch.setattr(tiles, "KEYS", 128)
    length = 2048
    inputs = arrays({"b": 1, "h": 1, "hk": 1, "sq": length, "sk": length, "d": 8, "dv": 8}, FP32)
    options = {"alibi_slopes": np.float32([0.01]), "bias": np.zeros((1, 1, 1, length), FP32)}
    options |= {"sink": np.zeros(1, FP32), "mask": np.ones((1, 1, length, 1), bool)}
    peak = peak_of(run, *inputs, **options, dropout_p=0.1, dropout_scheme=scheme)
    # Results, fp32 sums and a few tiles come to less than 1 MiB; one boolean score matrix would be 4 MiB.
    assert peak < length * length / 2, f"peak {peak / 2**20:.1f} MiB"


def test_pages_are_read_a_tile_at_a_time() -> None:
    pages = np.zeros((64, 1024, 1, 64), FP32)  # 16 MiB
    q, table, used = np.zeros((1, 1, 1, 64), FP32), np.arange(64)[None], np.array([65536])
    peak = peak_of(reference.forward_paged, q, pages, pages, table, used, band=Mask(), softmax_scale=1.0)
    assert peak < 2 * 2**20, f"peak {peak / 2**20:.1f} MiB"
