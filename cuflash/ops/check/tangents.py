"""How a call's arrays change: each like what it is the tangent of."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_like

TANGENT = "tangent_"
"""Before the name of an array: that of its tangent, as ``params.cuh`` has it."""


def tangents_of(views: Mapping[str, View]) -> dict[str, View]:
    """The tangents among the arrays, by the names of what they are of."""
    return {name.removeprefix(TANGENT): view for name, view in views.items() if name.startswith(TANGENT)}


def check_tangents(views: Mapping[str, View], tangents: Mapping[str, View], options: Options) -> None:
    """Tangents go by the names of what they are of, as the arrays of `views` do."""
    for name, view in tangents.items():
        of = views.get(name)
        if of is None:
            raise InvalidArgument(f"{view.name} is given but {options.name(name)} is not; pass both, or neither.")
        check_like(view, of.shape, of.dtype)
