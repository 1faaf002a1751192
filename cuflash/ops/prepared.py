"""A forward that is checked, planned and compiled before it is called."""

from __future__ import annotations

from collections.abc import Sequence
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
            kind: type = type(q)
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
            cached = self._cached
            if cache_seqlens is not None:
                cached = self._number(cache_seqlens)
            if self._prepared is None:
                moved = self._bound._replace(**dict(zip(self._names, arrays, strict=True)))
                result, lse = on_numpy.forward(self._options, moved, None, cached)
            else:
                if self._places is not None:
                    pointers, given = self._pointers[:], pointers
                    for place, pointer in zip(self._places, given, strict=True):
                        pointers[place] = pointer
                result, lse = self._prepared((out,), pointers, None, cached, self._listed)
            return result, lse
        except REFUSALS as error:
            shorten(error)
            raise

    def _number(self, cache_seqlens: int) -> int:
        """Refuse a number where an array, or nothing, says how much of a cache is in use."""
        if self._cached is None:
            what = "there is no cache" if not self._options.cache else "it was none at the preparation"
            raise InvalidArgument(f"cache_seqlens is {shown(cache_seqlens)}, but {what}. Leave it out.")
        return cache_seqlens

    def _spelled_out(self, arrays: Sequence[Any]) -> list[View | None]:
        framework = self._framework
        return [None if x is None else framework.view(word, x) for word, x in zip(self._words, arrays, strict=True)]


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
