"""Forward attention and the function that pulls gradients back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuflash.arrays import framework_of
from cuflash.ops.backward import backward
from cuflash.ops.forward import forward
from cuflash.ops.lengths import with_lengths
from cuflash.ops.options import Options


def vjp(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
) -> tuple[Any, Any, Callable[..., tuple[Any, Any, Any]]]:
    """(out, lse, pullback); what the lengths of packed sequences are is read once for both directions."""
    arrays = (q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_k)
    with_out = (*arrays, None)
    options = with_lengths(framework_of(options.names("forward"), with_out), "forward", options, with_out)
    out, lse = forward(options._replace(deterministic=False), *arrays)

    def pullback(dout: Any, dlse: Any = None) -> tuple[Any, Any, Any]:
        """Gradients of q, k and v for those of out and lse (None: zero)."""
        return backward(options, *arrays, out, dout, lse, dlse)

    return out, lse, pullback
