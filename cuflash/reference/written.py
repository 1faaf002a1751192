"""Scores and masks that a caller wrote as functions, on the tiles of one dense problem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cuflash.mods import Mod
from cuflash.mods.derive import curvature, slopes
from cuflash.mods.evaluate import evaluate
from cuflash.mods.expression import ONE, ZERO, Node
from cuflash.reference.tiles import Tile


class Written(NamedTuple):
    """A written score or mask, the arrays that it reads, and where its batch elements and query heads begin."""

    mod: Mod
    captured: Sequence[np.ndarray]
    first: int  # number of the first batch element
    group: int  # query heads of a key head

    def mask(self, tile: Tile) -> np.ndarray:
        """Which pairs of a tile are seen, of a shape that broadcasts to grouped pairs."""
        (seen,) = self._values(tile, [self.mod.expression], None, np.dtype(np.float32))
        return seen

    def apply(self, s: np.ndarray, tile: Tile) -> None:
        """Overwrite the scores of a tile, (batches, heads, group, rows, keys), by what was written for them."""
        (result,) = self._values(tile, [self.mod.expression], s, s.dtype)
        np.copyto(s, result)

    def apply_with_slopes(self, s: np.ndarray, tile: Tile, of_captured: bool) -> Slopes:
        """The same, and how what was written moves with the score and with the captured numbers."""
        by_score, loads = slopes(self.mod)
        loads = loads if of_captured else ()
        wanted = [self.mod.expression, by_score]
        for load, by_number in loads:
            wanted += [by_number, *load.args]
        result, of_score, *others = (x.copy() if x is s else x for x in self._values(tile, wanted, s, s.dtype))
        values = iter(others)
        by_load = []
        for load, _ in loads:
            slope, index = next(values), [next(values) for _ in load.args]
            by_load.append((load.value, _flat(index, self.captured[load.value].shape), slope))
        np.copyto(s, result)
        return Slopes(None if by_score is ONE else of_score, by_load)

    def apply_with_curvature(self, s: np.ndarray, tile: Tile) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The same, and the first and second derivative by the score; None where they are 1 and 0."""
        of_slope, of_curve = slopes(self.mod).by_score, curvature(self.mod)
        wanted = [self.mod.expression, of_slope, of_curve]
        result, slope, curve = (x.copy() if x is s else x for x in self._values(tile, wanted, s, s.dtype))
        np.copyto(s, result)
        return None if of_slope is ONE else slope, None if of_curve is ZERO else curve

    def _values(
        self, tile: Tile, results: Sequence[Node], score: np.ndarray | None, real: np.dtype
    ) -> list[np.ndarray]:
        heads = np.arange(tile.heads.start * self.group, tile.heads.stop * self.group)
        positions = {
            "b": self.first + np.arange(tile.batches.start, tile.batches.stop)[:, None, None, None, None],
            "h": heads.reshape(-1, self.group, 1, 1),
            "q": np.arange(tile.rows.start, tile.rows.stop)[:, None],
            "k": np.arange(tile.keys.start, tile.keys.stop),
        }
        return evaluate(*results, score=score, positions=positions, captured=self.captured, real=real)


class Slopes(NamedTuple):
    """How the written score of a tile's pairs moves."""

    by_score: np.ndarray | None
    """With the score, of a shape that broadcasts to grouped pairs; None where it is 1."""
    by_load: list[tuple[int, np.ndarray, np.ndarray]]
    """With what is read: number of the array, where in it, counted as if it were contiguous, and the slope."""

    def to_score(self, ds: np.ndarray) -> None:
        """Turn gradients of grouped pairs into those of scores, or tangents of scores into theirs, in place."""
        if self.by_score is not None:
            np.multiply(ds, self.by_score, out=ds, where=ds != 0)

    def add_captured(self, ds: np.ndarray, totals: dict[int, np.ndarray]) -> None:
        """Add the gradients of what is read to flat totals in float64."""
        for number, at, slope in self.by_load:
            at = at.reshape((1,) * (ds.ndim - at.ndim) + at.shape)
            axes = tuple(axis for axis, n in enumerate(at.shape) if n == 1)  # along which one element is read
            moved = np.multiply(ds, slope, out=np.zeros_like(ds), where=ds != 0)
            moved = moved.sum(axis=axes, keepdims=True, dtype=np.float64)
            np.add.at(totals[number], at.ravel(), moved.ravel())


def _flat(index: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Where elements are, of the nearest ones where there are none, counted as if the array were contiguous."""
    at = np.zeros((), np.int64)
    for i, size in zip(index, shape, strict=True):
        at = at * size + np.clip(i, 0, size - 1)
    return at


class CapturedSums:
    """The gradients of captured arrays, which every job may add to anywhere: in parts that jobs share in one order."""

    _PARTS = 16
    _ELEMENTS = 2**24
    """In all parts together, at most, unless one alone is larger."""

    def __init__(self, arrays: dict[int, np.ndarray]) -> None:
        """For arrays by number."""
        self._shapes = {number: x.shape for number, x in arrays.items()}
        size = sum(x.size for x in arrays.values())
        self._most = max(1, min(self._PARTS, self._ELEMENTS // max(1, size)))
        self._parts: list[dict[int, np.ndarray]] = []

    def parts(self, num_jobs: int) -> Iterator[tuple[slice, dict[int, np.ndarray]]]:
        """Which jobs add to each part, one after the other, and what they add to."""
        num_parts = min(self._most, num_jobs)
        for i in range(num_parts):
            part = {number: np.zeros(int(np.prod(shape))) for number, shape in self._shapes.items()}
            self._parts.append(part)
            yield slice(i, None, num_parts), part

    def totals(self, real: np.dtype) -> tuple[np.ndarray, ...]:
        """Their sums, in the shapes of the arrays."""
        sums = []
        for number, shape in self._shapes.items():
            total = np.zeros(int(np.prod(shape)))
            for part in self._parts:
                total += part[number]
            sums.append(total.reshape(shape).astype(real))
        return tuple(sums)
