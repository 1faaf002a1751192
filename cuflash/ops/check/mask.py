"""The band of a causal mask or a window, and the boolean tensor."""

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
    """The band of the keywords, and the boolean tensor, which must broadcast to the shape of the scores."""
    mask = band_of(options)
    view = views.get("mask")
    if view is None:
        return mask
    if view.dtype != "bool":
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected bool, True where a query and a key take part.")
    check_pairs(view, scores)
    return replace(mask, tensor=True)
