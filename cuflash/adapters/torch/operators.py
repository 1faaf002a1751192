"""Attention as operators of torch, which compilers trace: ``torch.ops.cuflash.forward`` and ``backward``.

Their arguments are tensors, numbers and words, so that a graph can be stored; a tensor that a call does not have comes
back empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuflash.adapters.torch.gradient import gradient, of_gradient
from cuflash.adapters.torch.recorded import NO_FORWARD_MODE, autocast, differentiated
from cuflash.adapters.torch.written import spelled, written
from cuflash.arrays import framework_of_type
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import Arrays, Options, asked
from cuflash.problem import Direction


def traced(
    direction: Direction, options: Options, arrays: Arrays, generator: Any = None, cached: int | None = None
) -> tuple[Any, ...]:
    """Answer a call while torch traces it.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If an operator cannot do what is asked for.
    """
    if direction == "backward" or options.cache:
        raise UnsupportedProblem(
            "torch.compile traces attention whose gradient autograd takes, and no explicit gradients or caches. "
            "Call them outside of the compiled function, or behind torch.compiler.disable."
        )
    transforms = _transforms()
    if "Jvp" in transforms:
        raise UnsupportedProblem(NO_FORWARD_MODE)
    if "Grad" in transforms:
        raise UnsupportedProblem(
            "torch.compile traces attention inside torch.func.grad, vjp or the like, where operators have no gradient. "
            "Take it outside of the compiled function, or by backward()."
        )
    if not (generator is None or isinstance(generator, tuple)):
        raise InvalidArgument(
            "generator is an object, which a compiled graph cannot advance. Pass None, for torch's own generator, or a "
            "tuple (seed, offset)."
        )
    if arrays.out is not None:
        raise InvalidArgument(
            f"{options.name('out')} is given to a call that torch.compile traces. Drop it and use what is returned."
        )
    arrays = autocast(arrays)
    grad = False
    if torch.is_grad_enabled():
        for x in arrays.each():
            if x is not None and x.requires_grad:
                grad = True
    if grad:
        arrays = differentiated(options, arrays)
    seed, offset = (0, -1) if generator is None else generator
    seed = seed - 2**64 if seed >= 2**63 else seed
    left, right = options.window_size
    manner = options.manner
    out, lse, row_state, rng_state = torch.ops.cuflash.forward(
        arrays.q, arrays.k, arrays.v, arrays.mask, arrays.bias, arrays.alibi, arrays.sink, arrays.cu_seqlens_q,
        arrays.cu_seqlens_kv, arrays.seqused_q, arrays.seqused_kv, list(arrays.captured or ()), arrays.table,
        options.softmax_scale, options.causal,
        left, right, options.softcap, options.alignment, options.dropout_p, options.dropout_scheme,
        options.unbiased_dropout, options.max_seqlen_q, options.max_seqlen_k, options.num_splits, options.deterministic,
        options.precision, manner.validate, manner.enable_gqa, manner.layout, manner.vocabulary, spelled(options), seed,
        offset,
        grad or options.keep_state,
    )  # fmt: skip
    results = (out, lse, row_state) if options.keep_state else (out, lse)
    return (*results, rng_state.view(torch.uint64)) if options.dropout_p else results


@torch.compiler.assume_constant_result
def _transforms() -> tuple[str, ...]:
    """What is active of torch.func, by the names of its levels; known when a call is traced."""
    levels = [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]
    return (*levels, "Jvp") if torch.autograd.forward_ad._current_level >= 0 else tuple(levels)


def _options(
    softmax_scale: float | None, causal: bool, left: int, right: int, softcap: float, alignment: str, dropout_p: float,
    dropout_scheme: str, unbiased_dropout: bool, max_seqlen_q: int | None, max_seqlen_k: int | None, num_splits: int,
    deterministic: bool, precision: Any, validate: bool, enable_gqa: bool, layout: Any, vocabulary: str, text: str,
) -> Options:  # fmt: skip
    options = asked(
        softmax_scale=softmax_scale, causal=causal, window_size=(left, right), softcap=softcap, alignment=alignment,
        dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, num_splits=num_splits, deterministic=deterministic,
        precision=precision, validate=validate, enable_gqa=enable_gqa, layout=layout, vocabulary=vocabulary,
    )  # fmt: skip
    return options.replace(**written(text)) if written(text) else options


@torch.library.custom_op("cuflash::forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, alibi: Tensor | None,
    sink: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None, seqused_q: Tensor | None,
    seqused_kv: Tensor | None, captured: Sequence[Tensor], table: Tensor | None, softmax_scale: float | None,
    causal: bool, left: int, right: int, softcap: float, alignment: str, dropout_p: float, dropout_scheme: str,
    unbiased_dropout: bool, max_seqlen_q: int | None, max_seqlen_k: int | None, num_splits: int, deterministic: bool,
    precision: str, validate: bool, enable_gqa: bool, layout: str, vocabulary: str, text: str, seed: int, offset: int,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, row_state, rng_state as int64); the third is empty unless kept, and the fourth without dropout.

    A negative offset draws from torch's generator.
    """
    options = _options(
        softmax_scale, causal, left, right, softcap, alignment, dropout_p, dropout_scheme, unbiased_dropout,
        max_seqlen_q, max_seqlen_k, num_splits, deterministic, precision, validate, enable_gqa, layout, vocabulary,
        text,
    )  # fmt: skip
    arrays = Arrays(
        q, k, v, mask, bias, alibi, sink, cu_seqlens_q, cu_seqlens_kv, seqused_q, seqused_kv, table,
        captured=tuple(captured) or None,
    )  # fmt: skip
    generator = None if offset < 0 else (seed % 2**64, offset)
    framework: Any = framework_of_type(torch.Tensor)
    out, lse, *others = framework.plain("forward", options.replace(keep_state=keep_state), arrays, generator)
    row_state = others.pop(0) if keep_state else lse.new_empty(0)
    rng_state = others[0].view(torch.int64) if dropout_p else torch.empty(0, dtype=torch.int64, device=q.device)
    return out, lse, row_state, rng_state


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, alibi: Any, sink: Any, cu_seqlens_q: Any, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout, keep_state, dropout_p = others[-6], others[-1], others[11]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if cu_seqlens_q is not None:
        rows = (q.shape[1], q.shape[0])
    else:
        rows = (q.shape[0], q.shape[2], q.shape[1]) if layout == "bshd" else tuple(q.shape[:3])
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse = q.new_empty(rows, dtype=wide)
    row_state = q.new_empty((*rows, 2) if keep_state else (0,), dtype=wide)
    return out, lse, row_state, q.new_empty((2,) if dropout_p else (0,), dtype=torch.int64)


@torch.library.custom_op("cuflash::backward", mutates_args=())
def backward(
    dout: Tensor, lse: Tensor, dlse: Tensor | None, row_state: Tensor, rng_state: Tensor, out: Tensor, q: Tensor,
    k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, alibi: Tensor | None, sink: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None, seqused_q: Tensor | None, seqused_kv: Tensor | None,
    captured: Sequence[Tensor], softmax_scale: float | None, causal: bool, left: int, right: int, softcap: float,
    alignment: str, dropout_p: float, dropout_scheme: str, unbiased_dropout: bool, max_seqlen_q: int | None,
    max_seqlen_k: int | None, num_splits: int, deterministic: bool, precision: str, validate: bool,
    enable_gqa: bool, layout: str, vocabulary: str, text: str, bias_grad: bool, captured_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """(dq, dk, dv, dbias, dsink, dcaptured); the others than three are empty where there is none."""
    options = _options(
        softmax_scale, causal, left, right, softcap, alignment, dropout_p, dropout_scheme, unbiased_dropout,
        max_seqlen_q, max_seqlen_k, num_splits, deterministic, precision, validate, enable_gqa, layout, vocabulary,
        text,
    )  # fmt: skip
    arrays = Arrays(
        q, k, v, mask, bias, alibi, sink, cu_seqlens_q, cu_seqlens_kv, seqused_q, seqused_kv,
        rng_state=rng_state if dropout_p else None, dout=dout, lse=lse, dlse=dlse, row_state=row_state, out=out,
        captured=tuple(captured) or None,
    )  # fmt: skip
    framework: Any = framework_of_type(torch.Tensor)
    dq, dk, dv, *others = gradient(framework, of_gradient(options, bias_grad, captured_grad), arrays)
    dq, dk, dv = (x.contiguous() for x in (dq, dk, dv))  # NumPy's follow the strides of rows before heads
    dbias = others.pop(0) if bias_grad else lse.new_empty(0)
    dsink = lse.new_empty(0) if sink is None else others.pop(0)
    return dq, dk, dv, dbias, dsink, others if captured_grad else []


@backward.register_fake
def _(
    dout: Tensor, lse: Tensor, dlse: Any, row_state: Any, rng_state: Any, out: Any, q: Tensor, k: Tensor, v: Tensor,
    mask: Any, bias: Any, alibi: Any, sink: Any, *others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    captured, (text, bias_grad, captured_grad) = others[4], others[-3:]
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    dbias = lse.new_empty(bias.shape if bias_grad else (0,))
    dsink = lse.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    dcaptured = [lse.new_empty(captured[i].shape) for i in _learned(text)] if captured_grad else []
    return *gradients, dbias, dsink, dcaptured


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    out, lse, row_state, rng_state = output
    ctx.mark_non_differentiable(row_state, rng_state)
    ctx.set_materialize_grads(False)
    captured = inputs[11]
    ctx.save_for_backward(*inputs[:11], out, lse, row_state, rng_state, *captured)
    ctx.rest = inputs[13:32]


def _backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
    saved = ctx.saved_tensors
    given, (out, lse, row_state, rng_state), captured = saved[:11], saved[11:15], list(saved[15:])
    if dout is None:
        if dlse is None:
            return (None,) * 35
        dout = torch.zeros_like(out)
    bias_grad, wanted = ctx.needs_input_grad[4], ctx.needs_input_grad[11]
    learned = _learned(ctx.rest[-1]) if any(wanted or ()) else ()
    dq, dk, dv, dbias, dsink, of_captured = backward(
        dout, lse, dlse, row_state, rng_state, out, *given, captured, *ctx.rest, bias_grad, bool(learned)
    )
    bias, sink = given[4], given[6]
    dbias = dbias.to(bias.dtype) if bias_grad else None
    dcaptured: list[Any] = [None] * len(captured)
    for i, gradient_of in zip(learned, of_captured, strict=True):
        dcaptured[i] = gradient_of.to(captured[i].dtype) if wanted[i] else None
    return dq, dk, dv, None, dbias, None, None if sink is None else dsink, *(None,) * 4, dcaptured, *(None,) * 23


def _learned(text: str) -> tuple[int, ...]:
    """Which of the arrays that are captured have gradients."""
    score = written(text).get("score_mod")
    return tuple(i for i, operand in enumerate(score.operands) if operand.kind == "real") if score else ()


forward.register_autograd(_backward, setup_context=_keep)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise UnsupportedProblem(
        "cuflash has no second derivative of attention. Drop create_graph=True and nested gradients."
    )


backward.register_autograd(_refuse)
