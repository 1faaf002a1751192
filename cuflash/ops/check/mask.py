"""The band of a causal mask or a window, the boolean tensor, and the lists of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.masks import Alignment, Mask, band
from cuflash.numbers import flag, pair, shown
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_pairs
from cuflash.problem import Blocks


def band_of(options: Options) -> Mask:
    """The band of the keywords."""
    causal = flag(options.name("causal"), options.causal)
    if not isinstance(options.alignment, str) or options.alignment not in get_args(Alignment):
        raise InvalidArgument(f"alignment is {shown(options.alignment)}; expected 'bottom-right' or 'top-left'.")
    window = pair(options.window_size)
    if window is None:
        raise InvalidArgument(
            f"window_size is {shown(options.window_size)}; expected a tuple of two integers (left, right)."
        )
    if not all(-1 <= bound < 2**31 for bound in window):
        raise InvalidArgument(f"window_size is {window}; expected bounds from 0 to 2**31 - 1, or -1 for unbounded.")
    return band(causal, window, options.alignment)


def mask_of(options: Options, views: Mapping[str, View], scores: tuple[int, int, int, int]) -> Mask:
    """The band of the keywords or of a block mask, and the boolean tensor, which must broadcast to all scores."""
    mask = band_of(options)
    mask = mask if options.band is None else options.band
    view = views.get("mask")
    if view is None:
        return mask
    if view.dtype != "bool":
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected bool, True where a query and a key take part.")
    check_pairs(view, scores)
    return replace(mask, tensor=True)


def blocks_of(options: Options, scores: tuple[int, int, int, int]) -> Blocks | None:
    """What is compiled in of a block mask, which must have the lengths of the scores and lists for all of them.

    None where it is a band (:func:`mask_of`).
    """
    given: object = options.block_mask
    if given is None:
        return None
    from cuflash.blocks import BlockMask  # which few calls need

    if not isinstance(given, BlockMask):
        raise InvalidArgument(
            f"block_mask is {shown(given)}; expected a BlockMask. Make one of it by cuflash.create_block_mask."
        )
    batch, heads, len_q, len_kv = scores
    if (given.len_q, given.len_kv) != (len_q, len_kv):
        raise InvalidArgument(
            f"block_mask is of {given.len_q} queries and {given.len_kv} keys but the call has {len_q} and {len_kv}, "
            "of packed sequences the longest. Make another one of these lengths."
        )
    for number, there, what in ((given.batch, batch, "batch elements"), (given.heads, heads, "query heads")):
        if number not in (1, there):
            raise InvalidArgument(
                f"block_mask has lists of {number} {what} but the call has {there}. Make another one of that many."
            )
    if options.band is not None:
        return None
    rule = given.rule if options.bias_grad else given.tested
    return Blocks(given.block_size, rule.mod, given.batch, given.heads)
