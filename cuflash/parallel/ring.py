"""Ring attention as one device runs it, on arrays of NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from cuflash import dtypes
from cuflash.ops import merge as merging
from cuflash.parallel.calls import Device, rows_of
from cuflash.parallel.division import Call, Step
from cuflash.parallel.exchange import Message, Post, Program


def forward(on: Device, xp: Any, rank: int, q: Any, k: Any, v: Any) -> Program[tuple[Any, Any]]:
    """(out, lse) of this device's queries and the keys of all devices.

    The keys of a step are on their way while those before are attended to.
    """
    sums, traffic = _Parts(xp, q, v), _Traffic(on.division.steps, xp, rank, k, v)
    calls, keys = on.division.own(rank), [k, v]
    left = len(calls) + sum(len(work.calls) for step in on.division.steps if (work := step.work[rank]) is not None)

    def add(calls: Sequence[Call], keys: Sequence[Any]) -> None:
        nonlocal left
        for call in calls:
            left -= 1
            sums.add(call.q, *on.attend(call, q, keys), last=not left)

    for coming in traffic.coming():
        wait = yield Post(coming.sent, coming.received)
        add(calls, keys)
        wait()
        calls, keys = coming.calls, coming.arrays
    add(calls, keys)
    return sums.merged()


class _Parts:
    """The output and the log-sum-exp of rows, of the parts of some of them that come one after the other.

    Each is merged with what was before in the accumulator's type. The first part stays in its own, though, and two that
    are all there is make the result at once: passes over memory add up to some percent of a step.
    """

    def __init__(self, xp: Any, q: Any, v: Any) -> None:
        self._xp, self._q, self._real, self._dim = xp, q, _real(q), v.shape[-1]
        self._out: Any = None
        self._lse: Any = None

    def add(self, rows: slice, part: Any, lse: Any, last: bool) -> None:
        """Add a part of some rows; `last` if no other follows."""
        whole = part.shape[:-1] == self._q.shape[:-1]
        if self._out is None and whole:
            self._out, self._lse = part, lse
            return
        if self._out is None:
            self._begin()
        if self._out.dtype == self._real or not (last or whole):
            self._out, part = self._out.astype(self._real, copy=False), part.astype(self._real, copy=False)
        mine, mine_lse = rows_of(self._out, rows), self._lse[..., rows]
        merged = merging.merge([mine, part], [mine_lse, lse], exact=not last)
        if whole:
            self._out, self._lse = merged.out, merged.lse
        else:
            mine[...], mine_lse[...] = merged.out, merged.lse

    def merged(self) -> tuple[Any, Any]:
        """(out, lse) in the dtypes of results."""
        if self._out is None:
            self._begin()
        return self._out.astype(self._q.dtype, copy=False), self._lse

    def _begin(self) -> None:
        *batch, length, heads, _ = self._q.shape
        self._out = self._xp.zeros((*self._q.shape[:-1], self._dim), self._real)
        self._lse = self._xp.full((*batch, heads, length), -self._xp.inf, self._real)


def backward(
    on: Device, xp: Any, rank: int, q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any
) -> Program[tuple[Any, Any, Any]]:
    """(dq, dk, dv) of this device's queries and keys, by the output and log-sum-exp of all keys.

    Gradients of received keys go home while the next are computed, and are added there in the order of the steps. They
    travel in the dtype of the keys where one call made them, which gives them in no other, and in the accumulator's
    where they are sums.
    """
    real = _real(q)
    dq, dk, dv = _Sum(xp, q, real), _Sum(xp, k, real), _Sum(xp, v, real)

    def add(calls: Sequence[Call], keys: Sequence[Any], *totals: _Sum) -> None:
        for call in calls:
            parts = on.gradients(call, q, keys, out, lse, dout, dlse)
            for total, part, rows in zip((dq, *totals), parts, (call.q, call.kv, call.kv), strict=True):
                total.add(rows, part)

    traffic = _Traffic(on.division.steps, xp, rank, k, v)
    here: _Keys | None = None
    going: _Back | None = None
    for coming in chain(traffic.coming(), [None]):
        returning, going = going, None
        posts = [x for x in (coming, returning) if x is not None]
        wait = yield Post([m for x in posts for m in x.sent], [m for x in posts for m in x.received])
        if here is None:
            add(on.division.own(rank), (k, v), dk, dv)
        else:
            made = [_Sum(xp, x, real if here.step.sums else x.dtype) for x in here.arrays]
            add(here.calls, here.arrays, *made)
            going = traffic.back(here.step, [x.total for x in made], real)
        wait()
        if returning is not None:
            returning.add(dk, dv)
        here = coming
    if going is not None:
        wait = yield Post(going.sent, going.received)
        wait()
        going.add(dk, dv)
    of_q, of_k, of_v = (x.total.astype(x.like.dtype) for x in (dq, dk, dv))
    return of_q, of_k, of_v


class _Sum:
    """What is added to rows of an array in some dtype; whole arrays to begin with are taken as they are."""

    def __init__(self, xp: Any, like: Any, dtype: Any) -> None:
        self.like, self._xp, self._dtype, self._total = like, xp, dtype, None

    @property
    def total(self) -> Any:
        """The sum."""
        if self._total is None:
            self._total = self._xp.zeros(self.like.shape, self._dtype)
        return self._total

    def add(self, rows: slice, part: Any) -> None:
        """Add to some rows."""
        part = part.astype(self._dtype, copy=False)
        if self._total is None and part.shape == self.like.shape:
            self._total = part
        else:
            mine = rows_of(self.total, rows)
            mine += part


class _Keys(NamedTuple):
    """Keys and values on their way at one step, and what they are for."""

    step: Step
    calls: tuple[Call, ...]
    arrays: list[Any]
    """Those that this device receives, if any."""
    sent: list[Message]
    received: list[Message]


class _Back(NamedTuple):
    """Gradients of keys on their way home."""

    homes: list[tuple[slice, list[Any]]]
    """Rows of this device's keys, and what is added to their gradients."""
    sent: list[Message]
    received: list[Message]

    def add(self, *totals: _Sum) -> None:
        """Add what has arrived."""
        for rows, parts in self.homes:
            for total, part in zip(totals, parts, strict=True):
                total.add(rows, part)


class _Traffic:
    """What one device sends and receives."""

    def __init__(self, steps: Sequence[Step], xp: Any, rank: int, k: Any, v: Any) -> None:
        self._steps, self._xp, self._rank, self._kv = steps, xp, rank, (k, v)

    def coming(self) -> Iterator[_Keys]:
        """The steps' keys; memory for them is allocated when the step is asked for."""
        return map(self._keys, range(len(self._steps)))

    def _keys(self, index: int) -> _Keys:
        step, work = self._steps[index], self._steps[index].work[self._rank]
        keys = _Keys(step, () if work is None else work.calls, [], [], [])
        for move in step.moves:
            for source, target in move.pairs:
                parts = [rows_of(x, move.rows) for x in self._kv]
                if source == self._rank:
                    keys.sent.extend(Message(target, self._xp.ascontiguousarray(x)) for x in parts)
                if target == self._rank:
                    keys.arrays.extend(self._xp.empty(x.shape, x.dtype) for x in parts)
                    keys.received.extend(Message(source, x) for x in keys.arrays)
        return keys

    def back(self, step: Step, made: Sequence[Any], real: Any) -> _Back:
        """Gradients of the keys of a step, the other way."""
        gradients = _Back([], [], [])
        for move in step.moves:
            for home, away in move.pairs:
                if away == self._rank:
                    gradients.sent.extend(Message(home, x) for x in made)
                if home == self._rank:
                    parts = [rows_of(x, move.rows) for x in self._kv]
                    empty = [self._xp.empty(x.shape, real if step.sums else x.dtype) for x in parts]
                    gradients.homes.append((move.rows, empty))
                    gradients.received.extend(Message(away, x) for x in empty)
        return gradients


def _real(q: Any) -> Any:
    """The dtype of sums."""
    dtype = dtypes.of(q.dtype)
    assert dtype is not None
    return dtype.accumulator
