"""Forward attention and the function that pulls gradients back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuflash.arrays import framework_of, numpy_arrays
from cuflash.errors import REFUSALS, shorten
from cuflash.ops.backward import backward
from cuflash.ops.forward import forward
from cuflash.ops.lengths import with_lengths
from cuflash.ops.options import Gradients, Options, Shared


def vjp(
    options: Options, arrays: Shared, generator: Any = None
) -> tuple[Any, Any, Callable[..., Gradients[Any, Any, Any] | tuple[Any, Any, Any]]]:
    """(out, lse, pullback) for the arrays in the order of :data:`SHARED`.

    How long packed sequences are is read once for both directions, and both draw the same random numbers.
    """
    every = (*arrays, None, None)
    framework = framework_of(options.names("forward"), every)
    options = with_lengths(framework, "forward", options, every)
    forward_options = options._replace(keep_state=framework is numpy_arrays)
    out, lse, *more = forward(forward_options, *arrays, generator=generator)
    row_state = more.pop(0) if forward_options.keep_state else None
    rng_state = more[0] if more else None

    def pullback(dout: Any, dlse: Any = None) -> Gradients[Any, Any, Any] | tuple[Any, Any, Any]:
        """Gradients of the inputs for those of out and lse (None: zero)."""
        try:
            return backward(options._replace(num_splits=0), *arrays, rng_state, out, dout, lse, dlse, row_state)
        except REFUSALS as error:
            shorten(error)
            raise

    return out, lse, pullback
