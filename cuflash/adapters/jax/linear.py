"""A step of a JAX program that is linear in some operands, pushed forward or pulled back by functions of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Arrays = Sequence[Any]


class Map(Protocol):
    """A linear map of changes that depends on other arrays too; two that are equal do the same."""

    def __hash__(self) -> int: ...

    def push(self, given: Arrays, changes: Arrays) -> Arrays:
        """The results."""
        ...

    def pull(self, given: Arrays, cotangents: Arrays) -> Arrays:
        """The cotangents of the changes for those of the results; among both, None is zero."""
        ...

    def derivative(self, moving: tuple[int, ...]) -> tuple[Map, tuple[int, ...]]:
        """The map from tangents of some of what is given to those of the results, and of which it depends on.

        To that map the changes are given, too, behind the rest.
        """
        ...


step: Primitive = Primitive("cuflash_linear")
step.multiple_results = True


def apply(map: Map, given: Arrays, changes: Arrays, like: Arrays) -> list[Any]:
    """The results of a map, shaped and typed like other arrays."""
    types = tuple(jax.typeof(x).update(weak_type=False) for x in like)
    return step.bind(*given, *changes, map=map, num_given=len(given), types=types)


@dataclass(frozen=True)
class _Mapped:
    """A map for each element along the first axis of what is mapped, where an axis is 0 and not None."""

    each: Map
    given: tuple[int | None, ...]
    changes: tuple[int | None, ...]

    def push(self, given: Arrays, changes: Arrays) -> Arrays:
        return jax.vmap(self.each.push, (self.given, self.changes))(tuple(given), tuple(changes))

    def pull(self, given: Arrays, cotangents: Arrays) -> Arrays:
        pulled = jax.vmap(self.each.pull, (self.given, 0))(tuple(given), tuple(cotangents))
        return tuple(
            x.sum(0) if x is not None and axis is None else x for x, axis in zip(pulled, self.changes, strict=True)
        )

    def derivative(self, moving: tuple[int, ...]) -> tuple[Map, tuple[int, ...]]:
        second, kept = self.each.derivative(moving)
        return _Mapped(second, (*self.given, *self.changes), tuple(self.given[i] for i in kept)), kept


def _push(*operands: Any, map: Map, num_given: int, types: Any) -> list[Any]:
    return list(map.push(operands[:num_given], operands[num_given:]))


@lru_cache(maxsize=1024)
def _program(map: Map, num_given: int) -> Any:
    return jax.jit(lambda *operands: _push(*operands, map=map, num_given=num_given, types=None))


@step.def_impl
def _run(*operands: Any, map: Map, num_given: int, types: Any) -> list[Any]:
    return _program(map, num_given)(*operands)


@step.def_abstract_eval
def _types(*_: Any, map: Map, num_given: int, types: Any) -> list[Any]:
    return list(types)


mlir.register_lowering(step, mlir.lower_fun(_push, multiple_results=True))


def _jvp(primals: Arrays, tangents: Arrays, *, map: Map, num_given: int, types: Any) -> tuple[Any, Any]:
    results = step.bind(*primals, map=map, num_given=num_given, types=types)
    moving = tuple(i for i in range(num_given) if type(tangents[i]) is not ad.Zero)
    terms = []
    if any(type(x) is not ad.Zero for x in tangents[num_given:]):
        changes = [ad.instantiate_zeros(x) for x in tangents[num_given:]]
        terms.append(step.bind(*primals[:num_given], *changes, map=map, num_given=num_given, types=types))
    second, kept = map.derivative(moving)
    if kept:
        changes = [tangents[i] for i in kept]
        terms.append(step.bind(*primals, *changes, map=second, num_given=len(primals), types=types))
    if not terms:
        return results, [ad.Zero(x.to_tangent_aval()) for x in types]
    return results, [sum(x[1:], x[0]) for x in zip(*terms, strict=True)]


def _transpose(cotangents: Arrays, *operands: Any, map: Map, num_given: int, types: Any) -> list[Any]:
    given, changes = operands[:num_given], operands[num_given:]
    pulled = map.pull(given, [None if type(x) is ad.Zero else x for x in cotangents])
    wanted = [x if ad.is_undefined_primal(change) else None for x, change in zip(pulled, changes, strict=True)]
    return [None] * num_given + wanted


def _batch(operands: Arrays, axes: Arrays, *, map: Map, num_given: int, types: Any) -> tuple[Any, Any]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    first = tuple(None if axis is None else 0 for axis in axes)
    operands = [x if axis is None else jax.numpy.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    mapped = _Mapped(map, first[:num_given], first[num_given:])
    results = step.bind(*operands, map=mapped, num_given=num_given, types=tuple(_stacked(x, size) for x in types))
    return results, [0] * len(results)


def _stacked(type: Any, size: int) -> Any:
    """The type of so many arrays of a type."""
    sharding = NamedSharding(type.sharding.mesh, PartitionSpec(None, *type.sharding.spec))
    return type.update(shape=(size, *type.shape), sharding=sharding)


ad.primitive_jvps[step] = _jvp
ad.primitive_transposes[step] = _transpose
batching.primitive_batchers[step] = _batch
