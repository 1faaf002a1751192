"""`vmap` of a call: one call on more batch elements or more heads, where that is the same, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from cuflash.adapters.jax.axes import positions_read
from cuflash.adapters.jax.sharding import divided
from cuflash.ops.call import Options
from cuflash.problem import Direction

Operands = dict[str, Any]

_PAIRS = ("mask", "bias")
_PER_ROW = ("lse", "dlse", "row_state")


@lru_cache(maxsize=1024)
def batched(
    direction: Direction, options: Options, names: tuple[str, ...], along: tuple[str, ...] = ()
) -> Callable[..., tuple[Any, ...]]:
    """`sharding.divided`, which may be mapped over new axes of any operands; tangents one after the other."""
    call = custom_vmap(divided(direction, options, names, along))

    @call.def_vmap
    def rule(size: int, mapped: list[bool], *operands: Any) -> tuple[Any, Any]:
        if along:
            computed = _one_by_one(call, mapped, operands)
            return tuple(computed), tuple(True for _ in computed)
        given = dict(zip(names, operands, strict=True))
        is_mapped = dict(zip(names, mapped, strict=True))
        fold = _Fold(direction, options, size, given, is_mapped)
        if fold.shares_keys():
            computed = fold.into_heads()
        elif fold.fits_the_batch():
            computed = fold.into_batch()
        else:
            computed = _one_by_one(call, mapped, operands)
        return tuple(computed), tuple(True for _ in computed)

    return call


def _one_by_one(call: Any, mapped: list[bool], operands: tuple[Any, ...]) -> tuple[Any, ...]:
    def one(changing: list[Any]) -> tuple[Any, ...]:
        rest = iter(changing)
        return call(*(next(rest) if is_mapped else x for x, is_mapped in zip(operands, mapped, strict=True)))

    return jax.lax.map(one, [x for x, is_mapped in zip(operands, mapped, strict=True) if is_mapped])


class _Fold:
    """One more axis, the first of those operands that are mapped over it, put into an axis that a call has."""

    def __init__(
        self, direction: Direction, options: Options, size: int, given: Operands, is_mapped: Mapping[str, bool]
    ) -> None:
        self._direction, self._options, self._size = direction, options, size
        self._given, self._is_mapped = given, is_mapped
        self._rows = options.manner.layout.index("s")
        self._heads = options.manner.layout.index("h")

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of one element."""
        return self._given[name].shape[1:] if self._is_mapped[name] else self._given[name].shape

    def _leading(self, name: str) -> tuple[int, int]:
        """Batch and heads of one element's tensor of pairs."""
        batch, heads, *_ = (1,) * (4 - len(self._shape(name))) + self._shape(name)
        return batch, heads

    def _foldable(self) -> bool:
        """Whether every number of the call is where no other element's is, and which element it is of does not matter.

        Packed rows and random numbers are not; written scores may read the number of a batch element or a head.
        """
        numbered = positions_read(self._options) & {"b", "h"}
        mapped = any(self._is_mapped[name] for name in self._given if name.startswith("captured"))
        summed = self._options.captured_grad
        return not (self._given.keys() & {"cu_seqlens_q", "seqused_kv", "rng_state"} or numbered or mapped or summed)

    def shares_keys(self) -> bool:
        """Whether all queries see the same keys: they are more query heads of each key head."""
        if self._direction == "backward" or not self._foldable() or not self._is_mapped["q"]:
            return False
        shared = not (self._is_mapped["k"] or self._is_mapped["v"])
        return shared and all(
            name not in self._given or (not self._is_mapped[name] and self._leading(name)[1] == 1) for name in _PAIRS
        )

    def into_heads(self) -> tuple[Any, ...]:
        """The call with a group of heads for every element."""
        size, at = self._size, self._heads
        heads_q, heads_kv = self._shape("q")[at], self._shape("k")[at]

        def folded(x: Any, at: int) -> Any:
            """(n, ..., kv * g, ...) to (..., kv * n * g, ...)."""
            shape = x.shape[1 : at + 1], x.shape[at + 2 :]
            x = x.reshape(size, *shape[0], heads_kv, heads_q // heads_kv, *shape[1])
            return jnp.moveaxis(x, 0, at + 1).reshape(*shape[0], size * heads_q, *shape[1])

        def unfolded(x: Any, at: int) -> Any:
            shape = x.shape[:at], x.shape[at + 1 :]
            x = x.reshape(*shape[0], heads_kv, size, heads_q // heads_kv, *shape[1])
            return jnp.moveaxis(x, at + 1, 0).reshape(size, *shape[0], heads_q, *shape[1])

        operands = dict(self._given)
        operands["q"] = folded(operands["q"], at)
        for name in ("alibi", "sink"):
            if name in operands:
                operands[name] = folded(self._mapped(name), len(self._shape(name)) - 1)
        out, *per_row = self._call(self._options.replace(enable_gqa=True), operands)
        return unfolded(out, at), *(unfolded(x, 1) for x in per_row)

    def fits_the_batch(self) -> bool:
        """Whether elements may be batch elements of one call, with no more memory than the call has for each."""
        if not self._foldable():
            return False
        backward = self._direction == "backward"
        if "sink" in self._given and (backward or self._is_mapped["sink"]):  # one for all of a batch
            return False
        batch = self._shape("q")[0]
        for name in _PAIRS:
            if name not in self._given:
                continue
            summed = backward and name == "bias" and self._options.bias_grad
            if self._is_mapped[name]:
                if self._leading(name)[0] != batch:
                    return False
            elif self._leading(name)[0] != 1 or summed:
                return False
        return True

    def into_batch(self) -> tuple[Any, ...]:
        """The call with more batch elements."""
        batch = self._shape("q")[0]
        operands = dict(self._given)
        for name in operands:
            if name == "sink" or name.startswith("captured") or (name in _PAIRS and not self._is_mapped[name]):
                continue
            if name == "alibi":
                if not self._is_mapped[name] and len(self._shape(name)) == 1:
                    continue
                heads = self._shape(name)[-1]
                per_batch = self._mapped(name).reshape(self._size, -1, heads)
                operands[name] = jnp.broadcast_to(per_batch, (self._size, batch, heads)).reshape(-1, heads)
                continue
            x = self._mapped(name)
            if name in _PAIRS:
                x = x.reshape(self._size, *(1,) * (5 - x.ndim), *x.shape[1:])
            operands[name] = x.reshape(-1, *x.shape[2:])
        results = self._call(self._options, operands)
        return tuple(self._unfolded(i, x) for i, x in enumerate(results))

    def _unfolded(self, index: int, x: Any) -> Any:
        x = x.reshape(self._size, -1, *x.shape[1:])
        if self._direction == "backward" and index == 3 and self._options.bias_grad:  # dbias, of the bias' shape
            x = x.reshape(self._size, *self._shape("bias"))
        return x

    def _mapped(self, name: str) -> Any:
        """The operand with the new axis, whether it had one or not."""
        x = self._given[name]
        return x if self._is_mapped[name] else jnp.broadcast_to(x, (self._size, *x.shape))

    def _call(self, options: Options, operands: Operands) -> tuple[Any, ...]:
        return batched(self._direction, options, tuple(operands))(*operands.values())
