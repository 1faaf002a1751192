"""Forward attention and the function that pulls gradients back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuflash.arrays import framework_of
from cuflash.errors import REFUSALS, shorten
from cuflash.ops.backward import backward
from cuflash.ops.call import Gradients, Options, Shared
from cuflash.ops.forward import forward
from cuflash.ops.lengths import with_lengths


def vjp(
    options: Options, arrays: Shared, generator: Any = None
) -> tuple[Any, Any, Callable[..., Gradients[Any, Any, Any] | tuple[Any, Any, Any]]]:
    """(out, lse, pullback) for the arrays in the order of :data:`SHARED`.

    How long packed sequences are is read once for both directions, and both draw the same random numbers.
    """
    every = (*arrays, None, None)
    options = with_lengths(framework_of(options.names("forward"), every), "forward", options, every)
    forward_options = options._replace(keep_state=True)
    out, lse, row_state, *drawn = forward(forward_options, *arrays, generator=generator)
    rng_state = drawn[0] if drawn else None

    def pullback(dout: Any, dlse: Any = None) -> Gradients[Any, Any, Any] | tuple[Any, Any, Any]:
        """Gradients of the inputs for those of out and lse (None: zero)."""
        try:
            return backward(options._replace(num_splits=0), *arrays, rng_state, out, dout, lse, dlse, row_state)
        except REFUSALS as error:
            shorten(error)
            raise

    return out, lse, pullback
