"""Heads for sequence: every device attends with some heads to whole sequences, on arrays of NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cuflash import dtypes, ops
from cuflash.errors import InvalidArgument
from cuflash.ops import Arrays, new
from cuflash.parallel.asked import Asked
from cuflash.parallel.exchange import Message, Post, Program
from cuflash.parallel.schedule import chunks_of, tokens_at


class Held(NamedTuple):
    """What the gradients need: whole sequences of some of this device's heads."""

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


_LONG = 2**24
"""Bytes of a device's queries from which on a part of the heads is worth a launch of its own."""


def shares_of(devices: int, heads_kv: int, nbytes: float) -> int:
    """How many parts a device's heads are cut into: one travels while another is attended to; of its queries' bytes."""
    return 2 if devices > 1 and heads_kv % (2 * devices) == 0 and nbytes >= _LONG else 1


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


class _Traffic(NamedTuple):
    """Arrays on their way."""

    arrived: list[list[Any]]
    """Of each array the part of every device, this one's own among them."""
    sent: list[Message]
    received: list[Message]


class Heads:
    """One device's part."""

    def __init__(self, asked: Asked, xp: Any, rank: int, devices: int, q: Any, k: Any) -> None:
        self._xp, self._rank, self._devices = xp, rank, devices
        self._heads_kv = k.shape[-2]
        check_heads(devices, q.shape[-2], k.shape[-2])
        longest = checked_rows(asked, devices, q.shape[-3], k.shape[-3])
        self._order = order_of(asked, xp, q.shape[-3] * devices, devices)
        self._shares = shares_of(devices, self._heads_kv, q.nbytes)
        self._options, self._starts = asked.options, {}
        if asked.packed:
            starts = xp.asarray(asked.cu_seqlens)
            self._options = asked.options.replace(max_seqlen_q=longest, max_seqlen_k=longest)
            self._starts = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}

    def forward(self, q: Any, k: Any, v: Any) -> Program[tuple[Any, Any, list[Held]]]:
        """(out, lse) of this device's rows, and what the gradients need."""
        held = []

        def attend(share: int, q: Any, k: Any, v: Any) -> list[Any]:
            out, lse, *_ = ops.forward(self._options, new(Arrays, q=q, k=k, v=v, **self._starts))
            held.append(Held(q, k, v, out, lse))
            return [out, _by_row(lse)]

        out, lse = yield from self._exchanging([q, k, v], attend)
        return self._xp.concatenate(out, axis=-2), _by_head(self._xp.concatenate(lse, axis=-2)), held

    def backward(self, held: Sequence[Held], dout: Any, dlse: Any) -> Program[tuple[Any, Any, Any]]:
        """(dq, dk, dv) of this device's rows."""

        def pull_back(share: int, dout: Any, dlse: Any = None) -> list[Any]:
            q, k, v, out, lse = held[share]
            dlse = None if dlse is None else self._xp.ascontiguousarray(_by_head(dlse))
            arrays = new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, out=out, **self._starts)
            return list(ops.backward(self._options, arrays)[:3])

        of_q, of_k, of_v = yield from self._exchanging([dout] if dlse is None else [dout, _by_row(dlse)], pull_back)
        return self._xp.concatenate(of_q, axis=-2), self._summed(of_k), self._summed(of_v)

    def _exchanging(self, arrays: Sequence[Any], compute: Callable[..., list[Any]]) -> Program[list[list[Any]]]:
        """What is computed of whole sequences of this device's heads, back in rows: each result by shares of the heads.

        While a share of the heads is computed the next is on its way here, and the results of the one before on theirs.
        """
        results = []
        coming = self._to_heads(arrays, 0)
        wait = yield Post(coming.sent, coming.received)
        wait()
        going: _Traffic | None = None
        for share in range(self._shares):
            here = [self._whole(parts) for parts in coming.arrived]
            last = share + 1 == self._shares
            coming = coming if last else self._to_heads(arrays, share + 1)
            beside = [x for x in (None if last else coming, going) if x is not None]
            if beside:
                wait = yield Post([m for x in beside for m in x.sent], [m for x in beside for m in x.received])
            going = self._to_rows(compute(share, *here))
            if beside:
                wait()
            results.append(going.arrived)
        assert going is not None
        wait = yield Post(going.sent, going.received)
        wait()
        return [[x for parts in zip(*of, strict=True) for x in parts] for of in zip(*results, strict=True)]

    def _to_heads(self, arrays: Sequence[Any], share: int) -> _Traffic:
        """Rows of this device of a share of everyone's heads."""
        return self._traffic([[x[..., self._of(peer, share, x.shape[-2]), :] for peer in self._peers] for x in arrays])

    def _to_rows(self, arrays: Sequence[Any]) -> _Traffic:
        """The way back: this device's heads of everyone's rows."""
        if self._order is not None:
            arrays = [ordered(self._xp, x, self._order[1]) for x in arrays]
        return self._traffic([self._xp.split(x, self._devices, axis=-3) for x in arrays])

    def _whole(self, parts: Sequence[Any]) -> Any:
        """Rows of all devices in the order of the sequence."""
        if self._order is None or not isinstance(self._order[0], tuple):
            whole = self._xp.concatenate(parts, axis=-3)
            return whole if self._order is None else ordered(self._xp, whole, self._order[0])
        length = max(parts[0].shape[-3], 1)
        places = [(rows.start // length, rows.start % length, rows.stop - rows.start) for rows in self._order[0]]
        chunks = [parts[device][..., first : first + count, :, :] for device, first, count in places]
        return self._xp.concatenate(chunks, axis=-3)

    def _traffic(self, parts: Sequence[Sequence[Any]]) -> _Traffic:
        """Of each list every device's part for this one, for this one's part for every device; all of one shape."""
        traffic = _Traffic([], [], [])
        for of_array in parts:
            arrived = [*of_array]
            for peer in self._peers:
                if peer != self._rank:
                    traffic.sent.append(Message(peer, self._xp.ascontiguousarray(of_array[peer])))
                    arrived[peer] = self._xp.empty(of_array[peer].shape, of_array[peer].dtype)
                    traffic.received.append(Message(peer, arrived[peer]))
            traffic.arrived.append(arrived)
        return traffic

    def _of(self, peer: int, share: int, heads: int) -> slice:
        """A share of a device's heads."""
        first, end, _ = heads_of(peer, self._devices, heads).indices(heads)
        count = (end - first) // self._shares
        return slice(first + share * count, first + (share + 1) * count)

    def _summed(self, parts: Sequence[Any]) -> Any:
        """Gradients of keys, of devices that had the same head added up in their order."""
        first, dtype = parts[0], dtypes.of(parts[0].dtype)
        assert dtype is not None
        total = self._xp.zeros((*first.shape[:-2], self._heads_kv, first.shape[-1]), dtype.accumulator)
        for i, part in enumerate(parts):
            peer, share = divmod(i, self._shares)
            mine = total[..., self._of(peer, share, self._heads_kv), :]
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
