"""Attention of sequences divided over devices: eight of the CPU, which a process of its own is told to have."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP32, random
from virtual_devices import has_devices, run_with_devices

import cuflash
from cuflash.parallel import (
    all_to_all_attention,
    all_to_all_attention_vjp,
    ring_attention,
    ring_attention_vjp,
    token_order,
)

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
P = jax.sharding.PartitionSpec

INSIDE = has_devices(8)
on_eight = pytest.mark.skipif(not INSIDE, reason="runs in a process with eight devices, started by another test here")


@pytest.mark.skipif(INSIDE, reason="is what starts this process")
def test_everything_here_on_eight_devices() -> None:
    run_with_devices(__file__, 8)


RING, HEADS = ring_attention, all_to_all_attention
IN_ONE_PROCESS = {RING: ring_attention_vjp, HEADS: all_to_all_attention_vjp}
CASES: dict[str, dict[str, Any]] = {
    "ring, zigzag causal": {"devices": 8, "order": "zigzag", "causal": True},
    "ring, contiguous causal": {"devices": 4, "causal": True, "checked": True, "dtype": BF16},
    "ring, full": {"devices": 8, "checked": True, "softcap": 2.0, "softmax_scale": 0.5},
    "ring, window": {"devices": 4, "causal": True, "window_size": (4, 0), "checked": True},
    "ring, window in zigzag order": {"devices": 4, "order": "zigzag", "window_size": (4, 1)},
    "ring, packed": {"devices": 8, "order": "zigzag", "causal": True, "packed": True, "traced": True, "checked": True},
    "ring, packed window": {"devices": 4, "window_size": (2, 1), "packed": True},
    "heads, zigzag causal": {"method": HEADS, "devices": 8, "order": "zigzag", "causal": True, "checked": True},
    "heads, contiguous window": {"method": HEADS, "devices": 4, "window_size": (4, 1), "heads": (8, 4)},
    "heads, packed window": {
        "method": HEADS, "devices": 4, "order": "zigzag", "window_size": (4, 1), "packed": True, "traced": True,
    },
}  # fmt: skip


def run(
    devices: int, method: Any = RING, order: Any = "contiguous", packed: bool = False, traced: bool = False,
    checked: bool = False, dtype: Any = FP32, heads: tuple[int, int] = (8, 2), **words: Any,
) -> tuple[list[np.ndarray], list[np.ndarray], Any]:  # fmt: skip
    """out, lse, dq, dk and dv of a program of devices; the tensors; and what they are in one process."""
    places = devices * (2 if order == "zigzag" else 1)
    lengths = [n * places for n in (3, 1, 0, 2)] if packed else [3 * places]
    total, starts = sum(lengths), np.cumsum([0, *lengths]).astype(np.int32)
    tokens = token_order(starts, devices, order)
    before = () if packed else (2,)
    sizes = (heads[0], 8), (heads[1], 8), (heads[1], 12), (heads[0], 12)
    tensors = [random(*before, total, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    tensors.append(random(*before, heads[0], total, dtype=FP32))
    axes = [-3, -3, -3, -3, -1]

    # The other axis of the mesh is there, too, with the same work on either side.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, devices), ("y", "x"))
    *rows, of_lse = (P(*[None] * (x.ndim + axis), "x") for x, axis in zip(tensors, axes, strict=True))
    more = {"cu_seqlens": starts, "max_seqlen": max(lengths)} if packed else {}
    given = (more.pop("cu_seqlens"),) if traced else ()

    def local(q: Any, k: Any, v: Any, *given: Any) -> Any:
        keywords = more | ({"cu_seqlens": given[0]} if given else {})
        return method(q, k, v, "x", order=order, return_lse=True, **keywords, **words)

    specs = tuple(rows[:3]) + ((P(),) if traced else ())
    call = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows[0], of_lse), check_vma=checked)

    @jax.jit
    def program(q: Any, k: Any, v: Any, dout: Any, dlse: Any, *given: Any) -> Any:
        results, pullback = jax.vjp(lambda q, k, v: call(q, k, v, *given), q, k, v)
        return (*results, *pullback((dout, dlse)))

    shards = [np.take(x, tokens, axis) for x, axis in zip(tensors, axes, strict=True)]
    computed = [np.asarray(x) for x in program(*shards, *given)]
    again = [np.asarray(x) for x in program(*shards, *given)]
    for first, second in zip(computed, again, strict=True):
        np.testing.assert_array_equal(first, second)

    def in_one_process() -> list[np.ndarray]:
        q, k, v, dout, dlse = (np.split(x, devices, axis) for x, axis in zip(shards, axes, strict=True))
        keywords = {"order": order, **words} | ({"cu_seqlens": starts} if packed else {})
        (out, lse), pullback = IN_ONE_PROCESS[method](q, k, v, return_lse=True, **keywords)
        results = zip([out, lse, *pullback(dout, dlse)], [-3, -1, -3, -3, -3], strict=True)
        return [np.concatenate(x, axis) for x, axis in results]

    words = words | ({"cu_seqlens_q": starts, "cu_seqlens_k": starts} if packed else {})
    renamed = {"window_size": "window", "softmax_scale": "scale"}
    exact, naive = (
        f(*tensors, **{renamed.get(name, name): x for name, x in words.items()})
        for f in (oracle.attention, oracle.naive_in_dtype)
    )
    words = {name: x for name, x in words.items() if "cu_seqlens" not in name}
    back = np.argsort(tokens)
    whole = oracle.Attention(*(np.take(x, back, -1 if i == 1 else -3) for i, x in enumerate(computed)))
    oracle.assert_all_close(whole, exact, naive)
    return computed, in_one_process(), program.lower(*shards, *given)


@on_eight
@pytest.mark.parametrize("name", CASES)
def test_a_program_of_devices_computes_what_one_does(name: str) -> None:
    computed, in_one_process, _ = run(**CASES[name])
    for field, x, y in zip(oracle.Attention._fields, computed, in_one_process, strict=False):
        few = 4 * np.abs(y[np.isfinite(y)]).max() * (2**-8 if x.dtype == BF16 else 2**-23)
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=0, atol=few, err_msg=field)


def permuted(lowered: Any) -> list[tuple[int, str]]:
    """(pairs, shape) of every exchange of neighbours in a program."""
    computed = []
    for line in lowered.as_text().splitlines():
        if "stablehlo.collective_permute" in line:
            pairs = line.split("source_target_pairs = dense<")[1].split(">")[0]
            computed.append((pairs.count("[") - 1, line.rsplit("tensor<", 1)[1].rstrip(">")))
    return computed


@on_eight
def test_with_a_window_neighbours_exchange_what_is_seen() -> None:
    *_, lowered = run(devices=8, causal=True, window_size=(2, 0))
    expected = [(7, "2x2x2x8xf32"), (7, "2x2x2x12xf32")]
    assert permuted(lowered) == 3 * expected, "keys and values in either direction, and gradients back"


@on_eight
def test_memory_does_not_grow_with_the_number_of_devices() -> None:
    def scratch(devices: int) -> list[float]:
        """Memory of a device beside arguments and results, in shards of k: forward, gradients, and those of layers."""
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))
        spec, x = P(None, "x"), jax.ShapeDtypeStruct((1, 256 * devices, 2, 32), np.float32)
        call = jax.shard_map(
            lambda q, k, v: RING(q, k, v, "x", causal=True, order="zigzag"),
            mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,
        )  # fmt: skip

        def gradients(q: Any, k: Any, v: Any, dout: Any) -> Any:
            return jax.vjp(call, q, k, v)[1](dout)

        def of_layers(x: Any) -> Any:
            return jax.grad(lambda x: jax.lax.scan(lambda x, _: (call(x, x, x), None), x, length=3)[0].sum())(x)

        programs = (call, (x,) * 3), (gradients, (x,) * 4), (of_layers, (x,))
        compiled = [jax.jit(program).lower(*given).compile() for program, given in programs]
        return [program.memory_analysis().temp_size_in_bytes / (256 * 2 * 32 * 4) for program in compiled]

    for few, many in zip(scratch(4), scratch(8), strict=True):
        assert many <= few + 0.1 and few < 24


@on_eight
def test_inside_scan_and_checkpoint() -> None:
    x = random(1, 32, 2, 8, dtype=FP32)
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "x")
    ring = jax.shard_map(lambda q: RING(q, q, q, "x", causal=True), mesh=mesh, in_specs=spec, out_specs=spec)

    def two_layers(attend: Any, x: Any) -> Any:
        layer = jax.checkpoint(lambda x, _: (x + attend(x), None))
        return (jax.lax.scan(layer, x, None, length=2)[0] ** 2).sum()

    def whole(x: Any) -> Any:
        return cuflash.flash_attn_func(x, x, x, causal=True)

    computed, expected = (jax.jit(jax.grad(lambda x, f=f: two_layers(f, x)))(x) for f in (ring, whole))
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


@on_eight
@pytest.mark.parametrize("method", [RING, HEADS])
def test_gradients_of_vmap(method: Any) -> None:
    x = random(2, 1, 16, 4, 8, dtype=FP32)
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, None, "x")
    mapped = jax.vmap(lambda q: method(q, q, q, "x", causal=True))
    of_devices = jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec)

    def whole(x: Any) -> Any:
        return jax.vmap(lambda q: cuflash.flash_attn_func(q, q, q, causal=True))(x)

    computed, expected = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(x) for f in (of_devices, whole))
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


def inside(function: Any, *arrays: Any, group: Any = "x") -> Any:
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "x")
    call = jax.shard_map(lambda *x: function(*x, group), mesh=mesh, in_specs=(spec,) * len(arrays), out_specs=spec)
    return call(*arrays)


@on_eight
def test_a_mesh_of_several_axes_is_one_ring() -> None:
    q = jnp.asarray(random(1, 16, 2, 8, dtype=FP32))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = P(None, ("a", "b"))
    call = jax.shard_map(
        lambda q: ring_attention(q, q, q, ("a", "b"), causal=True), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = np.asarray(q)
    exact, naive = (f(x, x, x, causal=True).out for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_close(np.asarray(jax.jit(call)(q)), exact, naive, "out")


@on_eight
def test_what_cannot_be_divided_is_refused() -> None:
    q = jnp.zeros((1, 12, 2, 8))
    with pytest.raises(ValueError, match=r"q has 2 heads for 4 devices"):
        inside(lambda q, group: all_to_all_attention(q, q, q, group), q)
    with pytest.raises(ValueError, match=r"q has 3 rows on each device; expected an even number"):
        inside(lambda q, group: ring_attention(q, q, q, group, order="zigzag"), q)
    with pytest.raises(ValueError, match=r"group is 'z', and no mesh has such an axis"):
        inside(lambda q, group: ring_attention(q, q, q, group), q, group="z")
    with pytest.raises(ValueError, match=r"group is None; expected the name of an axis"):
        inside(lambda q, group: ring_attention(q, q, q), q)
    with pytest.raises(NotImplementedError, match=r"q is a JAX array outside a program of several devices"):
        ring_attention(q, q, q, "x")
    with pytest.raises(NotImplementedError, match=r"Call ring_attention inside jax.grad"):
        inside(lambda q, group: ring_attention_vjp(q, q, q, group), q)
    with pytest.raises(NotImplementedError, match=r"does not run in JAX's forward mode"):
        jax.jvp(lambda q: inside(lambda q, group: ring_attention(q, q, q, group), q), (q,), (q,))
    packed = jnp.zeros((12, 2, 8))
    starts = jnp.array([0, 48])

    def of_packed(**words: Any) -> Any:
        mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
        call = jax.shard_map(
            lambda q, starts: ring_attention(q, q, q, "x", cu_seqlens=starts, **words),
            mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"),
        )  # fmt: skip
        return jax.jit(call)(packed, starts)

    with pytest.raises(ValueError, match=r"cu_seqlens is traced and max_seqlen is None"):
        of_packed()
    with pytest.raises(NotImplementedError, match=r"cu_seqlens is traced and window_size hides keys"):
        of_packed(window_size=(3, 0), max_seqlen=48)
