"""Arrays of other libraries in host memory: NumPy computes, and results come back as theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32, FP64, random

import cuflash
from cuflash import arrays
from cuflash.errors import InvalidArgument, UnsupportedProblem

DTYPES = {"fp16": FP16, "bf16": BF16, "fp32": FP32, "fp64": FP64}


class OfTorch:
    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch", reason="torch is not installed")

    def put(self, x: np.ndarray) -> Any:
        if x.dtype == BF16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def get(self, x: Any) -> np.ndarray:
        assert type(x) is self.torch.Tensor and x.is_cpu
        return x.view(self.torch.int16).numpy().view(BF16) if x.dtype is self.torch.bfloat16 else x.numpy()


class OfJax:
    def __init__(self) -> None:
        self.jax = pytest.importorskip("jax", reason="JAX is not installed")
        self.cpu = self.jax.devices("cpu")[0]

    def put(self, x: np.ndarray) -> Any:
        if x.dtype == FP64:
            pytest.skip("JAX has no float64 by default")
        return self.jax.device_put(x, self.cpu)

    def get(self, x: Any) -> np.ndarray:
        assert isinstance(x, self.jax.Array) and x.devices() == {self.cpu}
        return np.asarray(x)


class OfStandard:
    def __init__(self) -> None:
        self.xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")

    def put(self, x: np.ndarray) -> Any:
        if x.dtype in (BF16, FP16):
            pytest.skip("the standard has no 16-bit numbers")
        return self.xp.asarray(x)

    def get(self, x: Any) -> np.ndarray:
        assert type(x).__module__.startswith("array_api_strict")
        return np.from_dlpack(x)


LIBRARIES = {"torch": OfTorch, "jax": OfJax, "standard": OfStandard}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(arrays, "cupy_arrays", lambda: pytest.fail("nobody needs a GPU"))
    return LIBRARIES[request.param]()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention_and_gradients(library: Any, dtype: np.dtype) -> None:
    heads = (4, 2, 2, 4)
    tensors = [random(2, 9, h, 16, seed=seed, dtype=dtype) for seed, h in enumerate(heads)]
    q, k, v, dout = (library.put(x) for x in tensors)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, return_lse=True)
    results = [library.get(x) for x in (out, lse, *pullback(dout))]
    assert [x.dtype for x in results] == [dtype, FP64 if dtype == FP64 else FP32, *3 * [dtype]]
    expected, naive = (f(*tensors, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*results), expected, naive)
    plain = cuflash.flash_attn_func(*tensors[:3], causal=True)
    np.testing.assert_array_equal(results[0].view(np.uint8), plain.view(np.uint8), "it is the same backend")


def test_packed_sequences_dropout_and_probabilities(library: Any) -> None:
    starts = np.array([0, 3, 3, 9], np.int32)
    x = random(9, 2, 8, dtype=FP32)
    given = [library.put(y) for y in (x, x, x, starts, starts)]
    out = library.get(cuflash.flash_attn_varlen_func(*given))
    np.testing.assert_array_equal(out, cuflash.flash_attn_varlen_func(x, x, x, starts, starts))

    x = random(1, 9, 2, 8, dtype=FP32)
    q = library.put(x)
    options = {"dropout_p": 0.3, "generator": (5, 8), "return_attn_probs": True, "return_rng_state": True}
    *results, state = cuflash.flash_attn_func(q, q, q, **options)
    for result, expected in zip(results, cuflash.flash_attn_func(x, x, x, **options), strict=False):
        np.testing.assert_array_equal(library.get(result), expected)
    assert library.get(state).view(np.uint64).tolist() == [5, 8]


def test_explaining_needs_shapes_only(library: Any) -> None:
    q = library.put(random(1, 64, 2, 32, dtype=FP32))
    explanation = cuflash.explain(q, q, q, causal=True, device="h100")
    assert (explanation.problem.dtype.name, explanation.problem.len_q) == ("fp32", 64)
    with pytest.raises(InvalidArgument, match=r"^device is None and the arrays are .* arrays"):
        cuflash.explain(q, q, q)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_explicit_functions_of_pytorch_take_its_tensors(dropout_p: float) -> None:
    library = OfTorch()
    x = [random(2, 9, 2, 8, seed=seed, dtype=FP32) for seed in range(4)]
    starts = np.array([0, 3, 3, 18], np.int32)
    packed = [y.reshape(18, 2, 8) for y in x]
    state = {"gen_": (5, 8)} if dropout_p else {}
    varlen = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 15, "max_seqlen_k": 15}
    for function, arrays_of, chance, others in (
        (cuflash.mha_fwd, x, "p_dropout", {}), (cuflash.mha_fwd_ck, x, "p_dropout", {}),
        (cuflash.mha_varlen_fwd, [*packed[:3], None, starts, starts], "p_dropout", {}),
        (cuflash.mem_eff_forward, x, "p_dropout", {}), (cuflash.mem_eff_forward, packed, "p_dropout", varlen),
        (cuflash.efficient_attention_forward, x, "dropout_p", {}),
        (cuflash.efficient_attention_forward, x, "dropout_p", {"compute_log_sumexp": True}),
    ):  # fmt: skip
        given = arrays_of if len(arrays_of) > 4 else arrays_of[:3]
        options = {chance: dropout_p, **state}
        put = lambda y: library.put(y) if isinstance(y, np.ndarray) else y  # noqa: E731
        expected = function(*given, **others, **options)
        computed = function(*map(put, given), **{name: put(y) for name, y in others.items()}, **options)
        assert len(computed) == len(expected)
        for a, b in zip(computed, expected, strict=True):
            same = np.testing.assert_array_equal if isinstance(b, np.ndarray) else lambda a, b: a == b or pytest.fail()
            same(library.get(a) if isinstance(b, np.ndarray) else a, b)
    out, lse = cuflash.flash_attn_func(*x[:3], return_lse=True)
    expected = cuflash.mha_bwd(x[3], *x[:3], out, lse)
    for a, b in zip(cuflash.mha_bwd(*map(library.put, (x[3], *x[:3], out, lse))), expected, strict=True):
        np.testing.assert_array_equal(library.get(a), b)


def test_what_is_given_to_write_to_is_written() -> None:
    library = OfTorch()
    q, out = library.put(random(1, 9, 2, 8, dtype=BF16)), library.put(np.full((1, 9, 2, 8), np.nan, BF16))
    assert cuflash.flash_attn_func(q, q, q, out=out) is out
    np.testing.assert_array_equal(library.get(out), library.get(cuflash.flash_attn_func(q, q, q)))
    with pytest.raises(InvalidArgument, match=r"^out shares memory with q"):
        cuflash.flash_attn_func(q, q, q, out=q)
    with pytest.raises(InvalidArgument, match=r"^out is a JAX array, and cuflash does not write to those"):
        x = OfJax().put(random(1, 9, 2, 8))
        cuflash.flash_attn_func(x, x, x, out=x)


def test_shapes_without_memory_are_explained() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q = torch.empty(1, 512, 8, 64, dtype=torch.float16, device="meta")
    assert "sm90" in str(cuflash.explain(q, q, q, device="h100"))


def test_arrays_of_two_libraries_are_refused() -> None:
    x, y = OfTorch().put(random(1, 9, 2, 8)), OfJax().put(random(1, 9, 2, 8))
    with pytest.raises(InvalidArgument, match=r"^k is a JAX array but q is a torch array"):
        cuflash.flash_attn_func(x, y, x)
    with pytest.raises(InvalidArgument, match=r"^v is a NumPy array but q is a JAX array"):
        cuflash.flash_attn_func(y, y, random(1, 9, 2, 8))


def test_plans_of_dask_are_refused_by_name() -> None:
    Array = type("Array", (), {"__module__": "dask.array.core", "shape": (1, 9, 2, 8)})
    with pytest.raises(UnsupportedProblem, match=r"dask is a plan of chunks and no memory\. Pass its compute\(\)"):
        cuflash.flash_attn_func(Array(), Array(), Array())
