"""How a call is divided over devices: along its batch and its heads, and along nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from cuflash.adapters.jax import primitive
from cuflash.adapters.jax.axes import DIVISIBLE, axes_of, places_of
from cuflash.errors import UnsupportedProblem
from cuflash.ops.call import Options
from cuflash.ops.given import GivenCall
from cuflash.problem import Direction


def divided(
    direction: Direction, options: Options, names: tuple[str, ...], along: tuple[str, ...] = ()
) -> Callable[..., tuple[Any, ...]]:
    """`primitive.bind`, which a program over several devices runs on each device's part of the operands."""
    whole = partial(primitive.bind, direction, options, names, along)

    def call(*operands: Any) -> tuple[Any, ...]:
        division = Division(primitive.given_call(direction, options, names, along, operands))
        function = custom_partitioning(whole)
        function.def_partition(division.partition, sharding_rule=division.rule, **division.factor_sizes)
        return function(*operands)

    return jax.jit(call)  # op by op there would be no program to divide


class Division:
    """The axes of a call's arrays by what they are of, and which of them may lie on several devices."""

    def __init__(self, call: GivenCall) -> None:
        self._call, problem = call, call.problem
        self._names = [name for name, *_ in call.operands]
        self._results = [r.name for r in call.results]
        self._axes = axes_of(call)
        self._shared = problem.heads_kv == 1 and problem.heads_q > 1
        """Heads of queries all have the same keys, which every device has then."""
        compound = not self._shared and problem.group > 1 and "heads" in self._axes["q"]
        self._words = {"heads": "(kvheads group)"} if compound else {"kvheads": "heads"}
        if self._shared:
            self._words["kvheads"] = "onehead"
        self.factor_sizes: dict[str, int] = {"group": problem.group} if compound else {}
        self.rule: str = " -> ".join(
            ", ".join(" ".join(self._words.get(axis, axis) for axis in self._axes[name]) for name in names)
            for names in (self._names, self._results)
        )

    def partition(self, mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        """What XLA's partitioner asks for: the computation on one device, and what lies where."""
        on = self._placed(operands, results)
        specs = {name: self._spec(axes, on) for name, axes in self._axes.items()}
        mesh = next((x.sharding.mesh for x in operands if isinstance(x.sharding, NamedSharding)), mesh)
        return (
            mesh,
            partial(self._part, on),
            tuple(NamedSharding(mesh, specs[name]) for name in self._results),
            tuple(NamedSharding(mesh, specs[name]) for name in self._names),
        )

    def _placed(self, operands: Sequence[Any], results: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """The axes of the mesh that batch and heads lie along."""
        on: dict[str, tuple[str, ...]] = {}
        for name, x in zip((*self._names, *self._results), (*operands, *results), strict=True):
            if not isinstance(x.sharding, NamedSharding):
                if x.sharding is None or x.sharding.is_fully_replicated:
                    continue
                raise UnsupportedProblem(
                    f"{self._word(name)} is sharded in a way that names no axes of a mesh ({x.sharding}). "
                    "Place arrays by jax.sharding.NamedSharding."
                )
            for axis, n, names in zip(self._axes[name], x.shape, places_of(x.sharding, len(x.shape)), strict=True):
                count = prod(x.sharding.mesh.shape[name] for name in names)
                if count == 1:
                    continue
                if axis not in DIVISIBLE:
                    raise self._refused(name, axis, names)
                axis = "heads" if axis == "kvheads" and not self._shared else axis
                limit = self._call.problem.heads_kv if axis == "heads" and not self._shared else n
                if limit % count:
                    raise self._uneven(name, axis, n, count)
                on.setdefault(axis, names)
        if on and self._call.problem.dropout:
            raise UnsupportedProblem(
                "dropout draws by the number of a batch element and a head, and each of several devices would begin at "
                "0. Call cuflash inside jax.shard_map, with a key for each device: jax.random.fold_in(key, "
                "jax.lax.axis_index(...))."
            )
        return on

    def _uneven(self, name: str, axis: str, n: int, count: int) -> UnsupportedProblem:
        heads_kv = self._call.problem.heads_kv
        what = f"{n} batch elements" if axis == "batch" else f"{n} heads"
        why = "" if axis == "batch" else f", but heads are divided with their {heads_kv} key heads"
        return UnsupportedProblem(
            f"{self._word(name)} has {what} on {count} devices{why}; expected as many on each device. "
            "Shard along fewer devices, or repeat the key heads."
        )

    def _refused(self, name: str, axis: str, names: tuple[str, ...]) -> UnsupportedProblem:
        if axis.startswith("numbered"):
            along, one = ("batch", "batch element") if axis == "numberedbatch" else ("heads", "head")
            return UnsupportedProblem(
                f"{self._word(name)} is sharded along its {along} over {' and '.join(names)}, and a written score or "
                f"mask reads the number of a {one}, which each of several devices would begin at 0. Call cuflash "
                "inside jax.shard_map, where that is what the number means."
            )
        what = {"rows": "its length", "keys": "its length", "dim": "its head dimension", "dimv": "its head dimension"}
        return UnsupportedProblem(
            f"{self._word(name)} is sharded along {what.get(axis, 'an axis')} over {' and '.join(names)}; attention "
            "here is divided over devices along the batch and the heads only. Give it another sharding by "
            "jax.lax.with_sharding_constraint before the call, or call cuflash inside jax.shard_map."
        )

    def _word(self, name: str) -> str:
        return self._call.options.name(name)

    def _spec(self, axes: Sequence[str], on: dict[str, tuple[str, ...]]) -> PartitionSpec:
        if not self._shared:
            on = {**on, "kvheads": on.get("heads", ())}
        return PartitionSpec(*(on.get(axis) or None for axis in axes))

    def _part(self, on: dict[str, tuple[str, ...]], *operands: Any) -> tuple[Any, ...]:
        """The results of one device's part, and of all parts where they are sums over what is divided."""
        names = tuple(name for name, *_ in self._call.arrays)
        computed = primitive.bind(self._call.direction, self._call.options, names, self._call.along, *operands)
        return tuple(self._summed(name, x, on) for name, x in zip(self._results, computed, strict=True))

    def _summed(self, name: str, x: Any, on: dict[str, tuple[str, ...]]) -> Any:
        over: list[str] = []
        if name in ("dbias", "dsink") or name.startswith("dcaptured"):
            over = [place for axis in ("batch", "heads") if axis not in self._axes[name] for place in on.get(axis, ())]
        elif name in ("dk", "dv") and self._shared:
            over = [*on.get("heads", ())]
        if not over:
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jax.lax.psum(wide, tuple(over)).astype(x.dtype)
