"""Sums of probability over bins of queries and keys, by the kernels that compute attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cuflash import ops
from cuflash.arrays import Library, NumPy
from cuflash.ops import Arrays, Options
from cuflash.problem import Problem

_COLUMNS = 256
"""Bins at a time: a head dimension that every kernel family runs."""
_ALIGNED = 8
"""Of which columns are a multiple, some of them empty: rows of 16-bit elements then start at multiples of 16 bytes."""


class Sequences(NamedTuple):
    """Where the queries or the keys of each sequence lie among the rows of the call."""

    starts: list[int]
    lengths: list[int]
    total: int

    def bins(self, bins: int) -> np.ndarray:
        """The bin of each row of the call; -1 for rows of no sequence, or not in use."""
        numbers = np.full(self.total, -1)
        for start, length in zip(self.starts, self.lengths, strict=True):
            rows = np.arange(length)
            numbers[start : start + length] = rows * bins // length if length > bins else rows
        return numbers

    def firsts(self) -> np.ndarray:
        """Whether each row of the call is the first of a sequence."""
        firsts = np.zeros(self.total, bool)
        firsts[[start for start, length in zip(self.starts, self.lengths, strict=True) if length]] = True
        return firsts

    def members(self, rows: tuple[int, ...] | None, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, rows, n) rows of the call that go into each row of the map, and which of these numbers count."""
        lengths = np.array(self.lengths, np.int64)[:, None]
        if rows is None:
            count = min(bins, max(self.lengths, default=0))
            edges = np.arange(count + 1)
            long = -(-edges * lengths // max(count, 1))  # the first row whose number * count // length is the bin's
            edges = np.where(lengths > count, long, np.minimum(edges, lengths))
            begins, ends = edges[:, :-1], edges[:, 1:]
        else:
            begins = np.array(rows, np.int64) + np.where(np.array(rows) < 0, lengths, 0)
            ends = np.where((begins >= 0) & (begins < lengths), begins + 1, begins)
        places = begins[:, :, None] + np.arange((ends - begins).max(initial=0))
        inside = places < ends[:, :, None]
        starts = np.array(self.starts, np.int64)[:, None, None]
        return np.where(inside, starts + places, 0), inside


def queries_and_keys(problem: Problem, arrays: Arrays) -> tuple[Sequences, Sequences]:
    """The queries and the keys of each sequence."""
    if arrays.cu_seqlens_q is None:
        return tuple(
            Sequences([i * length for i in range(problem.batch)], [length] * problem.batch, problem.batch * length)
            for length in (problem.len_q, problem.len_kv)
        )  # type: ignore[return-value]
    sequences = []
    for starts, used, total in (
        (arrays.cu_seqlens_q, arrays.seqused_q, problem.total_q),
        (arrays.cu_seqlens_kv, arrays.seqused_kv, problem.total_kv),
    ):
        edges = starts.tolist()
        lengths = used.tolist() if used is not None else np.diff(edges).tolist()
        sequences.append(Sequences(edges[:-1], lengths, total))
    return sequences[0], sequences[1]


class BinSums:
    """Sums over the queries of each row of a map."""

    def __init__(
        self,
        framework: Library,
        problem: Problem,
        options: Options,
        arrays: Arrays,
        places: np.ndarray,
        inside: np.ndarray,
    ) -> None:
        self.framework, self.problem, self.options, self.arrays = framework, problem, options, arrays
        self.shape = (*places.shape[:2], problem.heads_q)
        self.dtype = framework.xp.float64 if problem.dtype.accumulator == np.float64 else framework.xp.float32
        self.steps = [
            (framework.moved(places[:, :, i], arrays.q), framework.moved(inside[:, :, i, None], arrays.q))
            for i in range(places.shape[2])
        ]
        self.zero = framework.full((), 0, self.dtype, arrays.q)
        self.lse: Any = None

    def columns(self, keys: Sequences, bins: int) -> tuple[Any, Any, Any]:
        """(b, rows, heads, bins) sums of probabilities, and (b, heads) sums of entropy and of the first key's."""
        framework, q, xp = self.framework, self.arrays.q, self.framework.xp
        mass = framework.full((*self.shape, bins), 0, self.dtype, q)
        entropy, first = (framework.full(self.shape[::2], 0, self.dtype, q) for _ in range(2))
        numbers, firsts = (framework.moved(x, q)[:, None] for x in (keys.bins(bins), keys.firsts()))
        # Behind the bins stands a column of the first key alone.
        for begin in range(0, bins + 1, _COLUMNS):
            end = min(begin + _COLUMNS, bins + 1)
            columns = framework.arange(-(-(end - begin) // _ALIGNED) * _ALIGNED, q) + begin
            out, lse = ops.forward(
                self.options, self.arrays._replace(v=self._values((numbers == columns) | (firsts & (columns == bins))))
            )
            if self.lse is None:
                self.lse = lse
            for part in self._rows(out.reshape(-1, *out.shape[-2:])):
                of_bins = part[..., : min(end, bins) - begin]
                mass[..., begin : min(end, bins)] += of_bins
                entropy += _entropy(xp, of_bins, self.zero).sum(-1).sum(1)
                if end > bins:
                    first += part[..., bins - begin].sum(1)
        return mass, entropy, first

    def states(self) -> tuple[Any, Any, Any]:
        """(b, heads) numbers of queries that see a key or the sink, sums of the sink's share and of its entropy."""
        framework, q, xp = self.framework, self.arrays.q, self.framework.xp
        seen, shares, entropy = (framework.full(self.shape[::2], 0, self.dtype, q) for _ in range(3))
        lse = self.lse.swapaxes(-1, -2).reshape(-1, self.problem.heads_q)  # a row for each query
        for part in self._rows(lse, hidden=framework.full((), -np.inf, self.dtype, q)):
            some = part > -np.inf
            seen += framework.cast(some, self.dtype).sum(1)
            if self.arrays.sink is not None:
                share = xp.where(some, xp.exp(self.arrays.sink - part), self.zero)
                shares += share.sum(1)
                entropy += _entropy(xp, share, self.zero).sum(1)
        return seen, shares, entropy

    def _rows(self, rows: Any, hidden: Any = None) -> Iterator[Any]:
        """(b, rows, heads, ...) numbers of one query after another of each row of the map, and where it has fewer 0."""
        for places, inside in self.steps:
            inside = inside.reshape(*inside.shape, *[1] * (rows.ndim - 2))
            part = self.framework.cast(rows[places], self.dtype)
            yield self.framework.xp.where(inside, part, self.zero if hidden is None else hidden)

    def _values(self, chosen: Any) -> Any:
        """Values of the keys of the call, which are 1 in the columns of their bins."""
        framework, k = self.framework, self.arrays.k
        values = framework.cast(chosen, k.dtype)[:, None]
        shape = (*k.shape[:-1], values.shape[-1])
        values = values.reshape(*shape[:-2], 1, shape[-1])
        if isinstance(framework, NumPy):
            return np.broadcast_to(values, shape)
        whole = framework.full(shape, 0, k.dtype, k)  # not every kernel runs expanded axes
        whole[...] = values
        return whole


def _entropy(xp: Any, p: Any, zero: Any) -> Any:
    """-p log p, which is 0 of 0."""
    return xp.where(p == 0, zero, -p * xp.log(p))
