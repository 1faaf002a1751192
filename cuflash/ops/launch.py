"""One call on a GPU.

The first call on arrays of some kind is checked, planned and compiled into a :class:`Prepared`; later ones look it up,
fill their pointers into its parameter block and launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import itemgetter
from typing import Any

import numpy as np

from cuflash import device, jit
from cuflash.arrays import Launcher, View
from cuflash.errors import InvalidArgument
from cuflash.ops import block, boxes, check, draw, lists, overlap
from cuflash.ops.call import OUTPUTS, Arrays, Options, Tangents, results
from cuflash.ops.lengths import with_lengths
from cuflash.ops.scratch import KeptZeros
from cuflash.plan import Scratch, Step, Workspace, choose, policies
from cuflash.plan.bias import needs_zeros
from cuflash.plan.steps import exact_sums
from cuflash.problem import Direction, Problem

_MAX_PREPARED = 1024
_prepared: dict[tuple[Any, ...], Prepared] = {}


def run(
    framework: Launcher,
    direction: Direction,
    options: Options,
    arrays: Arrays,
    generator: Any = None,
    cached: int | None = None,
    tangents: Tangents | None = None,
) -> tuple[Any, ...]:
    """Answer a call on arrays that live on a GPU; with tangents where the options ask for those of the results."""
    options = with_lengths(direction, options, arrays)
    arrays = lists.with_rule(framework, options, arrays)
    names = options.manner.names
    each: tuple[Any, ...] = arrays
    if arrays.captured is not None:
        arrays = _on_device(framework, options, arrays)
        names, each = options.names(arrays), arrays.each()
    if tangents is not None:
        names, each = (*names, *(f"d{name}" for name in tangents._fields)), (*each, *tangents)
    pointers, described = framework.describe(names, each)
    key = direction, options.kind, described, pointers[1] == pointers[2]  # whether k and v start together
    prepared = _prepared.get(key)
    if prepared is None:
        settled = check.settled(options)
        if settled is not options:
            return run(framework, direction, settled, arrays, generator, cached, tangents)
        prepared = prepare(framework, direction, options, arrays, tangents)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        if options.kind.is_kind:
            _prepared[key] = prepared
    listed: tuple[int, ...] = ()
    if options.block_mask is not None:
        listed = lists.pointers(framework, options.block_mask, arrays.q, prepared.listings)
    return prepared(arrays.outputs(direction), pointers, generator, cached, listed)


def _on_device(framework: Launcher, options: Options, arrays: Arrays) -> Arrays:
    """The call with copies on the device of q of what written scores and masks read in host memory."""
    captured = arrays.captured or ()
    host = [i for i, x in enumerate(captured) if isinstance(x, np.ndarray)]
    if not host:
        return arrays
    if framework.is_capturing():
        name = options.name(f"captured{host[0]}")
        raise InvalidArgument(
            f"{name} is in host memory, from where a CUDA graph would not copy it anew. Put it on the device of "
            f"{options.name('q')}."
        )
    with framework.context(framework.ordinal(arrays.q)):
        moved = [framework.moved(x, arrays.q) if i in host else x for i, x in enumerate(captured)]
    return arrays._replace(captured=tuple(moved))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about a kind of call but its pointers."""

    framework: Launcher
    device: int
    launches: tuple[jit.Launch, ...]
    """Those of the kernels, in order; none when there is no pair of a query and a key."""
    params: Callable[[tuple[int, ...]], ctypes.Array]
    """The parameter block for the pointers of the given and of the allocated arrays, and with dropout the address of a
    generator, a seed and an offset, or how many rows of a cache are in use."""
    allocations: tuple[Callable[[], Any], ...]
    """What allocates the results that are not given, and workspaces that begin as zeros."""
    scratch: Callable[[], tuple[Any, int]] | None
    """What allocates memory for all other workspaces, and says where it begins; None where there are none."""
    shared: tuple[int, ...]
    """At which bytes of it they start."""
    launch: Callable[..., None]
    """Launches the kernels where that belongs: on the pointers of the given and of the allocated arrays and, with
    dropout or a cache, as a second argument on what else there is in the parameter block."""
    results: Callable[[Sequence[Any]], tuple[Any, ...]]
    """Takes the results out of the given outputs and the allocations."""
    fills: tuple[tuple[int, float], ...]
    """Where those are that no kernel writes, as there is nothing to attend to, and what they hold."""
    increment: int | None
    """How far the call moves a generator on; None without dropout and in the backward."""
    shares_values: bool
    """The values must begin where the keys do: kernels read them as their first columns."""
    check_separate: Callable[[tuple[int, ...]], None] | None
    """Refuses pointers with which what is written meets another array; None when all results are allocated."""
    room: tuple[str, int, int] | None
    """Of a cache of which every sequence uses as many rows: what the caller knows their number as, how many rows there
    are, and how many are appended. None where an array says how many are in use, or there is no cache."""
    listings: tuple[lists.Listing, ...] = ()
    """The lists of a block mask that the kernels walk."""

    def __call__(
        self,
        outputs: tuple[Any, ...],
        pointers: list[int],
        generator: Any = None,
        cached: int | None = None,
        listed: tuple[int, ...] = (),
    ) -> tuple[Any, ...]:
        """Allocate, launch and return the results.

        `outputs` are those of the arrays, None where one is allocated, and `pointers` are of all arrays that are given.
        `cached` rows of a cache are in use, all of them if it is None. `listed` is where the lists of a block mask are.
        """
        self._check(pointers)
        framework = self.framework
        if (there := framework.elsewhere(self.device)) is not None:
            with there:
                return self(outputs, pointers, generator, cached, listed)
        drawn: tuple[int, ...] = ()
        if self.room is not None:
            drawn = self.rows(cached)
        elif self.increment is not None:
            drawn = draw.on_device(generator, self.increment, framework, self.device)
        written = (*outputs, *self.start((*pointers, *listed), drawn))
        for index, value in self.fills:
            written[index][...] = value
        return self.results(written)

    def start(self, numbers: Sequence[int], drawn: tuple[int, ...] = ()) -> list[Any]:
        """Allocate, launch and return what was allocated, the results that are not given first.

        `numbers` are the pointers of what is given. Call where launches for the device belong.
        """
        allocated = [allocate() for allocate in self.allocations]
        if self.launches:
            self.launch((*numbers, *self.framework.pointers(allocated)), drawn)
        return allocated

    def bind(
        self, outputs: tuple[Any, ...], pointers: list[int], cached: int | None = None, listed: tuple[int, ...] = ()
    ) -> Bound:
        """The call on arrays that stay, without dropout; what is not given is allocated now, for all calls."""
        self._check(pointers)
        framework = self.framework
        with framework.context(self.device):
            allocated = [a.own() if isinstance(a, KeptZeros) else a() for a in self.allocations]
            numbers = [*pointers, *listed, *framework.pointers(allocated)]
            held: list[Any] = [*allocated]
            if self.scratch is not None:
                scratch = self.scratch()
                held.append(scratch[0])
                numbers += [scratch[1] + first for first in self.shared]
            written = (*outputs, *allocated)
            for index, value in self.fills:
                written[index][...] = value
        drawn = self.rows(cached) if self.room is not None else ()
        params = self.params((*numbers, *drawn)) if self.launches else None
        return Bound(self, tuple(numbers), params, self.results(written), tuple(held))

    def rows(self, cached: int | None) -> tuple[int, ...]:
        """What a parameter block says of how many rows of a cache are in use, where that is a number."""
        assert self.room is not None
        name, room, appended = self.room
        return (room if cached is None else check.cached_rows(name, cached, room, appended),)

    def _check(self, pointers: list[int]) -> None:
        if self.shares_values and pointers[1] != pointers[2]:
            raise InvalidArgument(
                "the values do not begin where the keys do, as they did when the call was prepared. Prepare another."
            )
        if self.check_separate is not None:
            self.check_separate(tuple(pointers))


@dataclass(frozen=True, slots=True)
class Bound:
    """A call whose arrays are bound to it: its launches alone are left, one call at a time."""

    prepared: Prepared
    numbers: tuple[int, ...]
    """Pointers of what is given, then of what was allocated."""
    params: Any
    """The parameter block; None when there is nothing to launch."""
    results: tuple[Any, ...]
    held: tuple[Any, ...]
    """Memory that the launches use."""

    def call(self) -> Callable[..., None]:
        """Launches; of a cache so many rows are in use as it is told, or as many as at the binding if that is None."""
        prepared, params, framework = self.prepared, self.params, self.prepared.framework
        if params is None:
            return lambda cached=None: None
        device, launches = prepared.device, prepared.launches
        elsewhere, stream_of = framework.elsewhere, framework.launch_stream  # attributes take time to find

        def call(cached: int | None = None) -> None:
            if (there := elsewhere(device)) is not None:
                with there:
                    return call(cached)
            block = params
            if cached is not None:
                block = prepared.params((*self.numbers, *prepared.rows(cached)))
            stream = stream_of(device)
            for launch in launches:
                launch(block, stream)

        return call

    def captured(self) -> Callable[..., None]:
        """The same by one call of the driver, without a choice of rows; a capture around it records the launches."""
        prepared, params, framework = self.prepared, self.params, self.prepared.framework
        if params is None:
            return self.call()

        def launch(stream: int) -> None:
            for start in prepared.launches:
                start(params, stream)

        device = prepared.device
        with framework.context(device):
            replay = jit.record(launch)
        elsewhere, stream_of, is_capturing = framework.elsewhere, framework.launch_stream, framework.is_capturing

        def call(cached: None = None) -> None:
            if (there := elsewhere(device)) is not None:
                with there:
                    return call()
            (launch if is_capturing() else replay)(stream_of(device))

        return call


def prepare(
    framework: Launcher, direction: Direction, options: Options, arrays: Arrays, tangents: Tangents | None = None
) -> Prepared:
    """Check a call on arrays of this kind, plan it and load its kernels."""
    views = options.views(framework, arrays)
    if tangents is not None:
        given = {name: x for name, x in tangents._asdict().items() if x is not None}
        views |= {check.TANGENT + name: framework.view(f"d{name}", x) for name, x in given.items()}
    check.check_on_cuda(framework.name, views)
    ordinal = int(views["q"].device.removeprefix("cuda:"))
    call = plan_views(direction, options, views, device.current(ordinal))
    places = [*(name if name in views else None for name in OUTPUTS[direction]), *(w.name for w in call.results)]
    allocations = [_allocator(framework, w, ordinal) for w in (*call.results, *call.apart)]
    written = check.written(direction, views)
    with framework.context(ordinal):
        launches = call.load(ordinal)
        shared = Scratch(call.shared)
        scratch = framework.scratch(shared.nbytes, ordinal) if call.shared else None
    params = call.params(ordinal)
    return Prepared(
        framework=framework,
        device=ordinal,
        launches=launches,
        params=params,
        allocations=tuple(allocations),
        scratch=scratch,
        shared=shared.starts,
        launch=_launcher(framework, ordinal, launches, params, scratch, shared.starts),
        results=itemgetter(*(places.index(name) for name in call.names)),
        fills=tuple((places.index(name), value) for name, value in call.fills.items()),
        increment=draw.increment(call.problem) if call.draws else None,
        shares_values=any(getattr(step.config, "shared_kv", False) for step in call.steps),
        check_separate=overlap.checker(views, written) if written else None,
        room=(options.name("seqused_kv"), call.problem.len_kv, call.problem.appended) if call.counts else None,
        listings=lists.listings(call.problem, call.steps),
    )


def _launcher(
    framework: Launcher,
    device: int,
    launches: tuple[jit.Launch, ...],
    params: Callable[[tuple[int, ...]], ctypes.Array],
    scratch: Callable[[], tuple[Any, int]] | None,
    shared: tuple[int, ...],
) -> Callable[..., None]:
    """:attr:`Prepared.launch`, with all that it needs beside it: the attributes of objects take time to find."""
    stream_of = framework.launch_stream

    def launch(numbers: tuple[int, ...], drawn: tuple[int, ...] = ()) -> None:
        if scratch is not None:
            memory = scratch()  # held until the launches are queued
            numbers = (*numbers, *[memory[1] + first for first in shared])
        block = params((*numbers, *drawn) if drawn else numbers)
        stream = stream_of(device)
        for start in launches:
            start(block, stream)

    return launch


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A kind of call, checked and planned for a GPU that need not be there."""

    problem: Problem
    names: tuple[str, ...]
    """Its results, in order."""
    results: tuple[Workspace, ...]
    """Those of them that are not given."""
    workspaces: tuple[Workspace, ...]
    """Scratch memory, what begins as zeros first."""
    fills: dict[str, float]
    """What results hold that no kernel writes, as there is nothing to attend to."""
    steps: tuple[Step, ...]
    """What is launched, in order; without pairs of a query and a key less than the plan has."""
    template: np.ndarray
    maps: dict[str, jit.tensormap.TensorMap]
    given: tuple[str, ...]
    """The arrays of the call, in order."""

    @property
    def apart(self) -> tuple[Workspace, ...]:
        """Workspaces that begin as zeros."""
        return tuple(w for w in self.workspaces if w.zeroed or w.kept)

    @property
    def shared(self) -> tuple[Workspace, ...]:
        """The other ones, which may be parts of one array: every array that is allocated takes time."""
        return tuple(w for w in self.workspaces if not (w.zeroed or w.kept))

    @property
    def allocated(self) -> tuple[Workspace, ...]:
        """All arrays that are not given."""
        return self.results + self.workspaces

    @property
    def draws(self) -> bool:
        """Whether it takes a seed and an offset from a generator, and returns them."""
        return "rng_state" in self.names

    @property
    def counts(self) -> bool:
        """Whether it takes a number of rows of a cache that every sequence uses."""
        return self.problem.layout == "cache" and "seqused_kv" not in self.given

    def load(self, ordinal: int) -> tuple[jit.Launch, ...]:
        """:attr:`Prepared.launches`; call where launches for the GPU belong."""
        kernels = jit.load(self.steps, ordinal, policies.written(self.problem))
        return tuple(kernel.of(step.num_blocks) for kernel, step in zip(kernels, self.steps, strict=True))

    def params(self, ordinal: int) -> Callable[[tuple[int, ...]], ctypes.Array]:
        """:attr:`Prepared.params`: pointers of what is given, of lists of a block mask, then of what is allocated."""
        listed = (name for listing in lists.listings(self.problem, self.steps) for name in lists.MEMBERS[listing.side])
        pointers = (*self.given, *listed, *(w.name for w in self.allocated))
        return block.filler(self.template, pointers, self.maps, ordinal, draws=self.draws, counts=self.counts)


def plan_views(direction: Direction, options: Options, views: Mapping[str, View], gpu: device.Device) -> PlannedCall:
    """Check a call on arrays of which nothing but these views is known, and plan it.

    A forward with dropout that is given `rng_state` draws from that seed and offset, which stay as they are.
    """
    problem = check.problem_of(direction, options, views)
    plan = choose(problem, gpu, options.manner.family)
    shapes = check.shapes(options, views)
    names = results(problem, options.keep_state, options.keep_delta, options.tangents)
    if "rng_state" in views:
        names = tuple(name for name in names if name != "rng_state")
    new = {name: result(name, problem, shapes[name]) for name in names if name not in views}
    # Without pairs there is still a seed to draw, and a sink alone decides lse and its own gradient.
    rows = min(problem.batch, problem.rows_q) > 0
    uneven = problem.layout == "varlen" and options.empty_lse != options.tail_lse  # so lse is no one number either
    whole = rows and (problem.rows_kv > 0 or problem.sink or uneven)
    fills = {"lse": options.empty_lse if rows else options.tail_lse}
    apart = {"fwd_rng"} | ({"cache_append"} if problem.rows_kv else set())  # what is launched without pairs, too
    left_out = {"fwd_rng"} if "rng_state" in views else set()
    exact = problem.deterministic and whole
    sums = [exact_sums(name, problem, prod(shapes[name])) for name in names if exact and name.startswith("dcaptured")]
    steps = tuple(
        step
        for step in plan.steps
        if (whole or step.kernel in apart) and step.kernel not in left_out and step.num_blocks > 0
    )
    return PlannedCall(
        problem=problem,
        names=names,
        results=tuple(new.values()),
        workspaces=tuple(
            sorted(
                (w for w in (*plan.workspaces, *sums) if whole and w.name not in new),
                key=lambda w: not (w.zeroed or w.kept),
            )
        ),
        fills={name: fills.get(name, 0.0) for name in names if not whole and name != "rng_state"},
        steps=steps,
        template=block.template(plan, options, views, shapes),
        maps={
            box.tensor: tensor
            for step in steps
            for box in step.boxes
            if (tensor := boxes.tensor_map(box, problem, options, views, shapes)) is not None
        },
        given=tuple(views),
    )


def _allocator(framework: Launcher, workspace: Workspace, device: int) -> Callable[[], Any]:
    shape, dtype = workspace.shape, framework.dtype(workspace.dtype)
    if workspace.kept:
        return KeptZeros(framework, shape, dtype, device)
    return (
        partial(framework.zeros, shape, dtype, device)
        if workspace.zeroed
        else framework.allocator(shape, dtype, device)
    )


def result(name: str, problem: Problem, shape: tuple[int, ...]) -> Workspace:
    """A result to be allocated."""
    dtypes = {
        "lse": problem.dtype.accumulator, "row_state": problem.dtype.accumulator, "rng_state": np.dtype(np.uint64),
        "dbias": problem.dtype.accumulator, "dsink": np.dtype(np.float32), "delta": problem.dtype.accumulator,
        "tangent_lse": problem.dtype.accumulator,
    }  # fmt: skip
    if name.startswith("dcaptured"):  # sums, to which blocks add
        return Workspace(name, problem.dtype.accumulator, shape, zeroed=not problem.deterministic)
    # Kernels write delta up to the packed rows there are: not those of no sequence.
    zeroed = needs_zeros(problem) if name == "dbias" else name == "delta" and problem.layout == "varlen"
    return Workspace(name, dtypes.get(name, problem.dtype.numpy), shape, zeroed)
