"""Numbers and rules that PyTorch's attention was measured to follow, through the functions with its arguments."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import cuflash
from cuflash import InvalidArgument

SEED, OFFSET, HEADS, B, H = 0x123456789ABCDEF0, 64, 3, 1, 2

KEPT_ROWS = {
    0: (0xF8F7EFBF, 0xF7FEF7FF),
    1: (0xCFBFBDEF, 0xCC2FFF7B),
    7: (0x2FFFBFFF, 0xEF54FFFF),
    8: (0xFD79DEF7, 0xEFFF672F),
    15: (0xE7FFBFFF, 0xFFFFFF7F),
    16: (0x7BEEEFE7, 0xD77BFBDF),
    31: (0xFCF7F5F5, 0x7EBFE7BA),
}
"""Keys that the flash kernels keep in some rows of head H of batch element B at p = 0.2, the lowest bit first."""

UNIFORMS = {
    0: (0.17791343, 0.9469773, 0.7739484, 0.41121, 0.53694564, 0.57834846, 0.99782306),
    4: (0.3319141, 0.85920924, 0.78666097, 0.972232, 0.16038729, 0.2677669, 0.71530527),
}
"""The memory-efficient kernels' numbers of two rows of five, with seven keys: kept where above p."""


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def identity(batch: int, heads: int, keys: int) -> np.ndarray:
    """Values with which the output is what multiplies them."""
    return np.broadcast_to(np.eye(keys, dtype=np.float32)[:, None], (batch, keys, heads, keys))


def words(kept: np.ndarray) -> tuple[int, ...]:
    return tuple(np.packbits(kept, bitorder="little").view("<u4").tolist())


@pytest.mark.parametrize("packed", [False, True])
def test_flash_dropout(packed: bool) -> None:
    q, k, v = zeros(2, 32, HEADS, 8), zeros(2, 64, HEADS, 8), identity(2, HEADS, 64)
    if packed:
        starts = np.array([0, 32, 64], np.int32), np.array([0, 64, 128], np.int32)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        results = cuflash.mha_varlen_fwd(*flat, None, *starts, p_dropout=0.2, return_softmax=True, gen_=(SEED, OFFSET))
        out = results[0].reshape(2, 32, HEADS, 64)
    else:
        results = cuflash.mha_fwd(q, k, v, p_dropout=0.2, return_softmax=True, gen_=(SEED, OFFSET))
        out = results[0]
    kept, signed = out[B, :, H] > 0, results[7][B, H, :32, :64]
    np.testing.assert_array_equal(np.signbit(signed), ~kept)
    assert kept.sum() == 1664 and {row: words(kept[row]) for row in KEPT_ROWS} == KEPT_ROWS
    np.testing.assert_allclose(out[B, :, H][kept], 1 / 64 / 0.8, rtol=1e-6)


def test_flash_dropout_is_drawn_by_query_heads_and_again_in_the_backward() -> None:
    q, k = zeros(2, 32, HEADS, 8), zeros(2, 64, 1, 8)
    v = identity(2, 1, 64)
    out, *_, lse, state, unused, _ = cuflash.mha_fwd(q, k, v, p_dropout=0.2, gen_=(SEED, OFFSET))
    assert words(out[B, 1, H] > 0) == KEPT_ROWS[1]
    dout = zeros(*out.shape)
    dout[B, 1, H] = 1
    dv = cuflash.mha_bwd(dout, q, k, v, out, lse, p_dropout=0.2, philox_seed=state, philox_offset=unused)[2]
    assert words(dv[B, :, 0, 0] > 0) == KEPT_ROWS[1]


@pytest.mark.parametrize("p", [0.05, 0.17, 0.3, 0.5, 0.75, 0.95])
def test_memory_efficient_dropout(p: float) -> None:
    q, k, v = zeros(2, 5, HEADS, 8), zeros(2, 7, HEADS, 8), identity(2, HEADS, 7)
    out = cuflash.efficient_attention_forward(q, k, v, dropout_p=p, gen_=(SEED, OFFSET)).output
    for row, uniforms in UNIFORMS.items():
        np.testing.assert_array_equal(out[B, row, H] > 0, np.float32(uniforms) > np.float32(p))


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.05, 242), (0.1, 229), (0.2, 204), (0.25, 191), (0.3, 178), (0.5, 127), (0.75, 63), (0.9, 25), (0.99, 2)],
)
def test_flash_dropout_keeps_this_many_bytes_and_scales_by_the_probability(p: float, threshold: int) -> None:
    out = cuflash.mha_fwd(zeros(1, 256, 16, 8), zeros(1, 256, 16, 8), identity(1, 16, 256), p_dropout=p, gen_=(1, 0))[0]
    kept = out > 0
    chance = (threshold + 1) / 256
    assert abs(kept.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / kept.size)
    np.testing.assert_allclose(out[kept], 1 / 256 / (1 - p), rtol=1e-6)


def visible(sq: int, sk: int, left: int, right: int) -> np.ndarray:
    """The published rule, pair by pair."""
    off = sk - sq
    return np.array(
        [
            [(right < 0 or j <= i + off + right) and (left < 0 or j >= i + off - left) for j in range(sk)]
            for i in range(sq)
        ]
    ).reshape(sq, sk)


LENGTHS = [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (33, 40)]


@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_visibility_of_the_flash_functions(sq: int, sk: int) -> None:
    q, k = zeros(1, sq, 1, 8), zeros(1, sk, 1, 8)
    for causal, left, right in itertools.product((False, True), (-1, 0, 1, 37, sk), (-1, 0, 3, sk)):
        expected = visible(sq, sk, left, 0 if causal else right)
        out, *_, lse, _, _, _ = cuflash.mha_fwd(
            q, k, identity(1, 1, sk), is_causal=causal, window_size_left=left, window_size_right=right
        )
        np.testing.assert_array_equal(out[0, :, 0] > 0, expected, f"{causal} {left} {right}")
        count = expected.sum(1)
        np.testing.assert_array_equal(np.isposinf(lse[0, 0]), count == 0)
        np.testing.assert_allclose(lse[0, 0][count > 0], np.log(count[count > 0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_visibility_of_the_memory_efficient_functions(sq: int, sk: int) -> None:
    q, k, v = zeros(1, sq, 1, 8), zeros(1, sk, 1, 8), identity(1, 1, sk)
    i, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
    for mask_type, window in itertools.product((1, 2), (None, 0, 1, 4, 50)):
        own = i + (sk - sq if mask_type == 2 else 0)
        expected = (j <= own) & (j > own - (window or 1000))
        out = cuflash.efficient_attention_forward(q, k, v, custom_mask_type=mask_type, window_size=window).output
        np.testing.assert_array_equal(out[0, :, 0] > 0, expected, f"{mask_type} {window}")


def test_windows_of_packed_sequences_are_aligned_to_the_keys_in_use() -> None:
    starts_q, starts_k = np.array([0, 4, 6], np.int32), np.array([0, 9, 18], np.int32)
    v = np.concatenate([np.eye(9, dtype=np.float32)] * 2)[:, None]
    out = cuflash.mha_varlen_fwd(
        zeros(6, 1, 8), zeros(18, 1, 8), v, None, starts_q, starts_k, np.array([5, 9], np.int32), is_causal=True,
        window_size_left=2,
    )[0]  # fmt: skip
    np.testing.assert_array_equal(out[:4, 0, :5] > 0, visible(4, 5, 2, 0))
    np.testing.assert_array_equal(out[4:, 0] > 0, visible(2, 9, 2, 0))
    assert not out[:4, 0, 5:].any()


def test_alibi_counts_from_the_diagonal_and_its_log_sum_exp_is_the_textbook_one() -> None:
    slopes = np.float32([0.5, 0.25])
    for sq, sk, causal in itertools.product((1, 3), (4, 6), (False, True)):
        lse = cuflash.mha_fwd(
            zeros(1, sq, 2, 8), zeros(1, sk, 2, 8), zeros(1, sk, 2, 8), None, slopes, is_causal=causal
        )[4]
        i, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
        scores = -slopes[:, None, None] * np.abs(i + sk - sq - j)
        scores = np.where(visible(sq, sk, -1, 0 if causal else -1), scores, -np.inf)
        np.testing.assert_allclose(lse[0], np.log(np.exp(scores).sum(-1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, -30.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    q, k = (np.random.default_rng(i).standard_normal((1, 9, 1, 8)).astype(np.float32) for i in range(2))
    scores = scale * q[0, :, 0].astype(np.float64) @ k[0, :, 0].T.astype(np.float64)
    expected = np.exp(scores - scores.max(1, keepdims=True))
    for function in cuflash.mha_fwd, cuflash.efficient_attention_forward:
        keyword = {"softmax_scale" if function is cuflash.mha_fwd else "scale": scale}
        out = function(q, k, identity(1, 1, 9), **keyword)[0]
        np.testing.assert_allclose(out[0, :, 0], expected / expected.sum(1, keepdims=True), atol=1e-5)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    q, k, v = (np.ones((1, 4, 2, 8), np.float32) for _ in range(3))
    q[0, 2, 1, 3] = np.nan
    out, *_, lse, _, _, _ = cuflash.mha_fwd(q, k, v)
    assert np.isnan(out[0, 2, 1]).all() and np.isnan(lse[0, 1, 2])
    assert np.isnan(out).sum() == 8 and np.isnan(lse).sum() == 1


def test_logits_far_below_zero_behind_the_last_whole_tile() -> None:
    """Rows 128 to 191 of 192, and keys likewise, with every logit near -120."""
    q, k = np.full((1, 192, 1, 16), 1.0, np.float16), np.full((1, 192, 1, 16), -7.5, np.float16)
    v = np.random.default_rng(0).standard_normal((1, 192, 1, 16)).astype(np.float16)
    out, *_, lse, _, _, _ = cuflash.mha_fwd(q, k, v, softmax_scale=1.0)
    np.testing.assert_allclose(lse, -120 + np.log(192), rtol=1e-6)
    np.testing.assert_allclose(
        out[0, :, 0], np.broadcast_to(v[0, :, 0].mean(0, dtype=np.float32), (192, 16)), atol=2e-3
    )
    gradients = cuflash.mha_bwd(v, q, k, v, out, lse, softmax_scale=1.0)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(gradients[2][0, :, 0], np.broadcast_to(gradients[2][0, 0, 0], (192, 16)), atol=1e-3)


def test_more_heads_and_batch_elements_than_a_grid_dimension_has() -> None:
    v = np.random.default_rng(0).standard_normal((1, 1, 70000, 8)).astype(np.float32)
    q = zeros(1, 1, 70000, 8)
    np.testing.assert_array_equal(cuflash.mha_fwd(q, q, v)[0], v)
    q, v = q.reshape(70000, 1, 1, 8), v.reshape(70000, 1, 1, 8)
    np.testing.assert_array_equal(cuflash.efficient_attention_forward(q, q, v).output, v)


def test_expanded_inputs_and_gradients() -> None:
    one = np.random.default_rng(0).standard_normal((1, 5, 1, 8)).astype(np.float32)
    wide = np.broadcast_to(one, (2, 5, 4, 8))
    dout = np.broadcast_to(np.float32(1), wide.shape).copy()[:, :1]
    dout = np.broadcast_to(dout, wide.shape)
    results = []
    for x, d in ((wide, dout), (wide.copy(), dout.copy())):
        out, *_, lse, _, _, _ = cuflash.mha_fwd(x, x, x)
        results.append((out, lse, *cuflash.mha_bwd(d, x, x, x, out, lse)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_query_of_grouped_heads_fills_the_given_output() -> None:
    """Decoding, where PyTorch turns the group of heads into rows and forgets the caller's output."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((3, h, 8)).astype(np.float32) for h in (4, 2))
    starts = np.arange(4, dtype=np.int32)
    out_ = np.full_like(q, np.nan)
    out, *_, lse, _, _, _ = cuflash.mha_varlen_fwd(q, k, k, out_, starts, starts, is_causal=True)
    assert out is out_ and lse.shape == (4, 3)
    np.testing.assert_allclose(out_, np.repeat(k, 2, axis=1), rtol=1e-6)


def test_softcap_and_dropout_together() -> None:
    q, k = (np.random.default_rng(i).standard_normal((1, 6, 1, 8)).astype(np.float32) for i in range(2))
    without, with_dropout = (
        cuflash.mha_fwd(q, k, identity(1, 1, 6), softcap=0.7, p_dropout=p, gen_=(5, 0))[0] for p in (0.0, 0.5)
    )
    kept = with_dropout > 0
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(with_dropout[kept], 2 * without[kept], rtol=1e-6)


STARTS = np.array([0, 3, 6], np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqused_k": np.array([3, 4], np.int32)}, r"seqused_k\[1\] is 4, but sequence 1 has 3 keys"),
        ({"cu_seqlens_k": np.array([0, 4, 3], np.int32)}, r"cu_seqlens_k\[2\] is 3 after 4"),
        ({"max_seqlen_k": 2}, "max_seqlen_k is 2, but sequence 0 has 3 rows"),
        ({"p_dropout": 1.0}, r"p_dropout is 1\.0"),
    ],
)
def test_what_pytorch_leaves_undefined_is_refused(arguments: dict, message: str) -> None:
    x = zeros(6, 1, 8)
    given = {"q": x, "k": x, "v": x, "out_": None, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    with pytest.raises(InvalidArgument, match=message):
        cuflash.mha_varlen_fwd(**given | arguments)


def test_arrays_of_other_libraries_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        def __dlpack__(self) -> None: ...
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    Foreign.__module__ = "foreign"
    monkeypatch.setitem(sys.modules, "foreign", SimpleNamespace(__name__="foreign", from_dlpack=lambda x: x))
    for function in cuflash.mha_fwd, cuflash.mem_eff_forward, cuflash.efficient_attention_forward:
        with pytest.raises(
            InvalidArgument, match="is a foreign array; this function takes NumPy, CuPy and torch arrays"
        ):
            function(Foreign(), Foreign(), Foreign())
