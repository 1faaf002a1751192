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
        computed = cuflash.flash_attn_func(
            q, k, v, score_mod=score_of(table, numbers), mask_mod=seen, causal=True
        )  # fmt: skip
        computed.backward(torch.tensor(dout))
        np.testing.assert_array_equal(computed.detach().numpy(), out)
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
    computed, pullback = cuflash.flash_attn_vjp(
        put(Q), put(K), put(V), score_mod=score_of(table), mask_mod=seen, captured_grad=True
    )
    gradients = pullback(computed)
    for one, other in zip((computed, *gradients[:3], gradients.dcaptured[1]), (out, *expected[:3], expected[-1][1])):  # noqa: B905
        assert isinstance(one, jax.Array)
        np.testing.assert_array_equal(one, other)
    assert gradients.dcaptured[0] is None


def _of_jax(x: np.ndarray) -> Any:
    import jax

    return jax.device_put(x, jax.devices("cpu")[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_of_jax_differentiates_what_it_reads(compiled: bool) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    dout = RNG.standard_normal((2, 5, 4, 8)).astype(np.float32)
    _, pullback = cuflash.flash_attn_vjp(
        Q, K, V, score_mod=score_of(TABLE), mask_mod=seen, causal=True, captured_grad=True
    )
    gradients = pullback(dout)
    numbers = NUMBERS.astype(np.int32)

    def loss(q: Any, k: Any, v: Any, table: Any) -> Any:
        out = cuflash.flash_attn_func(q, k, v, score_mod=score_of(table, numbers), mask_mod=seen, causal=True)
        return (out * dout).sum()

    program = jax.grad(loss, (0, 1, 2, 3))
    computed = (jax.jit(program) if compiled else program)(*map(_of_jax, (Q, K, V, TABLE)))
    for one, other in zip(computed, (*gradients[:3], gradients.dcaptured[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    table = jax.grad(loss, 3)(*map(_of_jax, (Q, K, V, TABLE)))
    np.testing.assert_allclose(table, gradients.dcaptured[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mapped", ["table", "q", "all"])
def test_a_program_of_jax_maps_what_it_reads(mapped: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    tables = RNG.standard_normal((3, *TABLE.shape)).astype(np.float32)
    queries = RNG.standard_normal((3, *Q.shape)).astype(np.float32)
    numbers = NUMBERS.astype(np.int32)

    def attend(q: Any, table: Any) -> Any:
        return cuflash.flash_attn_func(q, _of_jax(K), _of_jax(V), score_mod=score_of(table, numbers))

    axes = (None if mapped == "table" else 0), (None if mapped == "q" else 0)
    given = [x if axis == 0 else x[0] for x, axis in zip((queries, tables), axes, strict=True)]
    computed = jax.vmap(attend, axes)(*map(_of_jax, given))
    for i, out in enumerate(computed):
        q, table = (x[i] if axis == 0 else x for x, axis in zip(given, axes, strict=True))
        np.testing.assert_array_equal(out, cuflash.flash_attn_func(q, K, V, score_mod=score_of(table)))


def test_mapped_queries_that_no_number_tells_apart_are_one_call() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    queries = _of_jax(RNG.standard_normal((3, *Q.shape)).astype(np.float32))
    near = lambda q: cuflash.flash_attn_func(  # noqa: E731
        q, _of_jax(K), _of_jax(V), mask_mod=lambda b, h, q, k: abs(q - k) < 3
    )
    told = lambda q: cuflash.flash_attn_func(  # noqa: E731
        q, _of_jax(K), _of_jax(V), mask_mod=lambda b, h, q, k: abs(q - k) < 3 + h
    )
    for function, looped in ((near, False), (told, True)):
        assert ("while" in jax.jit(jax.vmap(function)).lower(queries).as_text()) == looped
        for one, q in zip(jax.vmap(function)(queries), queries, strict=True):
            np.testing.assert_array_equal(one, function(q))


def test_what_a_program_of_jax_would_lose_is_refused() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v, table = map(_of_jax, (Q, K, V, TABLE))
    numbers = NUMBERS.astype(np.int32)
    attend = lambda table, q: cuflash.flash_attn_func(q, k, v, score_mod=score_of(table, numbers))  # noqa: E731
    with pytest.raises(UnsupportedProblem, match="cuflash has no forward mode of it"):
        jax.jvp(attend, (table, q), (table, q))
    for inner, outer in ((0, 1), (1, 0), (0, 0)):
        with pytest.raises(UnsupportedProblem, match="second derivatives are of q, k, v, a bias and a sink alone"):
            once = lambda *x: (jax.grad(lambda *x: attend(*x).sum(), inner)(*x) ** 2).sum()  # noqa: B023, E731
            jax.grad(once, outer)(table, q)
    with pytest.raises(UnsupportedProblem, match="captured0 of mask_mod is differentiated, and a mask has no gradient"):
        jax.grad(lambda x: cuflash.flash_attn_func(q, k, v, mask_mod=lambda b, h, q, k: x[h, k] > 0).sum())(table)
    with pytest.raises(UnsupportedProblem, match="block_mask is given inside JAX's transformations"):
        mask = cuflash.create_block_mask(seen, batch=2, heads=4, len_q=5, len_kv=7)
        jax.jit(lambda q: cuflash.flash_attn_func(q, k, v, block_mask=mask))(q)


def test_a_score_in_a_program_of_jax_changes_along_queries() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    change = RNG.standard_normal(Q.shape).astype(np.float32)
    expected = cuflash.flash_attn_jvp(Q, K, V, dq=change, score_mod=score_of(TABLE))
    numbers = NUMBERS.astype(np.int32)
    attend = lambda q: cuflash.flash_attn_func(  # noqa: E731
        q, _of_jax(K), _of_jax(V), score_mod=score_of(_of_jax(TABLE), numbers), return_lse=True
    )
    _, computed = jax.jvp(attend, (_of_jax(Q),), (_of_jax(change),))
    for one, other in zip(computed, expected[2:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def curved(table: Any) -> Any:
    """A score with second derivatives by itself, and what hides some pairs."""

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        moved = mods.where((q + k) % 4 == 1, mods.exp(0.3 * s), s * s * 0.2 + mods.tanh(s) * table[h, q - k + 6])
        return mods.where((q * k) % 5 == 2, -np.inf, mods.where(k == 5, s + 1.0, moved))

    return score


@pytest.mark.filterwarnings("ignore:.*is deprecated:")
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_second_derivatives_by_torch_are_finite_differences(softcap: float) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    table = TABLE.astype(np.float64)
    shapes = (2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 4), (4, 5, 7)
    x = [torch.tensor(RNG.standard_normal(shape), requires_grad=True) for shape in shapes]

    def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
        out, lse = cuflash.flash_attn_func(
            q, k, v, attn_bias=bias, score_mod=curved(table), mask_mod=seen, softcap=softcap, return_lse=True
        )
        return out.sin().sum() + (lse[lse.isfinite()] ** 2).sum()

    assert torch.autograd.gradgradcheck(loss, x, check_fwd_over_rev=True, fast_mode=True)


def test_second_derivatives_by_torch_of_what_is_read_are_refused() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v, table = (torch.tensor(x) for x in (Q, K, V, TABLE))
    refused = pytest.raises(UnsupportedProblem, match="second derivatives are of q, k, v, a bias and a sink alone")
    for learned in (q, table):
        q.requires_grad_(), table.requires_grad_()
        out = cuflash.flash_attn_func(q, k, v, score_mod=curved(table))
        (once,) = torch.autograd.grad(out.sum(), [learned], create_graph=True)
        with refused:
            once.square().sum().backward()


def test_second_derivatives_in_a_program_of_jax_are_finite_differences() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    table = _of_jax(TABLE)
    attend = lambda q: cuflash.flash_attn_func(q, _of_jax(K), _of_jax(V), score_mod=curved(table)).sum()  # noqa: E731
    q, change = _of_jax(Q), _of_jax(np.random.default_rng(4).standard_normal(Q.shape).astype(np.float32))
    turned = jax.jvp(jax.grad(attend), (q,), (change,))[1]
    pulled = jax.grad(lambda q: (jax.grad(attend)(q) * change).sum())(q)
    np.testing.assert_allclose(turned, pulled, rtol=1e-4, atol=1e-5)
    step = 1e-2
    after, before = (jax.grad(attend)(q + sign * step * change) for sign in (1, -1))
    np.testing.assert_allclose(turned, (after - before) / (2 * step), rtol=2e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*is deprecated:")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torch_functions_of_functions() -> None:
    """Gradients, changes and both of what reads arrays, by torch.func, as autograd has them and by differences."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v, table = (torch.tensor(x, dtype=torch.float64) for x in (Q, K, V, TABLE))
    weights = torch.linspace(-1, 1, Q.size, dtype=torch.float64).view(Q.shape)

    def loss(q: Any, k: Any, v: Any, table: Any) -> Any:
        return (cuflash.flash_attn_func(q, k, v, score_mod=score_of(table), mask_mod=seen) * weights).sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    for actual, dx in zip(gradient(q, k, v, table), expected, strict=True):
        np.testing.assert_array_equal(actual, dx)
    _, along = torch.func.jvp(lambda k: loss(q, k, v, table), (k,), (v,))
    np.testing.assert_allclose(along, (expected[1] * v).sum(), rtol=1e-12)
    of_q = torch.func.grad(lambda q: loss(q, k, v, table))
    _, curvature = torch.func.jvp(of_q, (q,), (torch.ones_like(q),))
    np.testing.assert_allclose(curvature, (of_q(q + 1e-5) - of_q(q - 1e-5)) / 2e-5, atol=1e-8)
    blocks = cuflash.create_block_mask(mods.causal(), len_q=5, len_kv=7)
    attend = lambda q: cuflash.flash_attn_func(q, k, v, block_mask=blocks).square().sum()  # noqa: E731
    np.testing.assert_array_equal(torch.func.grad(attend)(q), torch.autograd.grad(attend(leaves[0]), leaves[0])[0])
    with pytest.raises(UnsupportedProblem, match="what score_mod reads has a tangent"):
        torch.func.jvp(lambda table: loss(q, k, v, table), (table,), (table,))
    with pytest.raises(UnsupportedProblem, match=r"block_mask is given inside torch.vmap"):
        torch.func.vmap(torch.func.grad(attend))(q[None])
