"""A forward that is checked, planned and compiled before it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic

from cuflash.arrays import Array, ArrayT, Guest, Launcher, NumPy, View, framework_in_memory, framework_of_type
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import shown
from cuflash.ops import check, launch, lists, on_numpy
from cuflash.ops.call import Arrays, Options


class PreparedAttention(Generic[ArrayT]):
    """Attention of one kind of arrays, made by `flash_attn_prepare`: a call with nothing left to decide.

    It may be called from any thread, on any stream and while a CUDA graph is captured.
    """

    def __init__(self, options: Options, arrays: Arrays, cached: int | None = None) -> None:
        framework = framework_in_memory(options.names(arrays), arrays.each())
        self._listed: tuple[int, ...] = ()
        if isinstance(framework, Guest):
            raise InvalidArgument(
                f"q is a {framework.name} array; expected an array of CuPy or NumPy or a torch tensor, which prepared "
                "calls take as they are. Call the function that it is of, or convert its arrays."
            )
        self._framework = framework
        self._options = check.settled(options)
        self._cached = cached
        self._names = ("q", "k_new", "v_new", "out") if options.cache else ("q", "k", "v", "out")
        """Of the arrays that each call is given."""
        self._words = tuple(map(options.name, self._names))
        given = tuple(getattr(arrays, name) for name in self._names)
        self._bound = arrays._replace(**dict.fromkeys(self._names))
        _, self._kind = framework.describe(self._words, given)
        self._views = self._spelled_out(given)
        self._prepared = None  # on NumPy arrays nothing but the checks can be done before a call
        if isinstance(framework, NumPy):
            on_numpy.check_kind("forward", self._options, arrays)
        else:
            assert isinstance(framework, Launcher)
            arrays = lists.with_rule(framework, options, arrays)
            self._prepared = launch.prepare(framework, "forward", self._options, arrays)
            if options.block_mask is not None:
                self._listed = lists.pointers(framework, options.block_mask, arrays.q, self._prepared.listings)
            self._pointers, _ = framework.describe(options.names(arrays), arrays.each())
            there = list(arrays.by_name())
            places = [there.index(name) for name in self._names if name in there]
            self._places = None if len(places) == len(there) else places
            """Where pointers of given arrays are among all; None where there are no others."""

    def __call__(
        self,
        q: ArrayT,
        k: ArrayT | None = None,
        v: ArrayT | None = None,
        out: ArrayT | None = None,
        *,
        cache_seqlens: int | None = None,
    ) -> tuple[ArrayT, Array]:
        """Attend with arrays like those that the call was prepared for.

        Parameters
        ----------
        q, k, v : array
            Of the same library, shapes, strides, dtype and device as at the preparation, and starting as far past a
            multiple of 16 bytes. With a cache, k and v are what is appended to it, and left out where nothing is.
        out : array, optional
            Likewise, if one was given at the preparation; None otherwise.
        cache_seqlens : int, optional
            With a cache, how many of its rows are in use, if that was a number at the preparation; by default as many
            as then. An array of the preparation is read anew in every call.

        Returns
        -------
        out : array, (b, len_q, heads_q, dim_v)
            In the dtype of q.
        lse : array, (b, heads_q, len_q)
            The log-sum-exp, in float32 (float64 for float64 tensors).

        Raises
        ------
        InvalidArgument
            If an array is not like the one at the preparation, or `out` shares memory with another; nothing has been
            launched or written then.
        """
        try:
            arrays = q, k, v, out
            pointers = self._pointers_of(arrays)
            cached = self._cached
            if cache_seqlens is not None:
                cached = self._number(cache_seqlens)
            if self._prepared is None:
                result, lse = on_numpy.forward(self._options, self._moved(arrays), None, cached)
            else:
                result, lse = self._prepared((out,), pointers, None, cached, self._listed)
            return result, lse
        except REFUSALS as error:
            shorten(error)
            raise

    def bind(
        self,
        q: ArrayT,
        k: ArrayT | None = None,
        v: ArrayT | None = None,
        out: ArrayT | None = None,
    ) -> BoundAttention[ArrayT]:
        """Attach arrays that every call is to read anew, and to write to: a call is left that takes none.

        Parameters
        ----------
        q, k, v, out : array
            As for a call. Kept. Where `out` is None it is allocated, once, and so is lse.

        Returns
        -------
        BoundAttention
            ``call() -> (out, lse)``, the same two arrays each time; ``call.captured()`` is the same by a CUDA graph.

        Raises
        ------
        InvalidArgument
            As a call.

        Examples
        --------
        A layer of a model that fills the same arrays for every token::

            attend = cuflash.flash_attn_prepare(q, k, v, cache=(k_cache, v_cache), cache_seqlens=lengths, causal=True)
            step = attend.bind(q, k, v)
            for token in range(n):
                project(x, q, k, v)  # writes to q, k and v
                x, lse = step()
        """
        try:
            arrays = q, k, v, out
            pointers = self._pointers_of(arrays)
            if self._prepared is None:
                results = on_numpy.places(self._options, self._moved(arrays))
                call: Callable[..., None] = partial(self._on_numpy, self._moved((q, k, v, results[0])), results[1])
                return BoundAttention(arrays, results, call, self._number)
            bound = self._prepared.bind((out,), pointers, self._cached, self._listed)
            return BoundAttention((*arrays, self._bound), bound.results, bound.call(), self._number, bound)
        except REFUSALS as error:
            shorten(error)
            raise

    def _on_numpy(self, arrays: Arrays, lse: Any, cached: int | None = None) -> None:
        """A bound call."""
        _, lse[...] = on_numpy.forward(self._options, arrays, None, self._cached if cached is None else cached)

    def _moved(self, arrays: tuple[Any, ...]) -> Arrays:
        return self._bound._replace(**dict(zip(self._names, arrays, strict=True)))

    def _pointers_of(self, arrays: tuple[Any, ...]) -> list[int]:
        """Pointers of all arrays of a call on these, which must be like those of the preparation."""
        kind: type = type(arrays[0])
        framework = framework_of_type(kind)
        if not isinstance(framework, Launcher):
            framework = framework_in_memory(self._words, arrays)
        if framework is not self._framework:
            raise InvalidArgument(
                f"q is a {framework.name} array, but the call was prepared for {self._framework.name} arrays. "
                "Prepare another for it."
            )
        pointers, described = framework.describe(self._words, arrays)
        if described != self._kind:
            raise _unlike(self._spelled_out(arrays), self._views, self._words)
        if self._prepared is None or self._places is None:
            return pointers
        every = self._pointers[:]
        for place, pointer in zip(self._places, pointers, strict=True):
            every[place] = pointer
        return every

    def _number(self, cache_seqlens: int) -> int:
        """Refuse a number where an array, or nothing, says how much of a cache is in use."""
        if self._cached is None:
            what = "there is no cache" if not self._options.cache else "it was none at the preparation"
            raise InvalidArgument(f"cache_seqlens is {shown(cache_seqlens)}, but {what}. Leave it out.")
        return cache_seqlens

    def _spelled_out(self, arrays: Sequence[Any]) -> list[View | None]:
        framework = self._framework
        return [None if x is None else framework.view(word, x) for word, x in zip(self._words, arrays, strict=True)]


class BoundAttention(Generic[ArrayT]):
    """Attention bound to its arrays by `PreparedAttention.bind`: what is left of a call are its launches.

    Each call writes to the same results and uses the same scratch memory, so calls must follow each other, on
    one stream or on streams that wait for each other. It may be called while a CUDA graph is captured.
    """

    def __init__(
        self,
        held: tuple[Any, ...],
        results: tuple[Any, ...],
        call: Callable[..., None],
        number: Callable[[int], int],
        bound: launch.Bound | None = None,
    ) -> None:
        self._held, self._call, self._number, self._bound = held, call, number, bound
        self._results: Any = results

    def __call__(self, *, cache_seqlens: int | None = None) -> tuple[ArrayT, Array]:
        """Attend with what the arrays hold now.

        Parameters
        ----------
        cache_seqlens : int, optional
            As for a call of `PreparedAttention`.

        Returns
        -------
        out, lse : array
            The same arrays in every call, as those of a call of `PreparedAttention`.

        Raises
        ------
        InvalidArgument
            If `cache_seqlens` is no number of rows that the cache has room for.
        """
        try:
            if cache_seqlens is None:
                self._call()
            else:
                self._call(self._number(cache_seqlens))
        except REFUSALS as error:
            shorten(error)
            raise
        return self._results

    def captured(self) -> BoundAttention[ArrayT]:
        """Record the launches in a CUDA graph: a call is left that replays all of them by one call of the driver.

        Lengths, pages and all else that arrays hold are read anew in every replay. Calls must follow those of the call
        that was recorded, too, as both use the same memory. While another graph is captured around a call, that records
        the launches.

        Returns
        -------
        BoundAttention
            The same, whose calls take no `cache_seqlens`: as many rows of a cache are in use as at the preparation,
            unless an array says how many. On NumPy arrays, which launch nothing, nothing is recorded.

        Examples
        --------
        A token after the other, with lengths that count up on the GPU::

            attend = cuflash.flash_attn_prepare(q, k, v, cache=(k_cache, v_cache), cache_seqlens=lengths, causal=True)
            step = attend.bind(q, k, v).captured()
            for token in range(n):
                project(x, q, k, v)  # writes to q, k and v
                x, lse = step()
                lengths += 1
        """
        call = self._call if self._bound is None else self._bound.captured()
        return BoundAttention(self._held, self._results, call, _refuse_number, self._bound)


def _refuse_number(cache_seqlens: int) -> int:
    """A graph has the number that it was recorded with."""
    raise InvalidArgument(
        f"cache_seqlens is {shown(cache_seqlens)}, but a captured call has that of its preparation. Leave it out, and "
        "prepare the call with an array of lengths, which every replay reads anew."
    )


def _unlike(views: Sequence[View | None], expected: Sequence[View | None], words: Sequence[str]) -> InvalidArgument:
    """What is wrong with arrays that a call was not prepared for."""
    told = ((word, _show(x), _show(y)) for word, x, y in zip(words, views, expected, strict=True))
    name, is_now, was = next((name, is_now, was) for name, is_now, was in told if is_now != was)
    return InvalidArgument(f"{name} is {is_now}; expected {was}, which the call was prepared for. Prepare another.")


def _show(view: View | None) -> str:
    if view is None:
        return "None"
    past = f", {view.pointer % 16} past a multiple of 16" if view.pointer % 16 else ""
    return f"{view.dtype} of shape {view.shape} with strides of {view.strides} bytes on {view.device}{past}"
