"""From q.k to logits: which pairs exist, the soft cap, and the terms that depend on the position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuflash.masks import Mask
from cuflash.reference import tiles
from cuflash.reference.listed import Listed
from cuflash.reference.tiles import Tile, stacked
from cuflash.reference.written import Slopes, Written


class Hidden(NamedTuple):
    """The pairs of a tile that take no part."""

    columns: slice
    """Whose keys are hidden from some row; the others from none."""
    pairs: np.ndarray
    """bool, of these columns: (rows, columns), or of a shape that broadcasts to grouped pairs."""

    def fill(self, x: np.ndarray, value: float) -> None:
        """Set these of a tile of grouped pairs."""
        np.copyto(x[..., self.columns], value, where=self.pairs)


@dataclass(frozen=True, slots=True)
class Scores:
    """The logits of one dense problem, s = score_mod(softcap * tanh(x / softcap)) - slope * |distance| + bias."""

    band: Mask
    len_q: int
    len_kv: int
    unit: float  # x = unit * q.k
    softcap: float = 0.0  # 0: s = x + ...
    keep: np.ndarray | None = None  # bool, grouped pairs; None: the band alone decides
    slopes: np.ndarray | None = None  # (b|1, heads_kv, group, 1, 1)
    bias: np.ndarray | None = None  # grouped pairs
    score_mod: Written | None = None
    mask_mod: Written | None = None
    listed: Listed | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are products of queries and keys, with nothing but a band to hide some."""
        terms = self.keep, self.slopes, self.bias, self.score_mod, self.mask_mod, self.listed
        return not self.softcap and all(term is None for term in terms)

    def row_tiles(self, group: int, parts: int = 8) -> Iterator[slice]:
        """Cut len_q so that the rows of a group of heads make tiles of ROWS, and smaller ones at a band's edge.

        What a tile computes beyond the edge is wasted: half a tile's height for each of its rows. So a sequence has at
        least so many `parts` if its tiles are not too small: threads that have many short products to do wait for each
        other's Python. With a block mask tiles are whole rows of blocks, or equal parts of one, as each visits what
        some of its rows list.
        """
        rows = tiles.ROWS
        if self.band.left is not None:
            rows //= 4
        elif self.listed is not None:
            rows //= 2
        elif self.band.right is not None:
            rows = max(rows // 4, min(rows // 2, self.len_q // parts))
        step = max(1, rows // max(1, group))
        together = self.len_q
        if self.listed is not None:
            height = self.listed.height
            together = max(step // height, 1) * height
            step = -(-together // -(-together // step))
        for first in range(0, self.len_q, max(together, 1)):
            end = min(first + together, self.len_q)
            for start in range(first, end, step):
                yield slice(start, min(start + step, end))

    def keys_of(self, rows: slice) -> slice:
        """The keys that some of these rows may see by the band, from the first to the last."""
        return _seen_by(rows.start, rows.stop, *self._band(), self.len_kv)

    def fewest_keys(self, rows: slice) -> int:
        """How many keys each of these rows sees by the band, at least."""
        first, end = self._band()
        # Concave along the rows, as the smaller end less the larger start: smallest at the first row or the last.
        return min(min(i + end, self.len_kv) - max(i + first, 0) for i in (rows.start, rows.stop - 1))

    def kv_tiles(self, batches: slice, heads: slice, rows: slice) -> Iterator[tuple[Tile, Hidden | None]]:
        """Key tiles that some of these query rows see, each with what is hidden of it; None where all of it is seen."""
        first, end = self._band()
        step = tiles.KEYS if 2 * (rows.stop - rows.start) > tiles.ROWS else 2 * tiles.KEYS
        if self.listed is None:
            pieces: Iterable[_Piece] = _of_band(rows.start, rows.stop, first, end, self.len_kv, step)
        else:
            listed = self.listed.key_tiles(batches, heads, rows, self.keys_of(rows), step)
            pieces = (_Piece(keys, whole, *_crossed(rows, keys, first, end)) for keys, whole in listed)
        for keys, whole, keep, hidden in pieces:
            tile = Tile(batches, heads, rows, keys)
            if self.keep is None and self.mask_mod is None and self.listed is None:
                yield tile, hidden
                continue
            for seen in self._seen(tile, whole):
                if not seen.any():
                    break
                if not seen.all():
                    keep, hidden = seen if keep is None else seen & keep, None
            else:
                yield tile, Hidden(slice(None), ~keep) if hidden is None and keep is not None else hidden

    def _seen(self, tile: Tile, whole: bool) -> Iterator[np.ndarray]:
        """What each mask but the band lets through of a tile, of shapes that broadcast to grouped pairs."""
        if self.keep is not None:
            yield tile.of(self.keep)
        for test in (self.mask_mod, None if whole else self.listed):
            if test is not None:
                yield test.mask(tile)

    def _band(self) -> tuple[int, int]:
        """Row i sees keys from i + the first number to before i + the second."""
        off, unbounded = self.band.offset(self.len_q, self.len_kv), self.len_q + self.len_kv
        first = -unbounded if self.band.left is None else off - self.band.left
        return first, unbounded if self.band.right is None else off + self.band.right + 1

    def capped(self, x: np.ndarray) -> np.ndarray:
        """Apply softcap * tanh(x / softcap) in place."""
        if not self.softcap:
            return x
        return np.multiply(np.tanh(np.divide(x, self.softcap, out=x), out=x), self.softcap, out=x)

    def slope(self, capped: np.ndarray) -> np.ndarray | None:
        """The derivative of `capped`, 1 - tanh(x / softcap)^2, from its result; None where it is 1."""
        return 1 - np.square(capped / self.softcap) if self.softcap else None

    def curvature(self, capped: np.ndarray, slope: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """The tangent of `slope` along that of x, where there is a slope."""
        return capped * slope * dx * (-2 / self.softcap**2)

    def written(self, capped: np.ndarray, tile: Tile, group: int) -> np.ndarray:
        """Apply the written score in place."""
        if self.score_mod is not None:
            self.score_mod.apply(stacked(capped, group), tile)
        return capped

    def written_with_slopes(self, capped: np.ndarray, tile: Tile, group: int, of_captured: bool) -> Slopes | None:
        """Apply the written score in place; how it moves, None where none is written."""
        if self.score_mod is None:
            return None
        return self.score_mod.apply_with_slopes(stacked(capped, group), tile, of_captured)

    def bend(
        self, capped: np.ndarray, slope: np.ndarray | None, dx: np.ndarray, tile: Tile, group: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Apply the written score in place: the slope of what it makes of x, and the tangent of that along that of x.

        `slope` is that of `capped`; None is 1, of which the tangent is None, too.
        """
        turn = None if slope is None else self.curvature(capped, slope, dx)
        if self.score_mod is None:
            return slope, turn
        shape = stacked(capped, group).shape
        of_capped = stacked(dx if slope is None else dx * slope, group)
        by_capped, curve = self.score_mod.apply_with_curvature(stacked(capped, group), tile)
        if by_capped is None:
            return slope, turn
        by_capped = np.broadcast_to(by_capped, shape).reshape(dx.shape)
        total = by_capped * (1 if slope is None else slope)
        turn = np.zeros_like(dx) if turn is None else turn * by_capped
        if curve is not None:
            turned = np.broadcast_to(curve, shape).reshape(dx.shape) * of_capped.reshape(dx.shape)
            turn += turned if slope is None else turned * slope
        return total, turn

    def finish(self, capped: np.ndarray, tile: Tile, hidden: Hidden | None, group: int) -> np.ndarray:
        """Add ALiBi and bias and set what is hidden to -inf, whatever it was, in place."""
        if hidden is None and self.slopes is None and self.bias is None:
            return capped
        s = stacked(capped, group)
        if self.slopes is not None:
            off = self.band.offset(self.len_q, self.len_kv)
            distance = np.abs(_distances(tile) - off).astype(s.dtype)
            s -= tile.of(self.slopes) * _along_diagonals(tile, distance)
        if self.bias is not None:
            s += tile.of(self.bias).astype(s.dtype, copy=False)
        if hidden is not None:
            hidden.fill(s, -np.inf)
        return capped

    def tangent(
        self, dx: np.ndarray, slope: np.ndarray | None, dbias: np.ndarray | None, tile: Tile, hidden: Hidden | None,
        group: int, written: Slopes | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The tangent of logits from those of x and of the bias (grouped pairs), in place; 0 for what is hidden."""
        if slope is not None:
            np.multiply(dx, slope, out=dx)
        if written is not None:
            written.to_score(stacked(dx, group))
        if dbias is not None or hidden is not None:
            ds = stacked(dx, group)
            if dbias is not None:
                ds += tile.of(dbias).astype(ds.dtype, copy=False)
            if hidden is not None:
                hidden.fill(ds, 0)
        return dx


class _Piece(NamedTuple):
    """Some keys that a tile of rows visits, by the band and a block mask."""

    keys: slice
    whole: bool  # the block mask shows all of them
    keep: np.ndarray | None  # what the band lets through, (rows, keys); None is everything
    hidden: Hidden | None


def _seen_by(start: int, stop: int, first: int, end: int, len_kv: int) -> slice:
    """The keys that some of the rows from start to stop may see, where row i sees i + first to before i + end."""
    start = max(start + first, 0)
    return slice(start, max(start, min(stop - 1 + end, len_kv)))


@lru_cache(maxsize=256)
def _of_band(start: int, stop: int, first: int, end: int, len_kv: int, step: int) -> tuple[_Piece, ...]:
    """The keys of a tile of rows, at most `step` at a time."""
    keys, rows = _seen_by(start, stop, first, end, len_kv), slice(start, stop)
    pieces = (slice(at, min(at + step, keys.stop)) for at in range(keys.start, keys.stop, step))
    return tuple(_Piece(piece, True, *_crossed(rows, piece, first, end)) for piece in pieces)


def _crossed(rows: slice, keys: slice, first: int, end: int) -> tuple[np.ndarray | None, Hidden | None]:
    """What a band lets through of a tile, and hides; None where it hides nothing."""
    height, width = rows.stop - rows.start, keys.stop - keys.start
    left, right = rows.start + first - keys.start, rows.start + end - keys.start
    if left + height <= 1 and right >= width:
        return None, None
    return _edge(height, width, max(left, 1 - height), min(right, width))


@lru_cache(maxsize=32)
def _edge(height: int, width: int, left: int, right: int) -> tuple[np.ndarray, Hidden]:
    """The same of a tile whose row i sees columns left + i to before right + i; tiles along a diagonal share it."""
    column = np.arange(width) - np.arange(height)[:, None]
    keep = (column >= left) & (column < right)
    keep.flags.writeable = False
    hides_left, hides_right = left + height > 1, right < width
    crossed = slice(0 if hides_left else max(right, 0), width if hides_right else left + height - 1)
    return keep, Hidden(crossed, ~keep[:, crossed])


def _distances(tile: Tile) -> np.ndarray:
    """Key minus query of every diagonal of a tile, from its last row's first key to its first row's last key."""
    return np.arange(tile.keys.start - tile.rows.stop + 1, tile.keys.stop - tile.rows.start)


def _along_diagonals(tile: Tile, values: np.ndarray) -> np.ndarray:
    """The (rows, keys) view of one value for each diagonal."""
    rows, keys, step = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start, values.itemsize
    return np.ndarray((rows, keys), values.dtype, values, (rows - 1) * step, (-step, step))
