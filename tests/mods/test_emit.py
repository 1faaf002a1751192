"""What is known of written scores before they are printed: bounds, units and what distances decide."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from written import READ, random_source

from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.mods.derive import slopes
from cuflash.mods.distance import learned, steps, varies
from cuflash.mods.emit import cap_of, emit, in_units, is_bounded
from cuflash.mods.evaluate import evaluate
from cuflash.mods.expression import Node

SLOPES, TABLE, BUCKETS = np.ones(4, np.float32), np.zeros((4, 9), np.float32), np.arange(9, dtype=np.int32)


def traced(function: Callable[..., Any]) -> mods.Mod:
    return mods.trace("score_mod", function).mod


def sources(count: int) -> list[tuple[str, Any]]:
    """Random scores, and what they read."""
    rng, computed = np.random.default_rng(3), []
    while len(computed) < count:
        source = random_source(rng, "R", int(rng.integers(1, 4)))
        with suppress(InvalidArgument):
            computed.append(
                (source, mods.trace("score_mod", eval(f"lambda s, b, h, q, k: {source}", {"m": mods} | READ)))
            )
    return computed


def test_what_is_bounded_is_so_for_every_score_and_number() -> None:
    some = {False: 0, True: 0}
    for source, (mod, arrays) in sources(400):
        worst = [np.full_like(x, np.nan) if mod.operands[i].kind == "real" else x for i, x in enumerate(arrays)]
        scores = np.array([0, 1e-30, 0.3, -7, 1e30, -3e38], np.float32)
        by_score = slopes(mod).by_score
        for node, beyond in ((by_score, False), (mod.expression, True)):
            if not is_bounded(node, beyond):
                continue
            some[beyond] += 1
            held = [np.ones_like(x) if beyond and mod.operands[i].kind == "real" else y
                    for i, (x, y) in enumerate(zip(arrays, worst, strict=True))]  # fmt: skip
            positions = {"b": 0, "h": 1, "q": np.array([[5], [900]]), "k": np.array([[0], [70]])}
            with np.errstate(all="ignore"):
                (got,) = evaluate(
                    node, score=np.float32(0) if beyond else scores, positions=positions, captured=held, real=np.float32
                )
            assert (np.abs(got) <= (2.0**100 if beyond else 2.0**20)).all(), (source, node)
    assert min(some.values()) > 20


def test_bounds_of_those_that_are_used_most() -> None:
    cap = traced(mods.softcap(30.0))
    assert is_bounded(slopes(cap).by_score) and is_bounded(cap.expression, beyond=True)
    alibi = traced(mods.alibi(SLOPES))
    assert is_bounded(slopes(alibi).by_score) and is_bounded(alibi.expression, beyond=True)
    assert not is_bounded(alibi.expression)
    table = traced(mods.relative_bias(TABLE))
    assert is_bounded(slopes(table).by_score) and not is_bounded(table.expression, beyond=True)
    squared = traced(lambda s, b, h, q, k: s * s)
    assert not is_bounded(slopes(squared).by_score)


@pytest.mark.parametrize(
    ("function", "unit"),
    [
        (mods.alibi(SLOPES), None),
        (lambda s, b, h, q, k: (q - k) * SLOPES[h] + s, None),
        (mods.softcap(30.0), 30.0),
        (lambda s, b, h, q, k: s * 3.0, 3.0),
        (lambda s, b, h, q, k: s * 1e38, 1.0),
        (lambda s, b, h, q, k: s * -3.0, 1.0),
        (lambda s, b, h, q, k: s - SLOPES[h] * (q * k), 1.0),  # no small whole number
        (mods.relative_bias(TABLE), 1.0),
    ],
)
def test_units(function: Callable[..., Any], unit: float | None) -> None:
    assert in_units(traced(function).expression)[0] == unit


def test_what_the_compiler_knows_of_a_distance_is_taken_off_once() -> None:
    statements, _ = emit(in_units(traced(mods.alibi(SLOPES)).expression)[1], fast=True)
    (real,) = (line for line in statements if "small_real" in line)
    assert real.count("1 * q.known + -1 * k.known") == 2


def position(name: str) -> Node:
    return Node("position", value=name, kind="int")


def test_steps() -> None:
    index = traced(lambda s, b, h, q, k: s + TABLE[h, 7 - (q + q - k) + b]).expression.args[1].args[1]
    assert steps(index) == (-2, 1)
    assert steps(position("h")) == (0, 0) and not varies(position("h")) and varies(position("k"))
    product = traced(lambda s, b, h, q, k: s + TABLE[h, q * k]).expression.args[1].args[1]
    assert steps(product) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda s, b, h, q, k: s + TABLE[h, k - q + 4],
        lambda s, b, h, q, k: s + TABLE[h, abs(q - k) // 2],
        lambda s, b, h, q, k: s + TABLE[h, BUCKETS[mods.minimum(q - k, 8)]],
        lambda s, b, h, q, k: s + TABLE[h, (k - q) // 2 + 4] + SLOPES[b],
        mods.t5_bias(np.zeros((8, 4), np.float32), True, 16),
    ],
)
def test_indices_by_distance_are_those_of_every_pair_at_it(function: Callable[..., Any]) -> None:
    mod, arrays = mods.trace("score_mod", function)
    computed = learned(mod, range(9))
    assert computed
    q, k = np.arange(-3, 20)[:, None], np.arange(17)
    positions = {"b": 0, "h": 1, "q": q, "k": k, "distance": q - k}
    for load, indices in computed:
        rest = {"score": np.float64(0), "positions": positions, "captured": arrays, "real": np.float64}
        for got, wanted in zip(evaluate(*indices, **rest), evaluate(*load.args, **rest), strict=True):
            np.testing.assert_array_equal(np.broadcast_to(got, (23, 17)), np.broadcast_to(wanted, (23, 17)))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, b, h, q, k: s + TABLE[h, k],
        lambda s, b, h, q, k: s + TABLE[h, k - 2 * q],
        lambda s, b, h, q, k: s + 2.0 * TABLE[h, k - q],
        lambda s, b, h, q, k: s * SLOPES[h],
        lambda s, b, h, q, k: mods.tanh(s + TABLE[h, k - q]),
        lambda s, b, h, q, k: s + TABLE[h, k - q] + SLOPES[q],
    ],
)
def test_what_more_than_the_distance_decides(function: Callable[..., Any]) -> None:
    assert learned(traced(function), range(9)) == ()


@pytest.mark.parametrize(
    ("function", "cap"),
    [
        (mods.softcap(30.0), 30.0),
        (lambda s, b, h, q, k: mods.tanh(s / 2) * 2, 2.0),
        (lambda s, b, h, q, k: 2 * mods.tanh(s / 3), None),
        (lambda s, b, h, q, k: 2 * mods.tanh(2 * s / 2), None),
        (lambda s, b, h, q, k: 2 * mods.tanh(s / 2) + h, None),
        (lambda s, b, h, q, k: -2 * mods.tanh(s / -2), None),
        (lambda s, b, h, q, k: 1e9 * mods.tanh(s / 1e9), None),
    ],
)
def test_a_soft_cap_is_known_as_such(function: Callable[..., Any], cap: float | None) -> None:
    assert cap_of(mods.trace("score_mod", function).mod.expression) == cap
