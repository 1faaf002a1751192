"""Calls whose arrays are all given: results and scratch memory of another compiler's program."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import flash_words
import numpy as np
import oracle
import pytest
from doubles.launch import Launches, needs_compiler
from inputs import BF16, FP16, FP32, random

import cuflash
from cuflash import device, jit
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import given
from cuflash.ops.call import Arrays
from cuflash.ops.given import GivenCall

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softcap": 3.0},
    "window": {"window_size": (4, 0), "softmax_scale": np.float32(0.5)},
    "bias": {"attn_bias": random(1, 4, 37, 53, dtype=FP32), "sink": random(4, dtype=FP32)},
    "mask": {"attn_mask": random(37, 53, dtype=FP32) > -1, "alibi_slopes": random(2, 4, dtype=FP32) ** 2},
    "dropout": {"dropout_p": 0.25, "rng_state": np.array([7, 8], np.uint64)},
    "split": {"num_splits": 2},
}
PACKED = {
    "cu_seqlens_q": np.array([0, 9, 9, 30], np.int32), "cu_seqlens_k": np.array([0, 4, 20, 41], np.int32),
    "max_seqlen_q": 21, "max_seqlen_k": 21, "causal": True,
}  # fmt: skip
ORACLE = {"attn_bias": "bias", "attn_mask": "mask", "window_size": "window", "softmax_scale": "scale"}


def tensors(packed: bool, dtype: Any) -> list[np.ndarray]:
    """q, k, v, dout, dlse."""
    shapes = [(33, 4, 32), (45, 2, 32), (45, 2, 32), (33, 4, 32)] if packed else [(2, 37, 4, 32), (2, 53, 2, 32)] * 2
    shapes[1:3] = [shapes[1]] * 2
    shapes[3] = shapes[0]
    rows = (4, 33) if packed else (2, 4, 37)
    return [*(random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)), random(*rows, dtype=FP32)]


def place(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that holds no number yet."""
    return np.full(math.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


def on_cpu(call: GivenCall, arrays: list[np.ndarray], results: list[np.ndarray]) -> None:
    given.on_cpu(call, [x.ctypes.data for x in (*arrays, *results)])


def on_gpu(call: GivenCall, arrays: list[np.ndarray], results: list[np.ndarray]) -> None:
    scratch = place((call.scratch(device.named("a100")).nbytes,), np.uint8)
    memory = [scratch] if scratch.size else []
    pointers = [x.ctypes.data for x in (*arrays, *results, *memory)]
    call = replace(call, room=scratch.size)
    for _ in range(2):  # what a first run leaves in the scratch memory must not matter
        given.on_gpu(call, 0)(list(pointers), 5)


PLACES = [on_cpu, pytest.param(on_gpu, marks=needs_compiler)]


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams on which memory was cleared."""
    streams: list[int] = []

    def clear(pointer: int, nbytes: int, stream: int) -> None:
        ctypes.memset(pointer, 0, nbytes)
        streams.append(stream)

    monkeypatch.setattr(jit, "clear", clear)
    return streams


def answer(place_of: Any, direction: Any, keywords: dict[str, Any], **arrays: Any) -> dict[str, np.ndarray]:
    """The results of a call, described in a text and read from there."""
    options = given.plain(flash_words.options(keywords, keep_state=direction == "forward"))
    if direction == "backward":
        options = options.replace(bias_grad="attn_bias" in keywords)
    named = flash_words.arrays(keywords, **arrays).by_name()
    call = GivenCall(direction, options, tuple((name, x.shape, x.dtype.name) for name, x in named.items()))
    assert given.from_text(call.text()) == call and given.from_text(call.text().encode()).options is call.options
    results = {r.name: place(r.shape, r.dtype) for r in call.results}
    place_of(call, list(named.values()), list(results.values()))
    return results


@pytest.mark.parametrize("place_of", PLACES)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [*CALLS, "packed"])
@pytest.mark.sample(3)
def test_results_are_written_where_they_are_wanted(
    launches: Launches, cleared: list[int], name: str, dtype: Any, place_of: Any
) -> None:
    keywords = PACKED if name == "packed" else CALLS[name]
    *arrays, dout, dlse = tensors(name == "packed", dtype)
    q, k, v = arrays
    forward = answer(place_of, "forward", keywords, q=q, k=k, v=v)
    gradients = answer(place_of, "backward", keywords, q=q, k=k, v=v, dout=dout, dlse=dlse, **forward)
    words = {ORACLE.get(n, n): x for n, x in keywords.items() if n != "num_splits"}
    if "rng_state" in words:
        words["rng_state"] = tuple(words["rng_state"].tolist())
    exact, naive = (f(q, k, v, dout, dlse, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    actual = oracle.Attention(forward["out"], forward["lse"], **gradients)
    oracle.assert_all_close(actual, exact, naive, name)
    assert {5} >= set(cleared)
    if place_of is on_gpu:
        assert launches.kernels and "fwd_rng" not in launches.kernels


def test_scratch_memory_is_one_piece_with_what_is_cleared_in_front() -> None:
    call = GivenCall(
        "forward",
        given.plain(flash_words.options({"causal": True})),
        tuple((name, (2, 4096, 8, 128), "bfloat16") for name in "qkv"),
    )
    workspaces = call.plan(device.named("h100")).workspaces
    scratch = call.scratch(device.named("h100"))
    assert workspaces and scratch.nbytes >= sum(w.nbytes for w in workspaces)
    spans = sorted((start, start + w.nbytes) for start, w in zip(scratch.starts, workspaces, strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % 256 == 0 for start, _ in spans) and spans[-1][1] <= scratch.nbytes
    for start, w in zip(scratch.starts, workspaces, strict=True):
        assert (start + w.nbytes <= scratch.nbytes_zeroed) == (w.zeroed or w.kept)


def test_programs_of_another_gpu_are_refused(launches: Launches) -> None:
    arrays = tuple((name, (1, n, 4, 32), "float16") for name, n in (("q", 4), ("k", 1024), ("v", 1024)))
    call = GivenCall("forward", given.plain(flash_words.options({"num_splits": 4})), arrays)
    needed = call.scratch(device.named("a100")).nbytes
    assert needed and given.from_text(replace(call, room=needed).text()).room == needed
    for room in (0, needed - 256, needed + 256):
        with pytest.raises(UnsupportedProblem, match=rf"has {room} bytes .* needs {needed} on NVIDIA"):
            given.on_gpu(replace(call, room=room), 0)


def test_another_version_is_refused() -> None:
    call = GivenCall("forward", cuflash.ops.asked(), tuple((name, (1, 8, 1, 16), "float32") for name in "qkv"))
    with pytest.raises(UnsupportedProblem, match=r"in the words of version 2, and this cuflash knows version 1"):
        given.from_text(call.text().replace('"version":1', '"version":2'))


def test_what_is_wrong_is_refused_in_the_words_of_the_caller() -> None:
    options = given.plain(flash_words.options({"softcap": -1.0}))
    call = GivenCall("forward", options, tuple((name, (1, 8, 1, 16), "float32") for name in "qkv"))
    with pytest.raises(InvalidArgument, match=r"^softcap is -1\.0"):
        call.problem  # noqa: B018
    assert Arrays._fields[:3] == tuple("qkv")
