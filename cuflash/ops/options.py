"""What a call consists of: its keywords as one value, and the names and order of its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cuflash.problem import Direction

_SHARED = ("q", "k", "v", "attn_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "out")

ARGUMENTS: dict[Direction, tuple[str, ...]] = {
    "forward": _SHARED,
    "backward": (*_SHARED, "dout", "lse", "dlse", "dq", "dk", "dv"),
}
"""The arrays of a call in the order in which they are handed down; one that was left out is None."""

OUTPUTS: dict[Direction, tuple[str, ...]] = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
"""The last arguments: written when given, allocated when not."""

RESULTS: dict[Direction, tuple[str, ...]] = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
"""What a call returns."""

_SDPA_NAMES = {"q": "query", "k": "key", "v": "value", "causal": "is_causal", "softmax_scale": "scale"}


class Options(NamedTuple):
    """The keywords of a call, as given."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alignment: str = "bottom-right"
    deterministic: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    enable_gqa: bool = True
    sdpa: bool = False
    """Called as ``scaled_dot_product_attention``: (b, h, s, d) tensors and PyTorch's argument names."""
    family: str | None = None
    """Hold the planner to one kernel family, for checks of kernels that another is preferred to."""

    def name(self, argument: str) -> str:
        """What the caller knows an argument as."""
        return _SDPA_NAMES.get(argument, argument) if self.sdpa else argument

    def names(self, direction: Direction) -> Sequence[str]:
        """What the caller knows :data:`ARGUMENTS` as."""
        arguments = ARGUMENTS[direction]
        return [self.name(argument) for argument in arguments] if self.sdpa else arguments

    def axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of q, k, v and every array with heads of elements."""
        return ("total", "h", "d") if varlen else ("b", "h", "s", "d") if self.sdpa else ("b", "s", "h", "d")

    def row_axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of lse and every array with one number for each head and query row."""
        return ("h", "total") if varlen else ("b", "h", "s")


def given(direction: Direction, arrays: Sequence[Any]) -> dict[str, Any]:
    """The arrays that were not left out, by argument."""
    return {name: x for name, x in zip(ARGUMENTS[direction], arrays, strict=True) if x is not None}
