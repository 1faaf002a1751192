"""The steps of a program for a GPU, run by XLA's CPU client and by the kernels' twins on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import oracle
import pytest
from doubles.launch import Launches, needs_compiler
from inputs import FP16, random

from cuflash import device, jit
from cuflash.errors import REFUSALS, UnsupportedProblem
from cuflash.ops import asked
from cuflash.ops.given import GivenCall

jax = pytest.importorskip("jax", reason="JAX is not installed")

from cuflash.adapters.jax import ffi, primitive  # noqa: E402  which imports JAX

pytestmark = needs_compiler


@pytest.fixture
def streams(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Programs for a GPU run on the CPU; the streams on which memory is cleared."""
    cleared: list[int] = []

    def clear(pointer: int, nbytes: int, stream: int) -> None:
        ctypes.memset(pointer, 0, nbytes)
        cleared.append(stream)

    monkeypatch.setattr(jit, "clear", clear)
    monkeypatch.setattr(ffi, "_stream", lambda api, context: 5)
    monkeypatch.setattr(device, "ordinal", lambda: 0)
    monkeypatch.setattr(device, "activated", lambda ordinal: nullcontext())
    monkeypatch.setattr(primitive, "_gpus", lambda: [0])
    monkeypatch.setattr(primitive, "_launchers", {})
    monkeypatch.setattr(primitive, "_register_gpu", lambda: device.current(0))
    return cleared


_handlers: list[Any] = []
"""Kept as long as XLA may call them: to the end."""


def on_cpu_client(call: GivenCall) -> Callable[..., Any]:
    """The program of one call."""
    if not _handlers:
        jax.devices()
        _handlers.append(ffi.handler(lambda *given: primitive._launch(*given), REFUSALS))
        target = jax.ffi.pycapsule(_handlers[0])
        jax.ffi.register_ffi_target("cuflash_cuda", {"instantiate": target, "execute": target}, platform="cpu")
    return jax.jit(lambda *operands: primitive._on_gpu(*operands, call=call))


def described(direction: Any, options: Any, **arrays: np.ndarray) -> GivenCall:
    return GivenCall(direction, options, tuple((name, x.shape, x.dtype.name) for name, x in arrays.items()))


def test_kernels_are_ready_before_a_program_runs_and_launched_on_its_stream(
    launches: Launches, streams: list[int]
) -> None:
    q, k, v, dout = (random(2, n, h, 32, dtype=FP16, seed=n) for n, h in ((37, 4), (73, 2), (73, 2), (37, 4)))
    with jax.default_device(jax.devices("cpu")[0]):
        call = described("forward", asked(causal=True, keep_state=True), q=q, k=k, v=v)
        program = on_cpu_client(call).lower(q, k, v).compile()
        assert launches.loaded and not launches.kernels
        loaded = list(launches.loaded)
        out, lse, row_state = map(np.asarray, program(q, k, v))
        np.testing.assert_array_equal(out, np.asarray(program(q, k, v)[0]))
        assert launches.loaded == loaded and launches.take() == ["fwd_sm80"] * 2
        given = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "row_state": row_state, "out": out}
        call = described("backward", asked(causal=True), **given)
        gradients = map(np.asarray, on_cpu_client(call)(*given.values()))
        actual = oracle.Attention(out, lse, *gradients)
    assert set(streams) == {5} and "bwd_sm80" in launches.take()
    exact, naive = (f(q, k, v, dout, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(actual, exact, naive)


def test_nothing_is_launched_where_there_is_nothing_to_attend_to(launches: Launches, streams: list[int]) -> None:
    q, k = random(2, 5, 2, 32, dtype=FP16), random(2, 0, 2, 32, dtype=FP16)
    with jax.default_device(jax.devices("cpu")[0]):
        out, lse = map(np.asarray, on_cpu_client(described("forward", asked(), q=q, k=k, v=k))(q, k, k))
    assert not out.any() and np.isneginf(lse).all() and not launches.kernels


def test_a_gpu_that_is_unlike_the_one_of_the_program_is_left_out(
    launches: Launches, streams: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"q": (1, 4, 4, 32), "k": (1, 1024, 4, 32), "v": (1, 1024, 4, 32)}
    arrays = {name: random(*shape, dtype=FP16) for name, shape in shapes.items()}
    program = on_cpu_client(described("forward", asked(num_splits=4), **arrays))
    monkeypatch.setattr(primitive, "_gpus", lambda: [0, 1])
    monkeypatch.setattr(device, "current", lambda ordinal: device.named(("a100", "l4")[ordinal]))
    plan = GivenCall.plan

    def plan_but_for_l4(call: GivenCall, gpu: device.Device) -> Any:
        if gpu == device.named("l4"):
            raise UnsupportedProblem("no kernel runs this")
        return plan(call, gpu)

    monkeypatch.setattr(GivenCall, "plan", plan_but_for_l4)
    with jax.default_device(jax.devices("cpu")[0]):
        out = np.asarray(program(*arrays.values())[0])
    exact, naive = (f(*arrays.values()) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_close(out, exact.out, naive.out, "out")
    assert [ordinal for _, ordinal in primitive._launchers] == [0]
    monkeypatch.setattr(primitive, "_launchers", {})
    monkeypatch.setattr(primitive, "_gpus", lambda: [1])
    with pytest.raises(Exception, match="no kernel runs this"):
        on_cpu_client(described("forward", asked(num_splits=4, causal=True), **arrays)).lower(
            *arrays.values()
        ).compile()
