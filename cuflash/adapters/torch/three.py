"""Attention of q, k and v alone that autograd records, where every object that it keeps or returns is time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch

from cuflash.adapters.torch.gradient import gradient, of_gradient, recorded_gradient
from cuflash.ops import Arrays, Options, check, launch, new

_ad = torch.autograd.forward_ad


def is_of_three(options: Options, arrays: Arrays) -> bool:
    """Whether a forward is of q, k and v and nothing else."""
    for x in arrays[3:]:
        if x is not None:
            return False
    more = options.dropout_p or options.keep_state or options.cache or options.block_mask is not None
    return not more and _ad._current_level < 0


class _OfThree(torch.autograd.Function):
    """(out, lse) of q, k and v; ``recorded.py`` has the same of all else that a call may have."""

    @staticmethod
    def forward(ctx: Any, asked: tuple[Any, Options], q: Any, k: Any, v: Any) -> Any:
        framework, options = asked
        pair = None
        if q.is_cuda:
            pair, pointers = _Pair.of(framework, options, q, k, v)
        if pair is None:
            out, lse, row_state = framework.plain("forward", options.keeping, new(Arrays, q=q, k=k, v=v))
            ctx.kept = None, (), asked
        else:
            out, lse, row_state, pointers = pair.start(pointers)
            ctx.kept = pair, pointers, asked
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, row_state)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        saved = ctx.saved_tensors
        pair, pointers, asked = ctx.kept
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
            ctx.kept = None, (), asked
            ctx.save_for_backward(q, k, v, out, *rows)
        else:
            out, rows, pointers = pair.attend(pointers)
            ctx.kept = pair, pointers, asked
            ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        saved = ctx.saved_tensors
        pair, pointers, asked = ctx.kept
        if pair is not None:
            if not (_is_recording() or _is_mapping()):
                gradients = pair.pull_back(pointers, saved, dout)
                if gradients is not None:
                    return gradients
            saved = *saved[:4], *pair.rows.parts(saved[4])
        return _pulled_back(asked, saved, dout, None)


of_three, out_of_three = _OfThree.apply, _OutOfThree.apply

_is_recording, _is_mapping = torch.is_grad_enabled, torch._C._are_functorch_transforms_active


def _pulled_back(asked: tuple[Any, Options], saved: tuple[Any, ...], dout: Any, dlse: Any) -> tuple[Any, ...]:
    """No gradient of what was asked, and those of q, k and v."""
    framework, options = asked
    q, k, v, out, lse, row_state = saved
    options = of_gradient(options, False)
    arrays = new(Arrays, q=q, k=k, v=v, dout=dout, lse=lse, dlse=dlse, row_state=row_state, out=out)
    if _is_recording() or _is_mapping():
        return None, *recorded_gradient(framework, options, True, (), *arrays)
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
