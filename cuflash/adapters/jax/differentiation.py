"""Derivatives of a call, in both modes and of both orders, and words for those that there are none of.

With x for what a call reads and has gradients of, F(x) for its results and u for gradients of these, there are three
linear maps: the Jacobian J of F, the gradient's own Jacobian, which is the Hessian H of u.F(x) beside the transposed J,
and the derivative of J t along x. What each does to tangents a backend computes, or what it does to cotangents:

    map                            pushed forward           pulled back
    x' -> J x'                     `forward` along x'       u -> `backward`
    x', u' -> H x' + J^T u'        `backward` along both    w -> H w, J w: `backward` and `forward` along w
    x' -> (J t)'                   refused                  u -> H t: `backward` along t

As H is symmetric, reverse mode over either mode is forward mode over reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cuflash.adapters.jax import linear
from cuflash.adapters.jax.batching import batched
from cuflash.adapters.jax.primitive import alike
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import check
from cuflash.ops.call import Arrays, Options
from cuflash.problem import Direction

_WITH_GRADIENTS = ("q", "k", "v", "bias", "sink")
_UPSTREAM = ("dout", "dlse")


def _is_captured(name: str) -> bool:
    """Whether an operand is an array that a written score or mask reads."""
    return name.startswith("captured")


def _has_gradient(name: str) -> bool:
    return name in _WITH_GRADIENTS or _is_captured(name)


def _with_elements(options: Options) -> tuple[str, ...]:
    """Those of the arrays that a written score reads that have gradients."""
    operands = options.score_mod.operands if options.score_mod else ()
    return tuple(f"captured{i}" for i, operand in enumerate(operands) if operand.kind == "real")


Names = tuple[str, ...]


@lru_cache(maxsize=1024)
def differentiable(options: Options, names: Names) -> Callable[..., tuple[Any, ...]]:
    """The results of a forward on operands of these names, of which `out` and `lse` have derivatives."""
    kept = options.replace(keep_state=True)

    @jax.custom_jvp
    def attend(*operands: Any) -> tuple[Any, ...]:
        return once("forward", options, names)(*operands)

    def rule(operands: Any, tangents: Any) -> tuple[Any, Any]:
        changes = _changes(names, tangents)
        _check_differentiable(options, names, frozenset(changes))
        out, lse, row_state = differentiable(kept, names)(*operands)
        along = tuple(name for name in changes if _has_gradient(name))
        given = (*operands, out, lse, row_state)
        tangents = linear.apply(_Push(options, names, along), given, [changes[x] for x in along], (out, lse))
        if not options.keep_state:
            return (out, lse), tuple(tangents)
        return (out, lse, row_state), (*tangents, jnp.zeros_like(row_state))

    attend.defjvp(rule, symbolic_zeros=True)
    return attend


@lru_cache(maxsize=1024)
def _gradients(options: Options, names: Names) -> Callable[..., tuple[Any, ...]]:
    """The results of a backward whose `out`, `lse` and `row_state` are those of the forward on its other operands."""

    @jax.custom_jvp
    def pull(*operands: Any) -> tuple[Any, ...]:
        return once("backward", options, names)(*operands)

    def rule(operands: Any, tangents: Any) -> tuple[Any, Any]:
        results = once("backward", options, names)(*operands)
        changes = _changes(names, tangents)
        along = tuple(name for name in changes if _has_gradient(name) or name in _UPSTREAM)
        if not along:
            return results, tuple(jnp.zeros_like(x) for x in results)
        _refuse_captured(options, along)
        pushed = linear.apply(_PushGradients(options, names, along), operands, [changes[x] for x in along], results)
        return results, tuple(pushed)

    pull.defjvp(rule, symbolic_zeros=True)
    return pull


def _changes(names: Names, tangents: Any) -> dict[str, Any]:
    return {name: x for name, x in zip(names, tangents, strict=True) if not isinstance(x, SymbolicZero)}


@dataclass(frozen=True)
class _Push:
    """From tangents of a forward's operands to those of out and lse; out, lse and row_state are given too."""

    options: Options
    names: Names
    along: Names

    def push(self, given: Any, changes: Any) -> Any:
        if any(_is_captured(name) for name in self.along):
            raise UnsupportedProblem(
                "what score_mod reads has a tangent, and cuflash has no forward mode of it. Take its gradient in "
                "reverse mode, by jax.grad, jax.vjp or jax.jacrev."
            )
        values = given[: len(self.names)]
        return once("forward", self.options.replace(keep_state=False), self.names, self.along)(
            *alike([*values, *changes])
        )

    def pull(self, given: Any, cotangents: Any) -> Any:
        options, order, operands = _backward(self.options, self.names, given, cotangents, self.along)
        gradients = _named(options, order, operands, _gradients(options, order)(*operands))
        return tuple(gradients[name] for name in self.along)

    def derivative(self, moving: tuple[int, ...]) -> tuple[linear.Map, tuple[int, ...]]:
        kept = tuple(i for i in moving if i < len(self.names) and _has_gradient(self.names[i]))
        return _Turn(self, tuple(self.names[i] for i in kept)), kept


@dataclass(frozen=True)
class _Turn:
    """From tangents of a forward's operands to those of what `push` makes of changes, which are given too."""

    first: _Push
    along: Names

    def push(self, given: Any, changes: Any) -> Any:
        raise UnsupportedProblem(
            "cuflash does not run in JAX's forward mode twice, one inside the other (jax.jacfwd of jax.jvp). Take the "
            "inner or the outer derivative in reverse mode: jax.hessian, jax.jvp of jax.grad, jax.grad of jax.jvp."
        )

    def pull(self, given: Any, cotangents: Any) -> Any:
        first, count = self.first, len(self.first.names) + 3
        options, order, operands = _backward(first.options, first.names, given[:count], cotangents, self.along)
        results = once("backward", options, order, first.along)(*alike([*operands, *given[count:]]))
        gradients = _named(options, order, operands, results)
        return tuple(gradients[name] for name in self.along)

    def derivative(self, moving: tuple[int, ...]) -> tuple[linear.Map, tuple[int, ...]]:
        return _Third(), moving


@dataclass(frozen=True)
class _PushGradients:
    """From tangents of a backward's operands to those of its results."""

    options: Options
    names: Names
    along: Names

    def push(self, given: Any, changes: Any) -> Any:
        return once("backward", self.options, self.names, self.along)(*alike([*given, *changes]))

    def pull(self, given: Any, cotangents: Any) -> Any:
        values = dict(zip(self.names, given, strict=True))
        weights = {
            name: x.astype(values[name].dtype)
            for name, x in zip(_results(self.options, self.names), cotangents, strict=True)
            if x is not None
        }
        if not weights:
            return (None,) * len(self.along)
        along: Names = tuple(weights)
        gradients: dict[str, Any] = {}
        if any(map(_has_gradient, self.along)):
            options = self.options.replace(bias_grad="bias" in self.along)
            results = once("backward", options, self.names, along)(*alike([*given, *weights.values()]))
            gradients |= _named(options, self.names, given, results)
        if set(self.along) & set(_UPSTREAM):
            names = tuple(name for name in self.names if name not in _OF_BACKWARD)
            operands = alike([*(values[name] for name in names), *weights.values()])
            pushed = once("forward", self.options.replace(bias_grad=False), names, along)(*operands)
            gradients |= dict(zip(_UPSTREAM, pushed, strict=True))
        return tuple(gradients[name] for name in self.along)

    def derivative(self, moving: tuple[int, ...]) -> tuple[linear.Map, tuple[int, ...]]:
        return _Third(), moving


@dataclass(frozen=True)
class _Third:
    """What there is no way through."""

    def push(self, given: Any, changes: Any) -> Any:
        raise _no_third()

    def pull(self, given: Any, cotangents: Any) -> Any:
        raise _no_third()

    def derivative(self, moving: tuple[int, ...]) -> tuple[linear.Map, tuple[int, ...]]:
        return self, moving


_OF_BACKWARD = ("dout", "lse", "dlse", "row_state", "out")


def _backward(
    options: Options, names: Names, given: Any, cotangents: Any, along: Names
) -> tuple[Options, Names, list[Any]]:
    """What a backward along some names asks for and reads, of what its forward read and gave and their gradients."""
    *values, out, lse, row_state = given
    dout, dlse = cotangents
    arrays = dict(zip(names, values, strict=True)) | {"lse": lse, "row_state": row_state, "out": out}
    arrays["dout"] = jnp.zeros(out.shape, out.dtype) if dout is None else dout
    if dlse is not None:
        arrays["dlse"] = dlse
    order = (*(name for name in Arrays._fields if name in arrays), *filter(_is_captured, names))
    asks = options.replace(
        num_splits=0, keep_state=False, bias_grad="bias" in along, captured_grad=any(map(_is_captured, along))
    )
    return asks, order, alike([arrays[name] for name in order])


def _results(options: Options, names: Names) -> Names:
    """What the results of a backward are the gradients of."""
    of: Names = ("q", "k", "v", *(("bias",) if options.bias_grad else ()), *(("sink",) if "sink" in names else ()))
    return (*of, *_with_elements(options)) if options.captured_grad else of


def _named(options: Options, names: Names, operands: Any, results: Any) -> Mapping[str, Any]:
    """The results of a backward by what they are the gradients of, and in its element type."""
    values = dict(zip(names, operands, strict=True))
    return {name: x.astype(values[name].dtype) for name, x in zip(_results(options, names), results, strict=True)}


@lru_cache(maxsize=1024)
def once(direction: Direction, options: Options, names: Names, along: Names = ()) -> Callable[..., tuple[Any, ...]]:
    """`batching.batched`, with words for who differentiates it."""
    if direction == "backward" and along:
        _refuse_captured(options, along)
    call = jax.custom_jvp(batched(direction, options, names, along))

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise _no_third()

    return call


def _refuse_captured(options: Options, along: Names) -> None:
    """Refuse second derivatives by what a written score reads."""
    learns = options.captured_grad or any(map(_is_captured, along))
    check.refuse_second_derivatives(options.replace(captured_grad=learns))


def _no_third() -> UnsupportedProblem:
    return UnsupportedProblem(
        "cuflash has first and second derivatives of attention, and none of these is differentiated again; nor are "
        "explicit gradients, of flash_attn_vjp and flash_attn_backward. Take derivatives of flash_attn_func, or of "
        "attention that is written out, jax.nn.dot_product_attention(..., implementation='xla')."
    )


def _check_differentiable(options: Options, names: tuple[str, ...], wanted: frozenset[str]) -> None:
    """Refuse to be asked for gradients that there are none of."""
    if "alibi" in wanted:
        name = options.name("alibi")
        raise UnsupportedProblem(
            f"{name} is differentiated, but cuflash has no gradient of it. Pass jax.lax.stop_gradient({name}), or a "
            "bias, which has one."
        )
    for name in filter(_is_captured, wanted):
        if name not in _with_elements(options):
            raise UnsupportedProblem(
                f"{options.name(name)} is differentiated, and a mask has no gradient. Pass it through "
                "jax.lax.stop_gradient."
            )
    if "table" in names and wanted:
        raise InvalidArgument(
            f"{options.name('table')} is given and gradients are taken; keys in pages have none. "
            "Gather the pages into packed k and v."
        )
    if options.cache and wanted:
        raise InvalidArgument(
            f"gradients of {options.name('k')} or beside it are taken; a cache has none. Call flash_attn_func, or "
            "flash_attn_varlen_func with seqused_k."
        )
