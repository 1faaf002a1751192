"""Checks of packed sequences: cu_seqlens and seqused of queries and keys, first as arrays, then their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.ops.options import Options

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
"""The arguments that say where sequences lie."""


def is_packed(options: Options, views: Mapping[str, View]) -> bool:
    """Whether the call is on packed sequences; checks that what says so is complete and can be read."""
    starts = [views[name] for name in LENGTHS[:2] if name in views]
    if not starts:
        for name in (*LENGTHS[2:], "max_seqlen_q", "max_seqlen_k"):
            if name in views or getattr(options, name, None) is not None:
                raise InvalidArgument(
                    f"{options.name(name)} is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too."
                )
        return False
    if len(starts) == 1:
        missing = next(name for name in LENGTHS if name != starts[0].name)
        raise InvalidArgument(f"{starts[0].name} is given but {missing} is not; packed sequences need both.")
    for view in (views[name] for name in LENGTHS if name in views):
        if view.dtype != "int32":
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected int32. Convert it.")
        if len(view.shape) != 1:
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected one dimension.")
        if (view.shape[0] > 1 and view.strides[0] != view.itemsize) or view.pointer % view.itemsize:
            raise InvalidArgument(f"{view.name} is not contiguous; pass a contiguous copy of it.")
    counts = [view.shape[0] for view in starts]
    if counts[0] == 0:
        raise InvalidArgument("cu_seqlens_q is empty; expected batch + 1 numbers, the first of them 0.")
    if counts[0] != counts[1]:
        raise InvalidArgument(
            f"cu_seqlens_k has {counts[1]} numbers but cu_seqlens_q has {counts[0]}; "
            "both need batch + 1, with a sequence of keys for each sequence of queries."
        )
    for view in (views[name] for name in LENGTHS[2:] if name in views):
        if view.shape[0] != counts[0] - 1:
            raise InvalidArgument(
                f"{view.name} has {view.shape[0]} numbers; expected one for each of the {counts[0] - 1} sequences."
            )
    return True


def length(options: Options, name: str) -> int:
    """The value of max_seqlen_q or max_seqlen_k."""
    value = getattr(options, name)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise InvalidArgument(f"{name} is {value!r}; expected an integer from 0, or None to read it from cu_seqlens.")
    return int(value)


def with_lengths(options: Options, views: Mapping[str, View], arrays: Mapping[str, Any]) -> Options:
    """Read what says where sequences lie, check its values and fill in the longest lengths."""
    values = {name: np.asarray(arrays[name].tolist(), np.int64) for name in LENGTHS if name in arrays}
    lengths_q = _lengths("cu_seqlens_q", values["cu_seqlens_q"], views["q"])
    lengths_k = _lengths("cu_seqlens_k", values["cu_seqlens_k"], views["k"])
    for name, lengths, rows in (("seqused_q", lengths_q, "queries"), ("seqused_k", lengths_k, "keys")):
        used = values.get(name, np.zeros(0, np.int64))
        wrong = np.flatnonzero((used < 0) | (used > lengths[: len(used)]))
        if wrong.size:
            at = wrong[0]
            raise InvalidArgument(
                f"{options.name(name)}[{at}] is {used[at]}, but sequence {at} has {lengths[at]} {rows}; "
                "expected a number from 0 to those."
            )
    return options._replace(
        max_seqlen_q=_longest(options, "max_seqlen_q", lengths_q),
        max_seqlen_k=_longest(options, "max_seqlen_k", lengths_k),
        validate=False,
    )


def _lengths(name: str, starts: np.ndarray, packed: View) -> np.ndarray:
    """Rows of each sequence of a packed tensor."""
    lengths, rows = np.diff(starts), packed.shape[0]
    if starts[0] != 0:
        raise InvalidArgument(f"{name}[0] is {starts[0]}; expected 0, the first row of the first sequence.")
    falls = np.flatnonzero(lengths < 0)
    if falls.size:
        at = falls[0] + 1
        raise InvalidArgument(
            f"{name}[{at}] is {starts[at]} after {starts[at - 1]}; "
            "expected the first row of each sequence in rising order, and the end of the last."
        )
    if starts[-1] > rows:
        at = np.flatnonzero(starts > rows)[0]
        raise InvalidArgument(
            f"{name}[{at}] is {starts[at]}, but {packed.name} has {rows} rows; expected at most that many."
        )
    return lengths


def _longest(options: Options, name: str, lengths: np.ndarray) -> int:
    longest = int(lengths.max(initial=0))
    if getattr(options, name) is None:
        return longest
    allowed = length(options, name)
    if allowed < longest:
        at = lengths.argmax()
        raise InvalidArgument(
            f"{name} is {allowed}, but sequence {at} has {longest} rows; pass at least that many, or None."
        )
    return allowed
