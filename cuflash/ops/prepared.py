"""A forward that is checked, planned and compiled before it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

from cuflash.arrays import ON_GPU, Array, ArrayT, CuPy, Guest, NumPy, Torch, View, framework_of, framework_of_type
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.ops import check, launch, on_numpy
from cuflash.ops.call import Arrays, Options

_NAMES = ("q", "k", "v", "out")


class PreparedAttention(Generic[ArrayT]):
    """Attention of one kind of arrays, made by `flash_attn_prepare`: a call with nothing left to decide.

    It may be called from any thread, on any stream and while a CUDA graph is captured.
    """

    def __init__(self, options: Options, q: ArrayT, k: ArrayT, v: ArrayT, out: ArrayT | None = None) -> None:
        arrays = q, k, v, out
        framework = framework_of(_NAMES, arrays)
        if isinstance(framework, Guest):
            raise InvalidArgument(
                f"q is a {framework.name} array; expected an array of CuPy or NumPy or a torch tensor, which prepared "
                "calls take as they are. Call flash_attn_func, or convert q, k and v."
            )
        _, self._kind = framework.describe(_NAMES, arrays)
        self._framework = framework
        self._views = _views(framework, arrays)
        self._options = check.settled(options)
        self._prepared = None  # on NumPy arrays nothing but the checks can be done before a call
        if isinstance(framework, NumPy):
            on_numpy.check_kind("forward", self._options, Arrays(q=q, k=k, v=v, out=out))
        else:
            self._prepared = launch.prepare(framework, "forward", self._options, Arrays(q=q, k=k, v=v, out=out))

    def __call__(self, q: ArrayT, k: ArrayT, v: ArrayT, out: ArrayT | None = None) -> tuple[ArrayT, Array]:
        """Attend with arrays like those that the call was prepared for.

        Parameters
        ----------
        q, k, v : array
            Of the same library, shapes, strides, dtype and device as at the preparation, and starting as far past a
            multiple of 16 bytes.
        out : array, optional
            Likewise, if one was given at the preparation; None otherwise.

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
            if not isinstance(framework, ON_GPU):
                framework = framework_of(_NAMES, arrays)
            if framework is not self._framework:
                raise InvalidArgument(
                    f"q is a {framework.name} array, but the call was prepared for {self._framework.name} arrays. "
                    "Prepare another for it."
                )
            pointers, described = framework.describe(_NAMES, arrays)
            if described != self._kind:
                raise _unlike(_views(framework, arrays), self._views)
            if self._prepared is None:
                result, lse = on_numpy.forward(self._options, Arrays(q=q, k=k, v=v, out=out))
            else:
                result, lse = self._prepared((out,), pointers, None)
            return result, lse
        except REFUSALS as error:
            shorten(error)
            raise


def _views(framework: NumPy | CuPy | Torch, arrays: Sequence[Any]) -> list[View | None]:
    return [None if x is None else framework.view(name, x) for name, x in zip(_NAMES, arrays, strict=True)]


def _unlike(views: Sequence[View | None], expected: Sequence[View | None]) -> InvalidArgument:
    """What is wrong with arrays that a call was not prepared for."""
    shown = ((name, _show(x), _show(y)) for name, x, y in zip(_NAMES, views, expected, strict=True))
    name, is_now, was = next((name, is_now, was) for name, is_now, was in shown if is_now != was)
    return InvalidArgument(f"{name} is {is_now}; expected {was}, which the call was prepared for. Prepare another.")


def _show(view: View | None) -> str:
    if view is None:
        return "None"
    past = f", {view.pointer % 16} past a multiple of 16" if view.pointer % 16 else ""
    return f"{view.dtype} of shape {view.shape} with strides of {view.strides} bytes on {view.device}{past}"
