"""Attention of arrays that JAX has on several GPUs, divided along batch and heads, against float64 and one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP32, random

import cuflash
from cuflash.ops import given

jax = pytest.importorskip("jax", reason="JAX is not installed")
P, NamedSharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding

pytestmark = pytest.mark.gpu

BATCH, LEN_Q, LEN_KV, HEADS, DIM = 4, 256, 320, 8, 64
SHARDINGS = {
    "batch and heads": (4, P("x", None, "y"), P("x", None, "y")),
    "groups of heads": (2, P("x", None, "y"), P("x", None, "y")),
    "one key head": (1, P("x", None, "y"), P("x")),
    "queries alone": (4, P("x", None, "y"), P()),
    "batch over both": (4, P(("x", "y")), P(("x", "y"))),
}
"""Heads of keys, where q and dout lie, and where k and v do."""


@pytest.fixture(params=[(2, 1), (1, 2), (2, 2)], ids=["batch", "heads", "both"])
def mesh(request: pytest.FixtureRequest) -> Any:
    gpus = [x for x in jax.devices() if x.platform in ("gpu", "cuda")]
    count = int(np.prod(request.param))
    if len(gpus) < count:
        pytest.skip(f"needs {count} GPUs, of which JAX has {len(gpus)}")
    return jax.sharding.Mesh(np.array(gpus[:count]).reshape(request.param), ("x", "y"))


Launched = set[tuple[int, str, tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """GPU, direction, and the shapes of q and k of every call whose kernels are launched."""
    from cuflash.adapters.jax import primitive

    seen: Launched = set()
    prepare = given.on_gpu

    def on_gpu(call: given.GivenCall, ordinal: int) -> Callable[[list[int], int], None]:
        launch, shapes = prepare(call, ordinal), {name: shape for name, shape, _ in call.arrays}

        def noting(pointers: list[int], stream: int) -> None:
            seen.add((ordinal, call.direction, shapes["q"], shapes["k"]))
            launch(pointers, stream)

        return noting

    monkeypatch.setattr(given, "on_gpu", on_gpu)
    monkeypatch.setattr(primitive, "_launchers", {})
    return seen


def tensors(heads_kv: int) -> list[np.ndarray]:
    """q, k, v, dout and dlse."""
    sizes = (LEN_Q, HEADS), (LEN_KV, heads_kv), (LEN_KV, heads_kv), (LEN_Q, HEADS)
    arrays = [random(BATCH, n, heads, DIM, dtype=BF16, seed=i) for i, (n, heads) in enumerate(sizes)]
    return [*arrays, random(BATCH, HEADS, LEN_Q, dtype=FP32)]


def whole(q: Any, k: Any, v: Any, dout: Any, dlse: Any, learnt: Any) -> Any:
    """(out, lse) and all gradients."""

    def call(q: Any, k: Any, v: Any, learnt: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, causal=True, deterministic=True, return_lse=True, **learnt)

    results, pullback = jax.vjp(call, q, k, v, learnt)
    *gradients, others = pullback((dout, dlse))
    return (*results, *gradients, *(others[name] for name in learnt))


@pytest.mark.parametrize("learnt", [False, True], ids=["", "bias and sink"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_gpus_share_batch_and_heads(mesh: Any, launched: Launched, name: str, learnt: bool) -> None:
    heads_kv, of_q, of_k = SHARDINGS[name]
    arrays = tensors(heads_kv)
    others = {"attn_bias": random(HEADS, LEN_Q, LEN_KV, dtype=BF16), "sink": random(HEADS, dtype=FP32)}
    others = others if learnt else {}
    of_lse = P(of_q[0], of_q[2] if len(of_q) > 2 else None)
    places = [NamedSharding(mesh, spec) for spec in (of_q, of_k, of_k, of_q, of_lse)]
    sharded = [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]
    program = jax.jit(whole)
    compiled = program.lower(*sharded, others).compile().as_text()
    results = jax.block_until_ready(program(*sharded, others))

    gpus = [gpu.local_hardware_id for gpu in mesh.devices.flat]
    part_q = places[0].shard_shape(arrays[0].shape)
    part_k = (part_q[0], LEN_KV, heads_kv if heads_kv == 1 else heads_kv * part_q[2] // HEADS, DIM)
    expected = {(gpu, of, part_q, part_k) for gpu in gpus for of in ("forward", "backward")}
    assert launched == expected, "every GPU has its part, and no more"
    assert "all-gather" not in compiled and "all-to-all" not in compiled
    out, lse, dq, *_ = results
    for x, place in ((out, places[0]), (lse, places[4]), (dq, places[0])):
        assert x.sharding.is_equivalent_to(place, x.ndim), x.sharding
        assert {shard.data.shape for shard in x.addressable_shards} == {place.shard_shape(x.shape)}

    computed = oracle.Attention(*map(np.asarray, results))
    words = {"causal": True, "bias": others.get("attn_bias"), "sink": others.get("sink")}
    exact, naive = (f(*arrays, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(computed, *[x if learnt else x._replace(dbias=None, dsink=None) for x in (exact, naive)])

    if learnt:
        return
    alone = jax.jit(whole)(*(jax.device_put(x, mesh.devices.flat[0]) for x in arrays), others)
    on_one = oracle.Attention(*map(np.asarray, alone))
    for field in oracle.Attention._fields[:3] if part_k[2] == 1 or of_k == P() else oracle.Attention._fields[:5]:
        np.testing.assert_array_equal(getattr(computed, field), getattr(on_one, field), field)


def test_gpus_share_heads_of_packed_sequences(mesh: Any, launched: Launched) -> None:
    if mesh.shape["y"] == 1:
        pytest.skip("packed sequences have no batch that could be divided")
    starts_q, starts_k = np.array([0, 130, 130, 300], np.int32), np.array([0, 70, 200, 410], np.int32)
    q, k, v = (random(n, h, DIM, dtype=BF16, seed=n) for n, h in ((300, HEADS), (410, 4), (410, 4)))
    call = jax.jit(lambda *x: cuflash.flash_attn_varlen_func(*x, 170, 210, causal=True, return_lse=True))
    sharded = [jax.device_put(x, NamedSharding(mesh, P(None, "y"))) for x in (q, k, v)]
    out, lse = call(*sharded, starts_q, starts_k)
    words = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "causal": True}
    exact, naive = (f(q, k, v, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(np.asarray(out), np.asarray(lse)), exact, naive)
    assert out.sharding.is_equivalent_to(sharded[0].sharding, 3)
    gpus = [gpu.local_hardware_id for gpu in mesh.devices.flat]
    assert launched == {(gpu, "forward", (300, HEADS // 2, DIM), (410, 2, DIM)) for gpu in gpus}
