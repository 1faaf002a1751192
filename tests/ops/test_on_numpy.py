"""Calls on NumPy arrays: checked once a kind, and prepared like those on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash.errors import InvalidArgument
from cuflash.ops import check, on_numpy

FP16, FP32 = np.float16, np.float32


def random(*shape: int, seed: int = 0, dtype: Any = FP32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The direction of every call that is checked from the start."""
    seen, problem_of = [], check.problem_of

    def counted(direction: Any, *rest: Any) -> Any:
        seen.append(direction)
        return problem_of(direction, *rest)

    monkeypatch.setattr(check, "problem_of", counted)
    monkeypatch.setattr(on_numpy, "_checked", {})
    return seen


def test_calls_of_a_kind_are_checked_once(checks: list[str]) -> None:
    for seed in range(3):
        q, k, v, dout = (random(2, 9, 4, 8, seed=seed * 9 + i) for i in range(4))
        _, pullback = cuflash.flash_attn_vjp(q, k, v, causal=True)
        pullback(dout)
        cuflash.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert checks == ["forward", "backward", "forward"]
    cuflash.flash_attn_func(q, k, v, causal=True, softcap=2.0)
    cuflash.flash_attn_func(q[:, ::2], k, v, causal=True)
    cuflash.flash_attn_func(*(x.astype(FP16) for x in (q, k, v)), causal=True)
    cuflash.flash_attn_func(q, k, v, causal=True, attn_bias=random(9, 9))
    assert checks[3:] == ["forward"] * 4


def test_what_is_no_part_of_a_kind_is_checked_in_every_call(checks: list[str]) -> None:
    memory = np.zeros((3, 2, 9, 4, 8), FP32)
    q, k, v, out = (random(2, 9, 4, 8, seed=i) for i in range(4))
    assert cuflash.flash_attn_func(q, k, v, out=out) is out
    for inside in (q, k, v):
        with pytest.raises(InvalidArgument, match="out shares memory with"):
            cuflash.flash_attn_func(q, k, v, out=inside)
    read_only = out.copy()
    read_only.flags.writeable = False
    with pytest.raises(InvalidArgument, match="out is read-only"):
        cuflash.flash_attn_func(q, k, v, out=read_only)
    assert cuflash.flash_attn_func(q, k, v, out=out) is out
    out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
    gradients = cuflash.flash_attn_backward(out, q, k, v, out, lse, dq=memory[0], dk=memory[1], dv=memory[2])
    assert gradients[0].base is memory and gradients[2].base is memory
    with pytest.raises(InvalidArgument, match="dk shares memory with dq"):
        cuflash.flash_attn_backward(out, q, k, v, out, lse, dq=memory[0], dk=memory[0], dv=memory[2])

    x, starts = random(9, 4, 8), np.array([0, 4, 9], np.int32)
    cuflash.flash_attn_varlen_func(x, x, x, starts, starts)
    starts[1] = 10
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_q\[2\] is 9 after 10"):
        cuflash.flash_attn_varlen_func(x, x, x, starts, starts)
    starts[1] = 1  # one longer sequence: another kind, and the right answer
    np.testing.assert_array_equal(
        cuflash.flash_attn_varlen_func(x, x, x, starts, starts)[1:], cuflash.flash_attn_func(*3 * [x[None, 1:]])[0]
    )


def test_kinds_that_look_alike_are_told_apart(checks: list[str]) -> None:
    q, k, v = (random(1, 9, 2, 8, seed=i) for i in range(3))
    cuflash.flash_attn_func(q, k, v, causal=True)
    with pytest.raises(InvalidArgument, match="q is >f4"):
        cuflash.flash_attn_func(q.astype(">f4"), k, v, causal=True)
    raw = np.zeros(q.nbytes + 1, np.uint8)[1:]
    with pytest.raises(InvalidArgument, match="q is misaligned"):
        cuflash.flash_attn_func(raw.view(FP32).reshape(q.shape), k, v, causal=True)
    with pytest.raises(InvalidArgument, match="softmax_scale is"):
        cuflash.flash_attn_func(q, k, v, causal=True, softmax_scale=True)
    scale = np.array(0.5)
    half = cuflash.flash_attn_func(q, k, v, softmax_scale=scale)
    scale[...] = 2  # the same array, another number
    twice = cuflash.flash_attn_func(q, k, v, softmax_scale=scale)
    np.testing.assert_array_equal(half, cuflash.flash_attn_func(q, k, v, softmax_scale=0.5))
    np.testing.assert_array_equal(twice, cuflash.flash_attn_func(q, k, v, softmax_scale=2.0))


@pytest.mark.parametrize("dtype", [FP16, ml_dtypes.bfloat16, FP32, np.float64])
def test_a_call_is_prepared_for_numpy_arrays(dtype: Any, checks: list[str]) -> None:
    def tensors(seed: int) -> list[np.ndarray]:
        shapes = (2, 70, 4, 32), (2, 90, 2, 32), (2, 90, 2, 24)
        return [random(*shape, seed=seed, dtype=dtype) for shape in shapes]

    options = {"causal": True, "window_size": (20, -1), "softmax_scale": 0.3, "softcap": 2.0, "alignment": "top-left"}
    place = np.full((2, 70, 4, 25), 7, dtype)
    attend = cuflash.flash_attn_prepare(*tensors(0), **options)
    attend_to = cuflash.flash_attn_prepare(*tensors(0), **options, out=np.copy(place)[..., :24])
    for seed in (1, 2):
        inputs, out = tensors(seed), place[..., :24]
        expected = cuflash.flash_attn_func(*inputs, **options, return_lse=True)
        for results in (attend(*inputs), attend_to(*inputs, out)):
            for one, other in zip(results, expected, strict=True):
                np.testing.assert_array_equal(one, other)
        assert results[0] is out and (place[..., 24] == 7).all()


def test_a_call_prepared_for_numpy_arrays_refuses_others() -> None:
    q, k, v, out = (random(1, 8, 2, 16, seed=i) for i in range(4))
    attend = cuflash.flash_attn_prepare(q, k, v)
    attend_to = cuflash.flash_attn_prepare(q, k, v, out=out)
    for x in (q, k, v):
        x.flags.writeable = False  # inputs may be
    attend(q, k, v)
    read_only = out.copy()
    read_only.flags.writeable = False
    refusals = {
        "k is float32 of shape (1, 7, 2, 16)": lambda: attend(q, k[:, :7], v[:, :7]),
        "v is float16": lambda: attend(q, k, v.astype(FP16)),
        "out is float32 of shape (1, 8, 2, 16)": lambda: attend(q, k, v, out),
        "out is None; expected float32": lambda: attend_to(q, k, v),
        "out shares memory with v": lambda: attend_to(q, k, out, out),
        "out is read-only": lambda: attend_to(q, k, v, read_only),
        "softcap is -1": lambda: cuflash.flash_attn_prepare(q, k, v, softcap=-1),
    }
    for message, call in refusals.items():
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert message in str(caught.value)


def from_dlpack(x: object) -> object:
    """What makes `Foreign` an array of a library."""
    return x


class Foreign:
    """An array of a library that cuflash reaches through DLPack."""

    shape = 1, 8, 2, 16
    __dlpack__ = __dlpack_device__ = lambda self: (1, 0)


def test_calls_are_not_prepared_for_arrays_of_other_libraries() -> None:
    with pytest.raises(InvalidArgument, match="expected an array of CuPy or NumPy or a torch tensor"):
        cuflash.flash_attn_prepare(Foreign(), Foreign(), Foreign())
