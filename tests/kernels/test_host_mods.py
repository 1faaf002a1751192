"""Written scores and masks: what is printed of them against NumPy, and whole kernels on a CPU against the oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import oracle
import pytest
from host.build import build, why_not
from host.cases import HostCase, Tensors, dense, exact_and_naive, packed, run
from written import (
    NUM_PLACES,
    NUM_SOURCES,
    Written,
    alibi,
    check_printed,
    composed,
    documents,
    grid,
    prefix,
    printed,
    scaled,
    soft_cap,
    table,
    unit,
)  # fmt: skip

from cuflash import mods
from cuflash.device import Device
from cuflash.masks import Mask
from cuflash.mods.expression import OPERATIONS, in_order
from cuflash.plan import Plan, steps
from cuflash.plan.families import FAMILIES
from cuflash.problem import Problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

CAUSAL = Mask(right=0)


# What is printed


@cache
def library() -> ctypes.CDLL:
    """All of them in one."""
    return build(unit('extern "C" __attribute__((visibility("default")))'))


def test_every_operation_is_printed() -> None:
    nodes = {node.op for _, traced, _ in printed() for node in in_order(traced.mod.expression)}
    assert nodes >= {*OPERATIONS, "score", "position", "constant", "load"}


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("number", range(NUM_SOURCES))
def test_what_is_printed_computes_what_numpy_does(number: int, real: Any) -> None:
    def run(name: str, block: np.ndarray, places: np.ndarray, results: np.ndarray) -> None:
        getattr(library(), name)(*(c_void_p(x.ctypes.data) for x in (block, places, results)), NUM_PLACES)

    check_printed(number, real, run)


# Whole kernels


def without_asking(problem: Problem, device: Device, family: str) -> Plan:
    """The plan of a family, also of what it does not say that it supports."""
    return next(known for known in FAMILIES if known.name == family).plan(problem, device)


def check(case: HostCase, make: Callable[..., Written], direction: str, seed: int = 0) -> None:
    """Run a written score or mask in a kernel; the oracle computes what it stands for."""
    written, backward = make(case, np.random.default_rng(11)), direction == "backward"
    captured: list[np.ndarray] = []
    changes: dict[str, Any] = {}
    for name, function in (("score_mod", written.score), ("mask_mod", written.mask)):
        if function is not None:
            changes[name], arrays = mods.trace(name, function)
            captured += arrays
    learns = backward and written.learned is not None

    tensors = Tensors(case)
    inputs = ("dout", "dlse") if backward else ()
    for name in ("q", "k", "v", *inputs):
        tensors.random(name)
    tensors.options |= written.options
    exact, naive = exact_and_naive(tensors, *inputs)
    tensors.arrays |= {f"captured{i}": x for i, x in enumerate(captured)}
    if backward:
        tensors.place("out", exact.out.astype(case.problem.dtype.numpy))
        tensors.place("lse", exact.lse)
        tensors.arrays["dlse"][np.isneginf(exact.lse)] = np.nan
        results = {name: tensors.place(name) for name in ("dq", "dk", "dv")}
    else:
        results = {name: tensors.place(name) for name in ("out", "lse")}
        exact, naive = (x._replace(lse=tensors.told_of_nothing(x.lse)) for x in (exact, naive))
    real = case.problem.dtype.accumulator
    if backward and case.problem.bias is not None:
        results["dbias"] = tensors.place_flat("dbias", tensors.arrays["bias"].shape, real)
    exact_sums = learns and case.problem.deterministic
    sums = {f"dcaptured{i}": np.full(x.shape, 7 if exact_sums else 0, real) for i, x in enumerate(captured) if learns}
    tensors.arrays |= sums
    if exact_sums:
        words = {f"{name}_sums": steps.exact_sums(name, case.problem, x.size) for name, x in sums.items()}
        tensors.arrays |= {name: np.zeros(x.shape, x.dtype) for name, x in words.items()}

    changes["captured_flat"] = tuple(i for i, x in enumerate(captured) if x.flags.c_contiguous)
    run(case, tensors, direction, seed, choose=without_asking, captured_grad=learns, **changes)
    for name, result in results.items():
        oracle.assert_close(result, getattr(exact, name), getattr(naive, name), name)
    tensors.assert_surroundings_untouched(*results)
    if learns:
        assert written.learned is not None
        of_oracle = [written.learned(x, tensors.arrays["q"].astype(np.float64)) for x in (exact, naive)]
        for (name, result), of_exact, of_naive in zip(sums.items(), *of_oracle, strict=True):
            oracle.assert_close(result, of_exact, of_naive, name, case.problem.dtype.numpy)


def cases() -> list[Any]:
    """(case, what is written, direction)."""
    few = {"num_splits": 0, "num_sms": 4}
    rows: list[tuple[str, str, HostCase, Callable[..., Written]]] = [
        ("simt", "f", dense("fp32", (4, 2), (70, 90), (40, 24), batch=2), composed),
        ("simt", "f", packed("fp64", (2, 1), (70, 0, 33), (90, 20, 40), (24, 24), tail=5, mask=CAUSAL), table),
        ("simt", "f", dense("fp32", (4, 2), (3, 300), (32, 32), num_splits=3), prefix),
        ("simt", "b", packed("fp32", (4, 2), (40, 0, 33), (50, 20, 40), (24, 16), tail=5, mask=CAUSAL), composed),
        ("simt", "b", dense("fp64", (2, 1), (40, 50), (24, 24)), scaled),
        ("simt", "b", dense("fp32", (2, 1), (40, 50), (24, 24), bias_axes="hk"), soft_cap),
        ("sm80", "f", dense("bf16", (4, 2), (70, 150), (64, 64), batch=2, softcap=1.0), table),
        ("sm80", "f", packed("fp16", (4, 2), (70, 0, 33), (150, 20, 40), (64, 64), tail=5, mask=CAUSAL), composed),
        ("sm80", "f", dense("bf16", (8, 2), (3, 700), (64, 64), **few), prefix),
        ("sm80", "f", dense("bf16", (6, 2), (5, 700), (64, 64), num_splits=0, num_sms=4), alibi),
        ("sm80", "f", dense("bf16", (6, 2), (40, 200), (64, 64), num_splits=3), table),
        ("sm80", "b", packed("bf16", (4, 2), (70, 0, 33), (150, 20, 40), (64, 64), tail=5, mask=CAUSAL), table),
        ("sm80", "b", dense("bf16", (2, 1), (70, 150), (64, 64), batch=2), composed),
        ("sm80", "b", dense("bf16", (4, 2), (70, 90), (64, 64), softcap=1.0), table),
        ("sm80", "b", dense("bf16", (2, 2), (70, 150), (136, 136)), table),
        ("sm80", "b", dense("bf16", (2, 2), (50, 61), (64, 64), batch=3, num_sms=3, mask=CAUSAL), table),
        ("sm80", "b", dense("bf16", (2, 2), (70, 70), (64, 64), dropout="byte", softcap=2.0), alibi),
        ("sm80", "b", dense("bf16", (2, 1), (70, 150), (64, 64)), scaled),
        ("sm80", "b", dense("bf16", (2, 1), (70, 150), (64, 64), alibi_axes="h", bias_axes="bhqk"), soft_cap),
        ("sm80", "b", dense("bf16", (2, 2), (50, 61), (64, 64), batch=3, num_sms=3, bias_axes="hqk"), soft_cap),
        ("sm90", "f", dense("bf16", (4, 2), (200, 300), (64, 64)), composed),
        ("sm90", "f", packed("bf16", (4, 2), (130, 0, 33), (150, 20, 40), (128, 128), tail=5, mask=CAUSAL), alibi),
        ("sm90", "f", dense("fp16", (2, 1), (200, 300), (128, 128)), documents),
        ("sm90", "f", dense("bf16", (2, 1), (130, 200), (512, 512)), composed),
        ("sm90", "f", dense("bf16", (4, 1), (3, 700), (320, 264), **few), prefix),
        ("sm90", "b", packed("bf16", (4, 2), (130, 0, 33), (150, 20, 40), (64, 64), tail=5, mask=CAUSAL), composed),
        ("sm90", "b", dense("bf16", (4, 2), (130, 150), (64, 64), batch=2, mask=CAUSAL), table),
        ("sm90", "b", packed("bf16", (4, 2), (130, 0, 33), (150, 20, 40), (128, 128), tail=5), table),
        ("sm90", "b", dense("bf16", (2, 1), (130, 150), (192, 192)), soft_cap),
        ("sm90", "b", dense("bf16", (2, 1), (130, 150), (128, 128), deterministic=True), prefix),
        ("simt", "b", dense("fp64", (2, 1), (40, 50), (24, 24), deterministic=True), scaled),
        ("sm80", "b", dense("bf16", (2, 1), (70, 150), (64, 64), batch=2, deterministic=True), composed),
        ("sm80", "b", dense("bf16", (2, 2), (50, 61), (64, 64), batch=3, num_sms=3, deterministic=True), table),
        ("sm90", "b", dense("bf16", (4, 2), (130, 150), (64, 64), batch=2, mask=CAUSAL, deterministic=True), table),
    ]
    directions = {"f": "forward", "b": "backward"}
    return [
        pytest.param(
            replace(case, family=family),
            make,
            directions[letter],
            id=f"{family}-{replace(case.problem, direction=directions[letter])}-{make.__name__}".replace(" ", "-"),
        )
        for family, letter, case, make in rows
    ]


@pytest.mark.sample(5)
@pytest.mark.parametrize(("case", "make", "direction"), cases())
def test_kernels_compute_what_is_written(case: HostCase, make: Callable[..., Written], direction: str) -> None:
    check(case, make, direction)


def halved(case: HostCase, rng: np.random.Generator) -> Written:
    """A multiple of a constant, which is its unit."""
    cap = 1.25
    return Written(lambda s, b, h, q, k: mods.tanh(s / cap) * cap, options={"softcap": cap})


def sloped(case: HostCase, rng: np.random.Generator) -> Written:
    """In the unit of the score that it is made of."""
    slopes = np.linspace(0.01, 0.5, case.problem.heads_q).astype(np.float32)
    _, h, q, k = grid(case.problem)
    bias = -slopes.astype(np.float64)[h] * abs(q - k)
    return Written(lambda s, b, h, q, k: s - slopes[h] * abs(q - k), options={"bias": bias})


@pytest.mark.parametrize(
    ("family", "make", "splits"),
    [("sm90", halved, 1), ("sm90", sloped, 1), ("sm80", halved, 2), ("sm80", sloped, 1), ("simt", halved, 2)],
)
def test_gradients_by_what_the_forward_leaves(family: str, make: Callable[..., Written], splits: int) -> None:
    """States of rows are in units of the score, as whoever reads them has to know."""
    case = replace(dense("bf16", (4, 4), (70, 90), (64, 64), num_splits=splits), family=family)
    written, tensors, changes = make(case, np.random.default_rng(3)), Tensors(case), {}
    changes["score_mod"], captured = mods.trace("score_mod", written.score)
    for name in ("q", "k", "v", "dout"):
        tensors.random(name)
    tensors.options |= written.options
    exact, naive = exact_and_naive(tensors, "dout")
    rows = case.problem.batch, case.problem.heads_q, case.problem.len_q
    states = {"lse": np.zeros(rows, np.float32), "row_state": np.full((*rows, 2), np.nan, np.float32)}
    tensors.arrays |= {f"captured{i}": x for i, x in enumerate(captured)} | states
    changes["captured_flat"] = tuple(range(len(captured)))
    dout = tensors.arrays.pop("dout")
    tensors.place("out")
    run(case, tensors, "forward", 0, **changes)
    oracle.assert_close(states["lse"], exact.lse, naive.lse, "lse")
    tensors.arrays["dout"] = dout
    results = {name: tensors.place(name) for name in ("dq", "dk", "dv")}
    run(replace(case, problem=replace(case.problem, num_splits=1)), tensors, "backward", 0, **changes)
    for name, x in results.items():
        oracle.assert_close(x, getattr(exact, name), getattr(naive, name), name)
