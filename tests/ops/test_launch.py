"""The whole path of a GPU call without a GPU: arrays of CuPy and torch over host memory, real kernels on the CPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import flash_words
import numpy as np
import oracle
import pytest
from doubles.arrays import FAKE_TORCH, FakeTensor, as_cupy, as_torch, memory, needs_cupy, to_numpy
from doubles.launch import Launches, needs_compiler
from host import run
from inputs import BF16, FP16, random

import cuflash
from cuflash import arrays, device, jit, ops
from cuflash.adapters.torch.tensors import Torch
from cuflash.arrays import CuPy
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.jit import kernel
from cuflash.ops import block, launch
from cuflash.ops.scratch import KeptZeros
from cuflash.plan import Config, Step

FRAMEWORKS = [pytest.param(as_cupy, marks=needs_cupy, id="cupy"), pytest.param(as_torch, id="torch")]


def as_each_framework(launches: Launches, call: Callable[[Any], list[np.ndarray | None]]) -> list[np.ndarray | None]:
    """What ``call`` gives for the arrays of one framework, those of the others having asked the same of the kernels."""
    first, *others = [as_torch] if find_spec("cupy") is None else [as_cupy, as_torch]
    results = call(first)
    for wrap in others:
        with launches.again():
            for result, again in zip(results, call(wrap), strict=True):
                np.testing.assert_array_equal(result, again)
    return results


STARTS_Q, STARTS_K = np.array([0, 30, 30, 75], np.int32), np.array([0, 10, 40, 90], np.int32)

CASES = {
    "dense": ({}, FP16, False),
    "fp64": ({"window_size": (30, 5), "softmax_scale": -0.2}, np.float64, False),
    "causal-window": ({"causal": True, "window_size": (20, -1)}, BF16, False),
    "top-left": ({"causal": True, "alignment": "top-left", "softcap": 1.5}, FP16, False),
    "mask": ({"attn_mask": np.random.default_rng(1).random((2, 1, 70, 90)) < 0.5}, FP16, False),
    "mask-strided": ({"attn_mask": np.random.default_rng(1).random((90, 4, 1)).transpose(1, 2, 0) < 0.5}, FP16, False),
    "packed": ({"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 45, "max_seqlen_k": 70,
                "seqused_k": np.array([4, 30, 20], np.int32)}, FP16, True),
    "packed-causal": ({"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 80, "max_seqlen_k": 99,
                       "causal": True}, BF16, True),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("options", "dtype", "packed"), CASES.values(), ids=CASES)
def test_vjp_on_host_memory(launches: Launches, options: dict, dtype: Any, packed: bool) -> None:
    rows_q, rows_kv = ((80,), (95,)) if packed else ((2, 70), (2, 90))
    q = random(*rows_q, 4, 40, dtype=dtype)[..., :32]
    k = random(*rows_kv, 2, 32, dtype=dtype, seed=1)[..., ::-1, :]
    v = random(*rows_kv, 2, 24, dtype=dtype, seed=2)
    dout = random(*rows_q, 4, 24, dtype=dtype, seed=3)
    dlse = random(*rows_q[:-1], 4, rows_q[-1], dtype=np.float64 if dtype is np.float64 else np.float32, seed=4)

    def call(wrap: Any) -> list[np.ndarray]:
        wrapped = {name: wrap(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        (out, lse), pullback = cuflash.flash_attn_vjp(wrap(q), wrap(k), wrap(v), **wrapped, return_lse=True)
        results = [to_numpy(x) for x in (out, lse, *pullback(wrap(dout), wrap(dlse)))]
        assert launches.take() == ["fwd_sm80", "bwd_delta", "bwd_sm80", "bwd_convert"]
        return results

    results = as_each_framework(launches, call)
    names = {"attn_mask": "mask", "window_size": "window", "softmax_scale": "scale"}
    given = {names.get(n, n): x for n, x in options.items() if not n.startswith("max_seqlen")}
    inputs = (q, k, v, dout, dlse)
    oracle.assert_all_close(
        oracle.Attention(*results), oracle.attention(*inputs, **given), oracle.naive_in_dtype(*inputs, **given)
    )


RNG = np.random.default_rng(8)
SLOPES, SINK = RNG.uniform(0.02, 0.3, (3, 4)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)
BIAS = RNG.standard_normal((3, 4, 90, 95))
PACKED = CASES["packed"][0] | {"seqused_q": np.array([21, 0, 45], np.int32)}
BYTE, WORD = {"dropout_p": 0.3}, {"dropout_p": 0.4, "dropout_scheme": "word"}
GENERATOR = (2**64 - 7, 2**33 + 4)
FEATURES = {
    "alibi": {"alibi_slopes": SLOPES[0], "causal": True},
    "bias": {"attn_bias": BIAS[:2, :, :70, :90].astype(FP16), "bias_grad": True},
    "bias-heads-fp32": {"attn_bias": BIAS[0, :, :1, :90].astype(np.float32), "bias_grad": True, "softcap": 1.5},
    "bias-strided": {"attn_bias": BIAS[0, :1, :90, :70].astype(FP16).transpose(0, 2, 1)[..., ::-1], "bias_grad": True},
    "sink": {"sink": SINK, "window_size": (9, 3)},
    "byte": BYTE | {"causal": True, "unbiased_dropout": True},
    "word": WORD | {"attn_mask": RNG.random((2, 1, 70, 90)) < 0.6, "causal": True},
    "all": BYTE | {"alibi_slopes": SLOPES[:2], "attn_bias": BIAS[0, 0, :70, :90].astype(FP16), "bias_grad": True,
                   "sink": SINK, "softcap": 2.0, "attn_mask": RNG.random((70, 90)) < 0.8},
    "packed-used": PACKED | BYTE | {"alibi_slopes": SLOPES, "sink": SINK},
    "packed-longer": PACKED | {"max_seqlen_q": 90, "max_seqlen_k": 99, "bias_grad": True,
                               "attn_bias": np.pad(BIAS[:, :1], [(0, 0), (0, 0), (0, 0), (0, 4)]).astype(FP16)},
    "packed-bias": PACKED | WORD | {"attn_bias": BIAS[:, :1, :45, :70].astype(FP16), "bias_grad": True},
}  # fmt: skip


@needs_compiler
@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["sm80", "simt"])
@pytest.mark.parametrize("name", FEATURES)
def test_score_features_on_host_memory(launches: Launches, name: str, family: str) -> None:
    given = FEATURES[name]
    packed = "cu_seqlens_q" in given
    rows_q, rows_kv = ((80,), (95,)) if packed else ((2, 70), (2, 90))
    q, k, v = random(*rows_q, 4, 32), random(*rows_kv, 2, 32, seed=1), random(*rows_kv, 2, 24, seed=2)
    options = flash_words.options(given, family=family)
    dout, dlse = random(*rows_q, 4, 24, seed=3), random(*rows_q[:-1], 4, rows_q[-1], dtype=np.float32, seed=4)

    def call(wrap: Any) -> list[np.ndarray | None]:
        out, lse, pullback = ops.vjp(options, flash_words.arrays(given, wrap, q=q, k=k, v=v), GENERATOR)
        gradients = pullback(wrap(dout), wrap(dlse))
        kernels = launches.take()
        assert [kernel.endswith(family) for kernel in kernels if kernel.startswith("fwd_s")] == [True]
        assert ("fwd_rng" in kernels) is ("dropout_p" in given)
        assert (getattr(gradients, "dbias", None) is None) is (not given.get("bias_grad"))
        assert (getattr(gradients, "dsink", None) is None) is ("sink" not in given)
        return [None if x is None else to_numpy(x) for x in (out, lse, *gradients)]

    results = as_each_framework(launches, call)
    names = {"attn_mask": "mask", "window_size": "window", "attn_bias": "bias", "unbiased_dropout": "dropout_unbiased"}
    expected = {names.get(n, n): x for n, x in given.items() if n != "bias_grad"} | {"rng_state": GENERATOR}
    inputs = (q, k, v, dout, dlse)
    exact, naive = oracle.attention(*inputs, **expected), oracle.naive_in_dtype(*inputs, **expected)
    oracle.assert_all_close(oracle.Attention(*results, *[None] * (7 - len(results))), exact, naive)


@needs_compiler
@pytest.mark.parametrize("family", ["numpy", "sm80", "simt"])
@pytest.mark.parametrize("name", ["plain", "pairs"])
def test_the_longest_lengths_may_be_those_in_use(launches: Launches, family: str, name: str) -> None:
    wrap, unwrap = ((lambda x: x),) * 2 if family == "numpy" else (as_torch, to_numpy)
    starts = {"q": np.array([0, 200, 300], np.int32), "k": np.array([0, 300, 330], np.int32)}
    used = {"q": np.array([3, 40], np.int32), "k": np.array([21, 0], np.int32)}
    longest = {"max_seqlen_q": 40, "max_seqlen_k": 21}
    q, k, v = random(310, 4, 32), random(340, 2, 32, seed=1), random(340, 2, 24, seed=2)
    inputs = [q, k, v, random(310, 4, 24, seed=3)]
    dlse = random(4, 310, dtype=np.float32, seed=4)
    poisoned = [np.full_like(x, np.nan) for x in inputs]
    for x, live, side in zip(poisoned, inputs, "qkkq", strict=True):
        for start, n in zip(starts[side], used[side], strict=False):
            x[start : start + n] = live[start : start + n]
    features = {} if name == "plain" else {"attn_bias": BIAS[:2, :1, :40, :21].astype(FP16), "sink": SINK} | WORD
    lengths = {f"{word}_{side}": x[side] for word, x in (("cu_seqlens", starts), ("seqused", used)) for side in "qk"}
    options = flash_words.options(longest | features, family=None if family == "numpy" else family)
    tensors = dict(zip("qkv", poisoned, strict=False))
    out, lse, pullback = ops.vjp(options, flash_words.arrays(tensors | lengths | features, wrap), GENERATOR)
    results = [unwrap(x) for x in (out, lse, *pullback(wrap(poisoned[3]), wrap(dlse))[:3])]

    expected = {"bias" if n == "attn_bias" else n: x for n, x in (lengths | longest | features).items()}
    expected |= {"rng_state": GENERATOR} if features else {}
    exact, naive = oracle.attention(*inputs, dlse, **expected), oracle.naive_in_dtype(*inputs, dlse, **expected)
    oracle.assert_all_close(oracle.Attention(*results), exact, naive)


DECODE = {
    "plan": {},
    "whole": {"num_splits": 1},
    "two": {"num_splits": 2, "causal": True, "sink": SINK},
    "most": {"num_splits": 128, "alibi_slopes": SLOPES[:2]},
    "packed": {"num_splits": 3, "causal": True, "cu_seqlens_q": np.array([0, 1, 1, 4], np.int32),
               "cu_seqlens_k": np.array([0, 300, 310, 370], np.int32), "max_seqlen_q": 3, "max_seqlen_k": 300,
               "seqused_k": np.array([290, 10, 0], np.int32)},
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", DECODE)
def test_few_queries_on_host_memory(launches: Launches, name: str) -> None:
    given = DECODE[name]
    packed = "cu_seqlens_q" in given
    rows_q, rows_kv = ((4,), (370,)) if packed else ((2, 3), (2, 370))
    q, k, v = random(*rows_q, 4, 32), random(*rows_kv, 1, 32, seed=1), random(*rows_kv, 1, 24, seed=2)
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    splits = {"whole": 1, "two": 2}.get(name, 3)  # no more than there are tiles of 128 keys

    def call(wrap: Any) -> list[np.ndarray]:
        wrapped = {n: wrap(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
        results = [to_numpy(x) for x in function(*map(wrap, (q, k, v)), **wrapped, return_lse=True)]
        assert launches.take() == ["fwd_sm80" if splits == 1 else "fwd_sm80_few"]
        return results

    results = as_each_framework(launches, call)
    assert launches.params[-1]["num_splits"] == splits
    assert (launches.params[-1]["partial_out"] != 0) == (launches.params[-1]["partial_state"] != 0) == (splits > 1)

    options = {n: x for n, x in given.items() if n != "num_splits" and not n.startswith("max_seqlen")}
    exact, naive = oracle.attention(q, k, v, **options), oracle.naive_in_dtype(q, k, v, **options)
    oracle.assert_all_close(oracle.Attention(*results), exact, naive)
    np.testing.assert_array_equal(function(q, k, v, **given), function(q, k, v, **given | {"num_splits": 0}))


@needs_compiler
@pytest.mark.parametrize("num_splits", [0, 1, 2])
def test_gradients_take_what_splits_found(launches: Launches, num_splits: int) -> None:
    q, k, v = as_torch(random(2, 3, 4, 32)), as_torch(random(2, 370, 1, 32, seed=1)), as_torch(random(2, 370, 1, 24))
    options = {"causal": True, "num_splits": num_splits, "return_lse": True}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **options)
    assert launches.take() == ["fwd_sm80" if num_splits == 1 else "fwd_sm80_few"]
    assert launches.params[-1]["num_splits"] == (num_splits or 3), "0 leaves it to the plan"
    dout = random(*out.shape, seed=3)
    results = [to_numpy(x) for x in (out, lse, *pullback(as_torch(dout)))]
    assert launches.take() == ["bwd_delta", "bwd_sm80", "bwd_convert"]
    inputs = [x.x for x in (q, k, v)]
    exact, naive = (f(*inputs, dout, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*results), exact, naive)


@needs_compiler
@pytest.mark.parametrize("family", ["sm80", "simt"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_sink_alone_decides_lse_where_there_are_no_keys(launches: Launches, family: str, packed: bool) -> None:
    rows_q, rows_kv = ((9,), (0,)) if packed else ((2, 9), (2, 0))
    q, k, v = (as_torch(random(*rows, 4, 32)) for rows in (rows_q, rows_kv, rows_kv))
    starts = [np.array([0, 4, 9], np.int32), np.zeros(3, np.int32)] if packed else [None, None]
    starts = [x if x is None else as_torch(x) for x in starts]
    options = ops.asked(family=family, bias_grad=True)
    bias = as_torch(np.zeros((2, 4, 1, 1), FP16))
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), starts, strict=True))
    out, lse, pullback = ops.vjp(options, ops.Arrays(q, k, v, **lengths, bias=bias, sink=as_torch(SINK)))
    assert not to_numpy(out).any() and (to_numpy(lse) == SINK[:, None]).all()
    dlse = random(*lse.shape, dtype=np.float32)
    gradients = pullback(as_torch(random(*out.shape)), as_torch(dlse))
    assert not to_numpy(gradients.dq).any() and not to_numpy(gradients.dbias).any()
    np.testing.assert_allclose(to_numpy(gradients.dsink), dlse.sum(1 if packed else (0, 2)), rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_drawn_seed_and_offset(launches: Launches, wrap: Any) -> None:
    q, k, v = (wrap(random(2, 16, 3, 32, seed=seed)) for seed in range(3))
    generator = cuflash.PhiloxGenerator(2**64 - 1, 8)
    for offset in (8, 8 + 2 * 3 * 32):
        out, state = cuflash.flash_attn_func(q, k, v, 0.5, generator=generator, return_rng_state=True)
        assert launches.take() == ["fwd_rng", "fwd_sm80"] and to_numpy(state).tolist() == [2**64 - 1, offset]
    assert len(launch._prepared) == 1, "the seed and offset are no part of the kind of a call"
    attention = launches.params[-1]["attention"][0]
    assert attention["rng_state"] == launches.params[-1]["rng_state"][0] != 0
    assert (attention["dropout_p"], attention["keep_scale"]) == (0.5, 2.0)
    on_host = cuflash.flash_attn_func(*map(to_numpy, (q, k, v)), 0.5, generator=(2**64 - 1, 8 + 2 * 3 * 32))
    np.testing.assert_allclose(to_numpy(out), on_host, atol=5e-3)


@needs_compiler
def test_a_generator_on_the_device_is_advanced_there(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    state = np.array([5, 8], np.uint64)
    generator = cuflash.PhiloxGenerator(1)
    monkeypatch.setattr(generator, "_array", SimpleNamespace(data=SimpleNamespace(ptr=state.ctypes.data, device_id=0)))
    monkeypatch.setattr(Torch, "is_capturing", lambda self: True)
    q, k, v = (as_torch(random(2, 7, 3, 32, seed=seed)) for seed in range(3))
    step = -(-2 * 3 * 7 * 7 // 4) * 4
    for offset in (8, 8 + step):
        _, drawn = cuflash.flash_attn_func(
            q, k, v, 0.5, generator=generator, dropout_scheme="word", return_rng_state=True
        )
        assert to_numpy(drawn).tolist() == [5, offset] and state.tolist() == [5, offset + step]


def test_graphs_that_would_repeat_their_dropout_are_refused(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(Torch, "is_capturing", lambda self: True)
    x = as_torch(random(1, 8, 2, 16))
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_func(x, x, x, 0.5)
    assert str(caught.value) == (
        "generator keeps its state where cuda:0 cannot advance it, so that every replay of the graph being captured "
        "would drop the same probabilities. Call generator.to_device() before capturing "
        "(cuflash.manual_seed(seed).to_device() for the default one), or pass a tuple (seed, offset)."
    )
    assert launches.take() == []
    cuflash.flash_attn_func(x, x, x, 0.5, generator=(1, 4))
    assert launches.take() == ["fwd_rng", "fwd_sm80"]


def test_probabilities_of_dropout_are_refused_while_a_graph_is_captured(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Torch, "is_capturing", lambda self: True)
    x = as_torch(random(1, 8, 2, 16))
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_func(x, x, x, 0.5, generator=(1, 4), return_attn_probs=True)
    assert str(caught.value) == (
        "the seed and offset of dropout would be read from the GPU, which is not possible while a CUDA graph is "
        "captured. Do not ask for probabilities while capturing."
    )
    assert launches.loaded == []


@needs_compiler
def test_numbers_are_drawn_even_where_there_are_no_keys(launches: Launches) -> None:
    q, k = as_torch(random(2, 5, 3, 32)), as_torch(random(2, 0, 3, 32))
    generator = cuflash.PhiloxGenerator(5)
    out, state = cuflash.flash_attn_func(q, k, k, 0.5, generator=generator, return_rng_state=True)
    assert launches.take() == ["fwd_rng"] and not to_numpy(out).any() and to_numpy(state).tolist() == [5, 0]
    on_host = cuflash.PhiloxGenerator(5)
    cuflash.flash_attn_func(*(to_numpy(x) for x in (q, k, k)), 0.5, generator=on_host)
    assert on_host.state == generator.state == (5, 2 * 3 * 32)


@needs_compiler
@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_sdpa_on_host_memory(launches: Launches, wrap: Any) -> None:
    q, k, v = random(2, 4, 70, 32), random(2, 2, 90, 32, seed=1), random(2, 2, 90, 24, seed=2)
    out, lse = cuflash.scaled_dot_product_attention(
        *map(wrap, (q, k, v)), is_causal=True, enable_gqa=True, return_lse=True
    )
    assert out.shape == (2, 4, 70, 24) and to_numpy(out).flags.c_contiguous
    inputs = [x.swapaxes(1, 2) for x in (q, k, v)]
    options = {"causal": True, "alignment": "top-left"}
    exact, naive = oracle.attention(*inputs, **options), oracle.naive_in_dtype(*inputs, **options)
    oracle.assert_all_close(oracle.Attention(to_numpy(out).swapaxes(1, 2), to_numpy(lse)), exact, naive)


def test_sdpa_runs_the_preferred_kernels(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x, wide = as_torch(random(1, 2, 8, 16)), as_torch(random(1, 2, 8, 136, dtype=np.float64))
    cuflash.scaled_dot_product_attention(x, x, x, backend="mem_eff")
    assert launches.take() == ["fwd_simt"]
    with pytest.raises(UnsupportedProblem, match="heads of 136 > 128 in fp64"):
        cuflash.scaled_dot_product_attention(wide, wide, wide, backend="flash")
    monkeypatch.setenv("CUFLASH_ATTENTION_BACKEND", "mem_eff")
    cuflash.scaled_dot_product_attention(x, x, x)
    cuflash.flash_attn_func(x, x, x)
    assert launches.take() == ["fwd_simt", "fwd_sm80"], "flash-attn's functions know no preference"


@needs_compiler
@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_outputs_are_the_callers_arrays(launches: Launches, wrap: Any) -> None:
    q, k, v = random(2, 70, 4, 32), random(2, 90, 2, 32, seed=1), random(2, 90, 2, 24, seed=2)
    buffer = np.full((4, 2, 71, 27), 7, FP16)
    place = wrap(buffer.transpose(1, 2, 0, 3)[:, :70, :, :24])
    out, lse = cuflash.flash_attn_func(*map(wrap, (q, k, v)), return_lse=True, out=place)
    assert out is place
    fresh = cuflash.flash_attn_func(*map(wrap, (q, k, v)))
    np.testing.assert_array_equal(to_numpy(out), to_numpy(fresh))
    assert (buffer[..., 24:] == 7).all() and (buffer[:, :, 70:] == 7).all()

    dqk = np.full((2, 90, 6, 32), 7, FP16)
    dq, dk = wrap(dqk[:, :70, :4]), wrap(dqk[:, :, 4:])
    got = cuflash.flash_attn_backward(
        wrap(np.ones((2, 70, 4, 24), FP16)), *map(wrap, (q, k, v)), out, lse, dq=dq, dk=dk
    )
    assert got[0] is dq and got[1] is dk and got[2].shape == v.shape
    assert (dqk[:, 70:, :4] == 7).all() and not (dqk[:, :70, :4] == 7).any() and not (dqk[:, :, 4:] == 7).any()


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_a_call_is_prepared_once_for_arrays_of_a_kind(launches: Launches, wrap: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, v = (wrap(random(1, 64, 2, 32, seed=seed)) for seed in range(3))
    out = cuflash.flash_attn_func(q, k, v)
    other_q = wrap(random(1, 64, 2, 32, seed=9))
    other_out = cuflash.flash_attn_func(other_q, k, v)
    assert out is not other_out, "both are alive, so that neither's memory is handed out twice"
    assert len(launches.loaded) == 1 and len(launch._prepared) == 1
    first, second = launches.params
    assert first["q"] != second["q"] and first["k"] == second["k"] and first["out"] != second["out"]
    for changed in ({"causal": True}, {"softmax_scale": 0.5}, {"window_size": (3, 3)}, {"softcap": 1.0}):
        cuflash.flash_attn_func(q, k, v, **changed)
    shifted = np.zeros(64 * 2 * 32 + 4, FP16)[4:].reshape(1, 64, 2, 32)
    assert shifted.ctypes.data % 16 == 8
    cuflash.flash_attn_func(wrap(shifted), k, v)
    assert len(launches.loaded) == len(launch._prepared) == 6


@needs_cupy
def test_a_kernel_takes_the_address_of_its_parameters() -> None:
    config, calls = Config(threads=96, smem_bytes=1000), []
    loaded = jit.Kernel("fwd_sm80", None, config, SimpleNamespace(ptr=77), lambda *given: calls.append(given))
    struct = random(25, dtype=np.float64).tobytes()
    params = jit.parameters(struct)()
    loaded.launch(7, params, 5)
    ((*given, arguments, extra),) = calls
    assert given == [77, 7, 1, 1, 96, 1, 1, 1000, 5] and extra == 0
    assert ctypes.string_at(ctypes.c_void_p.from_address(arguments).value, len(struct)) == struct


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class DriverError(RuntimeError):
        def __init__(self, status: int) -> None:
            self.status = status

    errors, freed = [DriverError(201)], []

    def start(*given: Any) -> None:
        if errors:
            raise errors.pop()

    runtime = SimpleNamespace(free=freed.append)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    loaded = jit.Kernel("fwd_sm80", None, Config(threads=96, smem_bytes=0), SimpleNamespace(ptr=1), start)
    loaded.launch(7, jit.parameters(bytes(8))(), 5)
    assert freed == [0] and not errors
    errors.append(DriverError(1))
    with pytest.raises(DriverError):
        loaded.launch(7, jit.parameters(bytes(8))(), 5)


def test_kernels_are_compiled_once_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_together(jobs: list[tuple[str, Config, str, str]]) -> list[str]:
        compiled.append([(kernel, arch) for kernel, _, _, arch in jobs])
        return [kernel for kernel, *_ in jobs]

    monkeypatch.setattr(kernel, "compile_together", compile_together)
    monkeypatch.setattr(kernel, "_load", lambda cubin, config, ordinal: (cubin, config.threads, ordinal))
    monkeypatch.setattr(kernel, "_loaded", {})
    monkeypatch.setattr(device, "current", lambda ordinal: device.named(("a100", "h100")[ordinal]))
    delta, main, convert = (
        Step(name, "BwdParams", Config(threads=threads), num_blocks=7)
        for name, threads in (("bwd_delta", 128), ("bwd_sm80", 256), ("bwd_convert", 96))
    )
    assert jit.load([delta, main], 0) == [("bwd_delta", 128, 0), ("bwd_sm80", 256, 0)]
    assert jit.load([main, delta], 0) == [("bwd_sm80", 256, 0), ("bwd_delta", 128, 0)]
    assert jit.load([], 0) == []
    assert compiled == [[("bwd_delta", "sm_80"), ("bwd_sm80", "sm_80")]]
    again = replace(main, num_blocks=8)
    assert jit.load([convert, again], 0) == [("bwd_convert", 96, 0), ("bwd_sm80", 256, 0)]
    assert jit.load([again], 1) == [("bwd_sm80", 256, 1)]
    assert compiled[1:] == [[("bwd_convert", "sm_80")], [("bwd_sm80", "sm_90a")]]

    with pytest.raises(UnsupportedProblem, match="bwd_sm80 would need 2147483648 blocks, more than the 2147483647"):
        jit.load([delta, replace(main, num_blocks=2**31), convert], 1)
    assert len(compiled) == 3


@needs_compiler
@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_a_call_prepared_by_hand(launches: Launches, wrap: Any) -> None:
    def tensors(seed: int) -> list[np.ndarray]:
        shapes = (2, 70, 4, 32), (2, 90, 2, 32), (2, 90, 2, 24)
        return [random(*shape, seed=seed) for shape in shapes]

    options = {"causal": True, "window_size": (20, -1), "softmax_scale": 0.3}
    attend = cuflash.flash_attn_prepare(*map(wrap, tensors(0)), **options)
    assert launches.take() == [] and len(launches.loaded) == 1 and not launch._prepared, "compiled, and not run"
    place = np.full((2, 70, 4, 25), 7, FP16)
    attend_to = cuflash.flash_attn_prepare(*map(wrap, tensors(0)), **options, out=wrap(np.copy(place)[..., :24]))
    for seed in (1, 2):
        inputs = list(map(wrap, tensors(seed)))
        expected = cuflash.flash_attn_func(*inputs, **options, return_lse=True)
        out = wrap(place[..., :24])
        for results in (attend(*inputs), attend_to(*inputs, out)):
            for one, other in zip(results, expected, strict=True):
                np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
        assert results[0] is out and (place[..., 24] == 7).all()
    assert launches.take() == 2 * 3 * ["fwd_sm80"] and len(launches.loaded) == 3


def unlike(**changes: Any) -> dict[str, Any]:
    shapes = {"q": (1, 8, 2, 16), "k": (1, 9, 2, 16), "v": (1, 9, 2, 16)}
    arrays = {name: as_torch(np.zeros(shape, FP16)) for name, shape in shapes.items()}
    return arrays | changes


SHIFTED = np.zeros(8 * 2 * 16 + 4, FP16)[4:].reshape(1, 8, 2, 16)
OUT = "float16 of shape (1, 8, 2, 16) with strides of (512, 64, 32, 2) bytes on cuda:0"
KEYS = "float16 of shape (1, 9, 2, 16) with strides of (576, 64, 32, 2) bytes on cuda:0"
UNLIKE = {
    "shape": (unlike(k=as_torch(np.zeros((1, 8, 2, 16), FP16))), f"k is {OUT}; expected {KEYS}"),
    "dtype": (unlike(v=as_torch(np.zeros((1, 9, 2, 16), BF16))), f"v is b{KEYS}; expected {KEYS}"),
    "strides": (
        unlike(k=as_torch(np.zeros((1, 2, 9, 16), FP16).swapaxes(1, 2))),
        f"k is float16 of shape (1, 9, 2, 16) with strides of (576, 32, 288, 2) bytes on cuda:0; expected {KEYS}",
    ),
    "device": (
        unlike(q=FakeTensor(np.zeros((1, 8, 2, 16), FP16), "cuda:1")),
        f"q is {OUT[:-1]}1; expected {OUT}",
    ),
    "address": (unlike(q=as_torch(SHIFTED)), f"q is {OUT}, 8 past a multiple of 16; expected {OUT}"),
    "out": (unlike(out=as_torch(np.zeros((1, 8, 2, 16), FP16))), f"out is {OUT}; expected None"),
    "none": (unlike(k=None), f"k is None; expected {KEYS}"),
}


@pytest.mark.parametrize(("arrays", "message"), UNLIKE.values(), ids=UNLIKE)
def test_a_prepared_call_refuses_other_arrays(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, arrays: dict, message: str
) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    attend = cuflash.flash_attn_prepare(**unlike())
    attend(**unlike())
    assert launches.take() == ["fwd_sm80"]
    with pytest.raises(InvalidArgument) as caught:
        attend(**arrays)
    assert str(caught.value) == f"{message}, which the call was prepared for. Prepare another."
    assert launches.take() == []


@needs_cupy
def test_what_a_call_is_not_prepared_for(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x = random(1, 8, 2, 16)
    attend = cuflash.flash_attn_prepare(*3 * [as_torch(x)], out=as_torch(x.copy()))
    refusals = {
        "q is a NumPy array, but the call was prepared for torch arrays. Prepare another for it.": (
            lambda: attend(x, x, x, x.copy())
        ),
        "k is None; expected an array.": lambda: cuflash.flash_attn_prepare(as_torch(x), None, as_torch(x)),
        "softcap is -1.0; expected 0 (none) or a positive number.": (
            lambda: cuflash.flash_attn_prepare(*3 * [as_torch(x)], softcap=-1)
        ),
        "q is a CuPy array, but the call was prepared for torch arrays. Prepare another for it.": (
            lambda: attend(*3 * [as_cupy(x)], as_cupy(x.copy()))
        ),
        "out shares memory with k, which is still read while out is written. Give out memory of its own.": (
            lambda: attend(as_torch(x.copy()), as_torch(x), as_torch(x.copy()), as_torch(x))
        ),
    }
    for message, refused in refusals.items():
        with pytest.raises(InvalidArgument) as caught:
            refused()
        assert str(caught.value) == message
    assert launches.take() == []


@needs_cupy
def test_prepared_calls_are_bounded(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(launch, "_MAX_PREPARED", 4)
    x = as_cupy(random(1, 8, 1, 16))
    for i in range(9):
        cuflash.flash_attn_func(x, x, x, softmax_scale=1.0 + i)
        assert len(launch._prepared) <= 4


@needs_cupy
def test_threads_share_prepared_calls(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(launch, "_MAX_PREPARED", 3)
    tensors = [[as_cupy(random(1, n, 1, 16, seed=s)) for s in range(3)] for n in (8, 16, 24, 32, 40)]
    seen: list[tuple[int, ...]] = []

    def work() -> None:
        for _ in range(20):
            for q, k, v in tensors:
                out = cuflash.flash_attn_func(q, k, v)
                seen.append((q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 * 20 * 5
    launched = {tuple(int(p[name][0]) for name in ("q", "k", "v", "out")) for p in launches.params}
    assert set(seen) == launched


@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_is_launched_for_empty_tensors(launches: Launches, b: int, sq: int, sk: int) -> None:
    q, k, v = (as_torch(np.ones(shape, FP16)) for shape in ((b, sq, 2, 32), (b, sk, 2, 32), (b, sk, 2, 16)))
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, return_lse=True)
    assert out.shape == (b, sq, 2, 16) and lse.shape == (b, 2, sq)
    assert not to_numpy(out).any() and np.isneginf(to_numpy(lse)).all()
    for gradient, x in zip(pullback(as_torch(np.ones(out.shape, FP16))), (q, k, v), strict=True):
        assert gradient.shape == x.shape and not to_numpy(gradient).any()
    assert launches.loaded == []


@needs_compiler
@pytest.mark.parametrize("family", ["numpy", "sm80", "simt"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("shape", [(2, 64, 1, 0), (64, 7, 0), (1, 1, 1, 0)])
def test_biases_without_an_element(launches: Launches, family: str, packed: bool, shape: tuple[int, ...]) -> None:
    """And 64 causal query heads on one key head without a key, which count no further than there are heads."""
    wrap, unwrap = ((lambda x: x),) * 2 if family == "numpy" else (as_torch, to_numpy)
    rows_q, rows_kv = ((14,), (0,)) if packed else ((2, 7), (2, 0))
    q, k = random(*rows_q, 64, 32), random(*rows_kv, 1, 32)
    starts = [np.array([0, 7, 14], np.int32), np.zeros(3, np.int32)] if packed else [None, None]
    sink = random(64, dtype=np.float32)
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))
    arrays = flash_words.arrays(lengths, wrap, q=q, k=k, v=k, attn_bias=np.zeros(shape, FP16), sink=sink)
    options = ops.asked(causal=True, bias_grad=True, family=None if family == "numpy" else family)
    out, lse, pullback = ops.vjp(options, arrays)
    gradients = pullback(wrap(np.ones(q.shape, FP16)))
    assert "bwd_bias_" + family not in launches.kernels
    assert unwrap(gradients.dbias).shape == shape and unwrap(gradients.dbias).dtype == np.float32
    assert not unwrap(out).any() and (unwrap(lse) == sink[:, None]).all()
    for gradient, x in zip(gradients[:3], (q, k, k), strict=True):
        assert gradient.shape == x.shape and not unwrap(gradient).any()
    assert not unwrap(gradients.dsink).any()


def test_rows_of_no_sequence_are_filled_without_a_launch(launches: Launches) -> None:
    x, starts = as_torch(np.ones((5, 2, 16), FP16)), as_torch(np.zeros(1, np.int32))
    place = as_torch(np.full((5, 2, 16), 7, FP16))
    out, lse = cuflash.flash_attn_varlen_func(x, x, x, starts, starts, return_lse=True, out=place)
    assert out is place and not to_numpy(out).any() and np.isneginf(to_numpy(lse)).all()
    assert launches.loaded == []


def test_longest_lengths_are_read_from_the_device(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, v = (as_torch(x) for x in (random(80, 4, 32), random(95, 2, 32), random(95, 2, 32)))
    reads: list[FakeTensor] = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self) or self.x.tolist())
    starts = as_torch(STARTS_Q), as_torch(STARTS_K)
    _, pullback = cuflash.flash_attn_vjp(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    pullback(as_torch(random(80, 4, 32)))
    assert reads == list(starts), "once for both directions"
    for params in launches.params:
        assert (params["attention"]["len_q"], params["attention"]["len_kv"]) == (45, 50)
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_k\[3\] is 90, but k has 80 rows"):
        cuflash.flash_attn_varlen_func(q, q, q, *starts)
    reads.clear()
    cuflash.flash_attn_varlen_func(q, k, v, *starts, 45, 50)
    assert reads == []


OUT_OF_PLACE = {
    "cu_seqlens_q[0] is 1": {"cu_seqlens_q": [1, 30, 30, 75]},
    "cu_seqlens_q[2] is 29 after 30": {"cu_seqlens_q": [0, 30, 29, 75]},
    "cu_seqlens_k[3] is 96, but k has 95 rows": {"cu_seqlens_k": [0, 10, 40, 96]},
    "seqused_q[1] is 1, but sequence 1 has 0 queries": {"seqused_q": [30, 1, 45]},
    "seqused_k[2] is -1, but sequence 2 has 50 keys": {"seqused_k": [10, 30, -1]},
    "max_seqlen_q is 44, but sequence 2 has 45 rows": {"max_seqlen_q": 44},
}
LENGTHS = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 45, "max_seqlen_k": 50}


def lengths(changes: dict) -> dict:
    """The lengths with some of them changed, as torch tensors."""
    values = (LENGTHS | changes).items()
    return {name: x if isinstance(x, int) else as_torch(np.array(x, np.int32)) for name, x in values}


@pytest.mark.parametrize("message", OUT_OF_PLACE)
def test_lengths_on_a_gpu_are_checked_on_request_alone(
    launches: Launches, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, v = (as_torch(x) for x in (random(80, 4, 32), random(95, 2, 32), random(95, 2, 32)))
    lse, given = as_torch(random(4, 80, dtype=np.float32)), lengths(OUT_OF_PLACE[message])
    for function, head in (
        (cuflash.flash_attn_varlen_func, (q, k, v)),
        (cuflash.flash_attn_vjp, (q, k, v)),
        (cuflash.flash_attn_backward, (q, q, k, v, q, lse)),
    ):
        function(*head, **given)
        assert launches.take(), "trusted unless asked"
        with pytest.raises(InvalidArgument) as caught:
            function(*head, **given, validate=True)
        assert str(caught.value).startswith(message)
        assert launches.take() == []


def test_sound_lengths_are_validated_once_and_share_the_prepared_call(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, v = (as_torch(x) for x in (random(80, 4, 32), random(95, 2, 32), random(95, 2, 32)))
    reads: list[FakeTensor] = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self) or self.x.tolist())
    given = lengths({"seqused_k": [10, 0, 50]})
    cuflash.flash_attn_varlen_func(q, k, v, **given)
    assert reads == []
    cuflash.flash_attn_varlen_func(q, k, v, **given, validate=True)
    assert reads == [given[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")]
    assert len(launch._prepared) == 1
    reads.clear()
    _, pullback = cuflash.flash_attn_vjp(q, k, v, **given, validate=True)
    pullback(q)
    assert len(reads) == 3, "once for both directions"


def test_lengths_are_not_read_while_a_graph_is_captured(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(Torch, "is_capturing", lambda self: True)
    q, k, v = (as_torch(x) for x in (random(80, 4, 32), random(95, 2, 32), random(95, 2, 32)))
    given = lengths({})
    cuflash.flash_attn_varlen_func(q, k, v, **given)
    launches.take()
    why = "cu_seqlens would be read from the GPU, which is not possible while a CUDA graph is captured."
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_varlen_func(q, k, v, **given, validate=True)
    assert str(caught.value) == f"validate is True: {why} Validate before capturing."
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_varlen_func(q, k, v, **given | {"max_seqlen_k": None})
    assert str(caught.value) == f"max_seqlen_q or max_seqlen_k is None and {why} Pass both."
    assert launches.take() == []


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 6, 4, 16), (6 * 4 * 16, 4 * 16, 16)),
        ((2, 6, 1, 16), (6 * 16, 16, 0)),
        ((1, 6, 4, 16), (0, 4 * 16, 16)),
    ],
)
def test_strides_in_the_parameter_block(launches, monkeypatch, shape, strides) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x = as_torch(random(*shape))
    out, lse = cuflash.flash_attn_func(x, x, x, window_size=(-1, 2), return_lse=True)
    (params,) = launches.params
    for name in ("q", "k", "v", "out"):
        assert params[f"{name}_stride"][0].item() == strides
    b, s, h, _ = shape
    assert params["lse_stride"][0].item() == (h * s if b > 1 else 0, 1, s if h > 1 else 0)
    attention = params["attention"][0]
    assert (attention["window_left"], attention["window_right"]) == (2**30 - 1, 2)
    assert (params["out"][0], params["lse"][0]) == (out.data_ptr(), lse.data_ptr())
    assert attention["mask"] == attention["cu_seqlens_q"] == attention["seqused_kv"] == 0


@pytest.fixture
def hopper(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """An H100 whose tensor maps say in plain words what they describe, and whose kernels do nothing."""
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(device, "current", lambda ordinal: device.named("h100"))
    monkeypatch.setattr(jit.tensormap, "encoder", run.encoder)
    return launches


def maps(params: np.ndarray) -> dict[str, list[int]]:
    """The words of every map in a parameter block, of the address only what it is from the tensor's."""
    words_of = {}
    for name in (field.removesuffix("_map") for field in params.dtype.names if field.endswith("_map")):
        if name == "bias":
            continue
        address, *words = params[f"{name}_map"]["words"][0].tolist()
        words_of[name] = [address - int(params[name][0]), *of_four(words)] if any(words) else []
    return words_of


def of_four(words: list[int]) -> list[int]:
    """The words of a map behind its address, without those of the fifth dimension, which pages alone have."""
    dims, strides, box, itemsize = words[:5], words[5:9], words[9:14], words[14]
    assert (dims.pop(), strides.pop(), box.pop()) == (1, 0, 1)
    return [*dims, *strides, *box, itemsize]


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_maps_of_dense_tensors(hopper: Launches, wrap: Any) -> None:
    q = random(2, 4, 70, 40)[..., :32].swapaxes(1, 2)
    k, v = random(2, 90, 2, 32, seed=1)[:, ::2], random(2, 45, 2, 24, seed=2)
    place = np.zeros((2, 70, 4, 32), FP16)[..., :24]
    for out, strides in ((None, (4 * 48, 48, 70 * 4 * 48)), (place, (4 * 64, 64, 70 * 4 * 64))):
        cuflash.flash_attn_func(*map(wrap, (q, k, v)), out=out if out is None else wrap(out))
        assert hopper.take() == ["fwd_sm90"]
        params = hopper.params[-1]
        assert maps(params) == {
            "q": [0, 32, 70, 4, 2, 80, 70 * 80, 4 * 70 * 80, 64, 64, 1, 1, 2],
            "k": [0, 32, 45, 2, 2, 2 * 128, 64, 90 * 128, 64, 64, 1, 1, 2],
            "v": [0, 24, 45, 2, 2, 96, 48, 45 * 96, 64, 64, 1, 1, 2],
            "out": [0, 24, 70, 4, 2, *strides, 64, 64, 1, 1, 2],
        }
        assert params["heads_per_section"][0] == 2, "those that share keys"


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_maps_of_dense_gradients(hopper: Launches, wrap: Any) -> None:
    q = random(2, 4, 70, 40)[..., :32].swapaxes(1, 2)
    k, v = random(2, 90, 2, 32, seed=1)[:, ::2], random(2, 45, 2, 24, seed=2)
    out, dout = random(2, 70, 4, 24, seed=3), random(2, 70, 4, 64, seed=4)[..., :24]
    lse = np.zeros((2, 4, 70), np.float32)
    dv = np.zeros((2, 2, 45, 32), FP16)[..., :24].swapaxes(1, 2)
    for place, strides in ((None, (2 * 48, 48, 45 * 96)), (wrap(dv), (64, 45 * 64, 2 * 45 * 64))):
        cuflash.flash_attn_backward(*map(wrap, (dout, q, k, v, out, lse)), dv=place)
        assert hopper.take() == ["bwd_prepare_sm90", "bwd_sm90", "bwd_convert_sm90"]
        _, params, _ = hopper.params[-3:]
        assert maps(params) == {
            "q": [0, 32, 70, 4, 2, 80, 70 * 80, 4 * 70 * 80, 64, 128, 1, 1, 2],
            "k": [0, 32, 45, 2, 2, 2 * 128, 64, 90 * 128, 64, 64, 1, 1, 2],
            "v": [0, 24, 45, 2, 2, 96, 48, 45 * 96, 64, 64, 1, 1, 2],
            "dout": [0, 24, 70, 4, 2, 4 * 128, 128, 70 * 4 * 128, 64, 128, 1, 1, 2],
            "dk": [0, 32, 45, 2, 2, 128, 64, 45 * 128, 64, 64, 1, 1, 2],
            "dv": [0, 24, 45, 2, 2, *strides, 64, 64, 1, 1, 2],
            "dq": [],  # of the kernel for short sequences alone
        }
        assert all(params[name][0] for name in ("row_tiles", "dq_accum", "delta", "shift"))
        assert not params["dq_turn"][0], "blocks add in any order"


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_maps_of_packed_gradients(hopper: Launches, wrap: Any) -> None:
    q, k, v = random(80, 4, 128), random(95, 2, 128, seed=1), random(95, 2, 72, seed=2)
    out, lse = random(80, 4, 72, seed=3), np.zeros((4, 80), np.float32)
    cuflash.flash_attn_backward(
        *map(wrap, (out, q, k, v, out, lse)), cu_seqlens_q=wrap(STARTS_Q), cu_seqlens_k=wrap(STARTS_K),
        max_seqlen_q=45, max_seqlen_k=50, deterministic=True,
    )  # fmt: skip
    assert hopper.take() == ["bwd_prepare_sm90", "bwd_sm90", "bwd_convert_sm90"]
    _, params, _ = hopper.params[-3:]

    def words(rows: int, heads: int, dim: int) -> list[int]:
        row = heads * dim * 2
        return [-rows * row, dim, rows, rows + 1, heads, row, row, dim * 2, 64, 64, 1, 1, 2]

    queries, keys = words(80, 4, 128), words(95, 2, 128)
    values = words(95, 2, 72)
    assert maps(params) == {
        "q": queries, "k": keys, "v": values, "dout": words(80, 4, 72), "dq": [], "dk": keys, "dv": values
    }  # fmt: skip
    assert params["dq_turn"][0], "blocks take turns"


@pytest.mark.parametrize("change", ["dq", "dk", "dv", "dout"])
def test_gradients_at_odd_places_are_left_to_others(hopper: Launches, change: str) -> None:
    x, lse = random(1, 70, 2, 32), np.zeros((1, 2, 70), np.float32)
    odd = as_torch(np.zeros(x.size + 4, FP16)[4:].reshape(x.shape))
    places = {change: odd} if change != "dout" else {}
    dout = odd if change == "dout" else as_torch(x)
    cuflash.flash_attn_backward(dout, *(as_torch(x) for _ in range(4)), as_torch(lse), **places)
    assert hopper.take() == ["bwd_delta", "bwd_sm80", "bwd_convert"]


@pytest.mark.parametrize(("framework", "wrap"), [(CuPy, as_cupy), (Torch, as_torch)])
def test_calls_on_a_stream_share_their_tickets(
    hopper: Launches, monkeypatch: pytest.MonkeyPatch, framework: type, wrap: Any
) -> None:
    monkeypatch.setattr(device, "current", lambda ordinal: replace(device.named("h100"), num_sms=2))
    x = wrap(random(1, 300, 2, 64))

    busy: set[Any] = set()

    def tickets(stream: int = 7, owner: Any = "the pool", capturing: bool = False) -> int:
        monkeypatch.setattr(framework, "stream", lambda self: (stream, owner))
        monkeypatch.setattr(framework, "is_done", lambda self, stream: stream not in busy)
        monkeypatch.setattr(framework, "is_capturing", lambda self: capturing)
        cuflash.flash_attn_func(x, x, x, causal=True)
        address = int(hopper.params[-1]["tickets"][0])
        held = kept()._kept.values()
        assert all(
            memory(int(a), (1,), (4,), np.dtype(np.int32)).tolist() == [0] for a in (address_of(y) for _, y in held)
        )
        return address

    def kept() -> KeptZeros:
        (prepared,) = launch._prepared.values()
        (zeros,) = (allocate for allocate in prepared.allocations if isinstance(allocate, KeptZeros))
        return zeros

    def address_of(y: Any) -> int:
        return y.data_ptr() if wrap is as_torch else y.data.ptr

    mine, other = tickets(), tickets(8)
    assert tickets() == mine and tickets(8) == other != mine
    graph = tickets(capturing=True)
    assert graph not in (mine, other), "a graph may run beside calls"
    assert len(kept()._kept) == 2
    passing = [tickets(9, owner=None) for _ in range(2)]
    assert len(kept()._kept) == 2 and not {mine, other} & {*passing}, "its handle may be another stream's tomorrow"

    def in_a_thread() -> int:
        with ThreadPoolExecutor(1) as another:
            return another.submit(tickets, 2).result()

    alone, first, second = tickets(2), in_a_thread(), in_a_thread()
    assert len({alone, first, second, mine, other}) == 5, "threads have default streams of one name, and names return"
    assert tickets() == mine and tickets(2) == alone
    busy |= {f"stream {n}" for n in range(10, 60)}
    addresses = {n: tickets(n, f"stream {n}") for n in range(10, 200)}
    assert len(kept()._kept) <= 64, "streams come and go"
    assert all(tickets(n, f"stream {n}") == addresses[n] for n in range(10, 60)), "work may still run on those"
    busy |= {f"stream {n}" for n in range(200, 300)}
    for n in range(200, 300):
        tickets(n, f"stream {n}")
    assert len(kept()._kept) <= 64 and all(tickets(n, f"stream {n}") == addresses[n] for n in range(10, 60))


@pytest.mark.parametrize("wrap", FRAMEWORKS)
def test_maps_of_packed_tensors(hopper: Launches, wrap: Any) -> None:
    q, k, v = random(80, 4, 32), random(95, 3, 32, seed=1)[:, ::2], random(95, 2, 24, seed=2)
    cuflash.flash_attn_varlen_func(*map(wrap, (q, k, v, STARTS_Q, STARTS_K)), 45, 50, num_splits=1)
    assert hopper.take() == ["fwd_sm90"]
    (params,) = hopper.params
    backs = {"q": 80 * 256, "k": 95 * 192, "v": 95 * 96, "out": 80 * 192}
    assert maps(params) == {
        "q": [-backs["q"], 32, 80, 81, 4, 256, 256, 64, 64, 64, 1, 1, 2],
        "k": [-backs["k"], 32, 95, 96, 2, 192, 192, 128, 64, 64, 1, 1, 2],
        "v": [-backs["v"], 24, 95, 96, 2, 96, 96, 48, 64, 64, 1, 1, 2],
        "out": [-backs["out"], 24, 80, 81, 4, 192, 192, 48, 64, 64, 1, 1, 2],
    }


WIDE = np.pad(BIAS, [(0, 0), (0, 0), (0, 0), (0, 1)])
HALF, FLOAT = WIDE.astype(FP16), WIDE.astype(np.float32)
BIASES = {  # with the words of the map; none where keys are not neighbours, or rows not at multiples of 16 bytes
    "whole": (HALF[:2, :, :70, :90], [90, 70, 4, 2, 192, 90 * 192, 4 * 90 * 192, 64, 256, 1, 1, 2]),
    "fp32": (FLOAT[0, :, :70, :90], [90, 70, 4, 1, 384, 90 * 384, 16, 32, 256, 1, 1, 4]),
    "one-head": (HALF[:2, :1, :70, :90], [90, 70, 1, 2, 192, 16, 4 * 90 * 192, 64, 256, 1, 1, 2]),
    "one-row": (HALF[:2, :, :1, :90], [90, 1, 4, 2, 16, 90 * 192, 4 * 90 * 192, 64, 1, 1, 1, 2]),
    "expanded": (np.broadcast_to(HALF[0, 0, 0, :90], (2, 4, 70, 90)), [90, 1, 1, 1, 16, 16, 16, 64, 1, 1, 1, 2]),
    "one-key": (HALF[:2, :, :70, :1], []),
    "narrow": (np.ascontiguousarray(HALF[:2, :, :70, :90]), []),
    "shifted": (HALF[0, 0, :70, 4:94], []),
    "reversed": (HALF[0, 0, 69::-1, :90], []),
    "columns": (np.asfortranarray(HALF[0, 0, :70, :90]), []),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_on_hopper(launches: Launches, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(device, "current", lambda ordinal: device.named("h100"))
    monkeypatch.setattr(jit.tensormap, "encoder", run.encoder)
    bias, described = BIASES[name]
    q, k, v = random(2, 70, 4, 32), random(2, 90, 2, 32, seed=1), random(2, 90, 2, 24, seed=2)
    out, lse = ops.forward(ops.asked(), ops.Arrays(*map(as_torch, (q, k, v)), bias=as_torch(bias)))[:2]
    assert launches.take() == ["fwd_sm90"]
    (params,) = launches.params
    address, *words = params["bias_map"]["words"][0].tolist()
    assert [address, *(of_four(words) if described else words)] == (
        [bias.ctypes.data, *described] if described else [0] * 16
    )
    exact, naive = (f(q, k, v, bias=bias) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(to_numpy(out), to_numpy(lse)), exact, naive)


def test_maps_of_heads_before_rows(hopper: Launches) -> None:
    q, k = as_torch(random(2, 4, 70, 32)), as_torch(random(2, 4, 90, 32))
    cuflash.scaled_dot_product_attention(q, k, k)
    words = maps(hopper.params[-1])
    assert words["q"] == words["out"] == [0, 32, 70, 4, 2, 64, 70 * 64, 4 * 70 * 64, 64, 64, 1, 1, 2]
    assert words["k"] == words["v"] == [0, 32, 90, 4, 2, 64, 90 * 64, 4 * 90 * 64, 64, 64, 1, 1, 2]


def test_maps_of_tensors_with_one_element_or_none_along_an_axis(hopper: Launches) -> None:
    odd = np.ndarray((1, 1, 1, 16), FP16, random(64), strides=(6, -2, 10, 2))
    cuflash.flash_attn_func(*(as_torch(odd) for _ in range(3)))
    assert hopper.take() == ["fwd_sm90"]
    assert maps(hopper.params[-1])["k"] == [0, 16, 1, 1, 1, 16, 16, 16, 64, 64, 1, 1, 2]
    q, k = as_torch(random(2, 9, 4, 32)), as_torch(random(2, 0, 4, 32))
    ops.forward(ops.asked(), ops.Arrays(q, k, k, sink=as_torch(SINK)))
    assert hopper.take() == ["fwd_sm90"]
    words = maps(hopper.params[-1])
    assert words["k"] == words["v"] == [] and words["q"][1:5] == [32, 9, 4, 2], "there is nothing to copy"


def test_maps_follow_the_pointers(hopper: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(jit.tensormap, "encoder", lambda tensor, device: made.append(tensor) or run.encoder(tensor))
    q, k, v, other = (as_torch(random(1, 96, 2, 32, seed=seed)) for seed in range(4))
    kept = [cuflash.flash_attn_func(q, k, v), cuflash.flash_attn_func(other, k, v)]
    assert len(made) == 4 and len(launch._prepared) == 1, "described once for all tensors of a kind"
    first, second = hopper.params
    assert first["q_map"]["words"][0, 0] == q.data_ptr() and second["q_map"]["words"][0, 0] == other.data_ptr()
    assert [p["out_map"]["words"][0, 0] for p in hopper.params] == [out.data_ptr() for out in kept]
    assert first["k_map"] == second["k_map"]


def test_blocks_of_the_last_pointers_are_kept_but_for_dropout(
    hopper: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def encoder(tensor: jit.tensormap.TensorMap, device: int) -> Any:
        return lambda address: encoded.append(address) or run.encoder(tensor)(address)

    monkeypatch.setattr(jit.tensormap, "encoder", encoder)
    monkeypatch.setattr(block, "_MAX_BLOCKS", 2)
    q, *places = (as_torch(random(1, 96, 2, 32, seed=seed)) for seed in range(4))
    scratch = as_torch(np.zeros(4096, np.uint8))
    monkeypatch.setattr(Torch, "empty", lambda *_: scratch)
    for place in (0, 0, 1, 0, 2, 0, 1):
        cuflash.flash_attn_func(q, q, q, out=places[place])
        params = hopper.params[-1][0]
        assert (params["q"], params["out"]) == (q.data_ptr(), places[place].data_ptr())
        assert params["out_map"]["words"][0] == places[place].data_ptr()
    assert encoded[3::4] == [places[n].data_ptr() for n in (0, 1, 2, 1)], "of two blocks, the one used last stays"
    encoded.clear()
    for seed in (5, 5, 6):
        cuflash.flash_attn_func(q, q, q, 0.5, generator=(seed, 4), out=places[0])
        assert (hopper.params[-1]["seed"], hopper.params[-1]["offset"]) == (seed, 4)
    assert len(encoded) == 3 * 4, "of blocks with a seed none would come back"


def test_dropout_draws_before_the_kernel_that_copies_in_bulk(hopper: Launches) -> None:
    x = as_torch(random(1, 96, 2, 32))
    cuflash.flash_attn_func(x, x, x, 0.5, generator=(1, 4))
    assert hopper.take() == ["fwd_rng", "fwd_sm90"]
    assert maps(hopper.params[0]) == maps(hopper.params[1])


def test_what_cannot_be_copied_in_bulk_goes_to_other_kernels(hopper: Launches) -> None:
    x = random(2, 96, 4, 40)
    plain = x[..., :32]
    shifted = np.zeros(plain.size + 4, FP16)[4:].reshape(plain.shape)
    expanded = np.broadcast_to(plain[:, :, :1], plain.shape)
    for other in (plain[:, :, ::-1], plain[:, ::-1], expanded, x[..., 4:36], shifted, x[..., :36]):
        cuflash.flash_attn_func(*(as_torch(other),) * 3)
        assert hopper.take() == ["fwd_sm80"]
        assert not any(maps(hopper.params[-1]).values())


def test_gradients_come_from_a_family_that_has_them(hopper: Launches) -> None:
    x = as_torch(random(1, 96, 2, 32))
    (out, _), pullback = cuflash.flash_attn_vjp(x, x, x, return_lse=True)
    pullback(as_torch(np.ones(out.shape, FP16)))
    assert hopper.take() == ["fwd_sm90", "bwd_prepare_sm90", "bwd_sm90", "bwd_convert_sm90"]
    wide = as_torch(random(1, 96, 2, 72))
    (out, _), pullback = cuflash.flash_attn_vjp(x, x, wide, return_lse=True)
    pullback(as_torch(np.ones(out.shape, FP16)))
    assert hopper.take() == ["fwd_sm90", "bwd_delta", "bwd_sm80", "bwd_convert"]
    out, _, pullback = ops.vjp(ops.asked(family="sm90"), ops.Arrays(x, x, wide))
    with pytest.raises(UnsupportedProblem, match=r"\n  sm90    dim_v > 64 beside dim_qk <= 64\n"):
        pullback(as_torch(np.ones(out.shape, FP16)))
    assert hopper.take() == ["fwd_sm90"]


FAKE_GPU_REFUSALS = {
    "cpu": (
        lambda x: FakeTensor(x, "cpu"),
        "k is on cpu but q is on cuda:0; all arrays of a call must be on one device. Move one of them.",
    ),
    "other-device": (
        lambda x: FakeTensor(x, "cuda:1"),
        "k is on cuda:1 but q is on cuda:0; all arrays of a call must be on one device. Move one of them.",
    ),
    "negated": (lambda x: FakeTensor(x, negated=True), "k is a lazily negated torch view; pass k.resolve_neg()."),
    "numpy": (
        lambda x: x,
        "k is a NumPy array but q is a torch array; all arrays of a call must come from one framework. "
        "Convert one of them.",
    ),
}


@pytest.mark.parametrize(("make", "message"), FAKE_GPU_REFUSALS.values(), ids=FAKE_GPU_REFUSALS)
def test_refused_tensors(launches: Launches, make: Any, message: str) -> None:
    x = random(1, 8, 2, 16)
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_func(as_torch(x), make(x), as_torch(x))
    assert str(caught.value) == message
    assert launches.loaded == [] and launch._prepared == {}


def test_requires_grad_is_fine_where_grad_is_off(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    monkeypatch.setattr(FAKE_TORCH, "is_grad_enabled", lambda: False)
    x = FakeTensor(random(1, 8, 2, 16), requires_grad=True)
    cuflash.flash_attn_func(x, x, x)
    assert launches.take() == ["fwd_sm80"]


def test_prepared_calls_record_nothing(launches: Launches) -> None:
    plain, grad = (FakeTensor(random(1, 8, 2, 16), requires_grad=grad) for grad in (False, True))
    attend = cuflash.flash_attn_prepare(plain, plain, plain)
    with pytest.raises(InvalidArgument) as caught:
        attend(plain, grad, plain)
    assert str(caught.value) == (
        "k requires grad, and autograd sees neither prepared calls nor merges: its gradient would be lost. "
        "Pass k.detach(), or call flash_attn_func or merge_attention_vjp."
    )
    assert launches.take() == []


@needs_cupy
def test_refused_cupy_arrays(launches: Launches) -> None:
    x = random(1, 8, 2, 16)
    good = as_cupy(x)
    with pytest.raises(InvalidArgument, match="v is on cuda:3 but q is on cuda:0"):
        cuflash.flash_attn_func(good, good, as_cupy(x, ordinal=3))
    with pytest.raises(InvalidArgument, match="v is a NumPy array but q is a CuPy array"):
        cuflash.flash_attn_func(good, good, x)
    with pytest.raises(InvalidArgument, match=r"out shares memory with k, which is still read"):
        cuflash.flash_attn_func(as_cupy(x.copy()), good, good, out=good)
    with pytest.raises(UnsupportedProblem, match="no kernel runs this on NVIDIA A100"):
        wide = as_cupy(random(1, 2, 1, 2048))
        cuflash.flash_attn_func(wide, wide, wide)
    assert launches.kernels == []


@needs_cupy
def test_overlap_is_checked_on_every_call(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, v, out = (as_cupy(random(1, 8, 2, 16, seed=s)) for s in range(4))
    cuflash.flash_attn_func(q, k, v, out=out)
    assert len(launch._prepared) == 1
    with pytest.raises(InvalidArgument, match="out shares memory with v"):
        cuflash.flash_attn_func(q, k, v, out=v)
    assert len(launch._prepared) == 1 and len(launches.kernels) == 1


PACKED_GRADIENT = {
    **{name: random(9, 2, 16) for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")},
    **{name: np.array([0, 4, 9], np.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")},
    **{name: np.array([4, 5], np.int32) for name in ("seqused_q", "seqused_k")},
    **{name: np.zeros((2, 9), np.float32) for name in ("lse", "dlse")},
    "alibi_slopes": np.zeros(2, np.float32), "sink": np.zeros(2, np.float32), "attn_bias": np.zeros((5, 5), FP16),
    "attn_mask": np.ones((5, 5), bool), "rng_state": np.zeros(2, np.uint64),
}  # fmt: skip


@pytest.mark.parametrize("wrap", FRAMEWORKS)
@pytest.mark.parametrize("read", [False, True], ids=["lengths-given", "lengths-read"])
@pytest.mark.parametrize("name", PACKED_GRADIENT)
def test_every_array_belongs_to_one_library(launches: Launches, wrap: Any, read: bool, name: str) -> None:
    library = "CuPy" if wrap is as_cupy else "torch"
    arguments = {word: x if word == name else wrap(x) for word, x in PACKED_GRADIENT.items()}
    lengths = {} if read else {"max_seqlen_q": 5, "max_seqlen_k": 5}
    (word, kind), (first, first_kind) = (name, "NumPy"), ("q", library)
    if name == "q":
        (word, kind), (first, first_kind) = ("k", library), ("q", "NumPy")
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_backward(**arguments, **lengths, dropout_p=0.5)
    assert str(caught.value) == (
        f"{word} is a {kind} array but {first} is a {first_kind} array; all arrays of a call must come from one "
        "framework. Convert one of them."
    )
    arguments[name] = [1.0]
    with pytest.raises(InvalidArgument, match=f"^{name} is a list; expected an array of NumPy, CuPy, torch"):
        cuflash.flash_attn_backward(**arguments, **lengths, dropout_p=0.5)
    assert launches.loaded == [] and launch._prepared == {}


class Parameter(FakeTensor):
    """As ``torch.nn.Parameter``."""


def test_arrays_may_be_of_several_types_of_a_library(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    q, k, sink = random(1, 8, 2, 16), random(1, 8, 2, 16, seed=1), np.zeros(2, np.float32)
    for kinds in ((FakeTensor, Parameter, Parameter), (Parameter, FakeTensor, FakeTensor)):
        cuflash.flash_attn_func(kinds[0](q), kinds[1](k), kinds[0](k), sink=kinds[2](sink))
    assert launches.take() == ["fwd_sm80"] * 2 and len(launch._prepared) == 1


class ForeignArray:
    """An array of a library that is reached through DLPack alone."""

    def __init__(self, where: int) -> None:
        self.where = where

    def __dlpack__(self, **_: Any) -> None:
        raise AssertionError("must not be taken")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.where, 0


@needs_cupy
def test_refused_arrays_of_other_libraries(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("foreign")
    module.from_dlpack = lambda x: x
    monkeypatch.setitem(sys.modules, "foreign", module)
    monkeypatch.setattr(ForeignArray, "__module__", "foreign.arrays")
    x = ForeignArray(where=8)
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_func(x, x, x)
    assert str(caught.value) == (
        "q is a foreign array on device 0 of DLPack's kind 8; cuflash computes on CUDA devices and on the CPU. "
        "Move q to one of them."
    )
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_func(x, x, x, out=x)
    assert str(caught.value) == (
        "out is a foreign array, and cuflash does not write to those. Drop out and use the array that is returned."
    )


def test_cupy_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[cuda13\]'"):
        arrays.cupy_module()


def in_pages(x: np.ndarray, table: np.ndarray, num_pages: int, page_size: int) -> np.ndarray:
    """The packed keys of STARTS_K in the pages of a table; NaN in every other row, and strides like no other."""
    pages = np.full((x.shape[1] + 1, num_pages, page_size + 1, x.shape[2] + 8), np.nan, x.dtype)
    pages = pages.transpose(1, 2, 0, 3)[:, :page_size, 1:, :-8]
    for b, (start, end) in enumerate(pairwise(STARTS_K.tolist())):
        for j in range(end - start):
            pages[table[b, j // page_size], j % page_size] = x[start + j]
    return pages


def paged_inputs(page_size: int, dtype: Any = FP16) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Packed q, k and v, the pages of k and v, and a strided table with wild numbers behind each last page."""
    packed = [random(80, 4, 32, dtype=dtype), *(random(90, 2, d, dtype=dtype, seed=d) for d in (32, 24))]
    most = -(-50 // page_size)
    num_pages = 3 * most + 2
    table = np.random.default_rng(0).permutation(num_pages)[: 3 * most].reshape(most, 3).astype(np.int32).T
    pages = [in_pages(x, table, num_pages, page_size) for x in packed[1:]]
    for b, n in enumerate(np.diff(STARTS_K)):
        table[b, -(-n // page_size) :] = np.iinfo(np.int32).min
    return packed, pages, table


PAGED = {
    "causal": {"causal": True},
    "features": BYTE | {"window_size": (30, 5), "alibi_slopes": SLOPES, "sink": SINK, "softcap": 2.0},
    "pairs": WORD | {"attn_mask": RNG.random((3, 1, 45, 50)) < 0.7, "attn_bias": BIAS[:, :1, :45, :50].astype(FP16)},
}


@needs_compiler
@pytest.mark.parametrize("family", ["sm80", "simt"])
@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("name", PAGED)
def test_pages_on_host_memory(launches: Launches, name: str, page_size: int, family: str) -> None:
    given = PAGED[name] | {"max_seqlen_q": 45, "max_seqlen_k": 50}
    inputs, pages, table = paged_inputs(page_size)
    options = flash_words.options(given, family=family)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "block_table": table}

    def call(wrap: Any) -> list[np.ndarray]:
        tensors = dict(zip("qkv", (inputs[0], *pages), strict=True))
        results = ops.forward(options, flash_words.arrays(tensors | given | lengths, wrap), GENERATOR)
        assert launches.take() == ["fwd_rng"] * ("dropout_p" in given) + [f"fwd_{family}"]
        return [to_numpy(x) for x in results[:2]]

    results = as_each_framework(launches, call)
    names = {"attn_mask": "mask", "window_size": "window", "attn_bias": "bias"}
    expected = {names.get(n, n): x for n, x in given.items() if not n.startswith("max")} | {"rng_state": GENERATOR}
    expected |= {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    exact, naive = oracle.attention(*inputs, **expected), oracle.naive_in_dtype(*inputs, **expected)
    oracle.assert_all_close(oracle.Attention(*results), exact, naive)


def test_the_parameter_block_of_pages(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    reads: list[FakeTensor] = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self) or self.x.tolist())
    (q, *_), (k, v), table = paged_inputs(48)
    q, k, v, table, *starts = map(as_torch, (q, k, v, table, STARTS_Q, STARTS_K))
    cuflash.flash_attn_varlen_func(q, k, v, *starts, block_table=table)
    assert reads == starts, "the table is not read on the host"
    (params,) = launches.params
    for name, x in (("k", k), ("v", v)):
        page, row, head, _ = x.stride()
        assert params[f"{name}_stride"][0].item() == (page, row, head)
    pages = params["pages"][0]
    assert pages["table"] == table.data_ptr() and (pages["table_batch"], pages["table_page"]) == table.stride()
    assert (pages["count"], pages["size"]) == (k.shape[0], 48)
    keys = np.arange(0, 2**30, 99991)
    assert (keys * int(pages["multiplier"]) >> int(pages["shift"]) == keys // 48).all()
    assert params["attention"]["total_kv"] == 2**31 - 1 and params["attention"]["len_kv"] == 50

    launches.params.clear(), reads.clear()
    cuflash.flash_attn_varlen_func(q, k, v, *starts, 45, 1000, block_table=table)
    assert reads == [] and launches.params[0]["attention"]["len_kv"] == 2 * 48, "no more than the table has room for"


def test_the_distance_of_pages_bounds_the_access_width(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x, starts, table = random(5, 2, 16), as_torch(np.array([0, 5], np.int32)), as_torch(np.zeros((1, 1), np.int32))
    for pad, width in ((8, 16), (4, 8), (2, 4), (1, 2)):
        memory = np.zeros((3, 6 * 2 * 16 + pad), FP16)
        strides = (memory.strides[0], 2 * 2 * 16, 2 * 16, 2)
        pages = as_torch(np.lib.stride_tricks.as_strided(memory, (3, 6, 2, 16), strides))
        cuflash.flash_attn_varlen_func(as_torch(x), pages, pages, starts, starts, 5, 5, block_table=table)
        explanation = cuflash.explain(
            as_torch(x), pages, pages, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5,
            block_table=table,
        )  # fmt: skip
        assert explanation.problem.copy_bytes == width and explanation.problem.page_size == 6


def test_page_numbers_on_a_gpu_are_checked_on_request_alone(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    (q, *_), (k, v), table = paged_inputs(16)
    q, k, v, *starts = map(as_torch, (q, k, v, STARTS_Q, STARTS_K))
    cuflash.flash_attn_varlen_func(q, k, v, *starts, 45, 50, block_table=as_torch(table), validate=True)
    table[2, 3] = len(k.x)
    wrong = as_torch(table)
    cuflash.flash_attn_varlen_func(q, k, v, *starts, block_table=wrong)
    with pytest.raises(InvalidArgument) as caught:
        cuflash.flash_attn_varlen_func(q, k, v, *starts, 45, 50, block_table=wrong, validate=True)
    assert str(caught.value) == ("block_table[2, 3] is 14, but there are 14 pages; expected the number of one, from 0.")
    with pytest.raises(InvalidArgument, match=r"^block_table_\[2, 3\] is 14, but there are 14 pages;"):
        cuflash.mha_varlen_fwd(q, k, v, None, *starts, None, wrong, None, 45, 50, validate=True)
    assert launches.take() == ["fwd_sm80"] * 2, "what was refused was not launched"
    short = as_torch(table[:, :3])
    with pytest.raises(InvalidArgument, match="block_table has 3 pages of 16 rows a sequence, but sequence 2 has 50"):
        cuflash.flash_attn_varlen_func(q, k, v, *starts, block_table=short)


@pytest.mark.parametrize("shape", [(0, 16, 2, 32), (3, 16, 2, 32)], ids=["no pages", "no room for pages"])
def test_empty_caches(launches: Launches, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    q, pages, starts_q = as_torch(random(9, 4, 32)), as_torch(random(*shape)), as_torch(np.array([0, 4, 9], np.int32))
    table, starts_k = as_torch(np.zeros((2, 0), np.int32)), as_torch(np.zeros(3, np.int32))
    monkeypatch.setattr(run, "launch", lambda *_: None)
    out, lse = cuflash.flash_attn_varlen_func(q, pages, pages, starts_q, starts_k, block_table=table, return_lse=True)
    assert launches.take() == ["fwd_sm80"] * (shape[0] > 0)
    if shape[0] == 0:
        assert not to_numpy(out).any() and np.isneginf(to_numpy(lse)).all()


@needs_compiler
def test_written_scores_and_masks(launches: Launches) -> None:
    """As the NumPy backend has them."""
    q, dout = (random(2, 40, 4, 32, dtype=FP16, seed=seed) for seed in (0, 1))
    k, v = (random(2, 50, 2, 32, dtype=FP16, seed=seed) for seed in (2, 3))
    table, scale = random(4, 21, dtype=np.float32, seed=4)[:, ::-1], np.array(0.75, np.float32)
    ids = np.repeat(np.arange(5, dtype=np.int32), 10)

    def call(wrap: Any) -> list[np.ndarray]:
        numbers, factor, documents = wrap(table), wrap(scale), wrap(ids)
        out, lse = cuflash.flash_attn_func(
            wrap(q),
            wrap(k),
            wrap(v),
            score_mod=lambda s, b, h, q, k: s * factor + numbers[h, q - k + 10],
            mask_mod=lambda b, h, q, k: documents[q] <= documents[k],
            return_lse=True,
        )
        gradients = cuflash.flash_attn_backward(
            wrap(dout),
            wrap(q),
            wrap(k),
            wrap(v),
            out,
            lse,
            score_mod=lambda s, b, h, q, k: s * factor + numbers[h, q - k + 10],
            mask_mod=lambda b, h, q, k: documents[q] <= documents[k],
            captured_grad=True,
        )
        return [out, lse, *gradients[:3], *gradients.dcaptured]

    results = as_each_framework(launches, lambda wrap: [to_numpy(x) for x in call(wrap)])
    assert launches.take()[:3] == ["fwd_sm80_short", "bwd_delta", "bwd_sm80"]
    for result, expected in zip(results, call(np.asarray), strict=True):
        assert result.shape == expected.shape and result.dtype == expected.dtype
        np.testing.assert_allclose(result.astype(float), expected.astype(float), rtol=2e-2, atol=1e-2)
