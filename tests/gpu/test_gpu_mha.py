"""The functions with PyTorch's explicit arguments and results on a GPU, against the same calls on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.dtypes import DTYPES

B, H, HK, SQ, SK, D = 2, 4, 2, 70, 90, 64
STARTS_Q, STARTS_K = np.array([0, 30, 30, 62], np.int32), np.array([0, 40, 41, 81], np.int32)
USED = np.array([33, 0, 40], np.int32)
STATE = 0x123456789ABCDEF0, 64
P = 0.3

pytestmark = pytest.mark.gpu


def on_gpu(library: str) -> Callable[[Any], Any]:
    """From NumPy to the library, and everything that is no array as it is."""
    module = pytest.importorskip(library)

    def convert(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return module.asarray(x) if library == "cupy" else module.asarray(x, device="cuda")

    return convert


def on_host(x: Any) -> Any:
    if hasattr(x, "cpu"):
        return x.cpu().numpy()
    return x.get() if hasattr(x, "get") else x


def random(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[dtype].numpy)


def inputs(dtype: str, packed: bool) -> list[np.ndarray]:
    rows_q, rows_kv = ((SQ,), (SK,)) if packed else ((B, SQ), (B, SK))
    shapes = (*rows_q, H, D), (*rows_kv, HK, D), (*rows_kv, HK, D)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def assert_same(gpu: tuple, numpy: tuple, dtype: str) -> None:
    tolerance = {"fp16": 2e-2, "bf16": 1e-1, "fp32": 2e-4}[dtype]
    assert len(gpu) == len(numpy)
    for i, (one, other) in enumerate(zip(map(on_host, gpu), numpy, strict=True)):
        if isinstance(other, np.ndarray):
            assert one.shape == other.shape and one.dtype == other.dtype, i
            assert np.allclose(one.astype(np.float64), other.astype(np.float64), atol=tolerance, rtol=tolerance), i
        else:
            assert one == other, i


@pytest.fixture(params=["cupy", "torch"])
def convert(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return on_gpu(request.param)


def both(convert: Callable, function: Callable, *arguments: Any, **keywords: Any) -> tuple[tuple, tuple]:
    """The results of a call on a GPU and on NumPy arrays."""
    gpu = function(*map(convert, arguments), **{name: convert(x) for name, x in keywords.items()})
    return gpu, function(*arguments, **keywords)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("convention", ["current", "legacy", "rocm"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_mha(packed: bool, convention: str, dtype: str, convert: Callable) -> None:
    q, k, v = inputs(dtype, packed)
    slopes = np.abs(random(H, dtype="fp32", seed=5))
    options = {
        "alibi_slopes_": slopes,
        "p_dropout": P,
        "is_causal": True,
        "window_size_left": 31,
        "convention": convention,
    }
    more = {"gen_": STATE, "return_softmax": True, **options}
    dout = random(*q.shape, dtype=dtype, seed=3)
    if packed:
        lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED}
        gpu, numpy = both(convert, cuflash.mha_varlen_fwd, q, k, v, None, *lengths.values(), **more)
    else:
        lengths = {}
        gpu, numpy = both(convert, cuflash.mha_fwd, q, k, v, **more)
    assert_same(gpu, numpy, dtype)
    assert (np.signbit(on_host(gpu[7])) == np.signbit(numpy[7])).all()
    backward = cuflash.mha_varlen_bwd if packed else cuflash.mha_bwd
    tensors = {"dout": dout, "q": q, "k": k, "v": v} | ({"dq_": None, "dk_": None, "dv_": None} if packed else {})

    def gradients(results: tuple, at: Callable) -> tuple:
        given = {name: at(x) for name, x in {**tensors, **lengths, **options}.items()}
        out, lse, seed, offset = (results[i] for i in (0, 4, 5, 6))
        return backward(**given, out=out, softmax_lse=lse, philox_seed=seed, philox_offset=offset)

    assert_same(gradients(gpu, convert), gradients(numpy, lambda x: x), dtype)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_mha_of_pages(page_size: int, dtype: str, convert: Callable) -> None:
    q, *_ = inputs(dtype, packed=True)
    most = -(-40 // page_size)
    k, v = (random(3 * most, page_size, HK, D, dtype=dtype, seed=seed) for seed in (1, 2))
    table = np.random.default_rng(0).permutation(3 * most).reshape(3, most).astype(np.int32)
    for b, used in enumerate(USED):
        table[b, -(-used // page_size) :] = 2**31 - 1
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": np.array([0, 40, 80, 120], np.int32), "seqused_k": USED}
    options = {"p_dropout": P, "is_causal": True, "softcap": 2.0, "gen_": STATE}
    gpu, numpy = both(
        convert, cuflash.mha_varlen_fwd, q, k, v, None, *lengths.values(), table, **options, validate=True
    )
    assert_same(gpu, numpy, dtype)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("mask_type", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_efficient_attention(packed: bool, mask_type: int, dtype: str, convert: Callable) -> None:
    q, k, v = (x[None] if packed else x for x in inputs(dtype, packed))
    bias = random(1, H, 1, 40 if packed else SK, dtype=dtype, seed=6)
    starts = (STARTS_Q, STARTS_K) if packed else (None, None)
    gpu, numpy = both(
        convert, cuflash.efficient_attention_forward, q, k, v, bias, *starts, None, None, P, mask_type, True, gen_=STATE
    )
    assert_same(gpu, numpy, dtype)
    dout = random(*q.shape, dtype=dtype, seed=3)

    def gradients(results: tuple, at: Callable) -> tuple:
        out, lse, seed, offset, *lengths = results
        return cuflash.efficient_attention_backward(
            *map(at, (dout, q, k, v, bias)), out, *map(at, starts), *lengths, lse, P, seed, offset, mask_type, True
        )

    assert_same(gradients(gpu, convert), gradients(numpy, lambda x: x), dtype)


def test_mem_eff_with_a_bias(convert: Callable) -> None:
    q, k, v = inputs("fp16", False)
    bias, dout = random(B, 1, SQ, SK, dtype="fp16", seed=6), random(*q.shape, dtype="fp16", seed=3)
    gpu, numpy = both(convert, cuflash.mem_eff_forward, q, k, v, P, True, True, None, bias, gen_=STATE)
    assert_same(gpu, numpy, "fp16")

    def gradients(results: tuple, at: Callable) -> tuple:
        out, lse, seed, offset = (results[i] for i in (0, 4, 5, 6))
        head = (*map(at, (dout, q, k, v)), out, lse, None, None, None, at(bias), True)
        return cuflash.mem_eff_backward(*head, p_dropout=P, is_causal=True, philox_seed=seed, philox_offset=offset)

    assert_same(gradients(gpu, convert), gradients(numpy, lambda x: x), "fp16")


@pytest.mark.parametrize(("backend", "dtype"), [("flash", "fp16"), ("mem_eff", "fp16"), ("mem_eff", "fp32")])
def test_backends_draw_the_same_dropout(backend: str, dtype: str, convert: Callable) -> None:
    q, k, v = inputs(dtype, False)
    gpu, numpy = both(convert, cuflash.mha_fwd, q, k, v, p_dropout=P, return_softmax=True, gen_=STATE, backend=backend)
    assert_same(gpu, numpy, dtype)
    assert (np.signbit(on_host(gpu[7])) == np.signbit(numpy[7])).all()


FUNCTIONS = {
    "mha": ("mha_{}fwd", "mha_{}bwd"),
    "ck": ("mha_{}fwd_ck", "mha_{}bwd_ck"),
    "mem_eff": ("mem_eff_forward", "mem_eff_backward"),
    "efficient": ("efficient_attention_forward", "efficient_attention_backward"),
}


def gradient_step(group: str, q: Any, k: Any, v: Any, dout: Any, starts: tuple[Any, ...], gen: Any) -> tuple:
    """The output, the log-sum-exp and the gradients by the functions of a group; nothing that would have to be read."""
    packed = len(starts) > 0
    forward, backward = (getattr(cuflash, name.format("varlen_" if packed else "")) for name in FUNCTIONS[group])
    if group == "efficient":
        q, k, v, dout = (x[None] if packed else x for x in (q, k, v, dout))
        lengths = (*starts, 40, 41) if packed else (None,) * 4
        out, lse, *state, _, _ = forward(q, k, v, None, *lengths, P, 2, True, gen_=gen)
        returned = backward(dout, q, k, v, None, out, *lengths, lse, P, *state, 2, False, deterministic=True)
        return out, lse, *returned[:3]
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    options = {"p_dropout": P, "is_causal": True} | (dict(zip(names, (*starts, 40, 41), strict=True)) if packed else {})
    out, _, _, _, lse, seed, offset, _ = forward(q=q, k=k, v=v, out_=None, gen_=gen, **options)
    options |= {"dq_": None, "dk_": None, "dv_": None, "philox_seed": seed, "philox_offset": offset}
    return out, lse, *backward(dout, q, k, v, out, lse, deterministic=True, **options)[:3]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("group", FUNCTIONS)
def test_capture_of_every_function(group: str, packed: bool) -> None:
    """Nothing waits for the GPU once the longest lengths are given, and every replay draws fresh numbers."""
    cp = pytest.importorskip("cupy")
    arrays = inputs("fp16", packed)
    arrays.append(random(*arrays[0].shape, dtype="fp16", seed=3))
    places = [cp.asarray(x) for x in arrays]
    starts = (cp.asarray(STARTS_Q), cp.asarray(STARTS_K)) if packed else ()
    generator = cuflash.PhiloxGenerator(*STATE).to_device()
    gradient_step(group, *places, starts, STATE)  # kernels are compiled and loaded before the capture
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        captured = gradient_step(group, *places, starts, generator)
        graph = stream.end_capture()
    for seed in (10, 11):
        for place, x in zip(places, arrays, strict=True):
            place[...] = cp.asarray(random(*x.shape, dtype="fp16", seed=seed))
        expected = [x.get() for x in gradient_step(group, *places, starts, generator.state)]
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for x, y in zip(captured, expected, strict=True):
            np.testing.assert_array_equal(x.get(), y)


def test_a_generator_of_torch_moves_on() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cuda")
    generator.manual_seed(7)
    q, k, v = map(on_gpu("torch"), inputs("fp16", False))
    states = [cuflash.mha_fwd(q, k, v, p_dropout=P, gen_=generator)[5].tolist() for _ in range(2)]
    assert states == [[7, 0], [7, B * H * 32]] and generator.get_offset() == 2 * B * H * 32
