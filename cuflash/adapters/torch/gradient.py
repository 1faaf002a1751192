"""The gradient of a call as a function that autograd records and torch's transforms map, and tangents of calls.

Tangents, and so second derivatives, are computed in host memory alone: the Hessian of a gradient is symmetric, and
pulls back what it pushes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from cuflash.adapters.torch.folded import Folded
from cuflash.errors import UnsupportedProblem
from cuflash.ops import Arrays, Options, Tangents, check
from cuflash.problem import Direction

DIFFERENTIABLE = ("q", "k", "v", "bias", "sink")
CAPTURED = Arrays._fields.index("captured")
"""Where what is captured begins among all arrays, one by one."""
NO_FURTHER = (
    "cuflash has first and second derivatives of attention, and none of these is differentiated again, nor are "
    "tangents or explicit gradients, of flash_attn_vjp and flash_attn_backward. Use "
    "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
_UPSTREAM = ("dout", "dlse")
_WHERE = {name: Arrays._fields.index(name) for name in (*DIFFERENTIABLE, *_UPSTREAM)}


def of_gradient(options: Options, bias_grad: bool, captured_grad: bool = False) -> Options:
    """What the backward of a forward asks for."""
    # Options that are not kept elsewhere may hold the lists of a block mask.
    make = _of_gradient if options.is_kind else _of_gradient.__wrapped__
    return make(options, bias_grad, captured_grad)


@lru_cache(maxsize=1024)
def _of_gradient(options: Options, bias_grad: bool, captured_grad: bool) -> Options:
    return options.replace(num_splits=0, keep_state=False, bias_grad=bias_grad, captured_grad=captured_grad)


def gradient(framework: Any, options: Options, arrays: Arrays) -> tuple[Any, ...]:
    """The plain call of a backward, of gradients as autograd hands them over."""
    return framework.plain("backward", options, _contiguous(arrays))


def _contiguous(arrays: Arrays) -> Arrays:
    """Gradients, and what a hook may have given back, as kernels read them."""
    dout, dlse, row_state = arrays.dout, arrays.dlse, arrays.row_state
    if not dout.is_contiguous() and (dout.stride(-1) != 1 or 0 in dout.stride()):  # sum() gives one number to all
        arrays = arrays._replace(dout=dout.contiguous())
    if dlse is not None and not dlse.is_contiguous():
        arrays = arrays._replace(dlse=dlse.contiguous())
    if row_state is not None and not row_state.is_contiguous():
        arrays = arrays._replace(row_state=row_state.contiguous())
    return arrays


def on_host_of(captured: tuple[Any, ...] | None) -> tuple[np.ndarray | None, ...]:
    """NumPy's arrays among those that are captured."""
    return tuple(x if isinstance(x, np.ndarray) else None for x in captured or ())


def rejoined(on_host: tuple[np.ndarray | None, ...], each: Sequence[Any]) -> Arrays:
    """The arrays of which `Arrays.each` gives these."""
    if not on_host:
        return Arrays(*each)
    own = len(Arrays._fields) - 1
    captured = tuple(x if host is None else host for x, host in zip(each[own:], on_host, strict=True))
    return Arrays._make((*each[:own], captured))


def push_along(
    framework: Any, direction: Direction, options: Options, arrays: Arrays, tangents: Tangents
) -> tuple[Any, ...]:
    """Tangents of the results of a call, of which autograd and maps may want to know."""
    on_host = on_host_of(arrays.captured)
    return _Along.apply(framework, direction, options, on_host, *tangents, *arrays.each())


class _Along(torch.autograd.Function):
    """Tangents of a call's results."""

    @staticmethod
    def forward(framework: Any, direction: Direction, options: Options, on_host: Any, *tensors: Any) -> Any:
        count = len(Tangents._fields)
        return framework.along(direction, options, rejoined(on_host, tensors[count:]), Tangents(*tensors[:count]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedProblem(NO_FURTHER)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedProblem(NO_FURTHER)

    @staticmethod
    def vmap(info: Any, in_dims: Any, framework: Any, direction: Direction, options: Options, *others: Any) -> Any:
        arrays = Arrays(*in_dims[4 + len(Tangents._fields) :][: len(Arrays._fields)])
        mapped = arrays._replace(dout=None, dlse=None)
        if options.dropout_p and any(dim is not None for dim in mapped):
            raise UnsupportedProblem(
                "torch.vmap maps a call with dropout in forward mode or that is differentiated twice, and what it "
                "dropped is not known there. Map over changes alone, or drop nothing."
            )
        return _one_by_one(_Along, info.batch_size, in_dims, (framework, direction, options, *others))


def _one_by_one(function: Any, size: int, dims: Sequence[Any], operands: Sequence[Any]) -> Any:
    """The results of a function on every element, and where they are mapped."""
    each = [
        function.apply(
            *(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(operands, dims, strict=True))
        )
        for i in range(size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return results, (0,) * len(results)


class _AttentionGradient(torch.autograd.Function):
    """(dq, dk, dv), and dbias, dsink and gradients of what is captured where there are."""

    @staticmethod
    def forward(framework: Any, options: Options, own: bool, on_host: Any, *each: Any) -> Any:
        return gradient(framework, options, rejoined(on_host, each))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.framework, ctx.options, ctx.own, ctx.on_host, *each = inputs
        ctx.set_materialize_grads(False)
        if ctx.own:
            ctx.save_for_backward(*each)
            ctx.save_for_forward(*each)

    @staticmethod
    def backward(ctx: Any, *weights: Any) -> Any:
        """Hessians are symmetric: the weights of gradients are a change of what these are of."""
        arrays = _own(ctx)
        _refuse_captured(ctx, any(ctx.needs_input_grad[4 + CAPTURED :]))
        dq, dk, dv, *others = weights
        dbias = others.pop(0) if ctx.options.bias_grad else None
        dbias = None if dbias is None else dbias.to(arrays.bias.dtype)
        along = Tangents(dq, dk, dv, dbias, None if arrays.sink is None else others.pop(0))
        wanted = {name: ctx.needs_input_grad[4 + at] for name, at in _WHERE.items()}
        by_name: dict[str, Any] = {}
        if any(wanted[name] for name in DIFFERENTIABLE):
            options = of_gradient(ctx.options, wanted["bias"])
            results = list(push_along(ctx.framework, "backward", options, _contiguous(arrays), along))
            by_name = dict(zip(("q", "k", "v"), results, strict=False))
            if wanted["bias"]:
                by_name["bias"] = results[3].to(arrays.bias.dtype)
            if arrays.sink is not None:
                by_name["sink"] = results[-1]
        if wanted["dout"] or wanted["dlse"]:
            options = of_gradient(ctx.options, False)
            read = arrays._replace(dout=None, lse=None, dlse=None, row_state=None, out=None)
            by_name |= dict(zip(_UPSTREAM, push_along(ctx.framework, "forward", options, read, along), strict=True))
        changes = (by_name.get(name) if wanted.get(name) else None for name in Arrays._fields[:-1])
        return None, None, None, None, *changes, *(None for _ in ctx.on_host or (None,))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        own, of_captured = tangents[4 : 4 + CAPTURED], tangents[4 + CAPTURED :]
        _refuse_captured(ctx, any(x is not None for x in of_captured))
        arrays, changes = _own(ctx), Arrays(*own)
        along = Tangents(*(getattr(changes, name) for name in (*DIFFERENTIABLE, *_UPSTREAM)))
        return push_along(ctx.framework, "backward", ctx.options, _contiguous(arrays), along)

    @staticmethod
    def vmap(info: Any, in_dims: Any, framework: Any, options: Options, own: bool, on_host: Any, *arrays: Any) -> Any:
        given = Arrays(*arrays)
        if options.dropout_p and Arrays(*in_dims[4:]).out is None:  # heads would drop other things than the forward's
            operands = framework, options, own, on_host, *arrays
            return _one_by_one(_AttentionGradient, info.batch_size, in_dims, operands)
        fold = Folded(info.batch_size, options, given, in_dims[4:])
        results = recorded_gradient(framework, options, own, on_host, *fold.arrays())
        dq, dk, dv, *others = results
        unfolded = [fold.unfolded(x, fold.heads) for x in (dq, dk, dv)]
        dims = [fold.heads] * 3
        if options.bias_grad:
            unfolded.append(fold.bias_gradient(others[0]))
            dims.append(0)
        if given.sink is not None:
            unfolded.append(others[-1].unflatten(0, (info.batch_size, -1)))
            dims.append(0)
        return tuple(unfolded), tuple(dims)


recorded_gradient = _AttentionGradient.apply


def _refuse_captured(ctx: Any, some: bool) -> None:
    """Refuse second derivatives by what a written score reads."""
    check.refuse_second_derivatives(ctx.options.replace(captured_grad=ctx.options.captured_grad or some))


def _own(ctx: Any) -> Arrays:
    """What a gradient that autograd asked for read; one that a user asked for may be of another output."""
    if not ctx.own:
        raise UnsupportedProblem(NO_FURTHER)
    return rejoined(ctx.on_host, ctx.saved_tensors)
