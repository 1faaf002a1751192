"""Which keys each device attends to at each step, and which of them travel: numbers alone, of no framework.

A sequence is cut into chunks of one length, one for each device in ``contiguous`` order, two in ``zigzag`` order, where
device i holds chunks i and 2n − 1 − i. At step t each device works on keys of the device t before it, round the ring:

    contiguous, 4 devices           zigzag, 4 devices, causal
    device   0    1    2    3       device   0      1      2      3
    chunks   0    1    2    3       chunks   0 7    1 6    2 5    3 4
    step 0   0    1    2    3       step 0   0 7    1 6    2 5    3 4     its own keys, up to the diagonal
    step 1   3    0    1    2       step 1   3 4    0      1      2       below it: all queries, the earlier chunk
    step 2   2    3    0    1       step 2   2 5    3 4    0      1       above it: the later queries, both chunks
    step 3   1    2    3    0       step 3   1 6    2 5    3 4    0

In causal attention of contiguous chunks device 0 is done after its own keys; in zigzag order all have the same work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from cuflash.masks import Mask

Order = Literal["contiguous", "zigzag"]


class Tile(NamedTuple):
    """Some chunks of a device's queries against some chunks of a device's keys."""

    q: tuple[int, int]
    """First and end of the places among the device's chunks."""
    kv: tuple[int, int]
    ahead: int
    """By how many chunks the first query is behind the first key in the sequence."""
    banded: bool
    """The mask can hide a key; otherwise every query sees every key."""


class Band(NamedTuple):
    """The queries and keys of a rectangle that meet, and the mask between them, aligned to its first corner."""

    q: slice
    kv: slice
    left: int | None
    right: int | None

    @property
    def pairs(self) -> int:
        """Queries times keys that are seen."""
        rows, keys = self.q.stop - self.q.start, self.kv.stop - self.kv.start
        low = 0 if self.left is None else _below(rows - self.left - 1, keys)
        high = 0 if self.right is None else _above(rows, keys - self.right - 1)
        return rows * keys - low - high


def _below(first: int, keys: int) -> int:
    """Pairs left of a band: the last row hides `first` keys, each row above one fewer, and none more than `keys`."""
    whole = max(first - keys, 0)
    first = min(max(first, 0), keys)
    return first * (first + 1) // 2 + whole * keys


def _above(rows: int, first: int) -> int:
    """Pairs to the right of a band: row 0 hides `first` keys, and each row below one fewer."""
    first = max(first, 0)
    rest = max(first - rows, 0)
    return first * (first + 1) // 2 - rest * (rest + 1) // 2


def narrowed(len_q: int, len_kv: int, ahead: int, mask: Mask) -> Band | None:
    """Of a rectangle of queries and keys what the mask lets meet; None if nothing.

    Query i lies `ahead` keys after key i, which may be a negative number.
    """
    left = ahead + len_q if mask.left is None else mask.left
    right = len_kv - ahead if mask.right is None else mask.right
    # Query i sees keys from i + ahead - left to i + ahead + right.
    first, end = max(0, -ahead - right), min(len_q, len_kv - ahead + left)
    if first >= end:
        return None
    first_key, end_key = max(0, first + ahead - left), min(len_kv, end + ahead + right)
    if first_key >= end_key:
        return None
    ahead += first - first_key
    rows, keys = end - first, end_key - first_key
    left, right = left - ahead, right + ahead
    return Band(
        slice(first, end),
        slice(first_key, end_key),
        None if mask.left is None or left >= rows - 1 else left,
        None if mask.right is None or right >= keys - 1 else right,
    )


@dataclass(frozen=True)
class Schedule:
    """Who attends to what when."""

    devices: int
    order: Order
    mask: Mask
    """Its band; of queries and keys of one length, unless it hides nothing."""
    lengths: tuple[int, ...] = ()
    """Rows of a chunk, of each sequence: what a window needs to know."""

    @property
    def places(self) -> int:
        """Chunks that a device holds."""
        return places_of(self.order)

    def chunks(self, device: int) -> tuple[int, ...]:
        """The chunks of a device, by their number in the sequence."""
        return chunks_of(self.order, self.devices, device)

    def tiles(self, device: int, source: int) -> tuple[Tile, ...]:
        """What a device does with the keys of another, or with its own."""
        every = (0, self.places)
        if self.mask.kind == "none":
            return (Tile(every, every, 0, False),)
        if self.mask.kind == "causal":
            if device == source:
                return (Tile(every, every, 0, True),)  # chunks of a device lie in their order
            if self.order == "contiguous":
                return (Tile(every, every, device - source, False),) if source < device else ()
            q, kv = (every, (0, 1)) if source < device else ((1, 2), every)
            return (Tile(q, kv, self.chunks(device)[q[0]] - source, False),)
        return tuple(self._near(device, source))

    def _near(self, device: int, source: int) -> Iterator[Tile]:
        """The tiles of a window, chunk by chunk."""
        for q, i in enumerate(self.chunks(device)):
            for kv, j in enumerate(self.chunks(source)):
                if i - j in self._reach:
                    yield Tile((q, q + 1), (kv, kv + 1), i - j, True)

    @cached_property
    def _reach(self) -> range:
        """How many chunks a query may be ahead of a key that it sees, in the sequence that has most."""
        every = self.devices * self.places
        left, right = (
            every * max(self.lengths, default=0) if side is None else side for side in (self.mask.left, self.mask.right)
        )
        lengths = [n for n in self.lengths if n]
        # Rows 0 and n - 1 of one chunk are as near to rows n - 1 and 0 of another as these get.
        furthest = [max(((n - 1 + side) // n for n in lengths), default=-1) for side in (right, left)]
        return range(-min(furthest[0], every), min(furthest[1], every) + 1)

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """The steps after the first at which some device has work: how far before it the keys are at home."""
        if self.mask.kind != "window":
            return tuple(range(1, self.devices))
        owner = {chunk: device for device in range(self.devices) for chunk in self.chunks(device)}
        steps = {
            (device - owner[i - ahead]) % self.devices
            for device in range(self.devices)
            for i in self.chunks(device)
            for ahead in self._reach
            if i - ahead in owner
        }
        return tuple(sorted(steps - {0}))


def places_of(order: Order) -> int:
    """Chunks that a device holds."""
    return 2 if order == "zigzag" else 1


def chunks_of(order: Order, devices: int, device: int) -> tuple[int, ...]:
    """The chunks of a device, by their number in the sequence."""
    return (device, 2 * devices - 1 - device) if order == "zigzag" else (device,)


def tokens_at(xp: Any, starts: Any, total: int, order: Order, devices: int) -> Any:
    """Where each token lies among those of one device after the other; `starts` are cu_seqlens of whole sequences."""
    token = xp.arange(total)
    sequence = xp.searchsorted(starts[1:], token, side="right").clip(0, len(starts) - 2)
    start, places = starts[sequence], places_of(order)
    length = (starts[sequence + 1] - start) // (devices * places)
    chunk, within = (token - start) // length.clip(1), (token - start) % length.clip(1)
    device = xp.minimum(chunk, 2 * devices - 1 - chunk) if order == "zigzag" else chunk
    return device * (total // devices) + start // devices + (chunk >= devices) * length + within
