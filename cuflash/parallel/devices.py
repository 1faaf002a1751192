"""The devices that a process stands for, what they run, and how they reach the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cuflash.arrays import CuPy, Library, NumPy, framework_of
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.numbers import shown
from cuflash.parallel import ring
from cuflash.parallel.asked import Asked
from cuflash.parallel.calls import Device
from cuflash.parallel.exchange import Exchange, Program, run_together
from cuflash.parallel.heads import Heads
from cuflash.parallel.nccl import Nccl, is_communicator


class Method(NamedTuple):
    """How devices share a call."""

    name: str
    forward: Callable[..., Program[Any]]
    """``(rank, devices, asked, xp, q, k, v)``; its result are out, lse and what the gradients need."""
    backward: Callable[..., Program[Any]]
    """From that, dout and dlse, to dq, dk and dv."""


def _ring_forward(rank: int, devices: int, asked: Asked, xp: Any, q: Any, k: Any, v: Any) -> Program[Any]:
    starts = xp.asarray(asked.cu_seqlens) if asked.packed else None
    longest = asked.longest(q.shape[0] * devices) if asked.packed else None
    on = Device(asked.division(devices, q.shape, k.shape), asked.options, xp, starts, longest)
    out, lse = yield from ring.forward(on, xp, rank, q, k, v)
    return out, lse, (on, xp, rank, q, k, v, out, lse)


def _ring_backward(held: tuple[Any, ...], dout: Any, dlse: Any) -> Program[Any]:
    return ring.backward(*(*held, dout, dlse))


def _heads_forward(rank: int, devices: int, asked: Asked, xp: Any, q: Any, k: Any, v: Any) -> Program[Any]:
    heads = Heads(asked, xp, rank, devices, q, k)
    out, lse, held = yield from heads.forward(q, k, v)
    return out, lse, (heads, held)


def _heads_backward(held: tuple[Heads, Any], dout: Any, dlse: Any) -> Program[Any]:
    heads, whole = held
    return heads.backward(whole, dout, dlse)


RING = Method("ring_attention", _ring_forward, _ring_backward)
HEADS = Method("all_to_all_attention", _heads_forward, _heads_backward)


class Devices:
    """The devices that this process stands for, which are one of several or all of them."""

    def __init__(self, asked: Asked, tensors: tuple[Any, ...], group: Any) -> None:
        self._asked = asked
        self._together = any(isinstance(x, list | tuple) for x in tensors)
        names = ("q", "k", "v")
        if self._together:
            if group is not None:
                raise InvalidArgument(f"group is {shown(group)} and q, k and v are lists, of all devices; pass None.")
            self._shards = list(zip(*_lists(names, tensors), strict=True))
        else:
            self._shards = [tensors]
        words = [name for _ in self._shards for name in names]
        framework = framework_of(words, [x for shard in self._shards for x in shard])
        if not isinstance(framework, NumPy | CuPy):
            raise UnsupportedProblem(
                f"q is a {framework.name} array; expected arrays of NumPy or CuPy, or one that JAX traces inside "
                "jax.shard_map."
            )
        self._framework: Library = framework
        for shard in self._shards:
            asked.check(*shard)
            for name, x, first in zip(names, shard, self._shards[0], strict=True):
                _check_like(name, x, f"that of the first device's {name}", first)
        if asked.packed and asked.lengths is None:
            raise InvalidArgument(
                f"cu_seqlens is {shown(asked.cu_seqlens)}; expected a NumPy array: which rows meet follows from it."
            )
        with framework.arithmetic(self._shards[0][0]):
            self._exchange = None if self._together else exchange_of(group)
        exchange, every = self._exchange, len(self._shards)
        self._ranks: Sequence[int]
        self._size: int
        self._ranks, self._size = (range(every), every) if exchange is None else ([exchange.rank], exchange.size)

    def forward(self, method: Method) -> tuple[Any, Any, list[Any]]:
        """out, lse, and of each device here what the gradients need."""
        programs = [
            method.forward(rank, self._size, self._asked, self._framework.xp, *shard)
            for rank, shard in zip(self._ranks, self._shards, strict=True)
        ]
        out, lse, held = zip(*self._run(programs), strict=True)
        return self._given(out), self._given(lse), list(held)

    def backward(self, method: Method, held: list[Any], results: tuple[Any, Any], gradients: tuple[Any, Any]) -> Any:
        """dq, dk and dv."""
        given = []
        for name, of, x, result in zip(("dout", "dlse"), ("out", "lse"), gradients, results, strict=True):
            if x is None and name == "dlse":
                given.append([None] * len(held))
                continue
            shards = _lists((name,), (x,))[0] if self._together else [x]
            if len(shards) != len(held):
                raise InvalidArgument(f"{name} is a list of {len(shards)} arrays for {len(held)} devices.")
            for shard, like in zip(shards, result if self._together else [result], strict=True):
                if framework_of((name, of), (shard, like)) is not self._framework:
                    raise InvalidArgument(f"{name} is {shown(shard)}; expected an array like {of}.")
                _check_like(name, shard, f"{of}", like)
            given.append(list(shards))
        programs = [method.backward(*one) for one in zip(held, *given, strict=True)]
        shared = self._run(programs)
        return tuple(self._given(x) for x in zip(*shared, strict=True))

    def _run(self, programs: Sequence[Program[Any]]) -> list[Any]:
        with self._framework.arithmetic(self._shards[0][0]):
            if self._exchange is None:
                return run_together(programs)
            (program,) = programs
            return [self._exchange.run(program)]

    def _given(self, results: Sequence[Any]) -> Any:
        """What the caller gets: a list where lists were given."""
        return list(results) if self._together else results[0]


def _lists(names: Sequence[str], tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """Tensors that are lists of as many arrays each."""
    for name, x in zip(names, tensors, strict=True):
        if not isinstance(x, list | tuple) or len(x) != len(tensors[0]) or not x:
            what = f"a list of {len(x)}" if isinstance(x, list | tuple) else shown(x)
            raise InvalidArgument(
                f"{name} is {what}; expected a list of arrays, one for every device, as many of each of "
                f"{', '.join(names)}."
            )
    return list(tensors)


def _check_like(name: str, x: Any, of: str, like: Any) -> None:
    """Every device has as many rows of the same kind."""
    if (tuple(x.shape), x.dtype) != (tuple(like.shape), like.dtype):
        raise InvalidArgument(
            f"{name} has shape {tuple(x.shape)} and is {x.dtype}; expected {tuple(like.shape)} and {like.dtype}, as "
            f"{of}."
        )


def exchange_of(group: Any) -> Exchange:
    """The other devices, as a communicator knows them."""
    if isinstance(group, Exchange):
        return group
    communicator = getattr(group, "_comm", group)  # that of an NCCLBackend of cupyx.distributed
    if is_communicator(communicator):
        return Nccl(communicator)
    raise InvalidArgument(
        f"group is {shown(group)}; expected a cupy.cuda.nccl.NcclCommunicator, a cuflash.parallel.Nccl of one, or a "
        "communicator of cupyx.distributed; or lists of arrays as q, k and v, one for each device, and no group."
    )
