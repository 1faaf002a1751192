"""Tensors of torch and JAX without memory to read or with more than elements, and ndarrays of other arithmetic."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from doubles.arrays import FAKE_TORCH, FakeTensor, as_torch
from doubles.launch import Launches
from host import run
from inputs import random

import cuflash
from cuflash import arrays
from cuflash.errors import InvalidArgument, UnsupportedProblem

ERRORS = InvalidArgument, UnsupportedProblem


class Odd(FakeTensor):
    """A tensor without memory; on a GPU kernels would be launched on its null pointer."""

    def data_ptr(self) -> int:
        return 0


class Raising(Odd):
    """One that says so."""

    def data_ptr(self) -> int:
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")


@pytest.mark.parametrize("kind", [Odd, Raising])
@pytest.mark.parametrize("prepared", [False, True])
def test_tensors_without_memory(launches: Launches, monkeypatch: Any, kind: type, prepared: bool) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x = random(1, 8, 2, 16)
    good = as_torch(x)
    call = cuflash.flash_attn_prepare(good, good, good) if prepared else cuflash.flash_attn_func
    call(good, good, good)
    launches.take()
    with pytest.raises(UnsupportedProblem, match=rf"^k is a {kind.__name__} on cuda:0 without memory of its own"):
        call(good, kind(x), good)
    kinds = (
        ("is_nested", True, "k is a nested tensor"),
        ("layout", "torch.sparse_coo", r"k has layout torch.sparse_coo"),
    )
    for name, value, message in kinds:
        with pytest.raises(InvalidArgument, match=f"^{message}; expected a dense"):
            call(good, type("Other", (kind,), {name: value})(x), good)
    with monkeypatch.context() as inside:
        inside.setattr(FAKE_TORCH, "Tensor", kind)
        with pytest.raises(UnsupportedProblem, match=r"^k is a tensor inside torch.vmap, torch.func or the like"):
            call(good, kind(x), good)
    assert launches.take() == []
    empty = Odd(x[:0])
    if not prepared and kind is Odd:
        cuflash.flash_attn_func(empty, empty, empty)


def test_tangents_of_forward_mode(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    x, v = as_torch(random(1, 8, 2, 16)), as_torch(random(1, 8, 2, 16))
    cuflash.flash_attn_func(x, x, v)
    launches.take()
    mode = FAKE_TORCH.autograd.forward_ad
    monkeypatch.setattr(mode, "_current_level", 0)
    unpack = lambda y: SimpleNamespace(tangent=y if y is v else None)  # noqa: E731
    monkeypatch.setattr(mode, "unpack_dual", unpack, raising=False)
    with pytest.raises(UnsupportedProblem, match=r"^v has a tangent of torch's forward mode, which would be lost"):
        cuflash.flash_attn_prepare(x, x, v)
    assert launches.take() == []
    cuflash.flash_attn_prepare(x, x, x)
    cuflash.flash_attn_func(x, x, x)
    assert launches.take() == ["fwd_sm80"]


def torch_tensors() -> dict[str, tuple[Any, str]]:
    """Tensors of the real library, and what is said of them."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(1, 8, 2, 16)

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls: type, shape: tuple[int, ...]) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cpu")

        @classmethod
        def __torch_dispatch__(cls: type, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError(function)

    given_back = torch.randn(1, 8, 2, 16)
    given_back.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.empty(1, 8, 2, 16)
    return {
        "fake": (fake, "k is a FakeTensor on cpu without memory"),
        "wrapper": (Wrapper((1, 8, 2, 16)), "k is a Wrapper on cpu without memory"),
        "meta": (torch.empty(1, 8, 2, 16, device="meta"), "k is a Tensor on meta without memory"),
        "given back": (given_back, "k is a tensor inside torch.vmap"),
        "sparse": (x.to_sparse(), "k has layout torch.sparse_coo; expected a dense tensor. Pass k.to_dense()."),
        "nested": (torch.nested.nested_tensor([x[0], x[0]], layout=torch.strided), "k is a nested tensor"),
        "jagged": (torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged), "k is a nested tensor"),
    }


@pytest.mark.parametrize("name", ["fake", "wrapper", "meta", "given back", "sparse", "nested", "jagged"])
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_real_tensors(name: str) -> None:
    torch = pytest.importorskip("torch")
    odd, message = torch_tensors()[name]
    x = torch.randn(1, 8, 2, 16)
    with pytest.raises(ERRORS) as caught:
        cuflash.flash_attn_func(x, odd, x)
    assert str(caught.value).startswith(message)


def test_arrays_of_jax() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.zeros((1, 8, 2, 16), device=jax.devices("cpu")[0])
    gone = x + 1
    gone.delete()
    with pytest.raises(InvalidArgument, match=r"^q is a JAX array that does not lend its memory \(it was deleted"):
        cuflash.flash_attn_func(gone, x, x)
    assert isinstance(cuflash.flash_attn_func(x, x, x), jax.Array)
    assert cuflash.explain(x, x, x, device="h100").problem.dtype.name == "fp32"


class Borrowed:
    """An array of a library that is reached through DLPack alone."""

    def __init__(self, where: int, shape: tuple[int, ...] = (1, 8, 2, 16)) -> None:
        self.where, self.values = where, np.zeros(shape, np.float16)

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.where < 0:
            raise RuntimeError("Array has been deleted with shape=float32[1,8,2,16].")
        return self.where, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("must not be taken")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "framework_of_type", lambda kind: GUEST if kind is Borrowed else None)
    monkeypatch.setattr(arrays, "cupy_module", lambda: pytest.fail("nobody needs CuPy to look at host memory"))


GUEST = arrays.Guest("foreign", lambda x: x, np.asarray)


def test_guests_that_are_not_there(foreign: None) -> None:
    x = Borrowed(2)
    with pytest.raises(
        InvalidArgument, match=r"^k is a foreign array that does not lend its memory \(Array has been del"
    ):
        cuflash.flash_attn_func(x, Borrowed(-1), x)
    with pytest.raises(
        InvalidArgument, match=r"^v is in host memory but q is on a GPU; all arrays of a call must be on one device"
    ):
        cuflash.flash_attn_func(x, x, Borrowed(1))


def test_explaining_arrays_in_host_memory(foreign: None) -> None:
    x = Borrowed(1)
    explanation = cuflash.explain(x, x, x, device="h100", causal=True)
    assert explanation.problem.dtype.name == "fp16" and explanation.problem.len_q == 8
    with pytest.raises(InvalidArgument, match=r"^device is None and the arrays are foreign arrays"):
        cuflash.explain(x, x, x)


def test_explaining_tensors_in_host_memory(launches: Launches) -> None:
    x = FakeTensor(random(1, 8, 2, 16), "cpu")
    assert cuflash.explain(x, x, x, device="h100").problem.dim_v == 16
    with pytest.raises(InvalidArgument, match=r"^device is None and the arrays are torch arrays on cpu"):
        cuflash.explain(x, x, x)


class Meters(np.ndarray):
    """An array with a unit, which refuses arithmetic with plain ones."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("metres and numbers")

    def __setitem__(self, *_: Any) -> None:
        raise TypeError("metres and numbers")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_ndarrays_with_their_own_arithmetic() -> None:
    q, k, v = (random(2, 6, 2, 8, seed=seed, dtype=np.float32) for seed in range(3))
    bias, slopes, mask = random(6, 6, dtype=np.float32), np.full((2, 2), 0.25, np.float32), np.tri(6) > 0
    features = {"attn_bias": bias, "alibi_slopes": slopes, "attn_mask": mask}
    place, dv = np.empty_like(q), np.empty_like(v)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **features, bias_grad=True, return_lse=True)
    expected = [out, lse, *pullback(out)[:4]]

    odd = {name: np.matrix(x) for name, x in features.items()}
    plain = q, k, v
    q, k, v = (x.view(Meters) for x in plain)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **odd, bias_grad=True, return_lse=True)
    results = [out, lse, *pullback(np.asarray(out).view(Meters))[:4]]
    for x, y in zip(results, expected, strict=True):
        assert type(x) is np.ndarray
        np.testing.assert_array_equal(x, y)
    target, gradient = place.view(Meters), dv.view(Meters)
    assert cuflash.flash_attn_func(q, k, v, **odd, out=target) is target
    np.testing.assert_array_equal(place, expected[0])
    given = cuflash.flash_attn_backward(expected[0], q, k, v, target, lse, **odd, dv=gradient)
    assert given[2] is gradient
    np.testing.assert_allclose(dv, expected[4], rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidArgument, match=r"^attn_mask is a masked array, whose mask no arithmetic"):
        cuflash.flash_attn_func(*plain, attn_mask=np.ma.masked_array(mask))


def test_problems_name_their_types() -> None:
    sizes = {"batch": 1, "heads_q": 1, "heads_kv": 1, "len_q": 8, "len_kv": 8, "dim_qk": 16, "dim_v": 16}
    problem = cuflash.Problem("forward", "fp16", **sizes, bias="float32")
    assert problem == cuflash.Problem("forward", cuflash.dtypes.FP16, **sizes, bias=cuflash.dtypes.FP32)
    assert str(cuflash.explain(problem, device="h100")).startswith("forward fp16 b1")
    assert pickle.loads(pickle.dumps(problem)) == problem
    for wrong in ("fp8", 16, None, np.float16, ml_dtypes.bfloat16):
        with pytest.raises(InvalidArgument, match=r"^dtype is .*; expected one of fp16, bf16, fp32, fp64"):
            cuflash.Problem("forward", wrong, **sizes)
