"""The arrays that written scores and masks read."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.mods import CAPTURABLE
from cuflash.numbers import flag
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_alignment


def captured_grad_of(options: Options, views: Mapping[str, View]) -> bool:
    """Whether gradients of what is read are wanted; arrays with elements may have any shape and strides."""
    wanted = flag("captured_grad", options.captured_grad)
    if wanted and options.score_mod is None:
        raise InvalidArgument(
            "captured_grad is True but score_mod is None; pass the score whose arrays' gradients are wanted."
        )
    mods = options.score_mod, options.mask_mod, options.rule and options.rule.mod
    operands = [operand for mod in mods if mod is not None for operand in mod.operands]
    for view, operand in zip(captured(views), operands, strict=False):  # on NumPy without what the rule reads
        if view.dtype not in CAPTURABLE:
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected one of {', '.join(CAPTURABLE)}. Convert it.")
        if (view.dtype, len(view.shape)) != (operand.dtype.name, operand.ndim):
            raise InvalidArgument(
                f"{view.name} is {view.dtype} with {len(view.shape)} axes; it was traced as {operand.dtype.name} with "
                f"{operand.ndim}. Trace the function with the arrays of the call."
            )
        if view.empty:
            raise InvalidArgument(
                f"{view.name} has shape {view.shape}; expected at least one element along each axis, as an index "
                "outside reads the nearest element."
            )
        check_alignment(view)
    return wanted


def refuse_second_derivatives(options: Options) -> None:
    """Refuse to differentiate a gradient of what a written score reads."""
    if options.captured_grad:
        raise UnsupportedProblem(
            "what score_mod reads has a gradient in a call that is differentiated twice, and second derivatives are of "
            "q, k, v, a bias and a sink alone. Pass what it reads detached, or write the score out as a bias."
        )


def captured(views: Mapping[str, View]) -> list[View]:
    """What written scores and masks read, by number."""
    return [view for name, view in views.items() if name.startswith("captured")]


def flat_of(views: Mapping[str, View]) -> tuple[int, ...]:
    """Which arrays that are read, by number, are contiguous and have few enough elements for 32 bits."""
    return tuple(i for i, view in enumerate(captured(views)) if _is_flat(view))


def _is_flat(view: View) -> bool:
    size = view.itemsize
    for n, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if n > 1 and stride != size:
            return False
        size *= n
    return size < 2**31 * view.itemsize
