"""A case and its arrays to a call of cuflash: the public functions, or the floor below them to hold it to a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuflash
from cuflash.cases.inputs import Array, Inputs
from cuflash.cases.table import Case
from cuflash.dtypes import TF32
from cuflash.mods import Traced
from cuflash.ops import Tangents, backward, forward, jvp
from cuflash.ops.call import VOCABULARIES, Arrays, Options, asked
from cuflash.ops.call import results as results_of
from cuflash.ops.written import with_mods

Call = Callable[[], tuple[Array, ...]]


def of(case: Case, inputs: Inputs) -> Call:
    """The call that computes the case, once its forward has run: what it returns is named by :func:`results`."""
    if case.problem.layout == "cache":
        return _over_cache(case, inputs)
    if case.problem.tangents is not None:
        tangents = Tangents(inputs.tangent_q, inputs.tangent_k, inputs.tangent_v)
        return lambda: jvp(options(case), arrays(inputs), tangents, inputs.rng_state)
    run_forward, run_backward = _held_to_family(case, inputs) if case.family else _public(case, inputs)
    if case.problem.direction == "forward":
        return run_forward
    computed = dict(zip(("out", "lse", "rng_state"), run_forward(), strict=False))
    return lambda: run_backward(dout=inputs.dout, dlse=inputs.dlse, **computed)


def results(case: Case) -> tuple[str, ...]:
    """The names of what a call returns."""
    return results_of(case.problem, tangents="no" if case.problem.tangents is None else "too")


def keywords(case: Case) -> dict[str, Any]:
    """The keywords of the public functions that make the case's problem of its arrays."""
    problem, mask = case.problem, case.problem.mask
    window = tuple(-1 if side is None else side for side in (mask.left, mask.right))
    return {
        "softmax_scale": problem.softmax_scale,
        "causal": mask.kind == "causal",
        "window_size": window if mask.kind == "window" else (-1, -1),
        "softcap": problem.softcap,
        "alignment": mask.alignment,
        "dropout_p": case.dropout_p,
        "dropout_scheme": problem.dropout or "byte",
        "precision": "tf32" if problem.dtype == TF32 else "full",
    }


def written(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The keywords of a written score, a written mask and a block mask; none where there is none of them."""
    score, mask = case.problem.score_mod, case.problem.mask_mod
    count = len(score.operands) if score else 0
    mods = {"score_mod": (score, inputs.captured[:count]), "mask_mod": (mask, inputs.captured[count:])}
    blocks = {} if case.blocks is None else {"block_mask": case.blocks}
    return {name: Traced(mod, read) for name, (mod, read) in mods.items() if mod is not None} | blocks


def lengths(case: Case) -> dict[str, Any]:
    """The keywords of packed sequences; none where the layout is dense."""
    if case.problem.layout == "dense":
        return {}
    return {"max_seqlen_q": case.problem.len_q, "max_seqlen_k": case.problem.len_kv}


def options(case: Case) -> Options:
    """The same for the floor below."""
    num_splits = case.turned("forward").problem.num_splits
    return asked(**keywords(case), **lengths(case), num_splits=num_splits, family=case.family)


def arrays(inputs: Inputs) -> Arrays:
    """The arrays that are read; the forward alone knows pages."""
    return Arrays(
        q=inputs.q, k=inputs.k, v=inputs.v, mask=inputs.mask_tensor, bias=inputs.bias, alibi=inputs.alibi_slopes,
        sink=inputs.sink, cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_kv=inputs.cu_seqlens_kv,
        seqused_q=inputs.seqused_q, seqused_kv=inputs.seqused_kv, table=inputs.block_table, k_new=inputs.k_new,
        v_new=inputs.v_new, rotary_cos=inputs.rotary_cos, rotary_sin=inputs.rotary_sin,
    )  # fmt: skip


def _over_cache(case: Case, inputs: Inputs) -> Call:
    """The function for caches; what it appends it appends again in every call, to the same place."""
    words, problem = VOCABULARIES["kvcache"], case.problem
    given = {words.get(name, name): x for name, x in arrays(inputs).by_name().items()}
    names = "softmax_scale", "causal", "window_size", "softcap"
    given |= {name: value for name, value in keywords(case).items() if name in names}
    interleaved = problem.rotary is None or problem.rotary.interleaved
    given |= {"rotary_interleaved": interleaved, "num_splits": problem.num_splits}
    return lambda: cuflash.flash_attn_with_kvcache(**given, return_softmax_lse=True)


def _held_to_family(case: Case, inputs: Inputs) -> tuple[Call, Callable[..., tuple[Array, ...]]]:
    chosen = options(case)
    shared = arrays(inputs)
    if mods := written(case, inputs):
        chosen, shared = with_mods(
            chosen, shared, mods.get("score_mod"), mods.get("mask_mod"), block_mask=mods.get("block_mask")
        )
    gradients = chosen.replace(
        deterministic=case.problem.deterministic,
        bias_grad=case.problem.bias_grad,
        captured_grad=case.problem.captured_grad,
    )
    return (
        lambda: forward(chosen, shared, inputs.rng_state),
        lambda **computed: _without_none(backward(gradients, shared._replace(**computed))),
    )


def _public(case: Case, inputs: Inputs) -> tuple[Call, Callable[..., tuple[Array, ...]]]:
    chosen = keywords(case)
    words = VOCABULARIES["flash"]
    shared = {words.get(name, name): x for name, x in arrays(inputs).by_name().items()} | lengths(case) | chosen
    shared |= written(case, inputs)
    problem = case.problem
    function: Callable[..., Any] = (
        cuflash.flash_attn_func if problem.layout == "dense" else cuflash.flash_attn_varlen_func
    )
    drawn: dict[str, Any] = {"generator": inputs.rng_state, "return_rng_state": True} if problem.dropout else {}
    drawn["num_splits"] = problem.num_splits
    gradients: dict[str, Any] = {"deterministic": problem.deterministic, "bias_grad": problem.bias_grad}
    gradients["captured_grad"] = problem.captured_grad
    return (
        lambda: function(**shared, **drawn, return_lse=True),
        lambda **computed: _without_none(cuflash.flash_attn_backward(**shared, **gradients, **computed)),
    )


def _without_none(gradients: tuple[Array | None, ...]) -> tuple[Array, ...]:
    """Without the gradients that were not asked for, and with those of what is read one by one."""
    each = (y for x in gradients for y in (x if isinstance(x, tuple) else (x,)))
    return tuple(x for x in each if x is not None)
