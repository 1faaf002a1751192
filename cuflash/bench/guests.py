"""What calls cost the host inside JAX and torch, and prepared: of problems too small for GPU times to say anything."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cuflash
from cuflash.errors import UnsupportedProblem

NAME = "guests"
"""The problem set that is timed through other libraries."""

PEERS = "cuflash-jax,cuflash-torch,jax-cudnn,torch-flash,torch-cudnn"
"""What is timed with it, unless others are named."""

CHAIN = 16
"""Calls of a jitted program."""

_SHAPE = (1, 64, 2, 64)
"""Batch, length, heads and columns of a tiny problem."""

_TOKEN, _CACHE = (1, 1, 32, 128), (1, 1024, 8, 128)
"""A token's queries, and the keys of a cache."""


def costs() -> list[dict[str, object]]:
    """Host microseconds, as a report's host section has them; of libraries that are here and see a GPU."""
    rows: list[dict[str, object]] = []
    for measured in (_prepared, _torch, _jax):
        try:
            rows += measured()
        except (ImportError, UnsupportedProblem):
            continue
    return rows


def _prepared() -> list[dict[str, object]]:
    """Prepared calls on CuPy's arrays, beside one that is not prepared."""
    import cupy
    import ml_dtypes

    q, k, v, out = (cupy.zeros(_SHAPE, ml_dtypes.bfloat16) for _ in range(4))
    token, new_token, k_cache, v_cache = (
        cupy.zeros(shape, ml_dtypes.bfloat16) for shape in (_TOKEN, (1, 1, *_CACHE[2:]), _CACHE, _CACHE)
    )
    lengths = cupy.full(1, 500, cupy.int32)
    over_cache: dict[str, Any] = {"cache": (k_cache, v_cache), "cache_seqlens": lengths, "causal": True}
    attend = cuflash.flash_attn_prepare(q, k, v, causal=True)
    attend_to = cuflash.flash_attn_prepare(q, k, v, causal=True, out=out)
    append = cuflash.flash_attn_prepare(token, new_token, new_token, **over_cache)
    append_to = cuflash.flash_attn_prepare(token, new_token, new_token, **over_cache, out=cupy.empty_like(token))
    look = cuflash.flash_attn_prepare(token, None, None, **over_cache)
    look_to = cuflash.flash_attn_prepare(token, None, None, **over_cache, out=cupy.empty_like(token))
    place = cupy.empty_like(token)
    appended, looked = append.bind(token, new_token, new_token), look.bind(token)
    calls: dict[str, Callable[[], Any]] = {
        "forward, not prepared": lambda: cuflash.flash_attn_func(q, k, v, causal=True),
        "forward, prepared": lambda: attend(q, k, v),
        "forward, prepared, to an array": lambda: attend_to(q, k, v, out),
        "a token, prepared": lambda: append(token, new_token, new_token),
        "a token, prepared, to an array": lambda: append_to(token, new_token, new_token, place),
        "a token, prepared and bound": appended,
        "a token, prepared, bound and captured": appended.captured(),
        "a token that is in the cache, prepared": lambda: look(token),
        "a token that is in the cache, prepared, to an array": lambda: look_to(token, out=place),
        "a token that is in the cache, prepared and bound": looked,
    }
    took = _in_turn(calls, cupy.cuda.get_current_stream().synchronize)
    return [{"impl": "cuflash", "phase": phase, "host_us": round(us, 2)} for phase, us in took.items()]


def _torch() -> list[dict[str, object]]:
    """An eager forward and backward that autograd records, beside torch's own attention."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise UnsupportedProblem("torch sees no GPU")
    words: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    rows = [torch.randn(_SHAPE, **words, requires_grad=True) for _ in range(3)]
    heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in rows]
    dout = torch.randn(_SHAPE, **words)
    sdpa, of_heads = torch.nn.functional.scaled_dot_product_attention, dout.transpose(1, 2).contiguous()
    q, k, v = rows
    calls: dict[str, Callable[[], Any]] = {
        "cuflash-torch": lambda: torch.autograd.grad(cuflash.flash_attn_func(q, k, v, causal=True), rows, dout),
        "torch": lambda: torch.autograd.grad(sdpa(*heads, is_causal=True), heads, of_heads),
    }
    phase = "forward and backward, recorded by torch's autograd"
    return _table(phase, _in_turn(calls, torch.cuda.synchronize))


def _jax() -> list[dict[str, object]]:
    """What one call more adds to a jitted program of calls that wait for each other."""
    jax = importlib.import_module("jax")
    if jax.default_backend() != "gpu":
        raise UnsupportedProblem("JAX sees no GPU")
    q, k, v = (jax.random.normal(jax.random.key(i), _SHAPE, jax.numpy.bfloat16) for i in range(3))
    attentions: dict[str, Callable[[Any], Any]] = {
        "cuflash-jax": lambda x: cuflash.flash_attn_func(x, k, v, causal=True),
        "jax-cudnn": lambda x: jax.nn.dot_product_attention(x, k, v, is_causal=True, implementation="cudnn"),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, attention in attentions.items():
        for count in (1, CHAIN):
            program = jax.jit(_chain(attention, count))
            calls[f"{name} {count}"] = lambda program=program: program(q)  # type: ignore[misc]
            calls[f"{name} {count} done"] = lambda program=program: program(q).block_until_ready()  # type: ignore[misc]
    took = _in_turn(calls, lambda: jax.block_until_ready([call() for call in calls.values()]))
    rows: list[dict[str, object]] = []
    for when, end in (("", ""), (", with the GPU's time", " done")):
        added = {name: (took[f"{name} {CHAIN}{end}"] - took[f"{name} 1{end}"]) / (CHAIN - 1) for name in attentions}
        rows += _table(f"one of {CHAIN} calls of a jitted program{when}", added)
    return rows


def _chain(attention: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        for _ in range(count):
            x = attention(x)
        return x

    return run


def _in_turn(calls: dict[str, Callable[[], Any]], wait: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each call until it returns: the median of rounds, in which the device keeps up."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(15):
        for name, call in calls.items():
            wait()
            start_s = time.perf_counter()
            for _ in range(100):
                call()
            rounds[name].append((time.perf_counter() - start_s) * 1e4)
    wait()
    return {name: statistics.median(times) for name, times in rounds.items()}


def _table(phase: str, microseconds: dict[str, float]) -> list[dict[str, object]]:
    return [{"impl": name, "phase": phase, "host_us": round(us, 2)} for name, us in microseconds.items()]
