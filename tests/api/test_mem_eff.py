"""Memory-efficient attention with PyTorch's arguments and results, on NumPy arrays."""

from __future__ import annotations

import inspect

import numpy as np
import oracle
import pytest

import cuflash
from cuflash import InvalidArgument, PhiloxGenerator
from cuflash.dtypes import DTYPES

B, H, HK, SQ, SK, D, DV = 2, 4, 2, 19, 27, 16, 24
STARTS_Q, STARTS_K = np.array([0, 8, 8, 15], np.int32), np.array([0, 3, 12, 22], np.int32)
USED = np.array([3, 0, 6], np.int32)
STATE = 0x123456789ABCDEF0, 64
P = 0.3


def random(*shape: int, dtype: str = "fp32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[dtype].numpy)


def inputs(dtype: str = "fp32", packed: bool = False, dim: int = D) -> list[np.ndarray]:
    """q, k, v; packed ones are (1, total, h, d)."""
    batch = 1 if packed else B
    shapes = (batch, SQ, H, dim), (batch, SK, HK, dim), (batch, SK, HK, DV)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def assert_matches(actual: tuple, *arrays: np.ndarray, **options) -> None:
    """Compare (out, lse, dq, dk, dv, dbias) with the oracle; empty rows have lse +inf."""
    exact, naive = (f(*arrays, **options) for f in (oracle.attention, oracle.naive_in_dtype))
    exact, naive = (x._replace(lse=np.where(x.lse == -np.inf, np.inf, x.lse)) for x in (exact, naive))
    padded = oracle.Attention(*actual, *[None] * (len(oracle.Attention._fields) - len(actual)))
    oracle.assert_all_close(padded, exact, naive)


HEADERS = {
    "mem_eff_forward": "q k v p_dropout return_dropout_randval is_causal scale attn_bias_ out_ cu_seqlens_q "
    "cu_seqlens_k seqstart_q seqstart_k gen_ seqused_k_",
    "mem_eff_backward": "dout q k v out softmax_lse dq_ dk_ dv_ attn_bias bias_requires_grad grad_bias cu_seqlens_q "
    "cu_seqlens_k max_seqlen_q max_seqlen_k p_dropout scale is_causal deterministic zero_tensors philox_seed "
    "philox_offset",
    "efficient_attention_forward": "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
    "custom_mask_type compute_log_sumexp",
    "efficient_attention_backward": "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q "
    "max_seqlen_k logsumexp dropout_p philox_seed philox_offset custom_mask_type bias_requires_grad",
}
"""Arguments in the order of the C++ header, and of PyTorch's operators."""


@pytest.mark.parametrize("name", HEADERS)
def test_arguments_are_those_of_the_headers(name: str) -> None:
    parameters = inspect.signature(getattr(cuflash, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == HEADERS[name].split()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [None, False, True])
def test_mem_eff(causal: bool | None, dtype: str) -> None:
    q, k, v = inputs(dtype)
    bias = random(B, 1, SQ, SK, dtype=dtype, seed=6)
    out_ = np.empty((B, SQ, H, DV), q.dtype)
    results = cuflash.mem_eff_forward(q, k, v, P, True, causal, 0.3, bias, out_, None, None, None, None, STATE, None)
    out, *given, lse, seed, offset, values = results
    assert out is out_ and [x is y for x, y in zip(given, (q, k, v), strict=True)] == [True] * 3
    i, j = np.arange(SQ)[:, None], np.arange(SK)[None, :]
    kept = np.stack([[oracle.flash_keep(*STATE, P, b, h, H, i, j) for h in range(H)] for b in range(B)])
    np.testing.assert_array_equal(values <= int((1 - P) * 255), kept)

    dout = random(*out.shape, dtype=dtype, seed=3)
    gradients = [np.full_like(x, np.nan) for x in (q, k, v, bias)]
    returned = cuflash.mem_eff_backward(
        dout, q, k, v, out, lse, *gradients[:3], bias, True, gradients[3], None, None, SQ, SK, P, 0.3, bool(causal),
        False, False, seed, offset,
    )  # fmt: skip
    assert [x is y for x, y in zip(returned, gradients, strict=True)] == [True] * 4
    expected = {"bias": bias, "scale": 0.3, "dropout_p": P, "rng_state": STATE, "causal": bool(causal)}
    assert_matches((out, lse, *returned), q, k, v, dout, **expected)


@pytest.mark.parametrize("lengths", [(None, None), (9, 13)], ids=["derived", "given"])
@pytest.mark.parametrize("names", ["cu_seqlens", "seqstart"])
def test_mem_eff_of_packed_sequences(names: str, lengths: tuple) -> None:
    q, k, v = (x[0] for x in inputs(packed=True))
    starts = {f"{names}_q": STARTS_Q, f"{names}_k": STARTS_K, "max_seqlen_q": lengths[0], "max_seqlen_k": lengths[1]}
    results = cuflash.mem_eff_forward(q, k, v, P, gen_=STATE, seqused_k_=USED, is_causal=True, **starts)
    out, _, _, _, lse, seed, offset, _ = results
    dout = random(*out.shape, seed=3)
    gradients = cuflash.mem_eff_backward(
        dout, q, k, v, out, lse, None, None, None, cu_seqlens_q=STARTS_Q, cu_seqlens_k=STARTS_K, p_dropout=P,
        is_causal=True, philox_seed=seed, philox_offset=offset, seqused_k=USED,
    )  # fmt: skip
    assert gradients[3] is None and lse.shape == (3, H, lengths[0] or 8)
    exact = oracle.attention(
        q, k, v, dout, causal=True, cu_seqlens_q=STARTS_Q, cu_seqlens_k=STARTS_K, seqused_k=USED, dropout_p=P,
        rng_state=STATE,
    )  # fmt: skip
    for one, other in zip((out, *gradients[:3]), (exact.out, *exact[2:5]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


MASKS = {
    "none": ({"custom_mask_type": 0}, {}),
    "top-left": ({"custom_mask_type": 1}, {"causal": True, "alignment": "top-left"}),
    "bottom-right": ({"custom_mask_type": 2}, {"causal": True}),
    "no window": ({"custom_mask_type": 2, "window_size": 0}, {"causal": True}),
    "window": (
        {"custom_mask_type": 1, "window_size": 5},
        {"causal": True, "window": (4, 0), "alignment": "top-left"},
    ),
    "window of one": ({"custom_mask_type": 2, "window_size": 1}, {"window": (0, 0)}),
    "window, bottom-right": ({"custom_mask_type": 2, "window_size": 4}, {"causal": True, "window": (3, 0)}),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("turned", [False, True], ids=["more keys", "more queries"])
@pytest.mark.parametrize(("options", "expected"), MASKS.values(), ids=MASKS)
def test_efficient_attention(options: dict, expected: dict, turned: bool, dtype: str) -> None:
    q, k, v = inputs(dtype)
    if turned:
        k, v = k[:, :7], v[:, :7]
    bias = random(1, H, SQ, k.shape[1], dtype=dtype, seed=6)
    mask_type = options["custom_mask_type"]
    more = {name: value for name, value in options.items() if name == "window_size"}
    results = cuflash.efficient_attention_forward(
        q, k, v, np.broadcast_to(bias, (B, *bias.shape[1:])), None, None, None, None, P, mask_type, True, gen_=STATE,
        **more,
    )  # fmt: skip
    out, lse, seed, offset, max_q, max_k = results
    assert (max_q, max_k) == (SQ, k.shape[1]) and seed.dtype == offset.dtype == np.int64
    assert (int(seed), int(offset)) == STATE
    assert lse.shape == (B, H, 32) and np.isposinf(lse[..., SQ:]).all()
    dout = random(*out.shape, dtype=dtype, seed=3)
    gradients = cuflash.efficient_attention_backward(
        dout, q, k, v, np.broadcast_to(bias, (B, *bias.shape[1:])), out, None, None, SQ, k.shape[1], lse, P, seed,
        offset, mask_type, True, **more,
    )  # fmt: skip
    assert gradients[3].shape == bias.shape and gradients[3].dtype == bias.dtype
    extra = {"bias": bias, "dropout_p": P, "dropout_scheme": "word", "rng_state": STATE}
    assert_matches((out, lse[..., :SQ], *gradients), q, k, v, dout, **extra, **expected)


@pytest.mark.parametrize("dim", [8, 300, 1024])
def test_heads_of_any_size(dim: int) -> None:
    q, k, v = inputs(dim=dim)
    out, lse, *_ = cuflash.efficient_attention_forward(q, k, v, compute_log_sumexp=True, scale=-0.02)
    assert_matches((out, lse[..., :SQ]), q, k, v, scale=-0.02)


@pytest.mark.parametrize("lengths", [(None, None), (40, 33)], ids=["derived", "given"])
@pytest.mark.parametrize("mask_type", [0, 1, 2])
def test_efficient_attention_of_packed_sequences(mask_type: int, lengths: tuple) -> None:
    q, k, v = inputs(packed=True)
    generator = PhiloxGenerator(*STATE)
    out, lse, seed, offset, *longest = cuflash.efficient_attention_forward(
        q, k, v, None, STARTS_Q, STARTS_K, *lengths, P, mask_type, True, seqlen_k=USED, gen_=generator
    )
    assert longest == ([8, 10] if lengths[0] is None else [40, 33]) and out.shape == (1, SQ, H, DV)
    assert generator.state[1] - STATE[1] == 3 * H * longest[0] * longest[1]
    assert lse.shape == (3, H, 32 if lengths[0] is None else 64)
    packed_lse = np.full((H, SQ), np.inf, np.float32)
    for e in range(3):
        n = STARTS_Q[e + 1] - STARTS_Q[e]
        packed_lse[:, STARTS_Q[e] : STARTS_Q[e + 1]] = lse[e, :, :n]
        assert np.isposinf(lse[e, :, n:]).all()
    dout = random(*out.shape, seed=3)
    gradients = cuflash.efficient_attention_backward(
        dout, q, k, v, None, out, STARTS_Q, STARTS_K, *longest, lse, P, seed, offset, mask_type, False, seqlen_k=USED
    )
    assert gradients[3] is None and gradients[0].shape == q.shape
    extra = {"dropout_p": P, "dropout_scheme": "word", "rng_state": STATE, "causal": mask_type > 0}
    extra["alignment"] = "top-left" if mask_type == 1 else "bottom-right"
    packed = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED}
    packed |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    assert_matches((out[0], packed_lse, *(x[0] for x in gradients[:3])), q[0], k[0], v[0], dout[0], **packed, **extra)


def test_heads_and_sequences_draw_masks_of_their_own() -> None:
    """With the identity as values, an output of 0 says that a pair was dropped."""
    starts = np.arange(0, 65 * 8, 8, dtype=np.int32)
    q = k = np.zeros((1, 512, 4, 8), np.float32)
    rows = q.reshape(64, 8, 4, 8)
    dense = cuflash.efficient_attention_forward(rows, rows, _eye(64), gen_=(1, 0), dropout_p=0.5)
    packed = cuflash.efficient_attention_forward(
        q, k, _eye(64).reshape(1, 512, 4, 8), None, starts, starts, dropout_p=0.5, gen_=(1, 0)
    )
    np.testing.assert_array_equal(dense.output.ravel(), packed.output.ravel())
    masks = (dense.output > 0).transpose(0, 2, 1, 3).reshape(256, -1)
    assert len(np.unique(masks, axis=0)) == 256


def _eye(batch: int) -> np.ndarray:
    return np.broadcast_to(np.eye(8, dtype=np.float32)[:, None], (batch, 8, 4, 8)).copy()


def test_log_sum_exps_are_left_out_unless_asked_for() -> None:
    q, k, v = inputs()
    out, lse, seed, offset, *_ = cuflash.efficient_attention_forward(q, k, v)
    assert lse.shape == (B, H, 0) and seed.shape == offset.shape == (0,)
    asked = cuflash.efficient_attention_forward(q, k, v, compute_log_sumexp=True)
    np.testing.assert_array_equal(asked.output, out)


@pytest.mark.parametrize("packed", [False, True])
def test_shared_storage(packed: bool) -> None:
    shape = (1 if packed else B, SQ, H, D)
    q, k, v = (random(*shape, seed=i) for i in range(3))
    starts = (STARTS_Q, STARTS_Q, None, None) if packed else (None,) * 4
    forward = cuflash.efficient_attention_forward(q, k, v, None, *starts, compute_log_sumexp=True)
    dout = random(*shape, seed=3)
    arguments = (dout, q, k, v, None, forward.output, *starts, forward.logsumexp, 0.0, None, None, 0, False)
    separate = cuflash.efficient_attention_backward(*arguments)
    shared = cuflash.efficient_attention_backward(*arguments, shared_storage_dqdkdv=True)
    base = shared[0].base
    assert base is not None and base.shape == (shape[0], SQ, 3, H, D)
    for i, (one, other) in enumerate(zip(shared[:3], separate[:3], strict=True)):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(base[:, :, i], other)


@pytest.mark.parametrize(("splits", "deterministic"), [(None, False), (1, False), (1, True), (None, True), (4, False)])
def test_splits_of_keys(splits: int | None, deterministic: bool) -> None:
    q, k, v = inputs()
    forward = cuflash.efficient_attention_forward(q, k, v, compute_log_sumexp=True)
    dout = random(*forward.output.shape, seed=3)
    gradients = cuflash.efficient_attention_backward(
        dout, q, k, v, None, forward.output, None, None, None, None, forward.logsumexp, 0.0, None, None, 0, False,
        num_splits_key=splits, deterministic=deterministic,
    )  # fmt: skip
    assert_matches((forward.output, forward.logsumexp[..., :SQ], *gradients[:3]), q, k, v, dout)


@pytest.mark.parametrize(
    ("splits", "deterministic", "ordered"),
    [(None, False, False), (1, False, True), (None, True, True), (4, False, False)],
)
def test_one_split_asks_for_a_fixed_order(
    splits: int | None, deterministic: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(cuflash.ops, "backward", lambda options, arrays: asked.append(options) or (None,) * 3)
    x = np.zeros((B, SQ, H, D), np.float32)
    lse = np.zeros((B, H, 32), np.float32)
    cuflash.efficient_attention_backward(
        x, x, x, x, None, x, None, None, None, None, lse, 0.0, None, None, 0, False, num_splits_key=splits,
        deterministic=deterministic,
    )  # fmt: skip
    assert asked[0].deterministic is ordered


@pytest.mark.parametrize("sq", [0, 1, 33])
@pytest.mark.parametrize("sk", [0, 1])
@pytest.mark.parametrize("b", [0, 2])
def test_empty_sizes(b: int, sq: int, sk: int) -> None:
    q, k, v = random(b, sq, 2, 8), random(b, sk, 1, 8, seed=1), random(b, sk, 1, 8, seed=2)
    out, lse, seed, offset, *_ = cuflash.efficient_attention_forward(
        q, k, v, dropout_p=P, custom_mask_type=2, compute_log_sumexp=True, gen_=STATE
    )
    assert lse.shape == (b, 2, -(-sq // 32) * 32) and np.isposinf(lse[..., sq:]).all()
    dout = np.ones_like(out)
    gradients = cuflash.efficient_attention_backward(
        dout, q, k, v, None, out, None, None, sq, sk, lse, P, seed, offset, 2, False
    )
    extra = {"causal": True, "dropout_p": P, "dropout_scheme": "word", "rng_state": STATE}
    assert_matches((out, lse[..., :sq], *gradients[:3]), q, k, v, dout, **extra)


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


REFUSED = {
    "mask type": ({"custom_mask_type": 3}, "custom_mask_type is 3; expected 0 for none, 1 for causal top-left or 2"),
    "mask bool": ({"custom_mask_type": True}, "custom_mask_type is True; expected 0 for none"),
    "window": ({"window_size": 5}, "window_size is 5 but custom_mask_type is 0; windows end at a query's own key."),
    "window sign": ({"window_size": -1, "custom_mask_type": 1}, "window_size is -1; expected a number of keys from 1"),
    "one of two starts": ({"cu_seqlens_q": STARTS_Q}, "cu_seqlens_q is given but cu_seqlens_k is not"),
    "other of two": ({"cu_seqlens_k": STARTS_Q}, "cu_seqlens_k is given but cu_seqlens_q is not"),
    "batch": (
        {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K},
        "query has shape (2, 19, 4, 16); expected (1, total",
    ),
    "seqlen_k": ({"seqlen_k": USED}, "seqlen_k is for packed sequences"),
    "length": ({"max_seqlen_q": 20}, "max_seqlen_q is 20 but the tensor has 19 rows; pass that, or None"),
    "p": ({"dropout_p": 1.0}, "dropout_p is 1.0; expected a probability of dropping"),
    "bias dtype": ({"bias": zeros(SQ, SK, dtype="float16")}, "bias is float16; expected float32"),
    "bias shape": ({"bias": zeros(SQ, 3)}, "bias has shape (19, 3); expected one that broadcasts to"),
    "scale": ({"scale": np.nan}, "scale is nan; expected a finite number"),
    "key": ({"key": zeros(B, SK, HK, D, dtype="float16")}, "key is float16 but query is float32"),
    "query": ({"query": None}, "query is None; expected an array"),
    "lse": ({"compute_log_sumexp": None}, "compute_log_sumexp is None; expected True or False"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_efficient_attention_refuses(change: dict, message: str) -> None:
    arguments = {"query": zeros(B, SQ, H, D), "key": zeros(B, SK, HK, D), "value": zeros(B, SK, HK, DV)}
    cuflash.efficient_attention_forward(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.efficient_attention_forward(**arguments | change)
    assert str(error.value).startswith(message), error.value


BACKWARD_REFUSED = {
    "splits": ({"num_splits_key": 0}, "num_splits_key is 0; expected a number from 1, or None"),
    "deterministic": ({"num_splits_key": 2, "deterministic": True}, "num_splits_key is 2 and deterministic is True"),
    "shared": ({"shared_storage_dqdkdv": True}, "shared_storage_dqdkdv is True and query, key and value have shapes"),
    "no lse": ({"logsumexp": None}, "logsumexp is None; expected an array"),
    "short lse": ({"logsumexp": zeros(B, H, 8)}, "logsumexp has shape (2, 4, 8); expected (2, 4, 19)"),
    "bias": ({"bias_requires_grad": True}, "bias_requires_grad is True but bias is None"),
    "state": ({"dropout_p": P}, "philox_seed is None but dropout_p is 0.3"),
    "out": ({"out": zeros(B, SQ, H, 3)}, "out has shape (2, 19, 4, 3); expected (2, 19, 4, 24)"),
    "grad_out": ({"grad_out_": zeros(B, SQ, H, 3)}, "grad_out_ has shape (2, 19, 4, 3); expected (2, 19, 4, 24)"),
    "max_seqlen": ({"max_seqlen_k": 3}, "max_seqlen_k is 3 but the tensor has 27 rows"),
    "row": ({"query": zeros(D)}, "query has 1 dimensions, shape (16,); expected 4: (b, s, h, d)"),
    "list": ({"query": [0.0]}, "query is a list; expected an array"),
    "key list": ({"key": [0.0]}, "key is a list; expected an array"),
    "lse list": ({"logsumexp": [0.0]}, "logsumexp is a list; expected an array"),
    "lse number": ({"logsumexp": zeros()}, "logsumexp has shape (); expected (2, 4, 19)"),
    "packed list": (
        {"query": zeros(1, 15, H, D), "key": [0.0], "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K},
        "key has shape (); expected",
    ),
    "state text": ({"dropout_p": P, "philox_seed": "7", "philox_offset": 0}, "philox_seed is '7'; expected what the"),
    "shared rows": (
        {"shared_storage_dqdkdv": True, "query": zeros(D), "key": zeros(D), "value": zeros(D)},
        "query has shape (16,); expected (b, s, h, d)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BACKWARD_REFUSED.values(), ids=BACKWARD_REFUSED)
def test_what_the_gradients_of_efficient_attention_refuse(change: dict, message: str) -> None:
    out = zeros(B, SQ, H, DV)
    arguments = {
        "grad_out_": out, "query": zeros(B, SQ, H, D), "key": zeros(B, SK, HK, D), "value": zeros(B, SK, HK, DV),
        "bias": None, "out": out, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None,
        "max_seqlen_k": None, "logsumexp": zeros(B, H, 32), "dropout_p": 0.0, "philox_seed": None,
        "philox_offset": None, "custom_mask_type": 0, "bias_requires_grad": False,
    }  # fmt: skip
    cuflash.efficient_attention_backward(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.efficient_attention_backward(**arguments | change)
    assert str(error.value).startswith(message), error.value


MEM_EFF_REFUSED = {
    "two names": ({"cu_seqlens_q": STARTS_Q, "seqstart_q": STARTS_Q}, "cu_seqlens_q and seqstart_q are given together"),
    "causal": ({"is_causal": 2}, "is_causal is 2; expected True or False"),
    "p": ({"p_dropout": -1.0}, "p_dropout is -1.0; expected a probability of dropping"),
    "bias": ({"attn_bias_": zeros(3, SK)}, "attn_bias_ has shape (3, 27); expected one that broadcasts to"),
    "out": ({"out_": zeros(B, SQ, H, D)}, "out_ has shape (2, 19, 4, 16); expected (2, 19, 4, 24)"),
    "used": ({"seqused_k_": USED}, "seqused_k_ is for packed sequences"),
    "longest": ({"max_seqlen_q": SQ}, "max_seqlen_q is for packed sequences"),
    "randval": ({"return_dropout_randval": None}, "return_dropout_randval is None; expected True or False"),
}


@pytest.mark.parametrize(("change", "message"), MEM_EFF_REFUSED.values(), ids=MEM_EFF_REFUSED)
def test_what_mem_eff_refuses(change: dict, message: str) -> None:
    arguments = {"q": zeros(B, SQ, H, D), "k": zeros(B, SK, HK, D), "v": zeros(B, SK, HK, DV)}
    cuflash.mem_eff_forward(**arguments)
    with pytest.raises(InvalidArgument) as error:
        cuflash.mem_eff_forward(**arguments | change)
    assert str(error.value).startswith(message), error.value
