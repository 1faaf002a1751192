"""Attention of sequences that are divided over an axis of a mesh, inside ``jax.shard_map``: by JAX's collectives.

Every device runs one program. What differs between them, which rows meet, is a branch that each takes by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuflash import dtypes, ops
from cuflash.adapters.jax.primitive import alike
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.numbers import shown
from cuflash.ops import Arrays, Options
from cuflash.parallel.asked import Asked
from cuflash.parallel.calls import Device, rows_of
from cuflash.parallel.division import Call, Division, Step, Work
from cuflash.parallel.heads import check_heads, checked_rows, order_of, ordered

Pair = tuple[Any, Any]
"""Keys and values, or gradients of both."""


class _Group(NamedTuple):
    """The devices along an axis of the mesh, or several: they count along the last one that is named first."""

    axis: str | tuple[str, ...]
    of_mesh: tuple[str, ...]
    """Its axes in the order of the mesh, by which `jax.lax.ppermute` counts, whatever order it is given."""
    numbers: tuple[int, ...]
    """What number each device has there."""


def divided(method: str, asked: Asked, tensors: Sequence[Any], group: Any) -> Pair:
    """(out, lse) of this device's rows."""
    devices = _size(group)
    asked.check(*tensors)
    if method != "ring_attention":
        return _by_heads(asked, devices, group, *alike(tensors))
    return _by_ring(asked, devices, _group(group), *alike(tensors))


def _group(axis: str | tuple[str, ...]) -> _Group:
    names = axis if isinstance(axis, tuple) else (axis,)
    mesh = jax.sharding.get_abstract_mesh().axis_names
    of_mesh = tuple(sorted(names, key=lambda name: mesh.index(name) if name in mesh else -1))
    sizes = [jax.lax.axis_size(name) for name in of_mesh]
    numbers = np.arange(prod(sizes)).reshape(sizes).transpose([of_mesh.index(name) for name in names])
    return _Group(axis, of_mesh, tuple(numbers.ravel().tolist()))


def _permuted(x: Any, group: _Group, pairs: Iterable[tuple[int, int]]) -> Any:
    """What arrives from the device that is another's source, zeros where it has none."""
    numbers = group.numbers
    return jax.lax.ppermute(x, group.of_mesh, [(numbers[source], numbers[target]) for source, target in pairs])


def _size(group: Any) -> int:
    """How many devices there are along an axis of the mesh, or several."""
    names = group if isinstance(group, tuple) else (group,)
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(
            f"group is {shown(group)}; expected the name of an axis of the mesh that sequences are divided over, or a "
            "tuple of names."
        )
    try:
        return jax.lax.axis_size(group)
    except NameError as error:
        raise InvalidArgument(
            f"group is {shown(group)}, and no mesh has such an axis here. Call this inside jax.shard_map over it."
        ) from error


def _by_ring(asked: Asked, devices: int, group: _Group, q: Any, k: Any, v: Any) -> Pair:
    division = asked.division(devices, q.shape, k.shape)
    longest = asked.longest(q.shape[0] * devices) if asked.packed else None
    if asked.packed and longest is None:
        raise _unknown()
    starts = (jnp.asarray(asked.cu_seqlens, np.int32),) if asked.packed else ()
    tensors = (_reverse_only(x) for x in (q, k, v))
    return _ring(division, asked.options, group, longest)(*alike((*tensors, *starts)))


def _unknown() -> InvalidArgument:
    return InvalidArgument("cu_seqlens is traced and max_seqlen is None; pass the length of the longest sequence.")


@lru_cache(maxsize=256)
def _ring(division: Division, options: Options, group: _Group, longest: int | None) -> Callable[..., Pair]:
    """The ring, forward and backward, on q, k, v and, packed, cu_seqlens."""

    def device(starts: Sequence[Any]) -> Device:
        return Device(division, options, jnp, starts[0] if starts else None, longest)

    @jax.custom_vjp
    def attend(q: Any, k: Any, v: Any, *starts: Any) -> Pair:
        return _forward(device(starts), group, q, k, v)

    def forward(q: Any, k: Any, v: Any, *starts: Any) -> tuple[Pair, Any]:
        out, lse = _forward(device(starts), group, q, k, v)
        return (out, lse), (q, k, v, out, lse, starts)

    def backward(residuals: Any, gradients: Pair) -> tuple[Any, ...]:
        q, k, v, out, lse, starts = residuals
        return (*_backward(device(starts), group, q, k, v, out, lse, *gradients), *(None for _ in starts))

    attend.defvjp(forward, backward)
    return attend


# Without a window the keys go from hand to hand, in a loop: a program that had all steps one after the other would have
# all transfers first, and the keys of all devices in memory at once. What a window shows of neighbours is little, and
# comes straight from each of them.


def _forward(on: Device, group: _Group, q: Any, k: Any, v: Any) -> Pair:
    """(out, lse) of this device's queries."""
    *batch, length, heads, _ = q.shape
    out = jnp.zeros((*q.shape[:-1], v.shape[-1]), _real(q))
    lse = jnp.full((*batch, heads, length), -jnp.inf, _real(q))
    out, lse, *_ = alike((out, lse, q))
    add = partial(_attended, on)
    sums = (_of_neighbours if on.division.schedule.mask.kind == "window" else _of_all)(
        on.division, group, add, q, (k, v), (out, lse)
    )
    return sums[0].astype(q.dtype), sums[1]


def _of_neighbours(division: Division, group: _Group, add: Any, q: Any, kv: Pair, sums: Pair) -> Pair:
    def received(work: Work | None, q: Any, moved: Sequence[Pair], sums: Pair) -> Pair:
        return sums if work is None else add(work.calls, q, moved[work.move], sums)

    moved = [_moved(step, group, kv) for step in division.steps]
    sums = _chosen(group, _own(division), add, q, kv, sums)
    for step, here in zip(division.steps, moved, strict=True):
        sums = _chosen(group, step.work, received, q, here, sums)
    return sums


def _of_all(division: Division, group: _Group, add: Any, q: Any, kv: Pair, sums: Pair) -> Pair:
    devices = division.schedule.devices
    if devices == 1:
        return add(division.own(0), q, kv, sums)

    def step(_: Any, carried: tuple[Any, Pair, Pair]) -> tuple[Any, Pair, Pair]:
        lower, here, sums = carried
        return lower - 1, _passed_on(here, group, devices), _added(lower, division, add, q, here, sums)

    carried = _lower(group, kv), _passed_on(kv, group, devices), _chosen(group, _own(division), add, q, kv, sums)
    lower, here, sums = jax.lax.fori_loop(1, devices - 1, step, carried) if devices > 2 else carried
    return _added(lower, division, add, q, here, sums)


def _attended(on: Device, calls: Sequence[Call], q: Any, kv: Pair, sums: Pair) -> Pair:
    """Sums with what further keys give."""
    out, lse = sums
    for call in calls:
        part, part_lse = on.attend(call, q, kv)
        merged = _merged(rows_of(out, call.q), lse[..., call.q], part, part_lse)
        out, lse = _put(out, call.q, merged[0]), _put(lse, call.q, merged[1], -1)
    return out, lse


def _backward(
    on: Device, group: _Group, q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any
) -> tuple[Any, Any, Any]:
    """(dq, dk, dv) of this device's queries and keys."""
    dq, dk, dv, *_ = alike((*(jnp.zeros(x.shape, _real(q)) for x in (q, k, v)), q))
    add = partial(_pulled_back, on)
    dq, dk, dv = (_back_from_neighbours if on.division.schedule.mask.kind == "window" else _back_from_all)(
        on.division, group, add, (q, out, lse, dout, dlse), (k, v), dq, (dk, dv)
    )
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _back_from_neighbours(
    division: Division, group: _Group, add: Any, given: Any, kv: Pair, dq: Any, dkv: Pair
) -> tuple[Any, Any, Any]:
    def received(work: Work | None, given: Any, moved: Sequence[Pair], dq: Any, made: Sequence[Pair]) -> Any:
        made = list(made)
        if work is not None:
            dq, made[work.move] = add(work.calls, given, moved[work.move], dq, made[work.move])
        return dq, made

    dk, dv = dkv
    moved = [_moved(step, group, kv) for step in division.steps]
    dq, (dk, dv) = _chosen(group, _own(division), add, given, kv, dq, (dk, dv))
    for step, here in zip(division.steps, moved, strict=True):
        made = [_zeros(pair, dk.dtype if step.sums else kv[0].dtype, dq) for pair in here]
        dq, made = _chosen(group, step.work, received, given, here, dq, made)
        for move, pair in zip(step.moves, made, strict=True):
            home = [(target, source) for source, target in move.pairs]
            dk, dv = (
                _put(total, move.rows, rows_of(total, move.rows) + _permuted(x, group, home).astype(dk.dtype))
                for total, x in zip((dk, dv), pair, strict=True)
            )
    return dq, dk, dv


def _back_from_all(
    division: Division, group: _Group, add: Any, given: Any, kv: Pair, dq: Any, dkv: Pair
) -> tuple[Any, Any, Any]:
    """The sums of gradients of keys are one device behind the keys: they travel beside the step after theirs."""
    devices = division.schedule.devices
    if devices == 1:
        dq, dkv = add(division.own(0), given, kv, dq, dkv)
        return dq, *dkv

    def summed(lower: Any, here: Pair, dq: Any, behind: Pair) -> tuple[Any, Pair]:
        arrived = _passed_on(behind, group, devices)
        dq, made = _added(lower, division, add, given, here, dq, _zeros(here, here[0].dtype, dq))
        first, second = (x + y.astype(x.dtype) for x, y in zip(arrived, made, strict=True))
        return dq, (first, second)

    def step(_: Any, carried: tuple[Any, Pair, Any, Pair]) -> tuple[Any, Pair, Any, Pair]:
        lower, here, dq, behind = carried
        return lower - 1, _passed_on(here, group, devices), *summed(lower, here, dq, behind)

    here = _passed_on(kv, group, devices)
    carried = _lower(group, kv), here, *_chosen(group, _own(division), add, given, kv, dq, dkv)
    dq, dkv = summed(*(jax.lax.fori_loop(1, devices - 1, step, carried) if devices > 2 else carried))
    return dq, *_passed_on(dkv, group, devices)


def _pulled_back(on: Device, calls: Sequence[Call], given: Any, kv: Pair, dq: Any, dkv: Pair) -> tuple[Any, Pair]:
    """Sums of gradients with those of further pairs of queries and keys."""
    q, out, lse, dout, dlse = given
    dk, dv = dkv
    for call in calls:
        of_q, of_k, of_v = on.gradients(call, q, kv, out, lse, dout, dlse)
        dq, dk, dv = (
            _put(total, rows, rows_of(total, rows) + part.astype(total.dtype))
            for total, rows, part in ((dq, call.q, of_q), (dk, call.kv, of_k), (dv, call.kv, of_v))
        )
    return dq, (dk, dv)


def _own(division: Division) -> list[tuple[Call, ...]]:
    """What each device does with its own keys."""
    return [division.own(device) for device in range(division.schedule.devices)]


def _zeros(like: Pair, dtype: Any, beside: Any) -> Pair:
    """Zeros for sums, which vary over the mesh as `beside` does."""
    first, second, *_ = alike((*(jnp.zeros(x.shape, dtype) for x in like), beside))
    return first, second


def _passed_on(kv: Pair, group: _Group, devices: int) -> Pair:
    """What the device before this one has."""
    ring = [(device, (device + 1) % devices) for device in range(devices)]
    first, second = (_permuted(x, group, ring) for x in kv)
    return first, second


def _moved(step: Step, group: _Group, kv: Pair) -> list[Pair]:
    """The keys and values of each move of a step, zeros where none arrive."""
    return [tuple(_permuted(rows_of(x, of.rows), group, of.pairs) for x in kv) for of in step.moves]


def _lower(group: _Group, beside: Any) -> Any:
    """The number of devices with a lower number, whose keys come first.

    It is bound to what comes beside it: JAX's `scan` of layers would compute what depends on nothing else before the
    loop, and keep what the branches make of it for every step.
    """
    lower, _ = jax.lax.optimization_barrier((jax.lax.axis_index(group.axis), beside))
    return lower


def _added(lower: Any, division: Division, function: Callable[..., Any], *operands: Any) -> Any:
    """``function(calls, *operands)`` for the keys of a device, of a lower number as long as such are left."""
    below, above = division.below_and_above
    if below == above:
        return function(below, *operands)
    return jax.lax.cond(lower > 0, partial(function, below), partial(function, above), *operands)


def _chosen(group: _Group, work: Sequence[Any], function: Callable[..., Any], *operands: Any) -> Any:
    """``function(work of this device, *operands)``."""
    kinds: list[Any] = []
    for one in work:
        if one not in kinds:
            kinds.append(one)
    if len(kinds) == 1:
        return function(kinds[0], *operands)
    kind = jnp.asarray([kinds.index(one) for one in work])[jax.lax.axis_index(group.axis)]
    return jax.lax.switch(kind, [partial(function, one) for one in kinds], *operands)


def _put(x: Any, rows: slice, part: Any, axis: int = -3) -> Any:
    """`x` with other rows; they are along an axis that counts from the last one."""
    if part.shape == x.shape:
        return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, rows.start, x.ndim + axis)


def _merged(out: Any, lse: Any, part: Any, part_lse: Any) -> Pair:
    """Results of the same queries over further keys, as `cuflash.merge_attention` merges them."""
    parts = (out, lse), (part.astype(out.dtype), part_lse)
    top = jnp.maximum(lse, part_lse)
    top = jnp.where(jnp.isneginf(top), 0, top)
    shares = [jnp.exp(x - top) for _, x in parts]
    whole = sum(shares)
    total = jnp.zeros_like(out)
    for (x, _), share in zip(parts, shares, strict=True):
        weight = jnp.where(share == 0, 0, share / whole).swapaxes(-1, -2)[..., None]
        total += jnp.where(weight == 0, 0, weight * x)
    return total, top + jnp.log(whole)


def _by_heads(asked: Asked, devices: int, group: Any, q: Any, k: Any, v: Any) -> Pair:
    rows, heads_kv = q.shape[-3], k.shape[-2]
    check_heads(devices, q.shape[-2], heads_kv)
    longest = checked_rows(asked, devices, rows, k.shape[-3])
    options, starts = asked.options, {}
    if asked.packed:
        if longest is None:
            raise _unknown()
        whole = jnp.asarray(asked.cu_seqlens, np.int32)
        options = options.replace(max_seqlen_q=longest, max_seqlen_k=longest)
        starts = {"cu_seqlens_q": whole, "cu_seqlens_kv": whole}
    if heads_kv % devices:
        k, v = (_repeated(devices // heads_kv, x) for x in (k, v))
    q, k, v = (_exchanged(x, group, x.ndim - 2, x.ndim - 3) for x in (q, k, v))
    order = order_of(asked, jnp, rows * devices, devices)
    if order is not None:
        q, k, v = (_ordered(x, order[0], -3) for x in (q, k, v))
    out, lse, *_ = ops.forward(options, Arrays(q=q, k=k, v=v, **starts))
    if order is not None:
        out, lse = _ordered(out, order[1], -3), _ordered(lse, order[1], -1)
    return _exchanged(out, group, out.ndim - 3, out.ndim - 2), _exchanged(lse, group, lse.ndim - 1, lse.ndim - 2)


def _exchanged(x: Any, group: Any, split: int, joined: int) -> Any:
    return jax.lax.all_to_all(x, group, split, joined, tiled=True)


def _ordered(x: Any, order: Any, axis: int) -> Any:
    if isinstance(order, tuple):
        return ordered(jnp, x, order, axis)
    return jnp.take(x, order, axis, mode="clip", unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _repeated(times: int, x: Any) -> Any:
    """Every head so many times, whose gradients are added in float32."""
    return jnp.repeat(x, times, axis=-2)


def _repeated_forward(times: int, x: Any) -> tuple[Any, None]:
    return _repeated(times, x), None


def _repeated_backward(times: int, _: None, dx: Any) -> tuple[Any]:
    *before, heads, dim = dx.shape
    return (dx.reshape(*before, heads // times, times, dim).astype(_real(dx)).sum(axis=-2).astype(dx.dtype),)


_repeated.defvjp(_repeated_forward, _repeated_backward)


def _real(q: Any) -> Any:
    """The dtype of sums."""
    dtype = dtypes.of(q.dtype)
    assert dtype is not None
    return dtype.accumulator


# Forward mode: JAX's own words for it name `custom_vjp`, which its user never wrote. Reverse mode transposes the
# tangent's step away before anything runs, lowers or maps it.


@jax.custom_jvp
def _reverse_only(x: Any) -> Any:
    return x


@_reverse_only.defjvp
def _reverse_only_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return primals[0], _tangent.bind(tangents[0])


def _refuse_forward_mode(*_: Any, **__: Any) -> Any:
    raise UnsupportedProblem(
        "ring_attention does not run in JAX's forward mode (jax.jvp, jax.jacfwd, jax.linearize, jax.hessian). Take "
        "gradients in reverse mode: jax.grad, jax.vjp, jax.jacrev."
    )


_tangent: Primitive = Primitive("cuflash_tangent")
_tangent.def_impl(_refuse_forward_mode)
_tangent.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent)
mlir.register_lowering(_tangent, _refuse_forward_mode)
