"""Attention divided over devices: four of the CPU, which a process of its own is told to have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import FP32, random
from virtual_devices import has_devices, run_with_devices

import cuflash
from cuflash.ops import given

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
P, NamedSharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding

INSIDE = has_devices(4)
on_four = pytest.mark.skipif(not INSIDE, reason="runs in a process with four devices, started by another test here")


@pytest.mark.skipif(INSIDE, reason="is what starts this process")
def test_everything_here_on_four_devices() -> None:
    run_with_devices(__file__, 4)


@pytest.fixture
def mesh() -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The shapes of q and k of every call that is computed."""
    seen: list[tuple[Any, ...]] = []
    compute = given.on_cpu

    def on_cpu(call: given.GivenCall, pointers: Any) -> None:
        shapes = {name: shape for name, shape, _ in call.arrays}
        seen.append((call.direction, shapes["q"], shapes["k"]))
        compute(call, pointers)

    monkeypatch.setattr(given, "on_cpu", on_cpu)
    return seen


def tensors(heads_kv: int) -> list[np.ndarray]:
    shapes = (4, 20, 4, 16), (4, 24, heads_kv, 16), (4, 24, heads_kv, 24), (4, 20, 4, 24)
    return [*(random(*shape, dtype=FP32, seed=i) for i, shape in enumerate(shapes)), random(4, 4, 20, dtype=FP32)]


def whole(q: Any, k: Any, v: Any, dout: Any, dlse: Any, bias: Any = None, sink: Any = None) -> Any:
    """(out, lse) and all gradients."""
    learnt = {n: x for n, x in (("attn_bias", bias), ("sink", sink)) if x is not None}

    def call(q: Any, k: Any, v: Any, learnt: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True, **learnt)

    results, pullback = jax.vjp(call, q, k, v, learnt)
    dq, dk, dv, others = pullback((dout, dlse))
    return (*results, dq, dk, dv, *others.values())


SHARDINGS = {
    "batch and heads": (4, P("x", None, "y"), P("x", None, "y"), (2, 20, 2, 16), (2, 24, 2, 16)),
    "groups of heads": (2, P("x", None, "y"), P("x", None, "y"), (2, 20, 2, 16), (2, 24, 1, 16)),
    "one key head": (1, P("x", None, "y"), P("x"), (2, 20, 2, 16), (2, 24, 1, 16)),
    "batch over both": (2, P(("x", "y")), P(("x", "y")), (1, 20, 4, 16), (1, 24, 2, 16)),
    "one key head on all": (1, P(None, None, ("x", "y")), P(), (4, 20, 1, 16), (4, 24, 1, 16)),
    "queries alone": (4, P("x", None, "y"), P(), (2, 20, 2, 16), (2, 24, 2, 16)),
}


@on_four
@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("learnt", [(), ((4, 20, 24), (4,)), ((4, 1, 20, 24), (4,)), ((20, 24), (4,))], ids=str)
def test_arrays_that_are_sharded(mesh: Any, parts: list[Any], name: str, learnt: tuple[Any, ...]) -> None:
    heads_kv, of_q, of_k, part_q, part_k = SHARDINGS[name]
    arrays = tensors(heads_kv)
    others = [random(*shape, dtype=FP32) for shape in learnt]
    places = [of_q, of_k, of_k, of_q, P(of_q[0] if of_q else None, of_q[2] if len(of_q) > 2 else None)]
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, places, strict=True)]
    results = jax.jit(whole)(*sharded, *map(jnp.asarray, others))
    jax.block_until_ready(results)
    assert set(parts) == {(direction, part_q, part_k) for direction in ("forward", "backward")}
    assert len(parts) == 8  # each device once in either direction
    out, _, dq, *_ = results
    for x in (out, dq):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, of_q), 4), x.sharding
    words = dict(zip(("bias", "sink"), others, strict=False))
    exact, naive = (f(*arrays, causal=True, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*map(np.asarray, results)), *[
        x if learnt else x._replace(dbias=None, dsink=None) for x in (exact, naive)
    ])  # fmt: skip


@on_four
def test_arrays_are_divided_outside_programs_too(mesh: Any, parts: list[Any]) -> None:
    arrays = tensors(2)
    spec = P("x", None, "y")
    q, k, v, dout = (jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays[:4])
    dlse = jax.device_put(arrays[4], NamedSharding(mesh, P("x", "y")))
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, return_lse=True)
    by_hand = out, lse, *pullback(dout, dlse)
    exact, naive = (f(*arrays, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    for results in (by_hand, whole(q, k, v, dout, dlse)):
        oracle.assert_all_close(oracle.Attention(*map(np.asarray, results)), exact, naive)
        assert results[0].sharding.is_equivalent_to(q.sharding, 4)
    assert {shapes[1:] for shapes in parts} == {((2, 20, 2, 16), (2, 24, 1, 16))}


@on_four
def test_what_a_score_reads_decides_what_is_divided(mesh: Any, parts: list[Any]) -> None:
    q, k, v, dout, _ = tensors(2)
    near, by_head = random(60, dtype=FP32), random(4, 60, dtype=FP32)
    of_q = NamedSharding(mesh, P("x", None, "y"))

    def loss(q: Any, table: Any) -> Any:
        mod = lambda s, b, h, i, j: s + (table[i - j + 30] if table.ndim == 1 else table[h, i - j + 30])  # noqa: E731
        return (cuflash.flash_attn_func(q, *map(jnp.asarray, (k, v)), score_mod=mod) * dout).sum()

    _, pullback = cuflash.flash_attn_vjp(
        q, k, v, score_mod=lambda s, b, h, i, j: s + near[i - j + 30], captured_grad=True
    )
    gradients = pullback(dout)
    program = jax.jit(jax.grad(loss, (0, 1)))
    dq, dnear = program(jax.device_put(q, of_q), near)
    np.testing.assert_allclose(dq, gradients.dq, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dnear, gradients.dcaptured[0], rtol=1e-5, atol=1e-5)
    assert {shapes[1] for shapes in parts} == {(2, 20, 2, 16)}
    parts.clear()
    program(jax.device_put(q, NamedSharding(mesh, P("x"))), by_head)
    assert {shapes[1] for shapes in parts} == {(2, 20, 4, 16)}
    with pytest.raises(Exception, match="sharded along its heads over y, and a written score or mask reads the number"):
        program(jax.device_put(q, of_q), by_head)


@on_four
def test_heads_of_packed_sequences_are_divided(mesh: Any, parts: list[Any]) -> None:
    q, k, v = (random(n, h, 16, dtype=FP32, seed=n) for n, h in ((33, 4), (45, 2), (45, 2)))
    starts_q, starts_k = np.array([0, 9, 9, 30], np.int32), np.array([0, 4, 20, 41], np.int32)
    call = jax.jit(lambda *x: cuflash.flash_attn_varlen_func(*x, 21, 21, causal=True, return_lse=True))
    arrays = [jax.device_put(x, NamedSharding(mesh, P(None, "y"))) for x in (q, k, v)]
    out, lse = call(*arrays, jnp.asarray(starts_q), jnp.asarray(starts_k))
    words = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "causal": True}
    exact, naive = (f(q, k, v, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(np.asarray(out), np.asarray(lse)), exact, naive)
    assert {shapes[1:] for shapes in parts} == {((33, 2, 16), (45, 1, 16))}


@on_four
@pytest.mark.parametrize("checked", [False, True])
def test_shard_map(mesh: Any, parts: list[Any], checked: bool) -> None:
    arrays = tensors(1)
    of_q, of_lse = P("x", None, "y"), P("x", "y")
    specs = (of_q, P("x"), P("x"), of_q, of_lse)

    def local(q: Any, k: Any, v: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True)

    call = jax.shard_map(local, mesh=mesh, in_specs=specs[:3], out_specs=(of_q, of_lse), check_vma=checked)

    def gradients(q: Any, k: Any, v: Any, dout: Any, dlse: Any) -> Any:
        results, pullback = jax.vjp(call, q, k, v)
        return (*results, *pullback((dout, dlse)))

    results = jax.jit(gradients)(*arrays)
    exact, naive = (f(*arrays, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*map(np.asarray, results)), exact, naive)
    assert {shapes[1:] for shapes in parts} == {((2, 20, 2, 16), (2, 24, 1, 16))}


@on_four
@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("how", ["sharded", "shard_map"])
def test_tangents_and_second_derivatives_are_divided(mesh: Any, parts: list[Any], how: str, heads_kv: int) -> None:
    q, k, v, dout, _ = tensors(heads_kv)
    of_q, of_k = P("x", None, "y"), P("x", None, "y" if heads_kv > 1 else None)
    call = lambda q, k, v: cuflash.flash_attn_func(q, k, v, causal=True)  # noqa: E731
    divided = call
    if how == "shard_map":
        divided = jax.shard_map(call, mesh=mesh, in_specs=(of_q, of_k, of_k), out_specs=of_q)

    def derivatives(call: Any, *given: Any) -> Any:
        tensors, changes = given[:3], given[3:]
        loss = lambda *x: (dout * call(*x) ** 2).sum()  # noqa: E731
        gradient = jax.grad(loss, (0, 1, 2))
        return jax.jvp(call, tensors, changes), jax.jvp(gradient, tensors, changes)

    given = [q, k, v, 2 * q, v[..., :16], k[..., :1] * v]
    expected = jax.block_until_ready(jax.jit(derivatives, static_argnums=0)(call, *given))
    parts.clear()
    places = [of_q, of_k, of_k] * 2
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, places, strict=True)]
    computed = jax.jit(derivatives, static_argnums=0)(divided, *sharded)
    for a, b in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
    assert {shapes[1:] for shapes in parts} == {((2, 20, 2, 16), (2, 24, 1, 16))}


@on_four
def test_types_that_say_where_arrays_lie(parts: list[Any]) -> None:
    axis_type = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    arrays = tensors(2)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y", None))) for x in arrays[:4]]
        dlse = jax.device_put(arrays[4], NamedSharding(mesh, P("x", "y", None)))
        types = jax.eval_shape(whole, *sharded, dlse)
        assert [x.sharding.spec for x in types] == [P("x", None, "y", None), P("x", "y", None)] + [
            P("x", None, "y", None)
        ] * 3
        results = jax.jit(whole)(*sharded, dlse)
    exact, naive = (f(*arrays, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*map(np.asarray, results)), exact, naive)
    assert {shapes[1:] for shapes in parts} == {((2, 20, 2, 16), (2, 24, 1, 16))}


REFUSED = {
    "length": (4, P("x", "y"), P(), r"q is sharded along its length over y"),
    "keys": (4, P(), P("x", "y"), r"k is sharded along its length over y"),
    "columns": (4, P(), P(None, None, None, "y"), r"k is sharded along its head dimension over y"),
    "groups": (
        2,
        P(None, None, ("x", "y")),
        P(),
        r"q has 4 heads on 4 devices, but heads are divided with their 2 key",
    ),
}


@on_four
@pytest.mark.parametrize("name", REFUSED)
def test_no_array_is_gathered_unsaid(mesh: Any, parts: list[Any], name: str) -> None:
    heads_kv, of_q, of_k, match = REFUSED[name]
    arrays = tensors(heads_kv)
    arrays[2] = arrays[1]
    q, k = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, (of_q, of_k), strict=False))
    with pytest.raises(Exception, match=match):
        jax.jit(lambda q, k: cuflash.flash_attn_func(q, k, k))(q, k)
    assert not parts


@on_four
def test_dropout_is_drawn_on_each_device_by_its_own_key(mesh: Any) -> None:
    q, key = jnp.asarray(tensors(4)[0]), jax.random.key(0)
    call = lambda q, key: cuflash.flash_attn_func(q, q, q, dropout_p=0.5, generator=key)  # noqa: E731
    with pytest.raises(Exception, match=r"dropout draws by the number of a batch element and a head"):
        jax.jit(call)(jax.device_put(q, NamedSharding(mesh, P("x"))), key)
    local = lambda q, key: call(q, jax.random.fold_in(key, jax.lax.axis_index("x")))  # noqa: E731
    computed = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x")))(q, key)
    expected = [jax.jit(call)(q[2 * i : 2 * i + 2], jax.random.fold_in(key, i)) for i in range(2)]
    np.testing.assert_array_equal(np.asarray(computed), np.concatenate(expected))
