"""The functions with PyTorch's explicit arguments and results, on NumPy: orders, layouts, states and refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import InvalidArgument, PhiloxGenerator
from cuflash.api.pytorch import backend
from cuflash.dtypes import DTYPES
from cuflash.ops import Options

B, H, HK, SQ, SK, D, DV = 2, 4, 2, 19, 27, 16, 24
STARTS_Q, STARTS_K = np.array([0, 8, 8, 15], np.int32), np.array([0, 3, 12, 22], np.int32)
USED = np.array([3, 0, 6], np.int32)
STATE = 0x123456789ABCDEF0, 64
P = 0.3
OLDER = ["legacy", "rocm", "aotriton"]
CONVENTIONS = ["current", *OLDER]


def random(*shape: int, dtype: str = "fp32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[dtype].numpy)


def inputs(dtype: str = "fp32", packed: bool = False) -> list[np.ndarray]:
    """q, k, v."""
    rows_q, rows_kv = ((SQ,), (SK,)) if packed else ((B, SQ), (B, SK))
    shapes = (*rows_q, H, D), (*rows_kv, HK, D), (*rows_kv, HK, DV)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def assert_matches(actual: tuple, *arrays: np.ndarray, **options) -> None:
    """Compare (out, lse, dq, dk, dv, dbias), or the first of them, with the oracle; empty rows have lse +inf."""
    exact, naive = (f(*arrays, **options) for f in (oracle.attention, oracle.naive_in_dtype))
    exact, naive = (x._replace(lse=np.where(x.lse == -np.inf, np.inf, x.lse)) for x in (exact, naive))
    padded = oracle.Attention(*actual, *[None] * (len(oracle.Attention._fields) - len(actual)))
    oracle.assert_all_close(padded, exact, naive)


TENSORS = "q k v out_"
FORWARD = "p_dropout softmax_scale is_causal window_size_left window_size_right"
LENGTHS = "cu_seqlens_q cu_seqlens_k"
GIVEN = "dout q k v out softmax_lse dq_ dk_ dv_"
PHILOX = "deterministic philox_seed philox_offset"
VARLEN = f"max_seqlen_q max_seqlen_k {FORWARD.replace('softmax_scale', 'softmax_scale zero_tensors')}"
BIAS = "attn_bias_ bias_requires_grad grad_bias"
HEADERS = {
    "mha_fwd": f"{TENSORS} alibi_slopes_ {FORWARD} softcap return_softmax gen_",
    "mha_varlen_fwd": f"{TENSORS} {LENGTHS} seqused_k block_table_ alibi_slopes_ {VARLEN} softcap return_softmax gen_",
    "mha_bwd": f"{GIVEN} alibi_slopes_ {FORWARD} softcap {PHILOX}",
    "mha_varlen_bwd": f"{GIVEN} {LENGTHS} alibi_slopes_ {VARLEN} softcap {PHILOX}",
    "mha_fwd_ck": f"{TENSORS} {FORWARD} return_softmax gen_ attn_bias_",
    "mha_varlen_fwd_ck": f"{TENSORS} {LENGTHS} seqused_k {VARLEN} return_softmax gen_ attn_bias_",
    "mha_bwd_ck": f"{GIVEN} {BIAS} {FORWARD} {PHILOX}",
    "mha_varlen_bwd_ck": f"{GIVEN} {LENGTHS} {BIAS} {VARLEN} {PHILOX}",
}
"""Arguments in the order of the C++ headers."""


def positional(name: str) -> list[str]:
    parameters = inspect.signature(getattr(cuflash, name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", HEADERS)
def test_arguments_are_those_of_the_headers(name: str) -> None:
    assert positional(name) == HEADERS[name].split()


def call(function: Callable, *head: object, convention: str = "current", **values: object) -> tuple:
    """Call with positional arguments alone, in the convention's order."""
    lacks = {"legacy": ("softcap", "block_table_"), "aotriton": ("softcap",)}.get(convention, ())
    parameters = inspect.signature(function).parameters
    tail = []
    for name in [name for name in positional(function.__name__) if name not in lacks][len(head) :]:
        default = parameters[name].default
        tail.append(values.pop(name, None if default is inspect.Parameter.empty else default))
    assert not values, values
    return function(*head, *tail, **({} if convention == "current" else {"convention": convention}))


MASKS = {
    "full": ({}, {}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "window": ({"window_size_left": 5, "window_size_right": 3}, {"window": (5, 3)}),
    "window-of-one": ({"window_size_left": 0, "window_size_right": 0}, {"window": (0, 0)}),
    "unbounded": ({"window_size_left": None, "window_size_right": -7}, {}),
    "causal-wins": (
        {"is_causal": True, "window_size_left": 6, "window_size_right": 5},
        {"causal": True, "window": (6, 0)},
    ),
    "scale": ({"softmax_scale": -0.4}, {"scale": -0.4}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "expected"), MASKS.values(), ids=MASKS)
def test_dense(options: dict, expected: dict, dtype: str) -> None:
    q, k, v = inputs(dtype)
    slopes = np.abs(random(B, H, seed=5))
    extra = {"alibi_slopes": slopes, "softcap": 1.5, "dropout_p": P, "rng_state": STATE}
    both = {"alibi_slopes_": slopes, "softcap": 1.5, "p_dropout": P}
    results = call(cuflash.mha_fwd, q, k, v, gen_=STATE, **both, **options)
    out, *given, lse, rng_state, unused, probabilities = results
    assert len(results) == 8 and [x is y for x, y in zip(given, (q, k, v), strict=True)] == [True] * 3
    assert rng_state.dtype == np.uint64 and tuple(rng_state.tolist()) == STATE
    assert unused.shape == () and unused.dtype == np.uint64 and probabilities.shape == (0,)

    dout = random(*out.shape, dtype=dtype, seed=3)
    gradients = call(
        cuflash.mha_bwd, dout, q, k, v, out, lse, philox_seed=rng_state, philox_offset=unused, **both, **options
    )
    assert len(gradients) == 4
    assert_matches((out, lse, *gradients[:3]), q, k, v, dout, **extra, **expected)
    both |= {"philox_seed": STATE[0], "philox_offset": STATE[1], "deterministic": True}
    again = call(cuflash.mha_bwd, dout, q, k, v, out, lse, **both, **options)
    for one, other in zip(gradients, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("lengths", [None, (9, 13)], ids=["derived", "given"])
@pytest.mark.parametrize(("options", "expected"), MASKS.values(), ids=MASKS)
def test_varlen(options: dict, expected: dict, lengths: tuple | None, convention: str) -> None:
    q, k, v = inputs(packed=True)
    slopes = np.abs(random(H, seed=5))
    packed = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED}
    longest = {} if lengths is None else {"max_seqlen_q": lengths[0], "max_seqlen_k": lengths[1]}
    both = {"alibi_slopes_": slopes, "p_dropout": P, **longest, **options}
    results = call(cuflash.mha_varlen_fwd, q, k, v, None, *packed.values(), convention=convention, gen_=STATE, **both)
    out, _, _, _, lse, seed, offset, _ = results
    dout = random(*out.shape, seed=3)
    signature = dout, q, k, v, out, lse, None, None, None, STARTS_Q, STARTS_K
    keywords = {} if convention == "current" else {"convention": convention}
    gradients = cuflash.mha_varlen_bwd(
        *signature, philox_seed=seed, philox_offset=offset, seqused_k=USED, **both, **keywords
    )
    delta = (1 - P) * (dout * out).sum(-1).T
    if convention == "current":
        packed_lse = lse
        expected_d = np.zeros((H, SQ + 128 * 3), np.float32)
        for e, (start, end) in enumerate(pairwise(STARTS_Q)):
            expected_d[:, start + 128 * e : end + 128 * e] = delta[:, start:end]
    else:
        max_q = 8 if lengths is None else lengths[0]
        assert lse.shape == (3, H, max_q) and seed.shape == offset.shape == () and seed.dtype == np.int64
        assert (int(seed), int(offset)) == STATE
        packed_lse = np.full((H, SQ), np.inf, np.float32)
        expected_d = np.zeros((3, H, 128 if convention == "legacy" else max_q), np.float32)
        for e, (start, end) in enumerate(pairwise(STARTS_Q)):
            packed_lse[:, start:end] = lse[e, :, : end - start]
            expected_d[e, :, : end - start] = delta[:, start:end]
            assert np.isposinf(lse[e, :, end - start :]).all()
    extra = {"alibi_slopes": slopes, "dropout_p": P, "rng_state": STATE}
    assert_matches((out, packed_lse, *gradients[:3]), q, k, v, dout, **packed, **extra, **expected)
    assert gradients[3].shape == expected_d.shape
    np.testing.assert_allclose(gradients[3], expected_d, rtol=1e-5, atol=1e-5)
    assert not out[STARTS_Q[-1] :].any() and np.isposinf(packed_lse[:, STARTS_Q[-1] :]).all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("p", [0.0, P])
def test_dense_conventions(convention: str, p: float) -> None:
    q, k, v = inputs()
    results = call(cuflash.mha_fwd, q, k, v, convention=convention, p_dropout=p, return_softmax=True, gen_=STATE)
    out, _, _, _, lse, seed, offset, probabilities = results
    rounded = (128, 128) if convention in ("current", "legacy") else (SQ, SK)
    assert probabilities.shape == (B, H, *rounded)
    if convention == "current":
        assert seed.shape == (2,) and tuple(seed.tolist()) == (STATE if p else (0, 0))
    else:
        assert seed.shape == offset.shape == (() if p else (0,))
    dout = random(*out.shape, seed=3)
    keywords = {"p_dropout": p, "philox_seed": seed, "philox_offset": offset}
    gradients = call(cuflash.mha_bwd, dout, q, k, v, out, lse, convention=convention, **keywords)
    assert_matches((out, lse, *gradients[:3]), q, k, v, dout, dropout_p=p, rng_state=STATE)
    softmax_d = gradients[3]
    assert softmax_d.shape == (B, H, rounded[0]) and softmax_d.dtype == np.float32
    np.testing.assert_allclose(softmax_d[..., :SQ], (1 - p) * (dout * out).sum(-1).swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    assert not softmax_d[..., SQ:].any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_probabilities_are_normalised_and_signed(dtype: str) -> None:
    q, k, v = inputs(dtype)
    slopes = np.abs(random(H, seed=5))
    options = {"alibi_slopes_": slopes, "p_dropout": P, "is_causal": True, "softcap": 2.0, "gen_": STATE}
    out, *_, signed = call(cuflash.mha_fwd, q, k, v, return_softmax=True, **options)
    assert signed.dtype == q.dtype and signed.shape == (B, H, 128, 128)
    inside, signed = signed[:, :, :SQ, :SK].astype(np.float64), signed.astype(np.float64)
    signed[:, :, :SQ, :SK] = 0
    assert not signed.any()
    i, j = np.arange(SQ)[:, None], np.arange(SK)[None, :]
    kept = np.stack([[oracle.flash_keep(*STATE, P, b, h, H, i, j) for h in range(H)] for b in range(B)])
    np.testing.assert_array_equal(np.signbit(inside), ~kept)
    p = np.abs(inside)
    assert not p[..., j - i > SK - SQ].any()
    tolerance = 3 * float(np.finfo(np.float32).eps) if dtype == "fp32" else 2**-7
    np.testing.assert_allclose(p.sum(-1), 1, atol=tolerance * SK)
    dropped = np.einsum("bhij,bjhd->bihd", p * kept / (1 - P), np.repeat(v.astype(np.float64), H // HK, axis=2))
    np.testing.assert_allclose(dropped, out.astype(np.float64), atol=20 * tolerance)


def test_probabilities_that_vanish_say_what_was_dropped() -> None:
    q, k, v = (10 * x for x in inputs("fp16"))
    signed = cuflash.mha_fwd(q, k, v, p_dropout=P, return_softmax=True, gen_=STATE)[7][:, :, :SQ, :SK]
    assert (signed == 0).mean() > 0.5
    i, j = np.arange(SQ)[:, None], np.arange(SK)[None, :]
    kept = np.stack([[oracle.flash_keep(*STATE, P, b, h, H, i, j) for h in range(H)] for b in range(B)])
    np.testing.assert_array_equal(np.signbit(signed), ~kept)


@pytest.mark.parametrize("convention", ["current", "rocm"])
def test_probabilities_of_packed_sequences_longer_than_a_column_block(convention: str) -> None:
    starts_q, starts_k = np.array([0, 3, 3, 8], np.int32), np.array([0, 300, 310, 530], np.int32)
    used = np.array([290, 10, 7], np.int32)
    q, k, v = (random(n, 2, 8, seed=i) for i, n in enumerate((9, 540, 540)))
    results = call(
        cuflash.mha_varlen_fwd, q, k, v, None, starts_q, starts_k, used, convention=convention, p_dropout=P,
        return_softmax=True, gen_=STATE,
    )  # fmt: skip
    signed = results[7]
    assert signed.shape == ((3, 2, 128, 384) if convention == "current" else (3, 2, 5, 300))
    for e, rows, keys in ((0, 3, 290), (2, 5, 7)):
        p = signed[e, :, :rows, :keys]
        np.testing.assert_allclose(np.abs(p).sum(-1), 1, rtol=1e-5)
        i, j = np.arange(rows)[:, None], np.arange(keys)[None, :]
        kept = np.stack([oracle.flash_keep(*STATE, P, e, h, 2, i, j) for h in range(2)])
        np.testing.assert_array_equal(np.signbit(p), ~kept)
        assert not signed[e, :, rows:].any() and not signed[e, :, :, keys:].any()
    assert not signed[1].any()


def test_outputs_are_filled_in_slices_of_packed_tensors() -> None:
    x = np.full((B, SQ, 3, H, D), np.nan, np.float32)
    packed = random(B, SQ, 3, H, D)
    q, k, v = (packed[:, :, i] for i in range(3))
    dout = random(B, SQ, H, D, seed=3)
    out_ = np.full((B, SQ, 2, H, D), np.nan, np.float32)
    out, *_, lse, _, _, _ = call(cuflash.mha_fwd, q, k, v, out_=out_[:, :, 1])
    assert out.base is out_ and np.isnan(out_[:, :, 0]).all()
    gradients = call(cuflash.mha_bwd, dout, q, k, v, out, lse, x[:, :, 0], x[:, :, 1], x[:, :, 2])[:3]
    assert all(g.base is x for g in gradients)
    assert_matches((out, lse, *(x[:, :, i] for i in range(3))), q, k, v, dout)

    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_Q}
    q, k, v = (packed[0, :, i] for i in range(3))
    out, *_, lse, _, _, _ = cuflash.mha_varlen_fwd(q, k, v, out_[0, :, 0], *lengths.values())
    gradients = cuflash.mha_varlen_bwd(
        dout[0], q, k, v, out, lse, x[1, :, 0], x[1, :, 1], x[1, :, 2], *lengths.values()
    )
    assert all(g.base is x for g in gradients[:3]) and out.base is out_
    assert_matches((out, lse, *(x[1, :, i] for i in range(3))), q, k, v, dout[0], **lengths)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("zero_tensors", [False, True])
def test_zero_tensors_say_what_rows_of_no_sequence_hold(zero_tensors: bool, convention: str) -> None:
    q, k, v = inputs(packed=True)
    keywords = {} if convention == "current" else {"convention": convention}
    # The second sequence has queries but no keys: its rows are +inf either way.
    starts_q, starts_k = np.array([0, 8, 13], np.int32), np.array([0, 9, 9], np.int32)
    out, *_, lse, _, _, _ = cuflash.mha_varlen_fwd(
        q, k, v, None, starts_q, starts_k, zero_tensors=zero_tensors, **keywords
    )
    nothing, empty = (lse[:, 13:], lse[:, 8:13]) if convention == "current" else (lse[1, :, 5:], lse[1, :, :5])
    assert (nothing == (-np.inf if zero_tensors else np.inf)).all() and nothing.size
    assert np.isposinf(empty).all() and not out[8:].any()
    gradients = cuflash.mha_varlen_bwd(
        np.ones_like(out), q, k, v, out, lse, None, None, None, starts_q, starts_k, zero_tensors=zero_tensors,
        **keywords,
    )  # fmt: skip
    assert not gradients[0][8:].any() and not gradients[1][9:].any() and not gradients[2][9:].any()
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("lengths", ["cu_seqlens_k", "seqused_k"])
def test_pages(page_size: int, lengths: str) -> None:
    q, k, v = inputs(packed=True)
    starts_k = STARTS_K if lengths == "cu_seqlens_k" else np.array([0, 300, 600, 900], np.int32)
    used = None if lengths == "cu_seqlens_k" else np.diff(STARTS_K).astype(np.int32)
    most = -(-10 // page_size)
    table = np.random.default_rng(0).permutation(3 * most + 2)[: 3 * most].reshape(3, most).astype(np.int32)
    k_pages, v_pages = (np.full((3 * most + 2, page_size, *x.shape[1:]), np.nan, x.dtype) for x in (k, v))
    for b in range(3):
        for j in range(STARTS_K[b + 1] - STARTS_K[b]):
            at = table[b, j // page_size], j % page_size
            k_pages[at], v_pages[at] = k[STARTS_K[b] + j], v[STARTS_K[b] + j]
    slopes = np.abs(random(H, seed=5))
    options = {"alibi_slopes_": slopes, "p_dropout": P, "is_causal": True, "gen_": STATE, "softcap": 2.0}
    expected = call(cuflash.mha_varlen_fwd, q, k, v, None, STARTS_Q, STARTS_K, **options)
    out_ = np.full_like(expected[0], np.nan)
    paged = call(cuflash.mha_varlen_fwd, q, k_pages, v_pages, out_, STARTS_Q, starts_k, used, table, **options)
    assert paged[0] is out_ and paged[2] is k_pages
    for one, other in zip((paged[0], paged[4]), (expected[0], expected[4]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert paged[5].tolist() == list(STATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table_": np.zeros((3, 1), np.int64)}, "block_table_ is int64; expected int32"),
        ({"block_table_": np.zeros(3, np.int32)}, "block_table_ has shape (3,); expected (b, max_pages)"),
        ({"block_table_": np.zeros((2, 1), np.int32)}, "block_table_ has 2 rows; expected one for each of the 3"),
        (
            {"block_table_": np.full((3, 1), 4, np.int32)},
            "block_table_[0, 0] is 4, but there are 4 pages; expected the number of one, from 0.",
        ),
        (
            {"cu_seqlens_k": np.array([0, 3, 40, 41], np.int32)},
            "block_table_ has 1 pages of 16 rows a sequence, but sequence 1",
        ),
        (
            {"k": np.zeros((64, HK, D), np.float32)},
            "k has 3 dimensions, shape (64, 2, 16); expected 4: (num_pages, page_size, h, d)",
        ),
        ({"v": np.zeros((5, 16, HK, D), np.float32)}, "v has number of pages 5 but k has 4; they must be equal"),
        ({"return_softmax": True}, "return_softmax is True and block_table_ is given"),
    ],
)
def test_what_pages_refuse(change: dict, message: str) -> None:
    pages = np.zeros((4, 16, HK, D), np.float32)
    arguments = {
        "q": inputs(packed=True)[0], "k": pages, "v": pages, "out_": None, "cu_seqlens_q": STARTS_Q,
        "cu_seqlens_k": STARTS_K, "block_table_": np.zeros((3, 1), np.int32),
    }  # fmt: skip
    cuflash.mha_varlen_fwd(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.mha_varlen_fwd(**arguments | change)
    assert str(error.value).startswith(message)


def test_generators_move_on_by_32_numbers_a_head() -> None:
    q, k, v = inputs()
    generator = PhiloxGenerator(7, 8)
    states = [tuple(call(cuflash.mha_fwd, q, k, v, p_dropout=P, gen_=generator)[5].tolist()) for _ in range(2)]
    assert states == [(7, 8), (7, 8 + B * H * 32)] and generator.state == (7, 8 + 2 * B * H * 32)
    call(cuflash.mha_fwd, q, k, v, gen_=generator)
    assert generator.state == (7, 8 + 2 * B * H * 32)
    cuflash.manual_seed(3)
    assert call(cuflash.mha_fwd, q, k, v, p_dropout=P)[5].tolist() == [3, 0]
    with pytest.raises(InvalidArgument, match="generator is 3; expected"):
        call(cuflash.mha_fwd, q, k, v, p_dropout=P, gen_=3)


def test_a_generator_of_torch_is_drawn_from_and_moves_on() -> None:
    class State:
        """As much of a uint8 tensor in host memory as is touched."""

        def __init__(self, raw: bytes) -> None:
            self.x = np.frombuffer(raw, np.uint8).copy()

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return self.x

        def clone(self) -> State:
            return State(self.x.tobytes())

        def numpy(self) -> np.ndarray:
            return self.x

    states = [State(PhiloxGenerator(7, 8).torch_state())]
    generator = SimpleNamespace(get_state=lambda: states[-1], set_state=states.append)
    q, k, v = inputs()
    results = call(cuflash.mha_fwd, q, k, v, p_dropout=P, gen_=generator)
    assert results[5].tolist() == [7, 8]
    assert PhiloxGenerator.from_torch_state(states[-1].x).state == (7, 8 + B * H * 32)
    assert PhiloxGenerator.from_torch_state(states[0].x).state == (7, 8)


BIASES = [(B, H, SQ, SK), (1, H, SQ, SK), (B, 1, 1, SK), (1, 1, SQ, 1), (H, SQ, SK), (SQ, SK), (SK,)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("given_array", [False, True])
def test_bias_and_its_gradient(shape: tuple[int, ...], given_array: bool) -> None:
    q, k, v = inputs("fp64")
    bias = random(*shape, dtype="fp64", seed=6)
    forward = {"p_dropout": P, "softmax_scale": 0.3, "is_causal": True, "window_size_left": 9}
    results = call(cuflash.mha_fwd_ck, q, k, v, attn_bias_=bias, gen_=STATE, return_softmax=True, **forward)
    out, _, _, _, lse, seed, offset, values = results
    i, j = np.arange(SQ)[:, None], np.arange(SK)[None, :]
    kept = np.stack([[oracle.flash_keep(*STATE, P, b, h, H, i, j) for h in range(H)] for b in range(B)])
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values <= int((1 - P) * 255), kept)

    dout = random(*out.shape, dtype="fp64", seed=3)
    grad_bias = np.full(shape, np.nan) if given_array else None
    gradients = call(
        cuflash.mha_bwd_ck, dout, q, k, v, out, lse, attn_bias_=bias, bias_requires_grad=True, grad_bias=grad_bias,
        philox_seed=seed, philox_offset=offset, **forward,
    )  # fmt: skip
    assert len(gradients) == 5 and gradients[3].shape == (B, H, SQ) and (gradients[4] is grad_bias) == given_array
    expected = {"causal": True, "window": (9, 0), "scale": 0.3, "dropout_p": P, "rng_state": STATE, "bias": bias}
    assert_matches((out, lse, *gradients[:3], gradients[4]), q, k, v, dout, **expected)
    without = call(
        cuflash.mha_bwd_ck, dout, q, k, v, out, lse, attn_bias_=bias, philox_seed=seed, philox_offset=offset, **forward
    )
    assert without[4] is None
    np.testing.assert_array_equal(without[0], gradients[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_expanded_bias_has_the_gradient_of_what_it_was_expanded_from(dtype: str) -> None:
    q, k, v = inputs(dtype)
    bias = random(1, H, 1, SK, dtype=dtype, seed=6)
    expanded = np.broadcast_to(bias, (B, H, SQ, SK))
    out, _, _, _, lse, *_ = call(cuflash.mha_fwd_ck, q, k, v, attn_bias_=expanded)
    dout = random(*out.shape, dtype=dtype, seed=3)
    gradients = call(cuflash.mha_bwd_ck, dout, q, k, v, out, lse, attn_bias_=expanded, bias_requires_grad=True)
    assert gradients[4].dtype == q.dtype
    assert_matches((out, lse, *gradients[:3], gradients[4]), q, k, v, dout, bias=bias)


def test_bias_of_packed_sequences() -> None:
    q, k, v = inputs("fp64", packed=True)
    bias = random(1, H, 9, 11, dtype="fp64", seed=6)
    packed = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED}
    both = {"max_seqlen_q": 9, "max_seqlen_k": 11, "attn_bias_": bias, "p_dropout": P}
    results = call(cuflash.mha_varlen_fwd_ck, q, k, v, None, *packed.values(), gen_=STATE, return_softmax=True, **both)
    out, _, _, _, lse, seed, offset, values = results
    assert lse.shape == (3, H, 9) and values.shape == (3, H, 9, 11) and values.dtype == np.uint8
    dout = random(*out.shape, dtype="fp64", seed=3)
    gradients = cuflash.mha_varlen_bwd_ck(
        dout, q, k, v, out, lse, None, None, None, STARTS_Q, STARTS_K, bias_requires_grad=True, philox_seed=seed,
        philox_offset=offset, seqused_k=USED, **both,
    )  # fmt: skip
    assert gradients[3].shape == (3, H, 9)
    exact = oracle.attention(q, k, v, dout, bias=bias, dropout_p=P, rng_state=STATE, **packed)
    for one, other in zip((out, *gradients[:3], gradients[4]), (exact.out, *exact[2:6]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@given(b=st.integers(0, 2), sq=st.sampled_from([0, 1, 33]), sk=st.sampled_from([0, 1, 31]), causal=st.booleans())
def test_empty_sizes(b: int, sq: int, sk: int, causal: bool) -> None:
    q, k, v = random(b, sq, 2, 8), random(b, sk, 1, 8, seed=1), random(b, sk, 1, 8, seed=2)
    results = call(cuflash.mha_fwd, q, k, v, is_causal=causal, p_dropout=P, return_softmax=True, gen_=STATE)
    out, _, _, _, lse, state, _, signed = results
    assert signed.shape == (b, 2, -(-sq // 128) * 128, -(-sk // 128) * 128)
    dout = np.ones_like(out)
    gradients = call(cuflash.mha_bwd, dout, q, k, v, out, lse, is_causal=causal, p_dropout=P, philox_seed=state)
    assert gradients[3].shape == (b, 2, -(-sq // 128) * 128)
    assert_matches((out, lse, *gradients[:3]), q, k, v, dout, causal=causal, dropout_p=P, rng_state=STATE)
    starts_q, starts_k = (np.arange(b + 1, dtype=np.int32) * n for n in (sq, sk))
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    packed = call(cuflash.mha_varlen_fwd, q, k, v, None, starts_q, starts_k, is_causal=causal, p_dropout=P, gen_=STATE)
    np.testing.assert_allclose(packed[0].reshape(out.shape), out, atol=1e-6)
    for convention in CONVENTIONS:
        keywords = {} if convention == "current" else {"convention": convention}
        results = cuflash.mha_varlen_fwd(q, k, v, None, starts_q, starts_k, is_causal=causal, **keywords)
        gradients = cuflash.mha_varlen_bwd(
            np.ones_like(results[0]), q, k, v, results[0], results[4], None, None, None, starts_q, starts_k,
            is_causal=causal, **keywords,
        )  # fmt: skip
        assert all(np.isfinite(g).all() for g in gradients)


DENSE = {"q": (B, SQ, H, D), "k": (B, SK, HK, D), "v": (B, SK, HK, D)}


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


MISALIGNED = np.zeros(B * SQ * H * D * 4 + 1, np.uint8)[1:].view(np.float32).reshape(B, SQ, H, D)

REFUSED = {
    "dtype": ({"q": zeros(B, SQ, H, D, dtype="int8")}, "q is int8; expected float16, bfloat16, float32, float64"),
    "mixed": ({"k": zeros(B, SK, HK, D, dtype="float16")}, "k is float16 but q is float32"),
    "gqa": (
        {"k": zeros(B, SK, 3, D), "v": zeros(B, SK, 3, D)},
        "k has 3 heads but q has 4; heads_q must be a multiple",
    ),
    "no heads": ({"q": zeros(B, SQ, 0, D)}, "q has number of heads 0"),
    "no dims": ({"q": zeros(B, SQ, H, 0), "k": zeros(B, SK, HK, 0)}, "q has head dimension 0"),
    "rank": ({"q": zeros(SQ, H, D)}, "q has 3 dimensions"),
    "last stride": ({"q": zeros(B, SQ, H, 2 * D)[..., ::2]}, "q is not contiguous along its last dimension"),
    "misaligned": ({"q": MISALIGNED}, "q is misaligned"),
    "p one": ({"p_dropout": 1.0}, "p_dropout is 1.0; expected a probability of dropping, from 0 to below 1."),
    "p negative": ({"p_dropout": -0.1}, "p_dropout is -0.1; expected a probability of dropping"),
    "scale": ({"softmax_scale": np.inf}, "softmax_scale is inf; expected a finite number"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0; expected 0 (none) or a positive number"),
    "causal": ({"is_causal": 2}, "is_causal is 2; expected True or False"),
    "window": ({"window_size_left": 1.5}, "window_size_left is 1.5; expected an integer"),
    "window bool": ({"window_size_right": True}, "window_size_right is True; expected an integer"),
    "return_softmax": ({"return_softmax": None}, "return_softmax is None; expected True or False"),
    "alibi shape": (
        {"alibi_slopes_": zeros(3)},
        "alibi_slopes_ has shape (3,); expected (heads_q,) or (b, heads_q), here (4,)",
    ),
    "alibi dtype": ({"alibi_slopes_": zeros(H, dtype="float16")}, "alibi_slopes_ is float16; expected float32"),
    "out shape": ({"out_": zeros(B, SQ, H, D + 1)}, "out_ has shape (2, 19, 4, 17); expected (2, 19, 4, 16)"),
    "out dtype": ({"out_": zeros(B, SQ, H, D, dtype="float16")}, "out_ is float16; expected float32"),
    "not an array": ({"q": [1, 2]}, "q is a list; expected an array"),
    "none": ({"v": None}, "v is None; expected an array"),
    "convention": ({"convention": "old"}, "convention is 'old'; expected one of 'current', 'legacy'"),
    "backend": ({"backend": "cudnn"}, "backend is 'cudnn'; expected one of 'default', 'flash'"),
    "softcap of legacy": (
        {"convention": "legacy", "softcap": 1.0},
        "softcap is given, which convention 'legacy' does not have",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_forward_refuses(change: dict, message: str) -> None:
    arguments = {name: zeros(*shape) for name, shape in DENSE.items()}
    cuflash.mha_fwd(**arguments)
    before = cuflash.manual_seed(5).state
    with pytest.raises(InvalidArgument) as error:
        cuflash.mha_fwd(**{"p_dropout": P} | arguments | change)
    assert str(error.value).startswith(message), error.value
    assert cuflash.generator.default_generator.state == before


BACKWARD_REFUSED = {
    "dq": ({"dq_": zeros(B, SQ, H, D, dtype="float16")}, "dq_ is float16; expected float32"),
    "dk": ({"dk_": zeros(B, SK, H, D)}, "dk_ has shape (2, 27, 4, 16); expected (2, 27, 2, 16)"),
    "dv": ({"dv_": zeros(B, SK, HK, 2 * D)[..., ::2]}, "dv_ is not contiguous along its last dimension"),
    "dout": ({"dout": zeros(B, SQ, H, 8)}, "dout has shape (2, 19, 4, 8); expected (2, 19, 4, 16)"),
    "lse": ({"softmax_lse": zeros(B, H, 32)}, "softmax_lse has shape (2, 4, 32); expected (2, 4, 19)"),
    "lse dtype": ({"softmax_lse": zeros(B, H, SQ, dtype="float64")}, "softmax_lse is float64; expected float32"),
    "no lse": ({"softmax_lse": None}, "softmax_lse is None; expected an array"),
    "deterministic": ({"deterministic": "yes"}, "deterministic is 'yes'; expected True or False"),
    "no state": ({"p_dropout": P}, "philox_seed is None but p_dropout is 0.3; pass what the forward returned"),
    "no offset": ({"p_dropout": P, "philox_seed": 3}, "philox_offset is None and philox_seed is one number"),
    "two offsets": (
        {"p_dropout": P, "philox_seed": zeros(2, dtype="uint64"), "philox_offset": zeros(2, dtype="uint64")},
        "philox_seed holds seed and offset, and philox_offset has dimensions",
    ),
    "p": ({"p_dropout": 1.5}, "p_dropout is 1.5; expected a probability of dropping"),
}


@pytest.mark.parametrize(("change", "message"), BACKWARD_REFUSED.values(), ids=BACKWARD_REFUSED)
def test_what_the_backward_refuses(change: dict, message: str) -> None:
    arguments = {name: zeros(*shape) for name, shape in DENSE.items()}
    arguments |= {"dout": zeros(B, SQ, H, D), "out": zeros(B, SQ, H, D), "softmax_lse": zeros(B, H, SQ)}
    cuflash.mha_bwd(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.mha_bwd(**arguments | change)
    assert str(error.value).startswith(message), error.value


PACKED_REFUSED = {
    "no starts": ({"cu_seqlens_k": None}, "cu_seqlens_k is None; expected an array"),
    "starts dtype": ({"cu_seqlens_q": STARTS_Q.astype(np.int64)}, "cu_seqlens_q is int64; expected int32"),
    "falling": ({"cu_seqlens_q": np.array([0, 8, 7, 15], np.int32)}, "cu_seqlens_q[2] is 7 after 8"),
    "too far": ({"cu_seqlens_k": np.array([0, 3, 12, 99], np.int32)}, "cu_seqlens_k[3] is 99, but k has 27 rows"),
    "too short": ({"max_seqlen_q": 5}, "max_seqlen_q is 5, but sequence 0 has 8 rows"),
    "used": ({"seqused_k": np.array([9, 0, 0], np.int32)}, "seqused_k[0] is 9, but sequence 0 has 3 keys"),
    "used length": ({"seqused_k": USED[:2]}, "seqused_k has 2 numbers; expected one for each of the 3 sequences"),
    "zero_tensors": ({"zero_tensors": None}, "zero_tensors is None; expected True or False"),
    "block_table of legacy": (
        {"convention": "legacy", "block_table_": None},
        "block_table_ is given, which convention",
    ),
}


@pytest.mark.parametrize(("change", "message"), PACKED_REFUSED.values(), ids=PACKED_REFUSED)
def test_what_the_packed_forward_refuses(change: dict, message: str) -> None:
    q, k, v = inputs(packed=True)
    arguments = {"q": q, "k": k, "v": v, "out_": None, "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    cuflash.mha_varlen_fwd(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.mha_varlen_fwd(**arguments | change)
    assert str(error.value).startswith(message), error.value


def test_what_the_packed_backward_refuses() -> None:
    q, k, v = inputs(packed=True)
    out = zeros(SQ, H, DV)
    head, tail = (out, q, k, v, out), (None, None, None, STARTS_Q, STARTS_K)
    with pytest.raises(
        InvalidArgument, match=r"softmax_lse has shape \(4, 19\); expected \(b, heads_q, max_seqlen_q\)"
    ):
        cuflash.mha_varlen_bwd(*head, zeros(H, SQ), *tail, convention="rocm")
    with pytest.raises(InvalidArgument, match=r"softmax_lse has shape \(3, 4, 8\); expected \(4, 19\)"):
        cuflash.mha_varlen_bwd(*head, zeros(3, H, 8), *tail)


GRAD, GRAD_Q = zeros(SQ, SK), zeros(B, SQ, H, D)
BIAS_REFUSED = {
    "shape": ({"attn_bias_": zeros(3, SQ, SK)}, "attn_bias_ has shape (3, 19, 27); expected one that broadcasts to"),
    "dtype": ({"attn_bias_": zeros(SQ, SK, dtype="float16")}, "attn_bias_ is float16; expected float32"),
    "no bias": ({"attn_bias_": None}, "bias_requires_grad is True but attn_bias_ is None"),
    "not wanted": (
        {"bias_requires_grad": False, "grad_bias": zeros(SQ, SK)},
        "grad_bias is given but bias_requires_grad",
    ),
    "grad_bias": ({"grad_bias": zeros(1, SQ, SK)}, "grad_bias has shape (1, 19, 27); expected (19, 27)"),
    "grad_bias type": ({"grad_bias": zeros(SQ, SK, dtype="int32")}, "grad_bias is int32; expected float32"),
    "grad_bias order": ({"grad_bias": zeros(SQ, SK).astype(">f4")}, "grad_bias is >f4; expected float32"),
    "grad_bias list": ({"grad_bias": [[0.0]]}, "grad_bias is a list; expected an array"),
    "grad_bias rows": (
        {"grad_bias": np.lib.stride_tricks.as_strided(zeros(SK), (SQ, SK), (0, 4))},
        "grad_bias has elements that share memory",
    ),
    "grad_bias read-only": ({"grad_bias": np.broadcast_to(np.float32(0), (SQ, SK))}, "grad_bias is read-only"),
    "grad_bias is the bias": (
        {"attn_bias_": GRAD, "grad_bias": GRAD},
        "grad_bias shares memory with attn_bias_, which is still read while grad_bias is written",
    ),
    "grad_bias in dq": (
        {"dq_": GRAD_Q, "grad_bias": GRAD_Q.reshape(-1)[: SQ * SK].reshape(SQ, SK)},
        "grad_bias shares memory with dq_, which is written too",
    ),
    "flag": ({"bias_requires_grad": None}, "bias_requires_grad is None; expected True or False"),
}


@pytest.mark.parametrize(("change", "message"), BIAS_REFUSED.values(), ids=BIAS_REFUSED)
def test_what_the_bias_refuses(change: dict, message: str) -> None:
    arguments = {name: zeros(*shape) for name, shape in DENSE.items()}
    arguments |= {"dout": zeros(B, SQ, H, D), "out": zeros(B, SQ, H, D), "softmax_lse": zeros(B, H, SQ)}
    arguments |= {"attn_bias_": zeros(SQ, SK), "bias_requires_grad": True}
    cuflash.mha_bwd_ck(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.mha_bwd_ck(**arguments | change)
    assert str(error.value).startswith(message), error.value


def test_every_function_of_packed_sequences_hands_validate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def operation(_: Callable, options: Options, *__: object, **___: object) -> None:
        raise Asked(options.manner.validate)

    q, k, v = inputs(packed=True)
    starts = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    out, lse = zeros(SQ, H, DV), zeros(3, H, 32)
    dense = [x[None] for x in (q, k, v)]
    nothing = {"dq_": None, "dk_": None, "dv_": None}
    head = {"dout": out, "q": q, "k": k, "v": v, "out": out}
    efficient = {"bias": None, "dropout_p": 0.0, "philox_seed": None, "philox_offset": None, "custom_mask_type": 0}
    efficient |= {"bias_requires_grad": False, "max_seqlen_q": 8, "max_seqlen_k": 10, "logsumexp": lse}
    calls = {
        cuflash.mha_varlen_fwd: {"q": q, "k": k, "v": v, "out_": None},
        cuflash.mha_varlen_fwd_ck: {"q": q, "k": k, "v": v, "out_": None},
        cuflash.mha_varlen_bwd: head | nothing | {"softmax_lse": zeros(H, SQ)},
        cuflash.mha_varlen_bwd_ck: head | nothing | {"softmax_lse": lse},
        cuflash.mem_eff_forward: {"q": q, "k": k, "v": v},
        cuflash.mem_eff_backward: head | nothing | {"softmax_lse": lse},
        cuflash.efficient_attention_forward: dict(zip(("query", "key", "value"), dense, strict=True)),
        cuflash.efficient_attention_backward: {
            "grad_out_": out[None], "query": dense[0], "key": dense[1], "value": dense[2], "out": out[None], **efficient
        },
    }  # fmt: skip
    monkeypatch.setattr(backend, "call", operation)
    for function, arguments in calls.items():
        for validate in (False, True):
            with pytest.raises(Asked) as asked:
                function(**arguments, **starts, validate=validate)
            assert asked.value.args == (validate,)
    parameters = {x: inspect.signature(x).parameters for x in vars(cuflash).values() if inspect.isfunction(x)}
    flash = {cuflash.flash_attn_varlen_func, cuflash.flash_attn_backward}
    flash |= {cuflash.flash_attn_vjp, cuflash.flash_attn_jvp}
    assert {x for x, names in parameters.items() if "validate" in names} == flash | calls.keys()
    hands_on, runs_nothing, always = cuflash.flash_attn_varlen_kvpacked_func, cuflash.explain, cuflash.attention_map
    packed = {x for x, names in parameters.items() if "cu_seqlens_q" in names}
    assert packed == flash | calls.keys() | {hands_on, runs_nothing, always}


def test_too_many_arguments_for_the_convention() -> None:
    arguments = [zeros(*shape) for shape in DENSE.values()]
    rest = [None, None, 0.0, None, False, -1, -1]
    cuflash.mha_fwd(*arguments, *rest, False, None, convention="legacy")
    with pytest.raises(TypeError, match=r"mha_fwd\(\) takes at most 12 positional arguments in convention 'legacy'"):
        cuflash.mha_fwd(*arguments, *rest, 0.0, False, None, convention="legacy")
