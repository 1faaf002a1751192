"""A case and its arrays to a call of cuflash: the public functions, or the floor below them to hold it to a family."""

from __future__ import annotations

from collections.abc import Callable

import cuflash
from cuflash.bench.cases import Case
from cuflash.bench.inputs import Array, Inputs
from cuflash.ops import backward, forward
from cuflash.ops.options import Options

Call = Callable[[], tuple[Array, ...]]


def of(case: Case, inputs: Inputs) -> Call:
    """The call that computes the case: (out, lse), or (dq, dk, dv) of a forward that has run once."""
    run_forward, run_backward = _held_to_family(case, inputs) if case.family else _public(case, inputs)
    if case.problem.direction == "forward":
        return run_forward
    out, lse = run_forward()
    return lambda: run_backward(inputs.dout, out, lse)


def keywords(case: Case) -> dict[str, object]:
    """The keywords of the public functions that make the case's problem of its arrays."""
    problem, mask = case.problem, case.problem.mask
    window = tuple(-1 if side is None else side for side in (mask.left, mask.right))
    return {
        "softmax_scale": problem.softmax_scale,
        "causal": mask.kind == "causal",
        "window_size": window if mask.kind == "window" else (-1, -1),
        "softcap": problem.softcap,
        "alignment": mask.alignment,
    }


def lengths(case: Case) -> dict[str, object]:
    """The keywords of packed sequences; none where the layout is dense."""
    if case.problem.layout == "dense":
        return {}
    return {"max_seqlen_q": case.problem.len_q, "max_seqlen_k": case.problem.len_kv}


def options(case: Case) -> Options:
    """The same for the floor below."""
    return Options(**keywords(case), **lengths(case), family=case.family)


def arrays(inputs: Inputs) -> dict[str, Array | None]:
    """The arrays that both directions share, by the names the functions know them as."""
    return {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "attn_mask": inputs.mask_tensor,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_kv,
        "seqused_k": inputs.seqused_kv,
    }


def _held_to_family(case: Case, inputs: Inputs) -> tuple[Call, Callable[..., tuple[Array, ...]]]:
    chosen = options(case)
    shared = arrays(inputs)
    gradients = chosen._replace(deterministic=case.problem.deterministic)
    return (
        lambda: forward(chosen, **shared),
        lambda dout, out, lse: backward(gradients, **shared, out=out, dout=dout, lse=lse),
    )


def _public(case: Case, inputs: Inputs) -> tuple[Call, Callable[..., tuple[Array, ...]]]:
    chosen = keywords(case)
    packed = {name: x for name, x in arrays(inputs).items() if name.startswith(("cu_", "seq")) and x is not None}
    packed |= lengths(case)
    q, k, v = inputs.q, inputs.k, inputs.v
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    deterministic = case.problem.deterministic
    return (
        lambda: function(q, k, v, **packed, **chosen, return_lse=True),
        lambda dout, out, lse: cuflash.flash_attn_backward(
            dout, q, k, v, out, lse, **packed, **chosen, deterministic=deterministic
        ),
    )
