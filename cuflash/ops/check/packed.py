"""What says where packed sequences lie, but for its values: cu_seqlens, seqused, a block table, the longest lengths."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.numbers import integer, shown
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_contiguous, check_int32, is_aligned

LENGTHS = ("cu_seqlens_q", "cu_seqlens_kv", "seqused_q", "seqused_kv")
"""The arrays that say where sequences lie."""


def is_packed(options: Options, views: Mapping[str, View]) -> bool:
    """Whether the call is on packed sequences; checks that what says so is complete and can be read."""
    starts = [views[name] for name in LENGTHS[:2] if name in views]
    if not starts:
        for name in (*LENGTHS[2:], "table", "max_seqlen_q", "max_seqlen_k"):
            if name in views or getattr(options, name, None) is not None:
                raise InvalidArgument(
                    f"{options.name(name)} is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too."
                )
        return False
    if len(starts) == 1:
        missing = options.name(next(name for name in LENGTHS if name not in views))
        raise InvalidArgument(f"{starts[0].name} is given but {missing} is not; packed sequences need both.")
    for view in (views[name] for name in LENGTHS if name in views):
        check_int32(view)
        if len(view.shape) != 1:
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected one dimension.")
        check_contiguous(view)
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
    if "table" in views:
        check_table(views["table"], counts[0] - 1)
    return True


def check_table(table: View, batch: int) -> None:
    """The numbers of every sequence's pages, by any strides."""
    check_int32(table)
    if len(table.shape) != 2:
        raise InvalidArgument(f"{table.name} has shape {table.shape}; expected (b, max_pages).")
    if table.shape[0] != batch:
        raise InvalidArgument(
            f"{table.name} has {table.shape[0]} rows; expected one for each of the {batch} sequences."
        )
    if not is_aligned(table):
        raise InvalidArgument(f"{table.name} is misaligned; pass a contiguous copy of it.")


def length(options: Options, name: str) -> int:
    """The value of max_seqlen_q or max_seqlen_k."""
    longest = getattr(options, name)
    value = integer(longest)
    if value is None or value < 0:
        raise InvalidArgument(
            f"{name} is {shown(longest)}; expected an integer from 0, or None to read it from cu_seqlens."
        )
    if value >= 2**31:
        raise InvalidArgument(
            f"{name} is {shown(longest)}; expected fewer than 2**31. Pass the longest length, or None."
        )
    return value
