"""What answers a call on plain arrays: NumPy, or kernels on the GPU that they are on."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.arrays import Framework, Guest, Launcher
from cuflash.errors import InvalidArgument
from cuflash.ops import launch, on_numpy
from cuflash.ops.call import OUTPUTS, Arrays, Options
from cuflash.problem import Direction


def answer(
    framework: Framework,
    direction: Direction,
    options: Options,
    arrays: Arrays,
    generator: Any = None,
    cached: int | None = None,
) -> tuple[Any, ...]:
    """The results of a call, as `ops.call.results` names them, on arrays of one framework with memory."""
    if isinstance(framework, Launcher):
        return launch.run(framework, direction, options, arrays, generator, cached)
    if isinstance(framework, Guest):
        return _for_guest(framework, direction, options, arrays, generator, cached)
    if direction == "forward":
        return on_numpy.forward(options, arrays, generator, cached)
    return on_numpy.backward(options, arrays)


def _for_guest(
    framework: Guest, direction: Direction, options: Options, arrays: Arrays, generator: Any, cached: int | None
) -> tuple[Any, ...]:
    """The same of arrays that NumPy or CuPy borrows, whose results go back to their library."""
    refuse_outputs(framework.name, direction, options, arrays)
    if arrays.k_new is not None:
        name = options.name("k_new")
        raise InvalidArgument(
            f"{name} is a {framework.name} array to be appended, and cuflash does not write to the cache of such. "
            f"Append it yourself, and drop {name}."
        )
    native, borrowed = framework.borrow(options.names(arrays), arrays.each())
    results = answer(native, direction, options, arrays.like(borrowed), generator, cached)
    if direction == "forward":  # rng_state: JAX has no 64-bit integers by default
        results = tuple(x.view(np.uint32) if x.dtype == np.uint64 else x for x in results)
    return framework.lend(results, borrowed, arrays.q)


def refuse_outputs(library: str, direction: Direction, options: Options, arrays: Arrays) -> None:
    """Refuse to write into arrays of a library that has none to write into.

    Raises
    ------
    InvalidArgument
        If one is given.
    """
    for output, x in zip(OUTPUTS[direction], arrays.outputs(direction), strict=True):
        if x is not None:
            name = options.name(output)
            raise InvalidArgument(
                f"{name} is a {library} array, and cuflash does not write to those. "
                f"Drop {name} and use the array that is returned."
            )
