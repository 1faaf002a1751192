"""Calls on arrays of JAX that are traced: all checks are done, and a step of the program is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuflash import generator as generators
from cuflash.adapters.jax.differentiation import differentiable, once
from cuflash.adapters.jax.primitive import alike
from cuflash.arrays import Adapter, View
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.numbers import shown
from cuflash.ops import Tangents, check, given, lengths
from cuflash.ops.answer import refuse_outputs
from cuflash.ops.call import Arrays, Options
from cuflash.ops.given import GivenCall
from cuflash.problem import Direction


class Traced(Adapter):
    """Arrays of JAX inside its transformations, which have a shape and a dtype and no elements yet."""

    name = "JAX"

    def answer(
        self,
        direction: Direction,
        options: Options,
        arrays: Arrays,
        generator: Any = None,
        cached: int | None = None,
    ) -> tuple[Any, ...]:
        """The results of a call as tracers."""
        refuse_outputs(self.name, direction, options, arrays)
        options, arrays = _described(direction, options, arrays, generator, cached)
        operands = arrays.by_name()
        names, values = tuple(operands), alike(tuple(operands.values()))
        if direction == "backward":
            return once(direction, options, names)(*values)
        results = differentiable(options, names)(*values)
        return results if arrays.rng_state is None else (*results, arrays.rng_state)

    def answer_along(
        self, options: Options, arrays: Arrays, tangents: Tangents, generator: Any = None
    ) -> tuple[Any, ...]:
        """The same of a call of `ops.jvp`."""
        options, arrays = _described("forward", options, arrays, generator)
        operands = arrays.by_name()
        changes = {name: x for name, x in tangents._asdict().items() if x is not None}
        views = {name: given.contiguous(f"d{name}", x.shape, x.dtype.name) for name, x in changes.items()}
        check.check_tangents(_views(options, arrays), views, options)

        def attend(moved: dict[str, Any]) -> Any:
            return differentiable(options, tuple(operands))(*alike([*(operands | moved).values()]))

        if not changes:
            out, lse = attend({})
            return out, lse, jnp.zeros_like(out), jnp.zeros_like(lse)
        results, pushed = jax.jvp(attend, [{name: operands[name] for name in changes}], [changes])
        return (*results, *pushed)

    def divided(self, method: str, asked: Any, tensors: Any, group: Any) -> tuple[Any, Any]:
        """(out, lse) of this device's rows of a call that the devices along an axis of a mesh share."""
        from cuflash.adapters.jax import parallel

        return parallel.divided(method, asked, tensors, group)

    def outline(self, name: str, x: Any) -> View:
        """Spell an array out as it will lie in memory."""
        return given.contiguous(name, x.shape, x.dtype.name)


def _described(
    direction: Direction, options: Options, arrays: Arrays, generator: Any, cached: int | None = None
) -> tuple[Options, Arrays]:
    """The options and arrays of a call that has been checked, with random numbers and lengths."""
    if options.block_mask is not None:
        raise UnsupportedProblem(
            "block_mask is given inside JAX's transformations, where its lists would be part of the program. Pass what "
            "it was made of as mask_mod, or call flash_attn_vjp or flash_attn_backward on arrays outside of them."
        )
    if arrays.captured is not None:  # NumPy's, too, are operands of the program
        arrays = arrays._replace(captured=tuple(jnp.asarray(x) for x in arrays.captured))
        _check_kinds(options, arrays.captured)
    if direction == "forward" and check.dropout_of(options):
        arrays = arrays._replace(rng_state=_rng_state(generator))
    if options.cache:
        arrays = _with_rows(options, arrays, cached)
    options = given.plain(_with_lengths(options, arrays))
    described = tuple((name, x.shape, x.dtype.name) for name, x in arrays.by_name().items())
    GivenCall(direction, options, described).problem  # noqa: B018  refuses what is wrong
    return options, arrays


def _check_kinds(options: Options, captured: Sequence[Any]) -> None:
    """Refuse what JAX has in another element type than that which was traced: without x64 it makes 64 bits 32."""
    kinds = [operand for mod in (options.score_mod, options.mask_mod) if mod for operand in mod.operands]
    for i, (operand, x) in enumerate(zip(kinds, captured, strict=True)):
        if x.dtype != operand.dtype:
            raise InvalidArgument(
                f"{options.name(f'captured{i}')} is {operand.dtype}, which JAX makes {x.dtype}; pass it as that, or "
                "set jax_enable_x64."
            )


def _views(options: Options, arrays: Arrays) -> dict[str, View]:
    """Arrays as they will lie in memory."""
    return {name: given.contiguous(options.name(name), x.shape, x.dtype.name) for name, x in arrays.by_name().items()}


def _with_lengths(options: Options, arrays: Arrays) -> Options:
    """The options with the longest lengths, read from arrays that have values yet."""
    validates = options.manner.validate
    if arrays.cu_seqlens_q is None or not (validates or options.max_seqlen_q is None or options.max_seqlen_k is None):
        return options
    for name in (*check.LENGTHS, "table"):
        if isinstance(getattr(arrays, name), jax.core.Tracer):
            asked = "validate is True" if validates else "max_seqlen_q or max_seqlen_k is None"
            raise InvalidArgument(
                f"{asked} and {options.name(name)} is traced by JAX, so that its values are not known yet. "
                + ("Validate outside jax.jit." if validates else "Pass both.")
            )
    views = _views(options, arrays)
    check.layout_of("forward", options, views)
    return lengths.read(options, views, arrays)


def _with_rows(options: Options, arrays: Arrays, cached: int | None) -> Arrays:
    """The arrays of a call on a cache with how many of its rows each sequence uses."""
    for name in ("k_new", "rotary_cos"):
        if getattr(arrays, name) is not None:
            raise InvalidArgument(
                f"{options.name(name)} is given inside JAX's transformations, where arrays are not written to. "
                f"Append to {options.name('k')} before the call, by jax.lax.dynamic_update_slice or .at[...].set(...)."
            )
    if arrays.seqused_kv is not None:
        return arrays
    paged = arrays.table is not None
    room = arrays.table.shape[1] * arrays.k.shape[1] if paged else arrays.k.shape[1]
    rows = room if cached is None else check.cached_rows(options.name("seqused_kv"), cached, room, 0)
    return arrays._replace(seqused_kv=jnp.full(arrays.q.shape[0], rows, np.int32))


def _rng_state(generator: Any) -> Any:
    """Seed and offset as (4,) uint32: of a key, of an array like it, or of two numbers."""
    if isinstance(generator, tuple) and len(generator) == 2 and not any(x is None for x in generator):
        return jnp.asarray(np.array(generators.checked(*generator), np.uint64).view(np.uint32))
    if isinstance(generator, jax.Array) and generator.dtype == np.uint32 and generator.shape == (4,):
        return generator
    if isinstance(generator, jax.Array) and _is_key(generator):
        return jnp.concatenate([jax.random.bits(generator, (2,), np.uint32), jnp.zeros(2, np.uint32)])
    raise InvalidArgument(
        f"generator is {shown(generator)}; inside JAX's transformations it would give every run of the program the "
        "same numbers. Pass a key (jax.random.key(seed)), a (4,) uint32 array of seed and offset, or a tuple of both."
    )


def _is_key(x: Any) -> bool:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.shape == ()
    return x.dtype == np.uint32 and x.shape == (2,)
