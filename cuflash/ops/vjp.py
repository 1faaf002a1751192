"""Forward attention and the function that pulls gradients back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuflash.errors import REFUSALS, shorten
from cuflash.ops.backward import backward
from cuflash.ops.call import Arrays, Options
from cuflash.ops.forward import forward
from cuflash.ops.lengths import with_lengths


def vjp(options: Options, arrays: Arrays, generator: Any = None) -> tuple[Any, Any, Callable[..., tuple[Any, ...]]]:
    """(out, lse, pullback) for the arrays that both directions read.

    How long packed sequences are is read once for both directions, and both draw the same random numbers.
    """
    options = with_lengths("forward", options, arrays)
    out, lse, row_state, *drawn = forward(options.replace(keep_state=True), arrays, generator)
    rng_state = drawn[0] if drawn else None
    kept = arrays._replace(rng_state=rng_state, out=out, lse=lse, row_state=row_state)
    backward_options = options.replace(num_splits=0)

    def pullback(dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        """Gradients of the inputs for those of out and lse (None: zero)."""
        try:
            return backward(backward_options, kept._replace(dout=dout, dlse=dlse))
        except REFUSALS as error:
            shorten(error)
            raise

    return out, lse, pullback
