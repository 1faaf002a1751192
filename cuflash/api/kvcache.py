"""A cache of keys and values: one allocation, who has which rows of it, and attention over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuflash.api.cache import flash_attn_with_kvcache
from cuflash.api.pages import Pages
from cuflash.api.prepare import flash_attn_prepare
from cuflash.arrays import Array, Guest, framework_in_memory
from cuflash.dtypes import BY_NUMPY_NAME
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import integer, shown
from cuflash.ops import PreparedAttention
from cuflash.sheet import Sheet

_BAR = 40
"""Columns that show how full a sequence is."""


class KVCache:
    """Keys and values of a batch of sequences and of all layers of a model, in one allocation.

    Rows are made room for on the host, which knows all lengths, and written by kernels, which read lengths and pages
    from arrays that stay where they are: a call on the cache can be captured in a CUDA graph and replayed for every
    token. Not for several threads at once.

    Parameters
    ----------
    sequences : int
        How many there are.
    length : int
        Rows that each may have at most.
    heads_kv, dim : int
        Of every key.
    like : array
        Of NumPy, CuPy or torch; the cache has its library, device and dtype.
    layers : int
        How many keys and values a row has.
    dim_v : int, optional
        Of every value; `dim` by default.
    page_size : int, optional
        Keep rows in pages of so many, which sequences take as they grow and share where they have a past in common. By
        default every sequence has `length` rows of its own.
    num_pages : int, optional
        Pages of the whole cache; by default as many as all sequences could need.

    Attributes
    ----------
    k, v : array
        (layers, sequences, length, heads_kv, dim), or (layers, num_pages, page_size, heads_kv, dim).
    seqlens : array of int32, (sequences,)
        Rows in use.
    block_table : array of int32, (sequences, max_pages), or None
        Whose pages are which, as `flash_attn_with_kvcache` has it.

    Raises
    ------
    InvalidArgument
        If a size is not a positive integer, or `like` is of another library.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.ones((3, 2, 5, 4, 8), np.float32)
    >>> cache = cuflash.KVCache(2, 100, heads_kv=4, dim=8, like=q, page_size=16)
    >>> with cache.room(5):
    ...     out = cache.attend(q, k, v, causal=True)
    >>> cache
    <KVCache: 2 sequences of 5, 5 rows, 2 of 14 pages of 16 in use, 4 heads of 8, float32 on cpu, 57,344 bytes>
    """

    def __init__(
        self,
        sequences: int,
        length: int,
        heads_kv: int,
        dim: int,
        *,
        like: Array,
        layers: int = 1,
        dim_v: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        try:
            framework = framework_in_memory(["like"], [like])
            if isinstance(framework, Guest):
                raise InvalidArgument(
                    f"like is a {framework.name} array, and cuflash does not write to those. "
                    "Pass an array of NumPy or CuPy or a torch tensor."
                )
            view = framework.view("like", like)
            if view.dtype not in BY_NUMPY_NAME:
                raise InvalidArgument(f"like is {view.dtype}; expected {', '.join(BY_NUMPY_NAME)}.")
            self.sequences = _size("sequences", sequences)
            self.length = _size("length", length)
            self.layers = _size("layers", layers)
            self.page_size = None if page_size is None else _size("page_size", page_size)
            heads = _size("heads_kv", heads_kv)
            dims = _size("dim", dim), _size("dim_v", dim if dim_v is None else dim_v)
            self._framework, self._device, self._dtype = framework, view.device, view.dtype
            self._pages = self._paged(num_pages)
            self._allocate(like, heads, dims)
            self._room = 0
        except REFUSALS as error:
            shorten(error)
            raise

    def _paged(self, num_pages: int | None) -> Pages | None:
        """The pages of the cache, all of them free; None where sequences have rows of their own."""
        if self.page_size is None:
            if num_pages is not None:
                raise InvalidArgument(f"num_pages is {shown(num_pages)} but page_size is None; pass both.")
            return None
        most = -(-self.length // self.page_size)
        count = self.sequences * most if num_pages is None else _size("num_pages", num_pages)
        return Pages(self.sequences, most, count, self.page_size)

    def _allocate(self, like: Array, heads: int, dims: tuple[int, int]) -> None:
        """Allocate keys and values in one piece, and what kernels read of lengths and pages."""
        framework, pages = self._framework, self._pages
        outer = (self.sequences, self.length) if pages is None else (pages.count, pages.size)
        shapes = [(self.layers, *outer, heads, dim) for dim in dims]
        sizes = [int(np.prod(shape)) for shape in shapes]
        with framework.arithmetic(like):
            self._memory = framework.full((sum(sizes),), 0, like.dtype, like)
            self.k = self._memory[: sizes[0]].reshape(shapes[0])
            self.v = self._memory[sizes[0] :].reshape(shapes[1])
            self._lengths = np.zeros(self.sequences, np.int32)
            self._sent: dict[int, np.ndarray] = {}
            self.seqlens = framework.moved(self._lengths.copy(), like)
            self.block_table = None if pages is None else framework.moved(pages.table.copy(), like)

    @property
    def lengths(self) -> list[int]:
        """Rows in use of every sequence."""
        return self._lengths.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        view = self._framework.view("k", self._memory)
        return view.shape[0] * view.itemsize

    @contextmanager
    def room(self, rows: int | Sequence[int]) -> Iterator[None]:
        """Make room for new rows of every sequence, which layers append, and count them at the end.

        Where sequences are given different numbers, `append` and `attend` take as many rows for all as for the one that
        has most; those beyond a sequence's own are written behind it, to be overwritten.

        Parameters
        ----------
        rows : int or sequence of int, (sequences,)
            How many.

        Raises
        ------
        InvalidArgument
            If a sequence would become longer than `length`, or no page is left; nothing has changed then.
        """
        try:
            counts = self._counts(rows)
            self._make_room(int(counts.max(initial=0)))
        except REFUSALS as error:
            shorten(error)
            raise
        self._room = int(counts.max(initial=0))
        try:
            yield
        except BaseException:
            counts[...] = 0  # what was written is not counted
            raise
        finally:
            self._room = 0
            self._lengths += counts
            self._trim()
            self._upload()

    def append(self, k: Array, v: Array, layer: int = 0, **words: Any) -> None:
        """Write new rows of a layer, inside `room`.

        Parameters
        ----------
        k, v : array, (sequences, rows, heads_kv, dim)
            As for `flash_attn_with_kvcache`.
        layer : int
            Whose they are.
        **words
            Of `flash_attn_with_kvcache`: rotary_cos, rotary_sin and rotary_interleaved.
        """
        try:
            self._check_rows(k)
            self._call(k[:, :0], k, v, layer, words)
        except REFUSALS as error:
            shorten(error)
            raise

    def attend(self, q: Array, k: Array | None = None, v: Array | None = None, layer: int = 0, **words: Any) -> Any:
        """Attend over a layer, after writing new rows of it, inside `room`.

        Parameters
        ----------
        q : array, (sequences, len_q, heads_q, dim)
            Queries.
        k, v : array, (sequences, rows, heads_kv, dim), optional
            Written first.
        layer : int
            Whose they are.
        **words
            Of `flash_attn_with_kvcache`.

        Returns
        -------
        array, or (array, array)
            What `flash_attn_with_kvcache` returns.
        """
        try:
            if k is not None:
                self._check_rows(k)
            return self._call(q, k, v, layer, words)
        except REFUSALS as error:
            shorten(error)
            raise

    def prepare(
        self, q: Array, k: Array | None = None, v: Array | None = None, layer: int = 0, **words: Any
    ) -> PreparedAttention[Any]:
        """Prepare `attend` of a layer for arrays like these; the call does not check that it is inside `room`.

        Parameters
        ----------
        q, k, v, layer
            As for `attend`.
        **words
            Of `flash_attn_prepare`.

        Returns
        -------
        PreparedAttention
            ``call(q, k, v) -> (out, lse)``.
        """
        try:
            cache = self._layer(layer)
            table, used = self.block_table, self.seqlens
            return flash_attn_prepare(q, k, v, cache=cache, cache_seqlens=used, block_table=table, **words)
        except REFUSALS as error:
            shorten(error)
            raise

    def reorder(self, origins: Sequence[int]) -> None:
        """Let every sequence go on from the rows of another, as beam search does.

        Whole pages are shared, and a page that is begun is copied; without pages all rows are.

        Parameters
        ----------
        origins : sequence of int, (sequences,)
            Whose rows each sequence takes over, by the numbers before.

        Raises
        ------
        InvalidArgument
            If one is no sequence, or no page is left for a copy; nothing has changed then.
        """
        try:
            order = [integer(origin) for origin in origins]
            if len(order) != self.sequences or any(x is None or not 0 <= x < self.sequences for x in order):
                raise InvalidArgument(
                    f"origins is {shown(origins)}; expected {self.sequences} numbers of sequences, from 0 to "
                    f"{self.sequences - 1}."
                )
            index = np.array(order, np.int64)
            if self._pages is None:
                moved = np.flatnonzero(index != np.arange(self.sequences))
                with self._framework.arithmetic(self._memory):
                    taken = [x[:, [int(index[i]) for i in moved]] for x in (self.k, self.v)] if len(moved) else []
                    for x, rows in zip((self.k, self.v), taken, strict=False):
                        for at, i in enumerate(moved.tolist()):
                            x[:, i] = rows[:, at]
            else:
                copies = self._pages.share(self._lengths, index)
                with self._framework.arithmetic(self._memory):
                    for page, copy in copies:
                        for x in (self.k, self.v):
                            x[:, copy] = x[:, page]
            self._lengths = self._lengths[index]
            self._upload()
        except REFUSALS as error:
            shorten(error)
            raise

    def clear(self, sequence: int | None = None) -> None:
        """Forget the rows of a sequence, or of all.

        Parameters
        ----------
        sequence : int, optional
            Its number.
        """
        try:
            at = None if sequence is None else integer(sequence)
            if sequence is not None and (at is None or not 0 <= at < self.sequences):
                raise InvalidArgument(f"sequence is {shown(sequence)}; expected one from 0 to {self.sequences - 1}.")
            self._lengths[slice(None) if at is None else at] = 0
            self._trim()
            self._upload()
        except REFUSALS as error:
            shorten(error)
            raise

    def _counts(self, rows: Any) -> np.ndarray:
        """New rows of every sequence."""
        one = integer(rows)
        counts = [one] * self.sequences if one is not None else [integer(x) for x in rows] if _is_list(rows) else []
        if len(counts) != self.sequences or any(x is None or x < 0 for x in counts):
            raise InvalidArgument(
                f"rows is {shown(rows)}; expected how many rows are new, or {self.sequences} such numbers."
            )
        if self._room:
            raise InvalidArgument("room is made while room is made; leave the first `with` before the next.")
        return np.array(counts, np.int32)

    def _make_room(self, rows: int) -> None:
        """Give every sequence pages for as many more rows."""
        ends = self._lengths + rows
        if ends.max() > self.length:
            at = int(ends.argmax())
            raise InvalidArgument(
                f"sequence {at} has {self._lengths[at]} rows and would get {rows} more, but length is {self.length}. "
                "Make the cache longer, or clear the sequence."
            )
        if self._pages is not None:
            self._pages.grow(self._lengths, ends)
            self._upload()

    def _trim(self) -> None:
        """Give back the pages behind the rows in use."""
        if self._pages is not None:
            self._pages.trim(self._lengths)

    def _upload(self) -> None:
        """Bring lengths and pages to where kernels read them, if they are others than those there."""
        hosts: list[tuple[Any, np.ndarray]] = [(self.seqlens, self._lengths)]
        if self._pages is not None:
            hosts.append((self.block_table, self._pages.table))
        with self._framework.arithmetic(self._memory):
            for number, (array, values) in enumerate(hosts):
                if not np.array_equal(values, self._sent.get(number, 0)):
                    self._sent[number] = values.copy()
                    array[...] = self._framework.moved(self._sent[number], array)

    def _check_rows(self, k: Array) -> None:
        """New rows must be those that room was made for."""
        rows = k.shape[1] if len(getattr(k, "shape", ())) == 4 else None
        if rows != self._room:
            have = f"has {rows} rows" if rows is not None else f"is {shown(k)}"
            raise InvalidArgument(
                f"k {have}, but there is room for {self._room}; append what `with cache.room(rows):` was told."
            )

    def _layer(self, layer: int) -> tuple[Any, Any]:
        at = integer(layer)
        if at is None or not 0 <= at < self.layers:
            raise InvalidArgument(f"layer is {shown(layer)}; expected one from 0 to {self.layers - 1}.")
        return self.k[at], self.v[at]

    def _call(self, q: Array, k: Array | None, v: Array | None, layer: int, words: dict[str, Any]) -> Any:
        """`flash_attn_with_kvcache` of a layer."""
        k_cache, v_cache = self._layer(layer)
        used, table = self.seqlens, self.block_table
        call: Any = flash_attn_with_kvcache  # which of its results follows from words
        return call(q, k_cache, v_cache, k, v, cache_seqlens=used, block_table=table, **words)

    def _words(self) -> list[str]:
        """What there is to say of it."""
        lengths = self.lengths
        some = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        words = [f"{self.layers} layers"] if self.layers > 1 else []
        words.append(f"{self.sequences} sequences of {some} rows")
        if self._pages is None:
            words.append(f"{self.length} at most")
        else:
            count, size = self._pages.count, self._pages.size
            words.append(f"{count - len(self._pages.free)} of {count} pages of {size} in use")
        heads, dim, dim_v = self.k.shape[3], self.k.shape[4], self.v.shape[4]
        words.append(f"{heads} heads of {dim}" + (f" and {dim_v}" if dim_v != dim else ""))
        return [*words, f"{self._dtype} on {self._device}", f"{self.nbytes:,} bytes"]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self._words())}>"

    def sheet(self) -> Sheet:
        """What it is, and how full every sequence is."""
        lines = []
        for b, rows in enumerate(self.lengths):
            full = rows * _BAR // self.length
            lines.append((f"sequence {b}", f"{'█' * full}{'·' * (_BAR - full)} {rows} of {self.length} rows"))
        return Sheet(f"{type(self).__name__}: {', '.join(self._words())}", lines)

    def __str__(self) -> str:
        return str(self.sheet())

    def _repr_html_(self) -> str:
        """The same, for a notebook."""
        return self.sheet()._repr_html_()


def _size(name: str, value: int) -> int:
    """A positive integer."""
    size = integer(value)
    if size is None or size < 1:
        raise InvalidArgument(f"{name} is {shown(value)}; expected a positive integer.")
    return size


def _is_list(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | dict)
