"""Who attends to what when: every pair once, by one device, and no key travels to who does not see it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cuflash.masks import Mask
from cuflash.parallel import token_order
from cuflash.parallel.division import Call, Division
from cuflash.parallel.schedule import Schedule, chunks_of, narrowed, places_of

MASKS = {
    "full": Mask(), "causal": Mask(right=0), "near": Mask(3, 0), "both sides": Mask(5, 2), "ahead": Mask(None, 4),
    "behind": Mask(7, None), "itself": Mask(0, 0), "far": Mask(30, 17),
}  # fmt: skip


def seen(len_q: int, len_kv: int, ahead: int, mask: Mask) -> np.ndarray:
    i, j = np.arange(len_q)[:, None] + ahead, np.arange(len_kv)[None, :]
    below = True if mask.left is None else j >= i - mask.left
    return np.broadcast_to(below & (True if mask.right is None else j <= i + mask.right), (len_q, len_kv))


def test_a_rectangle_is_narrowed_to_what_meets() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        len_q, len_kv, ahead = rng.randrange(9), rng.randrange(9), rng.randrange(-20, 21)
        mask = Mask(*(rng.choice([None, *range(12)]) for _ in range(2)))
        expected, computed = seen(len_q, len_kv, ahead, mask), np.zeros((len_q, len_kv), bool)
        band = narrowed(len_q, len_kv, ahead, mask)
        if band is not None:
            computed[band.q, band.kv] = inside = seen(
                band.q.stop - band.q.start, band.kv.stop - band.kv.start, 0, Mask(band.left, band.right)
            )
            assert band.pairs == inside.sum() > 0
            assert inside.any(axis=1)[[0, -1]].all() and inside.any(axis=0)[[0, -1]].all()
        np.testing.assert_array_equal(computed, expected)


def pairs_of(call: Call, q: np.ndarray, kv: np.ndarray, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Tokens that meet in a call, of rows that hold these."""
    if call.packs is None:
        rows, keys = q[call.q], kv[call.kv]
        return [(rows[i], keys[j]) for i, j in np.argwhere(seen(len(rows), len(keys), 0, Mask(call.left, call.right)))]
    computed, at_q, at_kv = [], call.q.start, call.kv.start
    for length in lengths:
        for of_q, of_kv in zip(*call.packs, strict=True):
            rows, keys = q[at_q : at_q + of_q * length], kv[at_kv : at_kv + of_kv * length]
            met = np.argwhere(seen(len(rows), len(keys), 0, Mask(call.left, call.right)))
            computed += [(rows[i], keys[j]) for i, j in met]
            at_q, at_kv = at_q + len(rows), at_kv + len(keys)
    return computed


@pytest.mark.sample(3)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
def test_every_pair_meets_once(devices: int, order: Any, name: str, packed: bool) -> None:
    chunks = (3, 1, 0, 4) if packed else (4,)
    lengths = [n * devices * places_of(order) for n in chunks]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.split(token_order(starts.astype(np.int32), devices, order), devices)
    division = Division(Schedule(devices, order, MASKS[name], chunks), (len(tokens[0]),) * 2, packed)
    met: list[tuple[int, int]] = []
    for device in range(devices):
        for call in division.own(device):
            met += pairs_of(call, tokens[device], tokens[device], chunks)
    for step in division.steps:
        for device, work in enumerate(step.work):
            sources = [(i, a) for i, move in enumerate(step.moves) for a, b in move.pairs if b == device]
            if work is None:
                assert not sources, "keys travel to who has no use for them"
                continue
            [(index, source)] = sources
            assert index == work.move and source != device
            kv = tokens[source][step.moves[index].rows]
            for call in work.calls:
                met += pairs_of(call, tokens[device], kv, chunks)
        for move in step.moves:
            assert all(len({*ends}) == len(ends) for ends in zip(*move.pairs, strict=True))
    assert len(set(met)) == len(met), "a pair meets twice"
    expected = [
        (start + i, start + j)
        for start, length in zip(starts, lengths, strict=False)
        for i, j in np.argwhere(seen(length, length, 0, MASKS[name]))
    ]
    assert set(met) == set(expected)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_zigzag_balances_causal_work(devices: int) -> None:
    def work(order: Any) -> np.ndarray:
        """Pairs of each device at each step."""
        division = Division(Schedule(devices, order, Mask(right=0)), (12, 12))
        steps = [division.own, *((lambda i, s=s: s.work[i].calls if s.work[i] else ()) for s in division.steps)]
        return np.array([[sum(pairs(call) for call in step(i)) for i in range(devices)] for step in steps])

    def pairs(call: Call) -> int:
        return int(seen(call.q.stop - call.q.start, call.kv.stop - call.kv.start, 0, Mask(call.left, call.right)).sum())

    zigzag, contiguous = work("zigzag"), work("contiguous")
    assert (zigzag == zigzag[:, :1]).all(), "all devices have as much to do at every step"
    assert zigzag.sum() == contiguous.sum() == (12 * devices + 1) * 12 * devices // 2
    assert contiguous.max(axis=1).sum() > 1.4 * zigzag.max(axis=1).sum() or devices == 2


def moved(schedule: Schedule, rows: int) -> list[tuple[int, int, int]]:
    """(from, to, rows) of all that travels."""
    steps = Division(schedule, (rows, rows)).steps
    return [(a, b, m.rows.stop - m.rows.start) for step in steps for m in step.moves for a, b in m.pairs]


def test_what_is_seen_travels_and_nothing_else() -> None:
    causal, near = Mask(right=0), Mask(10, 0)
    assert moved(Schedule(4, "contiguous", near, (64,)), 64) == [(i, i + 1, 10) for i in range(3)]
    assert moved(Schedule(4, "contiguous", Mask(70, 0), (64,)), 64) == [
        *((i, i + 1, 64) for i in range(3)), *((i, i + 2, 6) for i in range(2))
    ]  # fmt: skip
    assert moved(Schedule(3, "contiguous", Mask(5, 7), (64,)), 64) == [(0, 1, 5), (1, 2, 5), (1, 0, 7), (2, 1, 7)]
    # Chunks 0 and 7, 1 and 6, 2 and 5, 3 and 4.
    assert sorted(moved(Schedule(4, "zigzag", near, (32,)), 64)) == sorted(
        [(i, i + 1, 10) for i in range(3)] + [(i + 1, i, 10) for i in range(3)]
    )
    assert {(a, b) for a, b, _ in moved(Schedule(4, "contiguous", causal), 64)} == {
        (a, b) for a in range(4) for b in range(4) if a < b
    }
    of_zigzag = moved(Schedule(4, "zigzag", causal), 64)
    assert {n for a, b, n in of_zigzag if a < b} == {32} and {n for a, b, n in of_zigzag if a > b} == {64}


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("devices", [1, 2, 5])
def test_tokens_lie_as_the_chunks_do(devices: int, order: Any) -> None:
    chunks = (2, 0, 1, 3)
    lengths = [n * devices * places_of(order) for n in chunks]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    expected = [
        start + chunk * n + row
        for device in range(devices)
        for start, n in zip(starts, chunks, strict=False)
        for chunk in chunks_of(order, devices, device)
        for row in range(n)
    ]
    assert token_order(starts, devices, order).tolist() == expected
    assert token_order(starts.tolist(), devices, order).tolist() == expected
