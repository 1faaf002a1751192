"""Forward attention with the tangents of its results, in one pass, on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, Guest, NumPy, framework_of
from cuflash.errors import UnsupportedProblem
from cuflash.ops import draw, on_numpy
from cuflash.ops.call import Arrays, Options, Tangents

NAMES = tuple(f"d{name}" for name in Tangents._fields)
"""What callers know tangents as."""

ON_GPU = (
    "no kernel computes tangents: forward mode runs on arrays in host memory alone, by the NumPy backend. Move the "
    "arrays there, or take gradients in reverse mode."
)
"""What is said of a call on a GPU."""


def jvp(options: Options, arrays: Arrays, tangents: Tangents, generator: Any = None) -> tuple[Any, ...]:
    """(out, lse) and the tangents of both, as arrays of the same framework; `tangents` has none of out and lse."""
    names = [*options.names(arrays), *NAMES]
    borrowed: list[Any] = [*arrays.each(), *tangents]
    framework = framework_of(names, borrowed)
    if isinstance(framework, Guest):
        framework = framework.beyond(borrowed, generator) or framework
    if isinstance(framework, Adapter):
        return framework.answer_along(options, arrays, tangents, generator)
    if generator is not None:
        draw.check(generator)
    native = framework
    if isinstance(framework, Guest):
        native, borrowed = framework.borrow(names, borrowed)
    if not isinstance(native, NumPy):
        raise UnsupportedProblem(ON_GPU)
    last = len(borrowed) - len(tangents)
    given, along = arrays.like(borrowed[:last]), Tangents(*borrowed[last:])
    results = on_numpy.jvp(options, given, along, generator)
    return framework.lend(results, borrowed, arrays.q) if isinstance(framework, Guest) else results
