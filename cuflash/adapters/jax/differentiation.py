"""`grad` of a call: the gradients of those operands that are differentiated, and words for what has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuflash.adapters.jax.batching import batched
from cuflash.adapters.jax.primitive import alike
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops.call import Arrays, Options
from cuflash.problem import Direction

_WITH_GRADIENTS = ("q", "k", "v", "bias", "sink")


@lru_cache(maxsize=1024)
def differentiable(options: Options, names: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    """The results of a forward on operands of these names; gradients of `out` and `lse` are pulled back through it."""
    kept = options.replace(keep_state=True)

    @jax.custom_vjp
    def attend(*operands: Any) -> tuple[Any, ...]:
        return once("forward", options, names)(*operands)

    def forward(*operands: Any) -> tuple[Any, ...]:
        wanted = frozenset(name for name, x in zip(names, operands, strict=True) if x.perturbed)
        _check_differentiable(options, names, wanted)
        values = tuple(x.value for x in operands)
        out, lse, row_state = once("forward", kept, names)(*values)
        results = (out, lse, row_state) if options.keep_state else (out, lse)
        return results, (values, out, lse, row_state, _Wanted(wanted))

    def backward(residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        values, out, lse, row_state, wanted = residuals
        dout, dlse = cotangents[:2]
        dout = jnp.zeros(out.shape, out.dtype) if isinstance(dout, SymbolicZero) else dout
        given = dict(zip(names, values, strict=True)) | {
            "dout": dout, "lse": lse, "row_state": row_state, "out": out,
        }  # fmt: skip
        if not isinstance(dlse, SymbolicZero):
            given["dlse"] = dlse
        asks = options.replace(num_splits=0, keep_state=False, bias_grad="bias" in wanted.names)
        order = tuple(name for name in Arrays._fields if name in given)
        dq, dk, dv, *others = once("backward", asks, order)(*alike([given[name] for name in order]))
        gradients = {"q": dq, "k": dk, "v": dv}
        if asks.bias_grad:
            gradients["bias"] = others.pop(0).astype(given["bias"].dtype)
        if "sink" in given:
            gradients["sink"] = others.pop(0)
        return tuple(gradients.get(name) for name in names)

    attend.defvjp(forward, backward, symbolic_zeros=True)

    def guarded(*operands: Any) -> tuple[Any, ...]:
        return attend(
            *(reverse_only(x) if name in _WITH_GRADIENTS else x for name, x in zip(names, operands, strict=True))
        )

    return guarded


@lru_cache(maxsize=1024)
def once(direction: Direction, options: Options, names: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    """`batching.batched`, with words for who differentiates it."""
    call = jax.custom_jvp(batched(direction, options, names))

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise UnsupportedProblem(
            "cuflash has first derivatives only: a gradient of attention cannot be differentiated again. Take second "
            "derivatives of attention that is written out, jax.nn.dot_product_attention(..., implementation='xla')."
        )

    return call


def _check_differentiable(options: Options, names: tuple[str, ...], wanted: frozenset[str]) -> None:
    """Refuse to be asked for gradients that there are none of."""
    if "alibi" in wanted:
        name = options.name("alibi")
        raise UnsupportedProblem(
            f"{name} is differentiated, but cuflash has no gradient of it. Pass jax.lax.stop_gradient({name}), or a "
            "bias, which has one."
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


@jax.tree_util.register_static
class _Wanted:
    """Names of operands whose gradients are wanted, of a forward until its backward."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Wanted) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)


# Forward mode: JAX's own words for it name `custom_vjp`, which its user never wrote. Reverse mode transposes the
# tangent's step away before anything runs, lowers or maps it.


@jax.custom_jvp
def reverse_only(x: Any) -> Any:
    """The same, with words for who takes a gradient in forward mode."""
    return x


@reverse_only.defjvp
def _reverse_only_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return primals[0], _tangent.bind(tangents[0])


def _refuse_forward_mode(*_: Any, **__: Any) -> Any:
    raise UnsupportedProblem(
        "cuflash does not run in JAX's forward mode (jax.jvp, jax.jacfwd, jax.linearize, jax.hessian). "
        "Take gradients in reverse mode: jax.grad, jax.vjp, jax.jacrev."
    )


_tangent: Primitive = Primitive("cuflash_tangent")
_tangent.def_impl(_refuse_forward_mode)
_tangent.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse_forward_mode
mlir.register_lowering(_tangent, _refuse_forward_mode)
