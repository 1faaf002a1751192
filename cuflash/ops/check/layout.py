"""Whether the arrays are there, on one device and of the right ranks, and how they lie: dense, packed or in a cache."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag
from cuflash.ops.call import Options
from cuflash.ops.check.cache import check_cache
from cuflash.ops.check.packed import is_packed
from cuflash.ops.check.sizes import check_ranks
from cuflash.problem import Direction, Layout

_REQUIRED: dict[Direction, tuple[str, ...]] = {
    "forward": ("q", "k", "v"),
    "backward": ("dout", "q", "k", "v", "out", "lse"),
}


def layout_of(direction: Direction, options: Options, views: Mapping[str, View]) -> Layout:
    """Check that the arrays are there, on one device and of the right ranks; how they lie."""
    for name in _REQUIRED[direction]:
        if name not in views:
            raise InvalidArgument(f"{options.name(name)} is None; expected an array.")
    for view in views.values():
        if view.device != views["q"].device:
            raise InvalidArgument(
                f"{view.name} is on {view.device} but {views['q'].name} is on {views['q'].device}; "
                "all arrays of a call must be on one device. Move one of them."
            )
    if options.cache:
        check_cache(options, views)
        return "cache"
    varlen = is_packed(options, views)
    if flag("validate", options.manner.validate) and not varlen:
        raise InvalidArgument("validate is True but no sequences are packed; there is nothing to check. Drop it.")
    check_ranks(options, views)
    return "varlen" if varlen else "dense"


def check_on_cuda(library: str, views: Mapping[str, View]) -> None:
    """Refuse arrays that no kernel can read, unless they lie apart, which `layout_of` says."""
    view = next(iter(views.values()))
    if not view.device.startswith("cuda"):
        raise InvalidArgument(
            f"{view.name} is a {library} array on {view.device}, which no kernel reads. "
            f"Move {view.name} to a CUDA device, or call flash_attn_func, which computes on the CPU as well."
        )
