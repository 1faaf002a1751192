"""Written scores and masks on arrays of torch and JAX in host memory, and what autograd knows of what they read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import mods
from cuflash.errors import InvalidArgument, UnsupportedProblem

RNG = np.random.default_rng(3)
Q, K, V = (RNG.standard_normal((2, length, heads, 8)).astype(np.float32) for length, heads in ((5, 4), (7, 2), (7, 2)))
TABLE, NUMBERS = RNG.standard_normal((4, 12)).astype(np.float32), np.arange(7) % 2


def score_of(table: Any, numbers: Any = NUMBERS) -> Any:
    return lambda s, b, h, q, k: mods.where(numbers[k] == 1, s * 0.5, s + table[h, q - k + 6])


def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q + k + h) % 3 != 0


def test_tensors_are_computed_as_arrays_are_and_autograd_sees_what_they_read() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dout = RNG.standard_normal((2, 5, 4, 8)).astype(np.float32)
    out, pullback = cuflash.flash_attn_vjp(
        Q, K, V, score_mod=score_of(TABLE), mask_mod=seen, causal=True, captured_grad=True
    )
    gradients = pullback(dout)
    tensors = [torch.tensor(x, requires_grad=True) for x in (Q, K, V, TABLE)]
    for numbers in (NUMBERS, torch.tensor(NUMBERS)):
        for tensor in tensors:
            tensor.grad = None
        q, k, v, table = tensors
        found = cuflash.flash_attn_func(
            q, k, v, score_mod=score_of(table, numbers), mask_mod=seen, causal=True
        )  # fmt: skip
        found.backward(torch.tensor(dout))
        np.testing.assert_array_equal(found.detach().numpy(), out)
        expected = (*gradients[:3], gradients.dcaptured[1])
        for tensor, dx in zip(tensors, expected, strict=True):
            np.testing.assert_array_equal(tensor.grad.numpy(), dx)


def test_what_torch_would_lose_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v, table = (torch.tensor(x) for x in (Q, K, V, TABLE))
    with pytest.raises(UnsupportedProblem, match=r"score_mod is given inside torch.vmap"):
        torch.func.vmap(lambda q: cuflash.flash_attn_func(q, k, v, score_mod=score_of(table)))(q[None])
    table.requires_grad_()
    with pytest.raises(UnsupportedProblem, match=r"captured0 of mask_mod requires grad, and a mask has no gradient"):
        cuflash.flash_attn_func(q, k, v, mask_mod=lambda b, h, q, k: table[h, k] > 0)
    with pytest.raises(InvalidArgument, match="captured1 of score_mod is a torch array but q is a NumPy array"):
        cuflash.flash_attn_func(Q, K, V, score_mod=score_of(table))


def test_arrays_of_jax() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    put = lambda x: jax.device_put(x, jax.devices("cpu")[0])  # noqa: E731
    out, pullback = cuflash.flash_attn_vjp(Q, K, V, score_mod=score_of(TABLE), mask_mod=seen, captured_grad=True)
    expected = pullback(out)
    table = put(TABLE)
    found, pullback = cuflash.flash_attn_vjp(
        put(Q), put(K), put(V), score_mod=score_of(table), mask_mod=seen, captured_grad=True
    )
    gradients = pullback(found)
    for one, other in zip((found, *gradients[:3], gradients.dcaptured[1]), (out, *expected[:3], expected[-1][1])):  # noqa: B905
        assert isinstance(one, jax.Array)
        np.testing.assert_array_equal(one, other)
    assert gradients.dcaptured[0] is None
    with pytest.raises(UnsupportedProblem, match="score_mod is given inside JAX's transformations"):
        jax.grad(lambda table: cuflash.flash_attn_func(put(Q), put(K), put(V), score_mod=score_of(table)).sum())(table)
