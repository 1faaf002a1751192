"""Which keys a query sees, as one small value: a band of keys around each query, or a boolean tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from cuflash import drawing
from cuflash.errors import InvalidArgument
from cuflash.numbers import pair, shown
from cuflash.sheet import Sheet, spelled

Alignment = Literal["bottom-right", "top-left"]


class Lengths(Protocol):
    """What has so many queries and keys, as a Problem has."""

    @property
    def len_q(self) -> int:
        """Queries."""
        ...

    @property
    def len_kv(self) -> int:
        """Keys."""
        ...


@dataclass(frozen=True, slots=True)
class Mask:
    """Query row ``i`` sees key ``j`` iff ``i + off - left <= j <= i + off + right``, for ``0 <= j < len_kv``.

    ``off`` is ``len_kv - len_q`` of the sequence at hand for ``bottom-right`` (the last query sees the last key) and
    0 for ``top-left``. A side that is None is unbounded; causal attention is ``right = 0``. With ``tensor`` a boolean
    array (True = take part) given at the call must let an element through as well.

    ``Mask()`` lets every query see every key.

    ``a & b`` is the mask of what both let through, and ``a | b`` of what one of them does, where that is a band again;
    a `BlockMask` takes either with everything else.
    """

    left: int | None = None
    right: int | None = None
    alignment: Alignment = "bottom-right"
    tensor: bool = False

    def __str__(self) -> str:
        if self.kind == "none":
            words = "every key"
        elif self.kind == "causal":
            words = "causal"
        else:
            sides = (("all" if side is None else str(side)) for side in (self.left, self.right))
            words = "window, {} before and {} after".format(*sides)
        words += ", aligned top-left" if self.kind != "none" and self.alignment == "top-left" else ""
        return words + (", and a boolean tensor" if self.tensor else "")

    def __repr__(self) -> str:
        return spelled(self)

    def sheet(self) -> Sheet:
        """What it says, in words."""
        bounds = [
            "" if self.left is None else f"i + off - {self.left} <= " if self.left else "i + off <= ",
            "" if self.right is None else f" <= i + off + {self.right}" if self.right else " <= i + off",
        ]
        rule = f"query i sees key j where {bounds[0]}j{bounds[1]}" if any(bounds) else "every query sees every key"
        lines = [("rule", rule + (" and the tensor is True" if self.tensor else ""))]
        if any(bounds):
            off = "len_kv - len_q: the last query's own key is the last one"
            if self.alignment == "top-left":
                off = "0: the first query's own key is the first one"
            lines.append(("off", off))
        return Sheet(f"mask: {self}", lines)

    def _repr_html_(self) -> str:
        """The words, for a notebook."""
        return self.sheet()._repr_html_()

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

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        alignment = self._aligned_with(other, "&")
        bounds = {side: _inner(getattr(self, side), getattr(other, side)) for side in ("left", "right")}
        return Mask(**bounds, alignment=alignment, tensor=self.tensor or other.tensor)

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        alignment = self._aligned_with(other, "|")
        if self.tensor != other.tensor:
            raise self._no_band(other, "|", "only one of them has a boolean tensor")
        for one, rest in ((self, other), (other, self)):
            if one.left is not None and one.right is not None and one.right < -one.left:  # which lets nothing through
                return rest
        left, right = (_outer(getattr(self, side), getattr(other, side)) for side in ("left", "right"))
        apart = any(
            a.left is not None and b.right is not None and b.right + 1 < -a.left
            for a, b in ((self, other), (other, self))
        )
        if apart:
            raise self._no_band(other, "|", "they do not meet")
        return Mask(left, right, alignment, self.tensor)

    def _aligned_with(self, other: Mask, sign: str) -> Alignment:
        """The alignment of both, where one has bounds to be aligned."""
        if self.alignment != other.alignment and "none" not in (self.kind, other.kind):
            raise self._no_band(other, sign, "they are aligned differently")
        return other.alignment if self.kind == "none" else self.alignment

    def _no_band(self, other: Mask, sign: str, why: str) -> InvalidArgument:
        return InvalidArgument(
            f"{self!r} {sign} {other!r} is no band: {why}. Compose block masks instead: "
            f"create_block_mask(a, len_q=..., len_kv=...) {sign} b."
        )

    def plot(
        self, problem: Lengths, tile: tuple[int, int] = (64, 64), attn_mask: Any = None, ax: Any = None
    ) -> drawing.Picture:
        """Draw which tiles of the scores are computed in full, in part and not at all, with their shares.

        Kernels skip a tile that a band hides, and compute one that a boolean tensor hides.

        Parameters
        ----------
        problem : Problem
            Whose lengths are taken, the longest of packed sequences.
        tile : (int, int)
            Queries and keys of a tile.
        attn_mask : array of bool, (len_q, len_kv), optional
            That of one head; needed where `tensor` is True.
        ax : matplotlib axes, optional
            Drawn into, instead of a figure of its own.

        Raises
        ------
        InvalidArgument
            If the tensor is left out, given where there is none, or of another shape.
        ImportError
            Without matplotlib, which comes with the extra viz.
        """
        len_q, len_kv = problem.len_q, problem.len_kv
        sizes = pair(tile)
        if sizes is None or min(sizes) < 1:
            raise InvalidArgument(f"tile is {shown(tile)}; expected two sizes of at least 1, of queries and keys.")
        counts, kinds, pairs = self._tiles(len_q, len_kv, sizes, self._seen(attn_mask, len_q, len_kv))
        share = pairs / max(len_q * len_kv, 1)
        below = f"{share:.1%} of the pairs; tiles of {sizes[0]} x {sizes[1]}"
        return drawing.tiles(
            drawing.panel(ax, 4.4, 4.6), kinds, counts, (len_q, len_kv), sizes, text=str(self), below=below
        )

    def _seen(self, attn_mask: Any, len_q: int, len_kv: int) -> np.ndarray | None:
        """The boolean tensor of one head, if the mask has one."""
        if attn_mask is None and not self.tensor:
            return None
        seen = None if attn_mask is None else np.asarray(attn_mask)
        if seen is None or not self.tensor or seen.dtype != bool or seen.shape != (len_q, len_kv):
            expected = f"an array of bool of shape {(len_q, len_kv)}" if self.tensor else "None"
            raise InvalidArgument(
                f"attn_mask is {'None' if seen is None else f'of {seen.dtype} and shape {seen.shape}'}; expected "
                f"{expected}, as tensor is {self.tensor}. Pass what one head of one sequence sees."
            )
        return seen

    def _tiles(
        self, len_q: int, len_kv: int, sizes: tuple[int, int], seen: np.ndarray | None
    ) -> tuple[list[int], np.ndarray, int]:
        """Numbers of full, partial and skipped tiles, their kinds (0 to 2) in a picture, and pairs that are seen."""
        tops, lefts = (np.arange(0, n, size) for n, size in zip((len_q, len_kv), sizes, strict=True))
        bottoms = np.minimum(tops + sizes[0], len_q) - 1
        off = self.offset(len_q, len_kv)

        def before(keys: np.ndarray) -> np.ndarray:
            return np.clip(keys, 0, len_kv)

        # Keys that some query of a row of tiles sees, and keys that all of them see: from the first to before the end.
        low = -len_kv - len_q if self.left is None else off - self.left
        high = len_kv + len_q if self.right is None else off + self.right + 1
        some = before(tops + low), before(bottoms + high)
        every = before(bottoms + low), before(tops + high)
        rights = np.minimum(lefts + sizes[1], len_kv)
        touched = (lefts[None] < some[1][:, None]) & (rights[None] > some[0][:, None])
        whole = (lefts[None] >= every[0][:, None]) & (rights[None] <= every[1][:, None])
        queries = np.arange(len_q)
        pairs = int((before(queries + high) - before(queries + low)).clip(0).sum())
        if seen is not None:
            keys = np.arange(len_kv)
            inside = (keys >= queries[:, None] + low) & (keys < queries[:, None] + high) & seen
            pairs = int(inside.sum())
            sums = np.add.reduceat(np.add.reduceat(inside, tops, axis=0, dtype=int), lefts, axis=1)
            whole = sums == np.outer(bottoms + 1 - tops, rights - lefts)
        kinds = np.where(whole & touched, 0, np.where(touched, 1, 2))
        counts = [int((kinds == kind).sum()) for kind in range(3)]
        drawn = [np.linspace(0, max(n - 1, 0), min(n, drawing.DRAWN)).round().astype(int) for n in kinds.shape]
        return counts, kinds[np.ix_(*drawn)], pairs


def _inner(a: int | None, b: int | None) -> int | None:
    """The nearer bound."""
    return a if b is None else b if a is None else min(a, b)


def _outer(a: int | None, b: int | None) -> int | None:
    """The further bound."""
    return None if a is None or b is None else max(a, b)


def band(causal: bool, window_size: tuple[int, int], alignment: Alignment = "bottom-right") -> Mask:
    """The mask of flash-attn's ``causal`` and ``window_size=(left, right)``; -1 is unbounded, causal makes right 0."""
    left, right = window_size
    return Mask(
        left=left if left >= 0 else None,
        right=0 if causal else right if right >= 0 else None,
        alignment=alignment,
    )
