"""Which keys a query sees, as one small value: a band of keys around each query, or a boolean tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Alignment = Literal["bottom-right", "top-left"]


@dataclass(frozen=True, slots=True)
class Mask:
    """Query row ``i`` sees key ``j`` iff ``i + off - left <= j <= i + off + right``, for ``0 <= j < len_kv``.

    ``off`` is ``len_kv - len_q`` of the sequence at hand for ``bottom-right`` (the last query sees the last key) and
    0 for ``top-left``. A side that is None is unbounded; causal attention is ``right = 0``. With ``tensor`` a boolean
    array (True = take part) given at the call must let an element through as well.

    ``Mask()`` lets every query see every key.
    """

    left: int | None = None
    right: int | None = None
    alignment: Alignment = "bottom-right"
    tensor: bool = False

    @property
    def kind(self) -> Literal["none", "causal", "window"]:
        """The kind of band, the part that is compiled into a kernel."""
        if self.left is not None:
            return "window"
        if self.right is not None:
            return "causal" if self.right == 0 else "window"
        return "none"

    def offset(self, len_q: int, len_kv: int) -> int:
        """The key that sits on query row 0's diagonal."""
        return len_kv - len_q if self.alignment == "bottom-right" else 0

    def clipped(self, len_q: int, len_kv: int) -> Mask:
        """The same mask without sides that cannot hide a key of sequences up to these lengths."""
        # The furthest key left of a diagonal is at most max(len_q, len_kv) away, whatever the alignment.
        reach = max(len_q, len_kv)
        left = self.left if self.left is not None and self.left < reach else None
        right = self.right if self.right is not None and self.right < reach else None
        return replace(self, left=left, right=right)


def band(causal: bool, window_size: tuple[int, int], alignment: Alignment = "bottom-right") -> Mask:
    """The mask of flash-attn's ``causal`` and ``window_size=(left, right)``; -1 is unbounded, causal makes right 0."""
    left, right = window_size
    return Mask(
        left=left if left >= 0 else None,
        right=0 if causal else right if right >= 0 else None,
        alignment=alignment,
    )
