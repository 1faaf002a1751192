"""The arrays that written scores and masks read."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
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
    for view in (view for name, view in views.items() if name.startswith("captured")):
        if view.dtype not in CAPTURABLE:
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected one of {', '.join(CAPTURABLE)}. Convert it.")
        if view.empty:
            raise InvalidArgument(
                f"{view.name} has shape {view.shape}; expected at least one element along each axis, as an index "
                "outside reads the nearest element."
            )
        check_alignment(view)
    return wanted
