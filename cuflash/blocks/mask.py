"""BlockMask: a mask as the lists of its visible blocks, with the rule that partial ones are tested by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from cuflash import drawing
from cuflash.blocks import kinds
from cuflash.blocks.kinds import UNKNOWN, Grid
from cuflash.blocks.lists import EMPTY, FULL, PARTIAL, Lists, listed
from cuflash.blocks.rules import band_of, traced_rule
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.mods import Symbol, Traced
from cuflash.mods.library import both, either, negated
from cuflash.mods.replay import function_of
from cuflash.numbers import integer, shown
from cuflash.sheet import Sheet

_PICTURE = 32
"""Blocks along a side of a picture in characters; of more, some are left out."""
LARGEST_TILE = 128
"""Queries or keys of a tile, in kernels that walk lists; the others have a power of two of them, too."""
EVERY_PAIR = traced_rule(lambda b, h, q, k: k >= 0)
_CHARACTERS = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockMask:
    """Which keys a query sees, as lists of the blocks of scores that hold a visible pair; made by `create_block_mask`.

    Full blocks, all of whose pairs are visible, are computed without a test; of partial ones each pair is tested by the
    rule; empty ones are in no list and never visited, in the forward and in the backward.

    ``a & b`` is the block mask of what both let through and ``a | b`` of what one of them does, where `b` may also be
    anything that `create_block_mask` takes; ``~a`` is that of what `a` hides. Each has the lists that it would have if
    it had been made as a whole: only blocks that are partial in both are computed again.

    Notes
    -----
    There are ``batch * heads`` matrices of ``rows x columns`` blocks, and one matrix stands for all batch elements or
    heads where that number is 1. `kv` is read by whoever holds queries and walks keys: line ``(b * heads + h) * rows +
    i`` lists the key blocks of query block `i`. `q` is its transpose, for whoever holds keys and walks queries: line
    ``(b * heads + h) * columns + j`` lists the query blocks of key block `j`. Both are three int32 arrays::

        offsets (lines + 1,)    line r is indices[offsets[r] : offsets[r + 1]]
        indices (visible,)      numbers of blocks: those that are full, ascending, then the partial ones, ascending
        full    (lines,)        how many of a line's are full

    so the cuts of a kernel's loop over line `r` are ``offsets[r]``, ``offsets[r] + full[r]`` and ``offsets[r + 1]``:
    tiles without a test, then tiles with one. Memory grows with the number of visible blocks. The last row and column
    of blocks may be cut short by the lengths, which "full" does not count against them.
    """

    rule: Traced
    """What visible pairs fulfil, as an expression and the NumPy arrays that it reads at every call."""
    len_q: int
    len_kv: int
    block_size: tuple[int, int]
    """Queries and keys of a block."""
    batch: int
    """Batch elements with lists of their own; 1: all have the same."""
    heads: int
    """Query heads with lists of their own; 1: all have the same."""
    kv: Lists
    """The key blocks of each query block."""
    q: Lists = field(init=False)
    """The query blocks of each key block."""
    tested: Traced = field(init=False)
    """What kernels test the pairs of partial tiles by: the rule, or `EVERY_PAIR` where they need not."""
    band: Mask | None = field(init=False)
    """The band that it is, if it is no more: kernels know bands, and need no lists for them."""
    copies: dict[Any, Any] = field(init=False, default_factory=dict)
    """What is kept of it on devices, by whoever keeps it there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "q", self.kv.transposed(self.batch * self.heads, *self.grid.shape))
        inside = not any(size % LARGEST_TILE for size in self.block_size)  # is every tile, of one block
        object.__setattr__(self, "band", band_of(self.rule))
        object.__setattr__(self, "tested", EVERY_PAIR if inside and not self.counts[1] else self.rule)

    @property
    def grid(self) -> Grid:
        """Its sizes without its heads."""
        return Grid(self.len_q, self.len_kv, self.block_size)

    @property
    def kind(self) -> Hashable:
        """All that decides how a kernel reads it, which two masks may have in common."""
        return self.rule.mod, self.tested.mod, self._sizes, self.batch, self.heads, self.band

    @property
    def mask_mod(self) -> Callable[..., Symbol]:
        """The rule as a function ``(b, h, q, k)``, for `mask_mod=` and inside of other such functions."""
        return function_of(self.rule)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of full, partial and empty blocks."""
        full = int(self.kv.full.sum())
        rows, columns = self.grid.shape
        visible = len(self.kv.indices)
        return full, visible - full, self.batch * self.heads * rows * columns - visible

    @property
    def sparsity(self) -> float:
        """The share of empty blocks, from 0 to 1."""
        return self.counts[2] / max(sum(self.counts), 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        sizes = self._sizes == other._sizes and (self.batch, self.heads) == (other.batch, other.heads)
        return sizes and self.kv == other.kv and _same(self.rule, other.rule)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> BlockMask:
        return self._with(other, "&")

    def __or__(self, other: Any) -> BlockMask:
        return self._with(other, "|")

    __rand__, __ror__ = __and__, __or__
    __array_ufunc__ = None
    """Of an array, ``array & mask`` too is a block mask."""

    def __invert__(self) -> BlockMask:
        rule = traced_rule(negated(self.rule))
        turned = np.array([FULL, PARTIAL, EMPTY], np.int8)
        kinds_of = (turned[kinds] for b, h in self._matrices() for _, kinds in self._kinds(b, h))
        return self._replaced(rule, self.batch, self.heads, kinds_of)

    def to_dense(self) -> np.ndarray:
        """All pairs, (batch, heads, len_q, len_kv) bool: for small sizes, and to see what there is."""
        queries, keys = np.arange(self.len_q)[:, None], np.arange(self.len_kv)
        dense = np.empty((self.batch, self.heads, self.len_q, self.len_kv), bool)
        for b, h in self._matrices():
            dense[b, h] = kinds.visible(self.rule, b, h, queries, keys[None])
        return dense

    def visible(self, b: Any, h: Any, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Whether queries see keys, bool, at positions that broadcast with one another, with as many axes as they."""
        return kinds.visible(self.rule, b, h, q, k)

    def seen(self, batches: slice, heads: slice, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """Of each key block, whether some of these queries list it, and whether it is full for all of them."""
        rows = slice(queries.start // self.block_size[0], -(-queries.stop // self.block_size[0]))
        height, columns = self.grid.shape
        batches = batches if self.batch > 1 else slice(0, 1)
        heads = heads if self.heads > 1 else slice(0, 1)
        starts = (
            (b * self.heads + h) * height
            for b, h in product(range(batches.start, batches.stop), range(heads.start, heads.stop))
        )
        return self.kv.seen([(start + rows.start, start + rows.stop) for start in starts], columns)

    def plot(self, batch: int = 0, head: int = 0, ax: Any = None) -> drawing.Picture:
        """Draw which blocks of a head are computed in full, in part and not at all, with their shares.

        Parameters
        ----------
        batch, head : int
            Whose blocks; any where all have the same.
        ax : matplotlib axes, optional
            Drawn into, instead of a figure of its own.

        Raises
        ------
        InvalidArgument
            If there is no such batch element or head.
        ImportError
            Without matplotlib, which comes with the extra viz.
        """
        b, h = self._own("batch", batch, self.batch), self._own("head", head, self.heads)
        counts = np.zeros(3, np.int64)
        for _, kinds_of in self._kinds(b, h):
            counts += np.bincount(kinds_of.ravel(), minlength=3)
        one = "" if self.batch == self.heads == 1 else f"batch element {b}, head {h}; "
        rows, columns = self.block_size
        return drawing.tiles(
            drawing.panel(ax, 4.4, 4.6), FULL - self._sampled(b, h, drawing.DRAWN), counts[::-1].tolist(),
            (self.len_q, self.len_kv), self.block_size,
            text=f"{counts[EMPTY] / max(counts.sum(), 1):.1%} empty", below=f"{one}blocks of {rows} x {columns}",
        )  # fmt: skip

    def __str__(self) -> str:
        rows, columns = self.block_size
        return f"{self.len_q} x {self.len_kv} in blocks of {rows} x {columns}, {self.sparsity:.1%} empty"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def sheet(self) -> Sheet:
        """What it says, and a small picture of its first head."""
        full, partial, empty = self.counts
        lists = [f"{n} {name}" for n, name in ((self.batch, "batch elements"), (self.heads, "heads")) if n > 1]
        lines = [
            ("rule", f"query q sees key k where {self.rule.mod}"),
            ("blocks", f"{full:,} full, {partial:,} partial, {empty:,} empty"),
            ("lists", f"of {' by '.join(lists)}" if lists else "the same for all batch elements and heads"),
        ]
        picture = self._sampled(0, 0, _PICTURE) if self.batch and self.heads else np.zeros((0, 0), np.int8)
        lines += [("", "".join(2 * _CHARACTERS[kind] for kind in row)) for row in picture.tolist() if row]
        return Sheet(f"block mask: {self}", lines)

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return self.sheet()._repr_html_()

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return self.len_q, self.len_kv, self.block_size

    def _matrices(self) -> Iterator[tuple[int, int]]:
        return product(range(self.batch), range(self.heads))

    def _kinds(self, b: int, h: int) -> Iterator[tuple[int, np.ndarray]]:
        """The kinds of a head's blocks behind their first row, some rows at a time; of the only one, where there is."""
        rows, columns = self.grid.shape
        line = (min(b, self.batch - 1) * self.heads + min(h, self.heads - 1)) * rows
        for start, stop in self.grid.chunks():
            yield start, self.kv.kinds(line + start, line + stop, columns)

    def _sampled(self, b: int, h: int, most: int) -> np.ndarray:
        """The kinds of a head's blocks, of at most so many rows and columns of them."""
        rows, columns = (np.linspace(0, max(n - 1, 0), min(n, most)).round().astype(int) for n in self.grid.shape)
        line = (b * self.heads + h) * self.grid.shape[0]
        drawn = [self.kv.kinds(line + i, line + i + 1, self.grid.shape[1])[:, columns] for i in rows.tolist()]
        return np.concatenate(drawn) if drawn else np.zeros((0, len(columns)), np.int8)

    def _own(self, name: str, given: Any, number: int) -> int:
        """The number of the lists of a batch element or head."""
        index = integer(given)
        if index is None or index < 0 or (number != 1 and index >= number):
            raise InvalidArgument(f"{name} is {shown(given)}; expected an integer from 0 to {number - 1}.")
        return index if number > 1 else 0

    def _with(self, other: Any, sign: str) -> BlockMask:
        """The composition with another block mask, or what one can be made of."""
        from cuflash.blocks.create import create_block_mask

        if not isinstance(other, BlockMask):
            batch, heads = (n if n > 1 else None for n in (self.batch, self.heads))
            other = create_block_mask(
                other, batch=batch, heads=heads, len_q=self.len_q, len_kv=self.len_kv, block_size=self.block_size
            )
        if self._sizes != other._sizes:
            raise InvalidArgument(
                f"{self!r} {sign} {other!r} have different sizes; expected the same lengths and blocks. "
                "Make one of them anew, by create_block_mask."
            )
        for name, mine, its in (("batch", self.batch, other.batch), ("heads", self.heads, other.heads)):
            if mine != its and 1 not in (mine, its):
                raise InvalidArgument(f"{self!r} {sign} {other!r} have {name} {mine} and {its}; expected one number.")
        rule = traced_rule((both if sign == "&" else either)(self.rule, other.rule))
        batch, heads = (
            mine if its == 1 else its for mine, its in ((self.batch, other.batch), (self.heads, other.heads))
        )
        return self._replaced(rule, batch, heads, self._joined(other, rule, batch, heads, sign))

    def _joined(self, other: BlockMask, rule: Traced, batch: int, heads: int, sign: str) -> Iterator[np.ndarray]:
        """The kinds of the composition's blocks."""
        join = np.minimum if sign == "&" else np.maximum
        for b, h in product(range(batch), range(heads)):
            for (start, mine), (_, its) in zip(self._kinds(b, h), other._kinds(b, h), strict=True):
                joined = np.where((mine == PARTIAL) & (its == PARTIAL), UNKNOWN, join(mine, its))
                yield kinds.looked_at(joined, start, rule, self.grid, b, h)

    def _replaced(self, rule: Traced, batch: int, heads: int, kinds_of: Iterator[np.ndarray]) -> BlockMask:
        """The same sizes with other blocks."""
        return BlockMask(rule, self.len_q, self.len_kv, self.block_size, batch, heads, listed(kinds_of))


def _same(a: Traced, b: Traced) -> bool:
    """Whether two rules are one expression of equal arrays."""
    return a.mod == b.mod and all(
        x is y or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in zip(a.arrays, b.arrays, strict=True)
    )
