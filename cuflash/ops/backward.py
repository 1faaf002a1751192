"""Gradients of attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import reference
from cuflash.arrays import NumPy, framework_of
from cuflash.ops import launch, on_numpy
from cuflash.ops.call import Gradients, Options


def backward(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    sink: Any = None,
    rng_state: Any = None,
    out: Any = None,
    dout: Any = None,
    lse: Any = None,
    dlse: Any = None,
    row_state: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
) -> tuple[Any, ...]:
    """(dq, dk, dv) as arrays of the same framework, all Gradients where a bias' or a sink's are among them.

    dq, dk and dv are written where they are given. If the options keep delta, a pair of those gradients and delta.
    """
    arrays = (
        q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, attn_bias, sink, rng_state,
        out, dout, lse, dlse, row_state, dq, dk, dv,
    )  # fmt: skip
    framework = framework_of(options.names("backward"), arrays)
    if not isinstance(framework, NumPy):
        dq, dk, dv, *others = launch.run(framework, "backward", options, arrays)
        delta = others.pop() if options.keep_delta else None
        gradients: Any = dq, dk, dv
        if others:
            dbias, dsink = others[0] if options.bias_grad else None, None if sink is None else others[-1]
            gradients = Gradients(dq, dk, dv, dbias, dsink)
        return (gradients, delta) if options.keep_delta else gradients

    places = dq, dk, dv  # of a subclass as they came
    plain = on_numpy.plain(arrays)
    q, k, v, _, cu_seqlens_q, cu_seqlens_k, *_, rng_state, out, dout, lse, dlse, row_state, _, _, _ = plain
    checked = on_numpy.checked("backward", options, plain)
    problem = checked.problem
    drawn = None if rng_state is None else np.ascontiguousarray(rng_state).view(np.uint64)
    delta = np.empty(checked.shapes["delta"], problem.dtype.accumulator) if options.keep_delta else None
    keywords = {"dlse": dlse, "row_state": row_state, "bias_grad": problem.bias_grad, "delta": delta}
    keywords |= on_numpy.keywords(checked, plain, drawn)
    if problem.layout == "varlen":
        found = reference.backward_varlen(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, **keywords)
    else:
        found = reference.backward(dout, q, k, v, out, lse, **keywords)
    dq, dk, dv = (on_numpy.stored(x, given) for x, given in zip(found[:3], places, strict=True))
    gradients = dq, dk, dv
    if problem.bias_grad or problem.sink:
        with np.errstate(all="ignore"):
            dsink = None if found.dsink is None else found.dsink.astype(np.float32)
        gradients = Gradients(dq, dk, dv, found.dbias, dsink)
    return gradients if delta is None else (gradients, delta)
