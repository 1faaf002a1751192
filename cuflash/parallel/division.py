"""A call divided over devices: the rows of each device's arrays that meet, and those that travel between devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cuflash.masks import Mask
from cuflash.parallel.schedule import Schedule, Tile, narrowed


class Packs(NamedTuple):
    """Packed sequences that each sequence of a device is taken for, as chunks of it; those of queries or keys may be 0.

    Chunks that do not meet are sequences without keys, and without queries.
    """

    q: tuple[int, ...]
    kv: tuple[int, ...]


class Call(NamedTuple):
    """One call of attention: rows of a device's queries on rows of keys, its own or received ones."""

    q: slice
    kv: slice
    left: int | None
    right: int | None
    """The window, aligned to the first row of either."""
    packs: Packs | None = None
    """How packed rows are divided; None for rows of one sequence, or of every element of a batch."""


class Move(NamedTuple):
    """Rows of keys and values that travel at one step."""

    rows: slice
    pairs: tuple[tuple[int, int], ...]
    """From which device to which; every device is at most once either."""


class Work(NamedTuple):
    """What a device does at one step."""

    move: int
    """Which one brings the keys."""
    calls: tuple[Call, ...]
    """Their rows of keys count from the first that was received."""


class Step(NamedTuple):
    """What happens between two exchanges."""

    moves: tuple[Move, ...]
    work: tuple[Work | None, ...]
    """Of each device."""

    @property
    def sums(self) -> bool:
        """Whether gradients of received keys may be sums over several calls."""
        return any(work is not None and len(work.calls) > 1 for work in self.work)


@dataclass(frozen=True)
class Division:
    """A ring's steps, in rows."""

    schedule: Schedule
    rows: tuple[int, int]
    """Of queries and of keys, on each device."""
    packed: bool = False

    def own(self, device: int) -> tuple[Call, ...]:
        """What a device does with its own keys."""
        return tuple(call for tile in self.schedule.tiles(device, device) for call in self._calls(tile))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps after that, in order."""
        return tuple(self._step(shift) for shift in self.schedule.shifts)

    @cached_property
    def packs(self) -> tuple[Packs, ...]:
        """How packed rows are divided in any call."""
        calls = [call for device in range(self.schedule.devices) for call in self.own(device)]
        calls += [call for calls in self.below_and_above for call in calls]
        return tuple(dict.fromkeys(call.packs for call in calls if call.packs is not None))

    @property
    def below_and_above(self) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
        """What a device does with the keys of a device of a lower number, and of a higher one.

        Without a window neither depends on how far it is.
        """
        if self.schedule.devices == 1:
            return (), ()
        return self.received(1, 1), self.received(0, 1)

    def received(self, device: int, shift: int) -> tuple[Call, ...]:
        """What a device does with the keys of the device so far before it."""
        tiles = self.schedule.tiles(device, (device - shift) % self.schedule.devices)
        return tuple(call for tile in tiles for call in self._calls(tile))

    def _step(self, shift: int) -> Step:
        devices = self.schedule.devices
        moves: list[tuple[slice, list[tuple[int, int]]]] = []
        work: list[Work | None] = []
        for device in range(devices):
            calls = self.received(device, shift)
            if not calls:
                work.append(None)
                continue
            rows = rows_that_travel(calls)
            index = next((i for i, (of, _) in enumerate(moves) if of == rows), len(moves))
            if index == len(moves):
                moves.append((rows, []))
            moves[index][1].append(((device - shift) % devices, device))
            work.append(Work(index, tuple(call._replace(kv=_from(call.kv, rows.start)) for call in calls)))
        return Step(tuple(Move(rows, tuple(pairs)) for rows, pairs in moves), tuple(work))

    def _calls(self, tile: Tile) -> Iterator[Call]:
        """A tile in rows."""
        mask = self.schedule.mask if tile.banded else Mask()
        if not self.packed:
            of_q, of_kv = (n // self.schedule.places for n in self.rows)
            call = _call(tile, of_q, of_kv, mask)
            if call is not None:
                yield call
        elif tile.banded and tile.ahead:  # the distance is another one for each sequence
            start = 0
            for n in self.schedule.lengths:
                call = _call(tile, n, n, mask)
                if call is not None:
                    yield call._replace(q=_from(call.q, -start), kv=_from(call.kv, -start))
                start += n * self.schedule.places
        else:
            rows_q, rows_kv = self.rows
            yield Call(slice(0, rows_q), slice(0, rows_kv), mask.left, mask.right, self._packs(tile))

    def _packs(self, tile: Tile) -> Packs:
        places, (q, end_q), (kv, end_kv) = self.schedule.places, tile.q, tile.kv
        pieces = (q, 0), (0, kv), (end_q - q, end_kv - kv), (places - end_q, 0), (0, places - end_kv)
        of_q, of_kv = zip(*(piece for piece in pieces if any(piece)), strict=True)
        return Packs(of_q, of_kv)


def rows_that_travel(calls: Sequence[Call]) -> slice:
    """The rows of keys that calls are about, and those between."""
    return slice(min(call.kv.start for call in calls), max(call.kv.stop for call in calls))


def _call(tile: Tile, of_q: int, of_kv: int, mask: Mask) -> Call | None:
    """What meets of a tile whose chunks have so many rows."""
    (q, end_q), (kv, end_kv) = tile.q, tile.kv
    band = narrowed((end_q - q) * of_q, (end_kv - kv) * of_kv, tile.ahead * of_kv, mask)
    if band is None:
        return None
    return Call(_from(band.q, -q * of_q), _from(band.kv, -kv * of_kv), band.left, band.right)


def _from(rows: slice, start: int) -> slice:
    """The same rows, counted from another."""
    return slice(rows.start - start, rows.stop - start)
