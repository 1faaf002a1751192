"""Attention that autograd records and torch's transforms map: gradients of q, k, v, a bias and a sink.

A forward of `torch.autograd.Function` keeps what ``ops.vjp`` keeps. Its gradient is a Function of its own where
something may be recorded or mapped there too, and the plain call where nothing is. Tangents of both, and so second
derivatives, are computed in host memory alone: the Hessian of a gradient is symmetric, and pulls back what it pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import torch

from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import Arrays, Options, Tangents, check, launch, new
from cuflash.ops.lengths import with_lengths
from cuflash.problem import Direction

_READ = Arrays._fields.index("rng_state")
"""How many arrays come before those that only a backward reads, or that are written."""
_DIFFERENTIABLE = ("q", "k", "v", "bias", "sink")
_OTHERS = [(i, name) for i, name in enumerate(Arrays._fields[:_READ]) if name not in _DIFFERENTIABLE]
"""What a forward reads and has no gradient of, and where among its arrays."""
_BIAS = Arrays._fields.index("bias")
_CAPTURED = Arrays._fields.index("captured")
"""Where what is captured begins among all arrays, one by one."""

NO_FORWARD_MODE = (
    "cuflash has no forward mode for torch here. Take gradients by backward() or torch.func.grad, or call "
    "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
NO_FURTHER = (
    "cuflash has first and second derivatives of attention, and none of these is differentiated again, nor are "
    "tangents or explicit gradients, of flash_attn_vjp and flash_attn_backward. Use "
    "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
_VMAP = torch._C._functorch.TransformType.Vmap
_UPSTREAM = ("dout", "dlse")
_WHERE = {name: Arrays._fields.index(name) for name in (*_DIFFERENTIABLE, *_UPSTREAM)}


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
        return _AttentionGradient.apply(framework, options, False, _on_host(arrays.captured), *arrays.each())
    arrays = autocast(arrays)
    if not (mapped or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arrays.each()))):
        return framework.plain(direction, options, arrays, generator, cached)
    if not mapped:
        return recorded(framework, options, arrays, generator)
    arrays = differentiated(options, arrays)
    out, lse, row_state, *drawn = _Mapped.apply(
        framework, options, generator, _on_host(arrays.captured), *arrays.each()
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
            return (_OutOfThree.apply((framework, options), *arrays[:3]),)
        return _OfThree.apply((framework, options), *arrays[:3])
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


def is_of_three(options: Options, arrays: Arrays) -> bool:
    """Whether a forward is of q, k and v and nothing else."""
    for x in arrays[3:]:
        if x is not None:
            return False
    more = options.dropout_p or options.keep_state or options.cache or options.block_mask is not None
    return not more and _ad._current_level < 0


_ad = torch.autograd.forward_ad


class _OfThree(torch.autograd.Function):
    """(out, lse) of q, k and v and nothing else, where every object that autograd keeps or returns is time.

    `_Recorded` has the same and all else that a call may have.
    """

    @staticmethod
    def forward(ctx: Any, asked: tuple[Any, Options], q: Any, k: Any, v: Any) -> Any:
        framework, options = asked
        pair = None
        if q.is_cuda:
            pair, pointers = _Pair.of(framework, options, q, k, v)
        if pair is None:
            out, lse, row_state = framework.plain("forward", options.keeping, new(Arrays, q=q, k=k, v=v))
            ctx.found = None, (), asked
        else:
            out, lse, row_state, pointers = pair.start(pointers)
            ctx.found = pair, pointers, asked
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, row_state)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        saved = ctx.saved_tensors
        pair, pointers, asked = ctx.found
        if pair is not None and dlse is None and dout is not None and not (_is_recording() or _is_mapping()):
            gradients = pair.pull_back(pointers, saved, dout)
            if gradients is not None:
                return gradients
        if dout is None:
            if dlse is None:
                return (None,) * 4
            dout = torch.zeros_like(saved[3])
        return _pulled_back(asked, saved, dout, dlse)


class _OutOfThree(torch.autograd.Function):
    """The same with out alone: on a GPU lse and row_state, which nobody is shown, lie in one array, `rows`."""

    @staticmethod
    def forward(ctx: Any, asked: tuple[Any, Options], q: Any, k: Any, v: Any) -> Any:
        framework, options = asked
        pair = None
        if q.is_cuda:
            pair, pointers = _Pair.of(framework, options, q, k, v)
        if pair is None:
            out, *rows = framework.plain("forward", options.keeping, new(Arrays, q=q, k=k, v=v))
            ctx.found = None, (), asked
            ctx.save_for_backward(q, k, v, out, *rows)
        else:
            out, rows, pointers = pair.attend(pointers)
            ctx.found = pair, pointers, asked
            ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        saved = ctx.saved_tensors
        pair, pointers, asked = ctx.found
        if pair is not None:
            if not (_is_recording() or _is_mapping()):
                gradients = pair.pull_back(pointers, saved, dout)
                if gradients is not None:
                    return gradients
            saved = *saved[:4], *pair.rows.parts(saved[4])
        return _pulled_back(asked, saved, dout, None)


out_of_three = _OutOfThree.apply

_is_recording, _is_mapping = torch.is_grad_enabled, torch._C._are_functorch_transforms_active


def _pulled_back(asked: tuple[Any, Options], saved: tuple[Any, ...], dout: Any, dlse: Any) -> tuple[Any, ...]:
    """No gradient of what was asked, and those of q, k and v."""
    framework, options = asked
    q, k, v, out, lse, row_state = saved
    options = of_gradient(options, False)
    arrays = new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, row_state=row_state, out=out)
    if _is_recording() or _is_mapping():
        return None, *_AttentionGradient.apply(framework, options, True, (), *arrays)
    return None, *gradient(framework, options, arrays)


class _Pair:
    """A forward on a GPU of q, k and v alone, and its gradient where dout is in one piece: found together.

    Autograd pulls back in a thread of its own, where the interpreter's objects are in no cache: the less of them the
    better. So what answers is put together once, with all it needs beside it.
    """

    def __init__(self, framework: Any, options: Options, few: tuple[Any, Any, Any]) -> None:
        self._framework, self._options = framework, check.settled(options)
        self._strides = tuple(x.stride() for x in few)
        self.forward = launch.prepare(framework, "forward", self._options.keeping, Arrays(*few))
        self._pull: Callable[[tuple[int, ...]], tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, framework: Any, options: Options, q: Any, k: Any, v: Any) -> tuple[_Pair | None, Sequence[int]]:
        """That of tensors like these, and their pointers; None where there is nothing to attend to."""
        if not type(q) is type(k) is type(v):
            framework.describe(options.manner.names[:3], (q, k, v))  # refuses what is no plain tensor
        try:
            pointers = at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
            key = (
                options, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                q.device, k.device, v.device, q.is_neg(), k.is_neg(), v.is_neg(), at_q & 15, at_k & 15, at_v & 15,
                at_k == at_v,  # values may be read with the keys
            )  # fmt: skip
            pair = _pairs.get(key) if at_q and at_k and at_v else None
        except RuntimeError:  # there is no memory, as is said below
            pair = None
        if pair is None:
            framework.describe(options.manner.names[:3], (q, k, v))
            pair = cls(framework, options, (q, k, v))
            if not pair.forward.launches:
                return None, pointers
            if len(_pairs) >= _MAX_PAIRS:
                _pairs.clear()
            if options.is_kind:
                _pairs[key] = pair
        return pair, pointers

    def start(self, pointers: Sequence[int]) -> tuple[Any, Any, Any, tuple[int, ...]]:
        """out, lse and row_state, and the pointers of all that the gradient reads of the forward."""
        prepared = self.forward
        if (there := self._framework.elsewhere(prepared.device)) is not None:
            with there:
                return self.start(pointers)
        out, lse, row_state, *_ = prepared.start(pointers)
        return out, lse, row_state, (*pointers, out.data_ptr(), lse.data_ptr(), row_state.data_ptr())

    @cached_property
    def rows(self) -> _Rows:
        """Of out alone, where lse and row_state lie."""
        with self._framework.context(self.forward.device):
            return _Rows(*(allocate() for allocate in self.forward.allocations[1:3]))

    @cached_property
    def attend(self) -> Callable[[Sequence[int]], tuple[Any, Any, tuple[int, ...]]]:
        """What gives out, `rows`, and the pointers of all that the gradient reads of the forward, row_state's last."""
        framework, prepared, start = self._framework, self.forward, self.rows.start
        launched, device = prepared.launch, prepared.device
        allocate_out, _, _, *others = prepared.allocations
        with framework.context(device):
            allocate_rows = framework.allocator(self.rows.shape, self.rows.dtype, device)
        elsewhere = framework.elsewhere

        def attend(pointers: Sequence[int]) -> tuple[Any, Any, tuple[int, ...]]:
            if (there := elsewhere(device)) is not None:
                with there:
                    return attend(pointers)
            out, rows = allocate_out(), allocate_rows()
            at_rows = rows.data_ptr()
            numbers = *pointers, out.data_ptr(), at_rows, at_rows + start
            if others:
                cleared = [allocate() for allocate in others]
                launched((*numbers, *framework.pointers(cleared)))
            else:
                launched(numbers)
            return out, rows, numbers

        return attend

    def pull_back(self, pointers: tuple[int, ...], saved: tuple[Any, ...], dout: Any) -> tuple[Any, ...] | None:
        """Gradients from what was saved, and None for what is none; None where that, or dout, is not as it should be.

        Hooks of saved tensors may give back others than the forward had, and callers change theirs by `Tensor.data`.
        """
        q, k, v, out, *rows = saved
        at_q, at_k, at_v, at_out, at_lse, at_row_state = pointers
        if (
            q.data_ptr() != at_q
            or k.data_ptr() != at_k
            or v.data_ptr() != at_v
            or out.data_ptr() != at_out
            or rows[0].data_ptr() != at_lse
            or rows[-1].data_ptr() != (at_row_state if len(rows) == 2 else at_lse)
            or (q.stride(), k.stride(), v.stride()) != self._strides
            or not dout.is_contiguous()
            or dout.is_neg()
        ):
            return None
        at = dout.data_ptr()
        if at & 15:
            return None
        pull = self._pull
        if pull is None:
            lse, row_state = rows if len(rows) == 2 else self.rows.parts(*rows)
            arrays = Arrays(q, k, v, dout=dout, lse=lse, row_state=row_state, out=out)
            pull = self._pull = self._pulling(arrays)
        return pull((at_q, at_k, at_v, at, at_lse, at_row_state, at_out))

    def _pulling(self, arrays: Arrays) -> Callable[[tuple[int, ...]], tuple[Any, ...]]:
        """What gives gradients for pointers of what these are."""
        framework = self._framework
        prepared = launch.prepare(framework, "backward", of_gradient(self._options, False), arrays)
        launched, device = prepared.launch, prepared.device
        allocate_dq, allocate_dk, allocate_dv, *others = prepared.allocations
        elsewhere = framework.elsewhere

        def pull(numbers: tuple[int, ...]) -> tuple[Any, ...]:
            if (there := elsewhere(device)) is not None:
                with there:
                    return pull(numbers)
            dq, dk, dv = allocate_dq(), allocate_dk(), allocate_dv()
            numbers = *numbers, dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
            if others:
                cleared = [allocate() for allocate in others]
                launched((*numbers, *framework.pointers(cleared)))
            else:
                launched(numbers)
            return None, dq, dk, dv

        return pull


class _Rows:
    """Where lse and row_state lie in one array."""

    def __init__(self, lse: Any, row_state: Any) -> None:
        self._shapes = lse.shape, row_state.shape
        self._first = -(-lse.numel() // _ALIGNED) * _ALIGNED
        self.dtype = lse.dtype
        self.shape = (self._first + row_state.numel(),)
        self.start = self._first * lse.element_size()
        """At which byte row_state does."""

    def parts(self, rows: Any) -> tuple[Any, Any]:
        """Both as tensors of their own shapes."""
        lse, row_state = self._shapes
        return rows[: prod(lse)].view(lse), rows[self._first :].view(row_state)


_ALIGNED = 64
"""Numbers of which arrays in one memory hold a multiple."""
_MAX_PAIRS = 1024
_pairs: dict[tuple[Any, ...], _Pair] = {}


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
    pushed = _along(ctx.framework, "forward", ctx.options, arrays._replace(rng_state=drawn), Tangents(*changes))
    return *pushed, None, *(() if drawn is None else (None,))


def _along(
    framework: Any, direction: Direction, options: Options, arrays: Arrays, tangents: Tangents
) -> tuple[Any, ...]:
    """Tangents of the results of a call, of which autograd and maps may want to know."""
    on_host = _on_host(arrays.captured)
    return _Along.apply(framework, direction, options, on_host, *tangents, *arrays.each())


class _Along(torch.autograd.Function):
    """Tangents of a call's results."""

    @staticmethod
    def forward(framework: Any, direction: Direction, options: Options, on_host: Any, *tensors: Any) -> Any:
        count = len(Tangents._fields)
        return framework.along(direction, options, _rejoined(on_host, tensors[count:]), Tangents(*tensors[:count]))

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


def _keep(ctx: Any, framework: Any, options: Options, arrays: Sequence[Any], output: tuple[Any, ...]) -> None:
    """Save what the gradient reads."""
    out, lse, row_state, *drawn = output
    ctx.framework, ctx.options = framework, options
    ctx.mark_non_differentiable(row_state, *drawn)
    ctx.set_materialize_grads(False)
    ctx.on_host = _on_host(arrays[-1])
    tensors = (x if host is None else None for x, host in zip(arrays[-1] or (), ctx.on_host, strict=True))
    ctx.save_for_backward(*arrays[:_READ], drawn[0] if drawn else None, out, lse, row_state, *tensors)


def _on_host(captured: tuple[Any, ...] | None) -> tuple[np.ndarray | None, ...]:
    """NumPy's arrays among those that are captured."""
    return tuple(x if isinstance(x, np.ndarray) else None for x in captured or ())


def _rejoined(on_host: tuple[np.ndarray | None, ...], each: Sequence[Any]) -> Arrays:
    """The arrays of which `Arrays.each` gives these."""
    if not on_host:
        return Arrays(*each)
    own = len(Arrays._fields) - 1
    captured = tuple(x if host is None else host for x, host in zip(each[own:], on_host, strict=True))
    return Arrays._make((*each[:own], captured))


def _gradients(ctx: Any, dout: Any, dlse: Any, bias_grad: bool, captured_grads: Sequence[bool] = ()) -> tuple[Any, ...]:
    """Of q, k, v, bias, sink and what is captured."""
    saved = ctx.saved_tensors
    given, (rng_state, out, lse, row_state, *tensors) = saved[:_READ], saved[_READ:]
    if dout is None:
        if dlse is None:
            return (None,) * (len(_DIFFERENTIABLE) + len(tensors))
        dout = torch.zeros_like(out)
    options = of_gradient(ctx.options, bias_grad, any(captured_grads))
    each = *given, rng_state, dout, lse, dlse, row_state, out, None, None, None, *(tensors or (None,))
    arrays = _rejoined(ctx.on_host, each)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        dq, dk, dv, *others = _AttentionGradient.apply(ctx.framework, options, True, ctx.on_host, *each)
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
        return framework.plain("forward", options.replace(keep_state=True), _rejoined(on_host, each), generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        framework, options, _, on_host, *each = inputs
        _keep(ctx, framework, options, _rejoined(on_host, each), output)
        ctx.save_for_forward(*each, *output[3:])

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
        captured_grads = ctx.needs_input_grad[4 + _CAPTURED :]
        gradients = _gradients(ctx, dout, dlse, ctx.needs_input_grad[4 + _BIAS], captured_grads)
        dq, dk, dv, dbias, dsink, *dcaptured = gradients
        own = Arrays(dq, dk, dv, bias=dbias, sink=dsink)[:_CAPTURED]
        return None, None, None, None, *own, *(dcaptured or (None,))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        count = _CAPTURED + max(1, len(ctx.on_host))
        arrays, drawn = _rejoined(ctx.on_host, ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        ctx.given = arrays, drawn[0] if drawn else None
        changes = Arrays(*tangents[4 : 4 + _CAPTURED])
        return _pushed(ctx, [getattr(changes, name) for name in _DIFFERENTIABLE], tangents[4 + _CAPTURED :])

    @staticmethod
    def vmap(info: Any, in_dims: Any, framework: Any, options: Options, generator: Any, _: Any, *arrays: Any) -> Any:
        if options.dropout_p and info.randomness != "different":
            raise UnsupportedProblem(
                f"randomness is {info.randomness!r} in torch.vmap, and dropout of what is mapped differs along it. "
                "Pass randomness='different' to torch.vmap."
            )
        fold = _Folded(info.batch_size, options, Arrays(*arrays), in_dims[4:])
        out, lse, row_state, *drawn = _Mapped.apply(framework, options, generator, (), *fold.arrays())
        results = fold.unfolded(out, fold.heads), fold.unfolded(lse, fold.rows), fold.unfolded(row_state, fold.rows)
        return (*results, *drawn), (fold.heads, fold.rows, fold.rows, *(None for _ in drawn))


class _AttentionGradient(torch.autograd.Function):
    """(dq, dk, dv), and dbias, dsink and gradients of what is captured where there are."""

    @staticmethod
    def forward(framework: Any, options: Options, own: bool, on_host: Any, *each: Any) -> Any:
        return gradient(framework, options, _rejoined(on_host, each))

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
        _refuse_captured(ctx, any(ctx.needs_input_grad[4 + _CAPTURED :]))
        dq, dk, dv, *others = weights
        dbias = others.pop(0) if ctx.options.bias_grad else None
        dbias = None if dbias is None else dbias.to(arrays.bias.dtype)
        along = Tangents(dq, dk, dv, dbias, None if arrays.sink is None else others.pop(0))
        wanted = {name: ctx.needs_input_grad[4 + at] for name, at in _WHERE.items()}
        by_name: dict[str, Any] = {}
        if any(wanted[name] for name in _DIFFERENTIABLE):
            options = of_gradient(ctx.options, wanted["bias"])
            results = list(_along(ctx.framework, "backward", options, _contiguous(arrays), along))
            by_name = dict(zip(("q", "k", "v"), results, strict=False))
            if wanted["bias"]:
                by_name["bias"] = results[3].to(arrays.bias.dtype)
            if arrays.sink is not None:
                by_name["sink"] = results[-1]
        if wanted["dout"] or wanted["dlse"]:
            options = of_gradient(ctx.options, False)
            read = arrays._replace(dout=None, lse=None, dlse=None, row_state=None, out=None)
            by_name |= dict(zip(_UPSTREAM, _along(ctx.framework, "forward", options, read, along), strict=True))
        changes = (by_name.get(name) if wanted.get(name) else None for name in Arrays._fields[:-1])
        return None, None, None, None, *changes, *(None for _ in ctx.on_host or (None,))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        own, of_captured = tangents[4 : 4 + _CAPTURED], tangents[4 + _CAPTURED :]
        _refuse_captured(ctx, any(x is not None for x in of_captured))
        arrays, changes = _own(ctx), Arrays(*own)
        along = Tangents(*(getattr(changes, name) for name in (*_DIFFERENTIABLE, *_UPSTREAM)))
        return _along(ctx.framework, "backward", ctx.options, _contiguous(arrays), along)

    @staticmethod
    def vmap(info: Any, in_dims: Any, framework: Any, options: Options, own: bool, on_host: Any, *arrays: Any) -> Any:
        given = Arrays(*arrays)
        if options.dropout_p and Arrays(*in_dims[4:]).out is None:  # heads would drop other things than the forward's
            operands = framework, options, own, on_host, *arrays
            return _one_by_one(_AttentionGradient, info.batch_size, in_dims, operands)
        fold = _Folded(info.batch_size, options, given, in_dims[4:])
        results = _AttentionGradient.apply(framework, options, own, on_host, *fold.arrays())
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


def _refuse_captured(ctx: Any, some: bool) -> None:
    """Refuse second derivatives by what a written score reads."""
    check.refuse_second_derivatives(ctx.options.replace(captured_grad=ctx.options.captured_grad or some))


def _own(ctx: Any) -> Arrays:
    """What a gradient that autograd asked for read; one that a user asked for may be of another output."""
    if not ctx.own:
        raise UnsupportedProblem(NO_FURTHER)
    return _rejoined(ctx.on_host, ctx.saved_tensors)


class _Folded:
    """Arrays of a mapped call as those of one call with as many more heads."""

    def __init__(self, size: int, options: Options, arrays: Arrays, dims: tuple[int | None, ...]) -> None:
        self._size, self._options, self._arrays = size, options, arrays
        self._dims = Arrays(*dims)
        varlen = arrays.cu_seqlens_q is not None
        self.heads, self.rows = options.axes(varlen).index("h"), options.row_axes(varlen).index("h")
        q, dim = arrays.q, self._dims.q
        shape = [n for axis, n in enumerate(q.shape) if dim is None or axis != dim % q.ndim]
        self._heads_q = shape[self.heads]
        axes = dict.fromkeys(("q", "k", "v", "dout", "out"), self.heads)
        self._axes = axes | dict.fromkeys(("lse", "dlse", "row_state"), self.rows) | {"sink": 0}

    def arrays(self) -> Arrays:
        """The arrays of the one call."""
        given = zip(Arrays._fields, self._arrays, self._dims, strict=True)
        return Arrays(*(None if x is None else self._folded(name, x, dim) for name, x, dim in given))

    def _folded(self, name: str, x: Any, dim: int | None) -> Any:
        if name in ("mask", "bias"):
            x, dim = self._pairs(name, x, dim)
            return x if dim is None else x.flatten(1, 2)
        axis = self._axes.get(name)
        if name == "alibi":
            axis = x.ndim - 1 if dim is None else x.ndim - 2
        if axis is None:
            if dim is not None:
                raise UnsupportedProblem(
                    f"{self._options.name(name)} is mapped by torch.vmap, and it belongs to a whole call. "
                    "Map over tensors alone, or pack the sequences."
                )
            return x
        if dim is None:
            x = x.unsqueeze(axis).expand(*x.shape[:axis], self._size, *x.shape[axis:])
        else:
            x = x.movedim(dim, axis)
        x = x.flatten(axis, axis + 1)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def _pairs(self, name: str, x: Any, dim: int | None) -> tuple[Any, int | None]:
        """A tensor of pairs as (b, mapped, heads, rows, columns), and its mapped axis; as it is and None if it may."""
        gradient = name == "bias" and self._options.bias_grad
        if dim is None and not gradient and (x.ndim < 3 or x.shape[-3] == 1):
            return x, None
        x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0).expand(self._size, *x.shape)
        x = x.reshape(x.shape[0], *[1] * (5 - x.ndim), *x.shape[1:]).movedim(0, 1)
        x = x.expand(*x.shape[:2], self._heads_q, *x.shape[3:])
        return (x.contiguous() if gradient else x), 1

    def unfolded(self, x: Any, axis: int) -> Any:
        """A result of the one call, mapped along an axis in front of its heads."""
        return x.unflatten(axis, (self._size, -1))

    def bias_gradient(self, x: Any) -> Any:
        """The gradient of a bias, mapped along the first axis, summed over heads that shared it."""
        bias, dim = self._arrays.bias, self._dims.bias
        shape = [n for axis, n in enumerate(bias.shape) if dim is None or axis != dim % bias.ndim]
        x = x.unflatten(1, (self._size, -1)).movedim(1, 0)
        if len(shape) < 3 or shape[-3] == 1:
            x = x.sum(2, keepdim=True)
        return x.reshape(self._size, *shape)
