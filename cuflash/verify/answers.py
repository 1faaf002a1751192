"""What a case should give: the naive formula on all sequences at once, padded to the longest; on NumPy or CuPy."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cuflash.cases.inputs import Array, Inputs, host, places, taking_part
from cuflash.cases.table import Case
from cuflash.dropout import Dropout
from cuflash.dtypes import FP64
from cuflash.reference.dropout import philox_words
from cuflash.verify.naive import Extras, Naive, within

_LOW = 2**32 - 1

_LSE_PART = 2.0**-14
"""How much of itself an lse may be off. Scores are never rounded to 16 bits on the way to it, as the naive ones are, so
that it shows a single key too many or too few where out does not."""

_ROUNDINGS = 32
"""How many of the accumulator's roundings an element may be off by chance alone."""


class Answer(NamedTuple):
    """One output, shaped as calls return it."""

    exact: Array
    """In float64."""
    naive: Array
    """With every stage rounded to the problem's element type; in its accumulator type."""
    spread: float = 0.0
    """Standard deviation of the naive error, for sums so few that chance decides what it is."""
    most: float = math.inf
    """What no error may exceed, whatever the naive one is."""


class Computed(NamedTuple):
    """What a formula makes of a case."""

    outputs: dict[str, Array]
    """By name, shaped as calls return them."""
    terms: dict[str, Array]
    """Of ``dbias`` and ``dsink``, which are sums over pairs or rows, by name: the addends."""


class _Part(NamedTuple):
    """Sequences that are computed at once, and how much of their padding is."""

    batch: slice
    len_q: int
    len_kv: int

    def of(self, x: Array, *lengths: int) -> Array:
        """The part's own of a (batch, heads, ...) array whose next axes have these lengths; size 1 stands for all."""
        slices = self.batch, slice(None), *map(slice, lengths)
        return x[tuple(slice(None) if size == 1 else own for size, own in zip(x.shape, slices, strict=False))]

    def lengths(self, result: str) -> tuple[int, ...]:
        """How long a result is behind its axes of batch and heads, as far as that depends on the part."""
        keys = (self.len_kv,)
        return {"dk": keys, "dv": keys, "ds": (self.len_q, self.len_kv)}.get(result, (self.len_q,))


class _Rows(NamedTuple):
    """Where padded rows are in a tensor, and the other way round."""

    live: Array
    """(batch, longest) booleans: whether there is such a row."""
    length: int
    """Rows of a dense tensor."""
    packed: Array | tuple[Array, Array] | None = None
    """(batch, longest): which packed row it is, or of which page which; None where the tensor is dense."""
    padded: Array | None = None
    """(total,): which of batch * longest padded rows a packed row is."""
    taking_part: Array | None = None
    """(total,) booleans: whether it is one."""


class Answers:
    """The results of a case in any element type, on the device that its arrays are on.

    What rows and pages of no sequence hold, NaN too, is not looked at. A GPU computes all sequences at once, the host
    one after the other, each as long as it is.
    Padded tensors are (batch, heads, rows, dim); what the padding holds is 0, and no pair with it is visible. There is
    at least one row and one key, as CuPy has no maximum of nothing.
    """

    def __init__(self, case: Case, inputs: Inputs, xp: Any, unbiased_dropout: bool = False) -> None:
        self._case, self._problem, self._inputs, self._xp = case, case.problem, inputs, xp
        problem = case.problem
        self._table = host(inputs.block_table)
        lens = np.array(case.sequences, np.int64).reshape(problem.batch, 2)
        self._len_q, self._len_kv = max(problem.len_q, 1), max(problem.len_kv, 1)
        self._whole = _Part(slice(0, problem.batch), self._len_q, self._len_kv)
        single = [_Part(slice(b, b + 1), *map(int, np.maximum(lengths, 1))) for b, lengths in enumerate(lens)]
        self._parts = single if xp is np and problem.batch else [self._whole]
        i, j = np.arange(self._len_q), np.arange(self._len_kv)
        live_q, live_kv = i < lens[:, :1], j < lens[:, 1:]
        self._rows_q = self._rows("q", problem.len_q, case.lens_q, live_q)
        self._rows_kv = self._rows("kv", problem.len_kv, case.lens_kv, live_kv)

        self._q = self._padded(inputs.q, self._rows_q)
        self._k, self._v = (self._padded(x, self._rows_kv) for x in (inputs.k, inputs.v))
        self._dout, self._dlse = None, None
        if problem.direction == "backward":
            self._dout = self._padded(inputs.dout, self._rows_q)
            if inputs.dlse is not None:
                self._dlse = self._padded(inputs.dlse.swapaxes(-1, -2)[..., None], self._rows_q)[..., 0]
        diagonals = i + [[problem.mask.offset(len_q, len_kv)] for len_q, len_kv in lens.tolist()]
        distance = xp.asarray(j) - xp.asarray(diagonals)[:, None, :, None]
        live = xp.asarray(live_q)[:, None, :, None] & xp.asarray(live_kv)[:, None, None, :]
        keep = live & within(problem.mask, distance)
        if inputs.mask_tensor is not None and problem.len_q > 0 and problem.len_kv > 0:
            keep = keep & inputs.mask_tensor
        dropout = case.dropout(unbiased_dropout)
        dropped = self._dropped(dropout, inputs.rng_state, i, j, lens[:, 1]) if dropout else None
        self._keep, self._extras = keep, Extras(self._added(distance), inputs.sink, dropped)
        # The axes of the terms that some gradients are sums of, and the shapes of those.
        self._summed: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        if problem.bias_grad and inputs.bias is not None:
            self._shapes["dbias"] = inputs.bias.shape
            self._summed["dbias"] = tuple(axis for axis, n in enumerate(inputs.bias.shape) if n == 1)
        if problem.sink and problem.direction == "backward":
            self._shapes["dsink"], self._summed["dsink"] = (problem.heads_q,), (0, 2)

    def _added(self, distance: Array) -> Array | None:
        """What is added to the scores of pairs that are so far from the diagonal."""
        problem, inputs = self._problem, self._inputs
        added = None
        if inputs.alibi_slopes is not None:
            added = -inputs.alibi_slopes.astype(np.float64)[..., None, None] * abs(distance)
        if inputs.bias is not None and problem.len_q > 0 and problem.len_kv > 0:
            bias = inputs.bias.astype(problem.dtype.accumulator)
            added = bias if added is None else added + bias
        return added

    def answers(self) -> dict[str, Answer]:
        """Every output by name."""
        problem = self._problem
        (exact, exact_terms), (naive, naive_terms) = (
            self.computed(Naive(dtype, problem.softmax_scale, problem.softcap, problem.dtype))
            for dtype in (FP64, problem.dtype)
        )
        real = problem.dtype.accumulator
        # In fp64 the exact answer is the naive one, so that its own roundings are not seen.
        unseen = _ROUNDINGS * float(np.finfo(real).eps)
        answers = {}
        for name, x in exact.items():
            size = float(self._xp.where(self._xp.isfinite(x), abs(x), 0).max()) if x.size else 0.0
            spread = unseen * max(size, 1.0) if real == np.float64 else 0.0
            most = _LSE_PART * max(size, 1.0) if name == "lse" else math.inf
            answers[name] = Answer(x, naive[name], spread, most)
        for name, axes in self._summed.items():
            e, n = exact_terms[name], naive_terms[name]
            *sums, off, squares = (x.sum(axis=axes, keepdims=True) if axes else x for x in (e, n, (n - e) ** 2, e**2))
            shape = self._shapes[name]
            exact_sum, naive_sum = (x.reshape(shape) if 0 not in shape else self._xp.zeros(shape) for x in sums)
            spread = float(off.max()) ** 0.5 + unseen * max(float(squares.max()) ** 0.5, 1.0)
            answers[name] = Answer(exact_sum, naive_sum, spread)
        return answers

    def computed(self, formula: Naive) -> Computed:
        """What a formula makes of the arrays; a backward has the outputs of its forward, too."""
        padded = self._padded_results(formula)
        rows = {"out": self._rows_q, "dq": self._rows_q, "dk": self._rows_kv, "dv": self._rows_kv}
        outputs = {name: self._unpadded(padded[name], rows[name]) for name in rows if name in padded}
        lse = self._unpadded(padded["lse"][..., None], self._rows_q, -np.inf)
        outputs["lse"] = lse[..., 0].swapaxes(-1, -2)
        if self._problem.direction == "forward":
            return Computed(outputs, {})
        # Errors of a row are one error, that of its delta; those of different rows are independent.
        ds = padded["ds"]
        ds = ds.sum(axis=-1, keepdims=True) if 3 in self._summed.get("dbias", ()) else ds
        return Computed(outputs, {"dbias": ds, "dsink": padded["sink_rows"]})

    def _padded_results(self, formula: Naive) -> dict[str, Array]:
        """What a formula returns, by name, (batch, heads, rows, ...)."""
        if self._parts == [self._whole]:
            return self._results_of(self._whole, formula)
        padded: dict[str, Array] = {}
        for part in self._parts:
            for name, x in self._results_of(part, formula).items():
                if name not in padded:
                    sizes = self._problem.batch, x.shape[1], *self._whole.lengths(name)
                    padded[name] = self._xp.zeros((*sizes, *x.shape[len(sizes) :]), x.dtype)
                part.of(padded[name], *part.lengths(name))[...] = x
        return padded

    def _results_of(self, part: _Part, formula: Naive) -> dict[str, Array]:
        """What a formula returns of some of the sequences, by name."""
        q = part.of(self._q, part.len_q)
        k, v = (part.of(x, part.len_kv) for x in (self._k, self._v))
        added, dropped, keep = (
            None if x is None else part.of(x, part.len_q, part.len_kv)
            for x in (self._extras.added, self._extras.dropped, self._keep)
        )
        extras = Extras(added, self._extras.sink, dropped)
        if self._problem.direction == "forward":
            return dict(zip(("out", "lse"), formula.forward(q, k, v, keep, extras), strict=True))
        dout, dlse = part.of(self._dout, part.len_q), self._dlse
        dlse = 0.0 if dlse is None else part.of(dlse, part.len_q)
        return formula.backward(dout, dlse, q, k, v, keep, extras)._asdict()

    def _rows(self, side: str, length: int, lens: tuple[int, ...], live: np.ndarray) -> _Rows:
        if self._problem.layout == "dense":
            return _Rows(self._xp.asarray(live), length)
        if side == "kv" and self._problem.page_size:
            pages, rows = np.zeros((2, *live.shape), np.int64)
            for b, (_, at) in enumerate(places(self._case, self._table)):
                pages[b, live[b]], rows[b, live[b]] = at
            return _Rows(self._xp.asarray(live), length, (self._xp.asarray(pages), self._xp.asarray(rows)))
        packed = np.array([*accumulate(lens, initial=0)][:-1])[:, None] + np.arange(live.shape[1])
        used = taking_part(self._case, side, None)
        padded = np.zeros(len(used), np.int64)
        padded[used] = np.flatnonzero(live)
        live, *others = (self._xp.asarray(x) for x in (live, np.where(live, packed, 0), padded, used))
        return _Rows(live, length, *others)

    def _padded(self, x: Array, rows: _Rows) -> Array:
        x = x.astype(self._problem.dtype.accumulator)
        if not x.size:
            return self._xp.zeros((len(rows.live), x.shape[-2], rows.live.shape[1], x.shape[-1]), x.dtype)
        if rows.packed is not None:
            x = self._xp.where(rows.live[..., None, None], x[rows.packed], 0)
        return self._xp.ascontiguousarray(x.swapaxes(1, 2))

    def _unpadded(self, x: Array, rows: _Rows, empty: float = 0.0) -> Array:
        x = x.swapaxes(1, 2)
        if rows.padded is None or rows.taking_part is None:
            return x[:, : rows.length]
        x = x.reshape(-1, *x.shape[2:])[rows.padded]
        return self._xp.where(rows.taking_part[:, None, None], x, empty)

    def _dropped(self, dropout: Dropout, rng_state: Any, i: np.ndarray, j: np.ndarray, lens_kv: np.ndarray) -> Array:
        """What probabilities are multiplied by, from the definition of the schemes: a call of Philox for each pair."""
        problem, xp = self._problem, self._xp
        seed, offset = rng_state
        heads = np.arange(problem.batch * problem.heads_q, dtype=np.uint64).reshape(problem.batch, -1, 1, 1)
        i, j = i.astype(np.uint64)[:, None], j.astype(np.uint64)
        if dropout.scheme == "byte":
            counter = xp.asarray(heads * 32 + i % 8 * 4 + offset) + xp.asarray(j // 2 % 4)
            row, key = xp.asarray(i // 16), xp.asarray(j // 32)
            w0, w1, w2, w3 = philox_words((counter & _LOW, counter >> 32, row, key), seed, rounds=7)
            upper, odd = (xp.asarray(j // n % 2 == 1) for n in (16, 8))
            word = xp.where(upper, xp.where(odd, w3, w2), xp.where(odd, w1, w0))
            shift = xp.asarray(i // 8 % 2 * 16) + xp.asarray(j % 2 * 8)
            return ((word >> shift) & 255 <= dropout.threshold) * dropout.keep_scale
        plane = problem.len_q * problem.len_kv
        first = heads * plane + i * lens_kv.astype(np.uint64)[:, None, None, None] + offset
        number = xp.asarray(first) + xp.asarray(j)
        call, at = number >> 2, number & 3
        w0, w1, w2, w3 = philox_words((call & _LOW, call >> 32, 0, 0), seed, rounds=10)
        word = xp.where(at < 2, xp.where(at == 0, w0, w1), xp.where(at == 2, w2, w3))
        uniform = word.astype(np.float32) * 2.0**-32 + 2.0**-33
        return (uniform > float(np.float32(dropout.p))) * dropout.keep_scale
