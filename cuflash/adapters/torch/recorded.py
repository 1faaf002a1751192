"""Attention that autograd records and torch's transforms map: gradients of q, k, v, a bias and a sink.

A forward of `torch.autograd.Function` keeps what ``ops.vjp`` keeps. Its gradient is a Function of its own
(``gradient.py``) where something may be recorded or mapped there too, and the plain call where nothing is. A call of q,
k and v alone takes a shorter way (``three.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cuflash.adapters.torch.folded import Folded
from cuflash.adapters.torch.gradient import (
    CAPTURED,
    DIFFERENTIABLE,
    gradient,
    of_gradient,
    on_host_of,
    push_along,
    recorded_gradient,
    rejoined,
)
from cuflash.adapters.torch.three import is_of_three, of_three, out_of_three
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import Arrays, Options, Tangents
from cuflash.ops.lengths import with_lengths
from cuflash.problem import Direction

_READ = Arrays._fields.index("rng_state")
"""How many arrays come before those that only a backward reads, or that are written."""
_OTHERS = [(i, name) for i, name in enumerate(Arrays._fields[:_READ]) if name not in DIFFERENTIABLE]
"""What a forward reads and has no gradient of, and where among its arrays."""
_BIAS = Arrays._fields.index("bias")

NO_FORWARD_MODE = (
    "cuflash has no forward mode for torch here. Take gradients by backward() or torch.func.grad, or call "
    "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
_VMAP = torch._C._functorch.TransformType.Vmap


def answer(
    framework: Any,
    direction: Direction,
    options: Options,
    arrays: Arrays,
    generator: Any = None,
    cached: int | None = None,
) -> tuple[Any, ...]:
    """Answer a call on tensors of which some may require grad, be mapped or be cast by autocast.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If something is to have a gradient that has none.
    """
    mapped = torch._C._are_functorch_transforms_active()
    if mapped and any(level.key() == _VMAP for level in torch._C._functorch.get_interpreter_stack() or ()):
        refuse_written(options, "inside torch.vmap")
    if direction == "backward":
        if not (mapped or torch.is_grad_enabled()):
            return framework.plain(direction, options, arrays)
        return recorded_gradient(framework, options, False, on_host_of(arrays.captured), *arrays.each())
    arrays = autocast(arrays)
    if not (mapped or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arrays.each()))):
        return framework.plain(direction, options, arrays, generator, cached)
    if not mapped:
        return recorded(framework, options, arrays, generator)
    arrays = differentiated(options, arrays)
    out, lse, row_state, *drawn = _Mapped.apply(
        framework, options, generator, on_host_of(arrays.captured), *arrays.each()
    )  # fmt: skip
    return (out, lse, row_state, *drawn) if options.keep_state else (out, lse, *drawn)


def recorded(
    framework: Any, options: Options, arrays: Arrays, generator: Any = None, alone: bool = False
) -> tuple[Any, ...]:
    """Answer a forward that autograd records, and nothing else of torch's has to see; with out alone or with all else.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If something is to have a gradient that has none.
    """
    if is_of_three(options, arrays):
        if alone:
            return (out_of_three((framework, options), *arrays[:3]),)
        return of_three((framework, options), *arrays[:3])
    arrays = differentiated(options, arrays)
    options = with_lengths("forward", options, arrays)
    # Autograd is shown what it may ask gradients of, as each argument more takes it time.
    captured = arrays.captured or ()
    results = _Recorded.apply(framework, options, generator, arrays, *arrays[:3], arrays.bias, arrays.sink, *captured)
    return results if options.keep_state else (*results[:2], *results[3:])


def refuse_written(options: Options, where: str) -> None:
    """Refuse written scores and masks, and lists of blocks, where torch does not see what they read."""
    for name in ("score_mod", "mask_mod", "block_mask"):
        if getattr(options, name) is not None:
            raise UnsupportedProblem(
                f"{name} is given {where}, which cuflash does not support. Call it on plain tensors."
            )


def autocast(arrays: Arrays) -> Arrays:
    """q, k and v in the dtype of torch.autocast where it is on, as torch's own attention takes them."""
    kind = arrays.q.device.type
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind):
        return arrays
    dtype = torch.get_autocast_dtype(kind)
    wide = (torch.float32, torch.float16, torch.bfloat16)
    q, k, v = (x.to(dtype) if x.dtype in wide else x for x in arrays[:3])
    bias = arrays.bias
    if bias is not None and bias.dtype in wide[1:]:
        bias = bias.to(q.dtype)
    return arrays._replace(q=q, k=k, v=v, bias=bias)


def differentiated(options: Options, arrays: Arrays) -> Arrays:
    """Refuse what would have no gradient; a bias that is expanded is taken before it is."""
    if arrays.out is not None:
        raise InvalidArgument(
            f"{options.name('out')} is given and a gradient may be taken, which torch does not record through arrays "
            f"that are written. Drop {options.name('out')}, or call under torch.no_grad()."
        )
    if options.cache:
        raise UnsupportedProblem(
            f"{options.name('k')} is a cache, and there are no gradients of it or beside it. "
            "Call under torch.no_grad() or pass detached tensors; or call flash_attn_func."
        )
    for i, name in _OTHERS:
        x = arrays[i]
        if x is None:
            continue
        if name == "table":
            raise UnsupportedProblem(
                f"{options.name(name)} is given, and there are no gradients through a cache. "
                "Call under torch.no_grad() or pass detached tensors."
            )
        if x.requires_grad:
            raise UnsupportedProblem(
                f"{options.name(name)} requires grad, and there is no gradient of it. "
                f"Pass {options.name(name)}.detach()."
            )
    read = len(options.score_mod.operands) if options.score_mod else 0
    for i, x in enumerate(arrays.captured or ()):
        if i >= read and getattr(x, "requires_grad", False):
            name = options.name(f"captured{i}")
            raise UnsupportedProblem(f"{name} requires grad, and a mask has no gradient. Pass it detached.")
    bias = arrays.bias
    if bias is None or 0 not in bias.stride():
        return arrays
    for axis, (n, stride) in enumerate(zip(bias.shape, bias.stride(), strict=True)):
        if n > 1 and stride == 0:
            bias = bias.narrow(axis, 0, 1)
    return arrays._replace(bias=bias)


class _Recorded(torch.autograd.Function):
    """(out, lse, row_state), and rng_state with dropout.

    What has gradients, q, k, v, bias, sink and what is captured, comes once more behind all arrays.
    """

    @staticmethod
    def forward(ctx: Any, framework: Any, options: Options, generator: Any, arrays: Arrays, *_: Any) -> Any:
        output = framework.plain("forward", options.keeping, arrays, generator)
        _keep(ctx, framework, options, arrays, output)
        if torch.autograd.forward_ad._current_level >= 0:
            ctx.given = arrays, output[3] if len(output) > 3 else None
        return output

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
        _, _, _, _, _, _, _, bias_grad, _, *captured_grads = ctx.needs_input_grad
        return None, None, None, None, *_gradients(ctx, dout, dlse, bias_grad, captured_grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _pushed(ctx, tangents[4:9], tangents[9:])


def _pushed(ctx: Any, changes: Sequence[Any], of_captured: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Tangents of the results of a forward, for those of q, k, v, bias and sink."""
    if any(x is not None for x in of_captured):
        raise UnsupportedProblem("what score_mod reads has a tangent, and cuflash has no forward mode of it.")
    arrays, drawn = ctx.given
    pushed = push_along(ctx.framework, "forward", ctx.options, arrays._replace(rng_state=drawn), Tangents(*changes))
    return *pushed, None, *(() if drawn is None else (None,))


def _keep(ctx: Any, framework: Any, options: Options, arrays: Sequence[Any], output: tuple[Any, ...]) -> None:
    """Save what the gradient reads."""
    out, lse, row_state, *drawn = output
    ctx.framework, ctx.options = framework, options
    ctx.mark_non_differentiable(row_state, *drawn)
    ctx.set_materialize_grads(False)
    ctx.on_host = on_host_of(arrays[-1])
    tensors = (x if host is None else None for x, host in zip(arrays[-1] or (), ctx.on_host, strict=True))
    ctx.save_for_backward(*arrays[:_READ], drawn[0] if drawn else None, out, lse, row_state, *tensors)


def _gradients(ctx: Any, dout: Any, dlse: Any, bias_grad: bool, captured_grads: Sequence[bool] = ()) -> tuple[Any, ...]:
    """Of q, k, v, bias, sink and what is captured."""
    saved = ctx.saved_tensors
    given, (rng_state, out, lse, row_state, *tensors) = saved[:_READ], saved[_READ:]
    if dout is None:
        if dlse is None:
            return (None,) * (len(DIFFERENTIABLE) + len(tensors))
        dout = torch.zeros_like(out)
    options = of_gradient(ctx.options, bias_grad, any(captured_grads))
    each = *given, rng_state, dout, lse, dlse, row_state, out, None, None, None, *(tensors or (None,))
    arrays = rejoined(ctx.on_host, each)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        dq, dk, dv, *others = recorded_gradient(ctx.framework, options, True, ctx.on_host, *each)
    else:
        dq, dk, dv, *others = gradient(ctx.framework, options, arrays)
    dbias = others.pop(0).to(arrays.bias.dtype) if bias_grad else None
    dsink = None if arrays.sink is None else others.pop(0)
    dcaptured: list[Any] = [None] * len(tensors)
    if options.captured_grad and options.score_mod is not None:
        for i, operand in enumerate(options.score_mod.operands):
            if operand.kind == "real":
                sums = others.pop(0)
                dcaptured[i] = sums.to(tensors[i].dtype) if captured_grads[i] else None
    return dq, dk, dv, dbias, dsink, *dcaptured


class _Mapped(torch.autograd.Function):
    """The same inside torch's transforms, which map tensors that are arguments, and in forms that they know."""

    @staticmethod
    def forward(framework: Any, options: Options, generator: Any, on_host: Any, *each: Any) -> Any:
        return framework.plain("forward", options.replace(keep_state=True), rejoined(on_host, each), generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        framework, options, _, on_host, *each = inputs
        _keep(ctx, framework, options, rejoined(on_host, each), output)
        ctx.save_for_forward(*each, *output[3:])

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
        captured_grads = ctx.needs_input_grad[4 + CAPTURED :]
        gradients = _gradients(ctx, dout, dlse, ctx.needs_input_grad[4 + _BIAS], captured_grads)
        dq, dk, dv, dbias, dsink, *dcaptured = gradients
        own = Arrays(dq, dk, dv, bias=dbias, sink=dsink)[:CAPTURED]
        return None, None, None, None, *own, *(dcaptured or (None,))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        count = CAPTURED + max(1, len(ctx.on_host))
        arrays, drawn = rejoined(ctx.on_host, ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        ctx.given = arrays, drawn[0] if drawn else None
        changes = Arrays(*tangents[4 : 4 + CAPTURED])
        return _pushed(ctx, [getattr(changes, name) for name in DIFFERENTIABLE], tangents[4 + CAPTURED :])

    @staticmethod
    def vmap(info: Any, in_dims: Any, framework: Any, options: Options, generator: Any, _: Any, *arrays: Any) -> Any:
        if options.dropout_p and info.randomness != "different":
            raise UnsupportedProblem(
                f"randomness is {info.randomness!r} in torch.vmap, and dropout of what is mapped differs along it. "
                "Pass randomness='different' to torch.vmap."
            )
        fold = Folded(info.batch_size, options, Arrays(*arrays), in_dims[4:])
        out, lse, row_state, *drawn = _Mapped.apply(framework, options, generator, (), *fold.arrays())
        results = fold.unfolded(out, fold.heads), fold.unfolded(lse, fold.rows), fold.unfolded(row_state, fold.rows)
        return (*results, *drawn), (fold.heads, fold.rows, fold.rows, *(None for _ in drawn))
