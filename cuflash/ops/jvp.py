"""Forward attention with the tangents of its results, in one pass, on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, Guest, Launcher, framework_of
from cuflash.ops import draw, launch, on_numpy
from cuflash.ops.call import Arrays, Options, Tangents

NAMES = tuple(f"d{name}" for name in Tangents._fields)
"""What callers know tangents as."""


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
    last = len(borrowed) - len(tangents)
    given, along = arrays.like(borrowed[:last]), Tangents(*borrowed[last:])
    if isinstance(native, Launcher):
        results = on_gpu(native, options, given, along, generator)
    else:
        results = on_numpy.jvp(options, given, along, generator)
    return framework.lend(results, borrowed, arrays.q) if isinstance(framework, Guest) else results


def on_gpu(
    framework: Launcher, options: Options, arrays: Arrays, tangents: Tangents, generator: Any = None
) -> tuple[Any, ...]:
    """The same of arrays on a GPU."""
    return launch.run(framework, "forward", options.replace(tangents="too"), arrays, generator, tangents=tangents)[:4]
