"""What is asked of devices together, checked once their number is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from cuflash import ops
from cuflash.dtypes import DTYPES
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.masks import Mask
from cuflash.numbers import flag, integer, pair, shown
from cuflash.ops import Options, check
from cuflash.parallel.division import Division
from cuflash.parallel.schedule import Order, Schedule, places_of

_DTYPES = [dtype.numpy.name for dtype in DTYPES.values()]


@dataclass(frozen=True)
class Asked:
    """A call that several devices share, but for its tensors."""

    options: Options
    order: Order
    cu_seqlens: Any = None
    """Of whole sequences."""
    max_seqlen: int | None = None

    @property
    def packed(self) -> bool:
        """Whether sequences of different lengths lie one after the other."""
        return self.cu_seqlens is not None

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Of the sequences; None where they are not known yet, or there is one of each."""
        if not isinstance(self.cu_seqlens, np.ndarray):
            return None
        return tuple(np.diff(self.cu_seqlens).tolist())

    def mask(self, longest: int) -> Mask:
        """The band, without sides that hide nothing of sequences as long as this."""
        return check.band_of(self.options).clipped(longest, longest)

    def check(self, q: Any, k: Any, v: Any) -> None:
        """Refuse tensors without the axes of a call, which others could not be divided by."""
        axes = ("total", "h", "d") if self.packed else ("b", "s", "h", "d")
        for name, x in (("q", q), ("k", k), ("v", v)):
            if len(x.shape) != len(axes):
                raise InvalidArgument(
                    f"{name} has {len(x.shape)} dimensions, shape {tuple(x.shape)}; expected {len(axes)}: "
                    f"({', '.join(axes)})."
                )
            if x.dtype.name not in _DTYPES:
                raise InvalidArgument(f"{name} is {x.dtype}; expected {', '.join(_DTYPES)}. Convert it.")
        if k.shape[:-1] != v.shape[:-1]:
            raise InvalidArgument(
                f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}; expected the same but for the head dimension."
            )

    def longest(self, rows: int) -> int | None:
        """The length of the longest whole sequence, if it is known; `rows` are those of all devices.

        Raises
        ------
        InvalidArgument
            If `cu_seqlens` are not of so many rows, or longer than `max_seqlen`.
        """
        if not self.packed:
            return rows
        given = self.max_seqlen
        if given is not None and ((value := integer(given)) is None or value < 0):
            raise InvalidArgument(f"max_seqlen is {shown(given)}; expected an integer from 0, or None.")
        if self.lengths is None:
            return given
        if self.cu_seqlens[0] or min(self.lengths, default=0) < 0 or self.cu_seqlens[-1] != rows:
            raise InvalidArgument(
                f"cu_seqlens is {shown(self.cu_seqlens)}; expected numbers that rise from 0 to {rows}, the rows of q "
                "on all devices together."
            )
        longest = max(self.lengths, default=0)
        if given is not None and given < longest:
            raise InvalidArgument(
                f"max_seqlen is {given}, but a sequence has {longest} rows; expected at least as many."
            )
        return longest if given is None else given

    def check_chunks(self, devices: int, rows: int) -> None:
        """Refuse sequences that devices cannot have equal parts of; `rows` are those of one device.

        Raises
        ------
        InvalidArgument
            If a sequence has another length than a multiple of the chunks.
        """
        places = places_of(self.order)
        if not self.packed and rows % places:
            raise InvalidArgument(
                f"q has {rows} rows on each device; expected an even number, as order='zigzag' gives a device two "
                "chunks of a sequence. Pad it."
            )
        for index, length in enumerate(self.lengths or ()):
            if length % (devices * places):
                raise InvalidArgument(
                    f"cu_seqlens says that sequence {index} has {length} rows; expected a multiple of "
                    f"{devices * places}, as {devices} devices have {places} equal chunks of each sequence each in "
                    f"{self.order} order. Pad it."
                )

    def division(self, devices: int, q: tuple[int, ...], k: tuple[int, ...]) -> Division:
        """The steps of a ring, by the shapes of q and k on one device.

        Raises
        ------
        InvalidArgument, UnsupportedProblem
            If what must be divided is not divided evenly, or lengths must be known that are not.
        """
        axis = 0 if self.packed else 1
        rows, keys = q[axis], k[axis]
        longest = self.longest(rows * devices)
        self.check_chunks(devices, rows)
        mask = self.mask(2**31 if longest is None else max(longest, keys * devices))
        if rows != keys and (self.packed or mask.kind != "none"):
            raise InvalidArgument(
                f"k has {keys} rows on each device but q has {rows}; expected as many where there are masks or packed "
                "sequences. Pass causal=False and no window, or pad either."
            )
        if keys % places_of(self.order):
            raise InvalidArgument(f"k has {keys} rows on each device; expected an even number. Pad it.")
        lengths: tuple[int, ...] = ()
        if mask.kind == "window":
            if self.packed and self.lengths is None:
                raise UnsupportedProblem(
                    "cu_seqlens is traced and window_size hides keys: which devices' keys are seen follows from the "
                    "lengths. Pass cu_seqlens as a NumPy array, or call all_to_all_attention."
                )
            whole = self.lengths if self.packed else (rows * devices,)
            lengths = tuple(n // (devices * places_of(self.order)) for n in whole or ())
        schedule = Schedule(devices, self.order, mask, lengths)
        return Division(schedule, (rows, keys), self.packed)


def checked_order(order: Any) -> Order:
    """One of the two orders.

    Raises
    ------
    InvalidArgument
        If it is neither.
    """
    if not isinstance(order, str) or order not in get_args(Order):
        raise InvalidArgument(f"order is {shown(order)}; expected 'contiguous' or 'zigzag'.")
    return order  # type: ignore[return-value]


def asked_for(
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, order: Any, cu_seqlens: Any, max_seqlen: Any,
    deterministic: Any,
) -> Asked:  # fmt: skip
    """What is asked, where it can be checked without tensors."""
    options = ops.asked(
        softmax_scale=softmax_scale, causal=flag("causal", causal), window_size=pair(window_size) or window_size,
        softcap=softcap, deterministic=flag("deterministic", deterministic),
    )  # fmt: skip
    order = checked_order(order)
    if cu_seqlens is None and max_seqlen is not None:
        raise InvalidArgument("max_seqlen is given without cu_seqlens; there is nothing that it could be of. Drop it.")
    return Asked(options, order, None if cu_seqlens is None else starts_of("cu_seqlens", cu_seqlens), max_seqlen)


def starts_of(name: str, given: Any) -> Any:
    """Where sequences start as int32, if the values are in host memory; otherwise as given."""
    if not isinstance(given, np.ndarray | list | tuple):
        return given
    starts = np.asarray(given)
    if starts.ndim != 1 or not len(starts) or starts.dtype.kind not in "iu":
        raise InvalidArgument(f"{name} is {shown(given)}; expected a row of integers, one more than sequences.")
    return starts.astype(np.int32)
