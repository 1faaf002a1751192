"""Calls from threads on which nothing of CUDA has run, and streams that come and go, on a GPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracle
import pytest

import cuflash

pytestmark = pytest.mark.gpu
SHAPE = (2, 256, 4, 64)


def random(seed: int, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)


@pytest.fixture(scope="module")
def tensors() -> list[Any]:
    cupy = pytest.importorskip("cupy")
    return [cupy.asarray(random(seed)) for seed in range(4)]


def in_thread(work: Callable[[], Any]) -> Any:
    """A thread of its own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def in_pool(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def in_executor(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.to_thread(work)

    return asyncio.run(main())


def gradients(x: list[Any]) -> list[Any]:
    out, pullback = cuflash.flash_attn_vjp(*x[:3], causal=True)
    return [out, *pullback(x[3])]


CALLS: dict[str, Callable[[list[Any]], Any]] = {
    "flash_attn_func": lambda x: cuflash.flash_attn_func(*x[:3], causal=True),
    "flash_attn_vjp": gradients,
    "scaled_dot_product_attention": lambda x: cuflash.scaled_dot_product_attention(*x[:3], is_causal=True),
    "flash_attn_prepare": lambda x: cuflash.flash_attn_prepare(*x[:3], causal=True)(*x[:3])[0],
    "mha_fwd": lambda x: cuflash.mha_fwd(*x[:3])[0],
    "dropout": lambda x: cuflash.flash_attn_func(*x[:3], 0.5, generator=(3, 4)),
    "probabilities": lambda x: cuflash.flash_attn_func(*x[:3], return_attn_probs=True)[2],
}


@pytest.mark.parametrize("where", [in_thread, in_pool, in_executor])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "warm"])
@pytest.mark.parametrize("name", CALLS)
def test_a_thread_without_a_context(tensors: list[Any], name: str, warm: bool, where: Callable[..., Any]) -> None:
    import cupy

    call = CALLS[name]
    # Other sizes are another kind of call, whose maps have not been described yet.
    numbers = list(CALLS).index(name), [in_thread, in_pool, in_executor].index(where)
    rows = 256 if warm else 248 - 8 * numbers[0] - 64 * numbers[1]
    mine = [cupy.ascontiguousarray(x[:, :rows]) for x in tensors]
    if warm:
        call(mine)
        mine = [x.copy() for x in mine]  # at other addresses
    cupy.cuda.Device().synchronize()
    results = where(lambda: call(mine))
    expected = call([x.copy() for x in mine])
    for x, y in zip(*(z if isinstance(z, list) else [z] for z in (results, expected)), strict=True):
        np.testing.assert_allclose(x.get().astype(np.float32), y.get().astype(np.float32), atol=2e-2)


def test_streams_that_come_and_go(tensors: list[Any]) -> None:
    """CUDA hands a destroyed stream's handle out again while its work still runs."""
    import cupy

    long = [cupy.asarray(np.concatenate(8 * [random(seed)], 1)) for seed in range(3)]
    expected = cuflash.flash_attn_func(*long, causal=True)
    cupy.cuda.Device().synchronize()
    results = []
    for _ in range(200):
        with cupy.cuda.Stream(non_blocking=True):
            results.append(cuflash.flash_attn_func(*long, causal=True, out=cupy.full_like(expected, cupy.nan)))
    cupy.cuda.Device().synchronize()
    assert all(bool((x == expected).all()) for x in results)


def test_what_threads_compute_at_once(tensors: list[Any]) -> None:
    q, k, v, _ = (x.get() for x in tensors)
    exact, naive = oracle.attention(q, k, v, causal=True), oracle.naive_in_dtype(q, k, v, causal=True)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: cuflash.flash_attn_func(*tensors[:3], causal=True), range(64)))
    for x in results:
        oracle.assert_close(x.get(), exact.out, naive.out, "out")
