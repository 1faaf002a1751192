"""Heads for sequence: every device attends with some heads to whole sequences, on arrays of NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cuflash import dtypes, ops
from cuflash.errors import InvalidArgument
from cuflash.ops import Arrays, new
from cuflash.parallel.asked import Asked
from cuflash.parallel.exchange import Message, Post, Program
from cuflash.parallel.schedule import chunks_of, tokens_at


class Held(NamedTuple):
    """What the gradients need: whole sequences of this device's heads."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any


def check_heads(devices: int, heads_q: int, heads_kv: int) -> None:
    """Refuse heads that devices cannot have equal parts of.

    Raises
    ------
    InvalidArgument
        If query heads are not a multiple of the devices, or key heads neither a multiple nor a divisor of them.
    """
    if heads_q % devices:
        raise InvalidArgument(
            f"q has {heads_q} heads for {devices} devices; expected a multiple of them. Call ring_attention, or over "
            "fewer devices."
        )
    if heads_kv % devices and (not heads_kv or devices % heads_kv):
        raise InvalidArgument(
            f"k has {heads_kv} heads for {devices} devices; expected a multiple or a divisor of them. Repeat the "
            "heads, or call ring_attention."
        )


def heads_of(device: int, devices: int, heads: int) -> slice:
    """The heads that a device works with; several have one where there are more devices."""
    if heads % devices == 0:
        return slice(device * heads // devices, (device + 1) * heads // devices)
    return slice(device * heads // devices, device * heads // devices + 1)


def checked_rows(asked: Asked, devices: int, rows: int, keys: int) -> int | None:
    """The length of the longest whole sequence, if it is known, of so many rows on each device.

    Raises
    ------
    InvalidArgument
        If rows cannot be divided as is asked.
    """
    if rows != keys and (asked.packed or asked.order == "zigzag"):
        raise InvalidArgument(
            f"k has {keys} rows on each device but q has {rows}; expected as many in zigzag order or where sequences "
            "are packed. Pad either."
        )
    asked.check_chunks(devices, rows)
    return asked.longest(rows * devices)


Rows = Any
"""What brings rows into another order: slices that follow each other, or an array of which row comes where."""


def order_of(asked: Asked, xp: Any, total: int, devices: int) -> tuple[Rows, Rows] | None:
    """How rows of one device after the other come into the order of the sequence, and back; None where they are."""
    if asked.packed:
        places = tokens_at(xp, xp.asarray(asked.cu_seqlens), total, asked.order, devices)
        return places, xp.argsort(places)
    if asked.order == "contiguous":
        return None
    chunks = [chunk for device in range(devices) for chunk in chunks_of(asked.order, devices, device)]
    length, numbers = total // len(chunks), range(len(chunks))

    def joined(chunks: Sequence[int]) -> tuple[slice, ...]:
        return tuple(slice(chunk * length, (chunk + 1) * length) for chunk in chunks)

    return joined([chunks.index(number) for number in numbers]), joined(chunks)


def ordered(xp: Any, x: Any, order: Rows, axis: int = -3) -> Any:
    """Rows, along an axis that counts from the last one, in another order."""
    if not isinstance(order, tuple):
        return xp.take(x, order, axis)
    behind = (slice(None),) * (-1 - axis)
    return xp.concatenate([x[(..., rows, *behind)] for rows in order], axis)


class Heads:
    """One device's part."""

    def __init__(self, asked: Asked, xp: Any, rank: int, devices: int, q: Any, k: Any) -> None:
        self._xp, self._rank, self._devices = xp, rank, devices
        self._heads_kv = k.shape[-2]
        check_heads(devices, q.shape[-2], k.shape[-2])
        longest = checked_rows(asked, devices, q.shape[-3], k.shape[-3])
        self._order = order_of(asked, xp, q.shape[-3] * devices, devices)
        self._options, self._starts = asked.options, {}
        if asked.packed:
            starts = xp.asarray(asked.cu_seqlens)
            self._options = asked.options.replace(max_seqlen_q=longest, max_seqlen_k=longest)
            self._starts = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}

    def forward(self, q: Any, k: Any, v: Any) -> Program[tuple[Any, Any, Held]]:
        """(out, lse) of this device's rows, and what the gradients need."""
        q, k, v = yield from self._gathered([q, k, v])
        out, lse, *_ = ops.forward(self._options, new(Arrays, q=q, k=k, v=v, **self._starts))
        own_out, own_lse = yield from self._scattered([out, _by_row(lse)])
        joined = self._xp.concatenate(own_out, axis=-2), _by_head(self._xp.concatenate(own_lse, axis=-2))
        return *joined, Held(q, k, v, out, lse)

    def backward(self, held: Held, dout: Any, dlse: Any) -> Program[tuple[Any, Any, Any]]:
        """(dq, dk, dv) of this device's rows."""
        dout, *rest = yield from self._gathered([dout] if dlse is None else [dout, _by_row(dlse)])
        q, k, v, out, lse = held
        dlse = self._xp.ascontiguousarray(_by_head(rest[0])) if rest else None
        arrays = new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, out=out, **self._starts)
        dq, dk, dv, *_ = ops.backward(self._options, arrays)
        of_q, of_k, of_v = yield from self._scattered([dq, dk, dv])
        return self._xp.concatenate(of_q, axis=-2), self._summed(of_k), self._summed(of_v)

    def _gathered(self, arrays: Sequence[Any]) -> Program[list[Any]]:
        """Rows of all devices of this device's heads, in the order of the sequence."""
        parts = [[x[..., heads_of(peer, self._devices, x.shape[-2]), :] for peer in self._peers] for x in arrays]
        whole = [self._xp.concatenate(x, axis=-3) for x in (yield from self._exchanged(parts))]
        return whole if self._order is None else [ordered(self._xp, x, self._order[0]) for x in whole]

    def _scattered(self, arrays: Sequence[Any]) -> Program[list[list[Any]]]:
        """The way back: this device's rows of each device's heads."""
        if self._order is not None:
            arrays = [ordered(self._xp, x, self._order[1]) for x in arrays]
        return (yield from self._exchanged([self._xp.split(x, self._devices, axis=-3) for x in arrays]))

    def _exchanged(self, parts: Sequence[Sequence[Any]]) -> Program[list[list[Any]]]:
        """Of each list every device's part for this one, for this one's part for every device; all of one shape."""
        sent, received, arrived = [], [], []
        for of_array in parts:
            arrived.append([*of_array])
            for peer in self._peers:
                if peer != self._rank:
                    sent.append(Message(peer, self._xp.ascontiguousarray(of_array[peer])))
                    arrived[-1][peer] = self._xp.empty(of_array[peer].shape, of_array[peer].dtype)
                    received.append(Message(peer, arrived[-1][peer]))
        wait = yield Post(sent, received)
        wait()
        return arrived

    def _summed(self, parts: Sequence[Any]) -> Any:
        """Gradients of keys, of devices that had the same head added up in their order."""
        first, dtype = parts[0], dtypes.of(parts[0].dtype)
        assert dtype is not None
        total = self._xp.zeros((*first.shape[:-2], self._heads_kv, first.shape[-1]), dtype.accumulator)
        for peer, part in enumerate(parts):
            mine = total[..., heads_of(peer, self._devices, self._heads_kv), :]
            mine += part.astype(total.dtype)
        return total.astype(first.dtype)

    @property
    def _peers(self) -> range:
        return range(self._devices)


def _by_row(lse: Any) -> Any:
    """(..., h, s) as (..., s, h, 1)."""
    return lse.swapaxes(-1, -2)[..., None]


def _by_head(x: Any) -> Any:
    """(..., s, h, 1) as (..., h, s)."""
    return x[..., 0].swapaxes(-1, -2)
