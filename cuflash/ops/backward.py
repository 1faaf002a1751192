"""Gradients of attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash import reference
from cuflash.arrays import framework_of, numpy_arrays
from cuflash.ops import host, launch
from cuflash.ops.options import Options


def backward(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    out: Any = None,
    dout: Any = None,
    lse: Any = None,
    dlse: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
) -> tuple[Any, Any, Any]:
    """(dq, dk, dv) as arrays of the same framework; dq, dk and dv are written where they are given."""
    arrays = (q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_k, out, dout, lse, dlse, dq, dk, dv)
    framework = framework_of(options.names("backward"), arrays)
    if framework is not numpy_arrays:
        return launch.run(framework, "backward", options, arrays)
    problem, _ = host.problem_of("backward", options, arrays)
    keywords = {"dlse": dlse, **host.keywords(problem, attn_mask, seqused_k)}
    if problem.layout == "varlen":
        gradients = reference.backward_varlen(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, **keywords)
    else:
        gradients = reference.backward(dout, q, k, v, out, lse, **keywords)
    return tuple(host.stored(x, given) for x, given in zip(gradients[:3], (dq, dk, dv), strict=True))
