"""Forward attention and the function that pulls gradients back through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cuflash.arrays import framework_of
from cuflash.ops.backward import backward
from cuflash.ops.forward import forward
from cuflash.ops.lengths import with_lengths
from cuflash.ops.options import Gradients, Options


def vjp(
    options: Options, arrays: Sequence[Any], generator: Any = None
) -> tuple[Any, Any, Callable[..., Gradients | tuple[Any, Any, Any]]]:
    """(out, lse, pullback) for the arrays in the order of :data:`SHARED`.

    How long packed sequences are is read once for both directions, and both draw the same random numbers.
    """
    every = (*arrays, None, None)
    options = with_lengths(framework_of(options.names("forward"), every), "forward", options, every)
    out, lse, *drawn = forward(options._replace(deterministic=False), *arrays, generator=generator)
    rng_state = drawn[0] if drawn else None

    def pullback(dout: Any, dlse: Any = None) -> Gradients | tuple[Any, Any, Any]:
        """Gradients of the inputs for those of out and lse (None: zero)."""
        return backward(options._replace(num_splits=0), *arrays, rng_state, out, dout, lse, dlse)

    return out, lse, pullback
