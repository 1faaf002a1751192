"""Attention divided over the GPUs of this machine: a thread or a process for each, JAX's collectives, or lists."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from doubles.nccl import in_threads
from inputs import BF16, FP32, random

import cuflash
from cuflash.parallel import (
    Nccl,
    all_to_all_attention,
    all_to_all_attention_vjp,
    ring_attention,
    ring_attention_vjp,
    token_order,
)

pytestmark = pytest.mark.gpu

RING, HEADS = ring_attention_vjp, all_to_all_attention_vjp
UNDER_JAX = {RING: ring_attention, HEADS: all_to_all_attention}
PACKED = [0, 320, 384, 384, 1024]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ring": (RING, {"order": "zigzag", "causal": True}),
    "ring, contiguous": (RING, {"causal": True, "softcap": 5.0}),
    "ring, full": (RING, {"softmax_scale": 0.2}),
    "ring, window": (RING, {"causal": True, "window_size": (100, 0)}),
    "ring, packed": (RING, {"order": "zigzag", "causal": True, "cu_seqlens": PACKED}),
    "ring, packed window": (RING, {"order": "zigzag", "window_size": (70, 9), "cu_seqlens": PACKED}),
    "heads": (HEADS, {"order": "zigzag", "causal": True}),
    "heads, packed window": (HEADS, {"window_size": (70, 9), "cu_seqlens": PACKED}),
}
LONG = {"long, ring": (RING, CASES["ring"][1]), "long, heads": (HEADS, CASES["heads"][1])}
"""So long that messages are on their way, of half of the heads too, while kernels run and memory changes hands."""


@pytest.fixture(params=[1, 2])
def size(request: pytest.FixtureRequest) -> int:
    """How many GPUs share a call."""
    import cupy

    if (count := cupy.cuda.runtime.getDeviceCount()) < request.param:
        pytest.skip(f"needs {request.param} GPUs, of which this machine has {count}")
    return request.param


@cache
def tensors(name: str) -> tuple[np.ndarray, ...]:
    """q, k, v, dout and dlse of whole sequences: two query heads for each key head."""
    rows, heads, dim = (16_384, (8, 4), 128) if name in LONG else (1024, (4, 2), 64)
    before = () if "cu_seqlens" in (CASES | LONG)[name][1] else (1,)
    of = (*(random(*before, rows, heads[i], dim, dtype=BF16, seed=s) for s, i in enumerate((0, 1, 1, 0))),)
    return *of, random(*before, heads[0], rows, dtype=FP32)


def order_of(name: str, size: int) -> np.ndarray:
    words = (CASES | LONG)[name][1]
    return token_order(words.get("cu_seqlens", tensors(name)[0].shape[-3]), size, words.get("order", "contiguous"))


def parts(name: str, size: int) -> list[list[np.ndarray]]:
    """Those of every device."""
    axes = -3, -3, -3, -3, -1
    given = [np.take(x, order_of(name, size), axis) for x, axis in zip(tensors(name), axes, strict=True)]
    return [[np.split(x, size, axis)[rank] for x, axis in zip(given, axes, strict=True)] for rank in range(size)]


def judge(name: str, size: int, computed: list[list[np.ndarray]]) -> None:
    """Compare out, lse, dq, dk and dv of every device with float64."""
    back = np.argsort(order_of(name, size))
    axes = -3, -1, -3, -3, -3
    whole = [
        np.take(np.concatenate(x, axis), back, axis) for x, axis in zip(zip(*computed, strict=True), axes, strict=True)
    ]
    oracle.assert_all_close(oracle.Attention(*whole), *expected(name), f"{name}, {size} GPUs:")


@cache
def expected(name: str) -> list[oracle.Attention]:
    given = dict(CASES[name][1])
    words = {"causal": given.get("causal", False), "window": given.get("window_size", (-1, -1))}
    words |= {"softcap": given.get("softcap", 0.0), "scale": given.get("softmax_scale")}
    if "cu_seqlens" in given:
        words |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), np.array(given["cu_seqlens"], np.int32))
    return [f(*tensors(name), **words) for f in (oracle.attention, oracle.naive_in_dtype)]


def attended(name: str, group: Any, arrays: Any) -> list[Any]:
    """out, lse, dq, dk and dv of a device, or lists of those of all."""
    function, words = (CASES | LONG)[name]
    q, k, v, dout, dlse = arrays
    (out, lse), pullback = function(q, k, v, group, return_lse=True, deterministic=True, **words)
    return [out, lse, *pullback(dout, dlse)]


def by_communicator(
    rank: int, size: int, names: list[str], unique: Any, repeats: int = 3, barrier: threading.Barrier | None = None
) -> dict[str, list[Any]]:
    """What this device gets, in host memory, the same every time; devices of one process have a barrier."""
    import cupy
    from cupy.cuda import nccl

    with cupy.cuda.Device(rank), cupy.cuda.Stream(non_blocking=True):
        communicator = nccl.NcclCommunicator(size, unique, rank)
        computed = {}
        for name in names:
            given = [cupy.asarray(x) for x in parts(name, size)[rank]]
            group = communicator if barrier is None else Nccl(communicator, barrier)
            runs = [attended(name, group, given) for _ in range(repeats)]
            first, *others = [[x.get() for x in run] for run in runs]
            for other in others:
                for x, y in zip(first, other, strict=True):
                    np.testing.assert_array_equal(x, y, f"{name}, device {rank}: runs differ")
            computed[name] = first
        return computed


def in_lists(name: str, size: int) -> list[list[np.ndarray]]:
    """What each of several devices gets, all of them on one GPU."""
    import cupy

    shards = zip(*([cupy.asarray(x) for x in of] for of in parts(name, size)), strict=True)
    results = attended(name, None, [list(x) for x in shards])
    return [[x.get() for x in of] for of in zip(*results, strict=True)]


def check(size: int, computed: list[dict[str, list[np.ndarray]]]) -> None:
    """All is right, and has the bits of lists on one GPU, whose schedule is the same."""
    for name in CASES | LONG:
        results = [of[name] for of in computed]
        for rank, (here, there) in enumerate(zip(results, in_lists(name, size), strict=True)):
            for x, y in zip(here, there, strict=True):
                np.testing.assert_array_equal(x, y, f"{name}, device {rank} of {size}")
        if name in CASES:
            judge(name, size, results)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_lists_on_one_gpu(name: str, devices: int) -> None:
    judge(name, devices, in_lists(name, devices))


@pytest.mark.parametrize("name", LONG)
def test_long_sequences_are_apart_from_one_device_by_rounding(name: str) -> None:
    import cupy

    q, k, v, dout, dlse = (cupy.asarray(x) for x in tensors(name))
    (out, _), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, deterministic=True, return_lse=True)
    back, results = np.argsort(order_of(name, 2)), in_lists(name, 2)
    for i, whole in zip((0, 2, 3, 4), (out, *pullback(dout, dlse)), strict=True):
        divided = np.concatenate([of[i] for of in results], -3)[:, back].astype("f4")
        difference = divided - whole.get().astype("f4")
        apart = np.sqrt((difference**2).mean(dtype="f8") / (divided**2).mean(dtype="f8"))
        assert apart < 2**-8, "two parts and their sum are rounded, each by 2^-9 at most"


def test_a_thread_for_each(size: int) -> None:
    from cupy.cuda import nccl

    unique, barrier = nccl.get_unique_id(), threading.Barrier(size)
    names = [*CASES, *LONG]
    check(size, in_threads(size, lambda rank: by_communicator(rank, size, names, unique, barrier=barrier)))


def test_a_process_for_each(size: int, tmp_path: Path) -> None:
    from cupy.cuda import nccl

    root = Path(__file__).parents[2]
    search = os.pathsep.join([*map(str, (root, root / "tests")), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "unique").write_bytes(nccl.get_unique_id())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(rank), str(size)],
            env=os.environ | {"PYTHONPATH": search},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    computed = []
    for rank in range(size):
        with np.load(tmp_path / f"{rank}.npz") as file:
            computed.append({name: [file[f"{name} {i}"] for i in range(5)] for name in CASES | LONG})
    check(size, [{n: [x.view(BF16) if x.dtype == np.uint16 else x for x in of[n]] for n in of} for of in computed])


def test_jax(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    spec = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:size]), ("sequence",))
    for name, (function, words) in CASES.items():
        ndim = tensors(name)[0].ndim
        rows = spec(*[None] * (ndim - 3), "sequence")
        of_lse = spec(*[None] * (ndim - 2), "sequence")

        def local(*qkv: Any, function: Any = function, words: Any = words) -> Any:
            return UNDER_JAX[function](*qkv, "sequence", return_lse=True, deterministic=True, **words)

        call = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows, of_lse))

        def both(q: Any, k: Any, v: Any, *gradients: Any, call: Any = call) -> Any:
            results, pullback = jax.vjp(call, q, k, v)
            return *results, *pullback(gradients)

        joined = [np.concatenate(x, -1 if i == 4 else -3) for i, x in enumerate(zip(*parts(name, size), strict=True))]
        placed = [
            jax.device_put(x, jax.sharding.NamedSharding(mesh, of_lse if i == 4 else rows))
            for i, x in enumerate(joined)
        ]
        run = jax.jit(both)
        first, second = ([np.asarray(x) for x in run(*placed)] for _ in range(2))
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y, f"{name}: runs differ")
        divided = [np.split(x, size, -1 if i == 1 else -3) for i, x in enumerate(first)]
        judge(name, size, [list(of) for of in zip(*divided, strict=True)])


def main(folder: Path, rank: int, size: int) -> None:
    """One process of several."""
    unique = (folder / "unique").read_bytes()
    computed = by_communicator(rank, size, [*CASES, *LONG], unique)
    arrays = {f"{name} {i}": x for name, of in computed.items() for i, x in enumerate(of)}
    np.savez(folder / f"{rank}.npz", **{n: x.view(np.uint16) if x.dtype == BF16 else x for n, x in arrays.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
