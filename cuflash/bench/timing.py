"""The clock: device time by events around graph replays, host time by counting calls, everything interleaved.

There are two ways to time. A *burst* is a short slice on a card as cool or warm as the implementations before left it.
*Sustained* lets each implementation heat the card itself, for about a second, before a longer slice: a card that has
reached its power limit runs at the clock that this implementation's energy allows.

Tensors stay where the last call left them. Those of the ``prefill`` problems (268 MB in, out) exceed every L2 cache;
smaller ones are partly in L2, as they are in a model whose previous layer has just written them. All implementations
read the same inputs, so none has a warmer cache than another.

What the host's clock times begins when the process is at rest (:func:`settle`). OpenBLAS's threads look for more work
for 100 ms after a product, OpenMP's for some: with as many implementations as cores, the next one would share a core
with the last one's threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from cuflash.bench.meter import Meter, Reading

AT_REST = "Each slice on the host's clock begins when no thread of the process has computed for 20 ms"
"""What a run on a CPU says of its times."""


@dataclass(slots=True)
class Runner:
    """One implementation, ready to run one case again and again."""

    impl: str
    family: str
    call: Callable[[], object]
    """One call as a user makes it, without waiting for the device."""
    launch: Callable[[], object]
    """The same device work with as little host work as possible."""
    clock: Literal["events", "wall"]
    """How ``launch`` is timed: CUDA events on CuPy's current stream, or the host's clock until ``wait`` returns."""
    wait: Callable[[], object]
    """Returns when everything launched is done."""
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around any number of calls."""
    keep: list[Any] = field(default_factory=list)
    """Memory that captured work still reads and writes."""
    flops: float | None = None
    """Floating-point operations of a launch, where it does not compute the case itself."""
    nbytes: int | None = None
    """Bytes it must read and write, likewise."""
    tensors: Callable[[Any], Sequence[Any]] | None = None
    """Takes from what ``call`` returns out, or dq, dk, dv and perhaps more, shaped as the case is, in a type that
    DLPack has a name for and that holds every value. None where a call does not compute the case."""
    calls: int = 1
    """How many calls a launch is."""
    join: Callable[[], object] | None = None
    """Has CuPy's current stream wait on the device for what was launched, where that is on a stream of its own."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one implementation took for one case."""

    gpu_us: float
    """Device time of a call: the median over rounds, in microseconds; the whole time on the CPU."""
    host_us: float
    """Host time of a call until it returns, in microseconds: the median over calls."""
    sm_mhz: float | None = None
    """SM clock during the slices, the median of what was read; None where nothing was."""
    watts: float | None = None
    """Power during the slices, likewise."""


def settle(most_s: float = 2.0) -> bool:
    """Wait until no thread of the process has computed for 20 ms, or for so many seconds; whether that came to be."""
    deadline_s, calm = time.perf_counter() + most_s, 0
    while calm < 4 and time.perf_counter() < deadline_s:
        before_s = time.process_time()
        time.sleep(0.005)
        calm = calm + 1 if time.process_time() - before_s < 0.0005 else 0
    return calm == 4


def measure(runner: Runner, repeats: int) -> float:
    """Microseconds a call, over ``repeats`` launches back to back."""
    if runner.clock == "wall":
        runner.wait()
        start_s = time.perf_counter()
        for _ in range(repeats):
            runner.launch()
        runner.wait()
        return (time.perf_counter() - start_s) * 1e6 / (repeats * runner.calls)
    import cupy

    stream = cupy.cuda.get_current_stream()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    if runner.join is not None:  # what the host does first is hidden behind one launch more
        runner.launch()
        runner.join()
    start.record(stream)
    for _ in range(repeats):
        runner.launch()
    if runner.join is not None:
        runner.join()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) * 1e3 / (repeats * runner.calls)


def measure_host(runner: Runner, calls: int) -> float:
    """Microseconds of host time a call, over calls that do not wait for the device: their median."""
    times = []
    for _ in range(calls):
        start_s = time.perf_counter()
        runner.call()
        times.append((time.perf_counter() - start_s) * 1e6)
    runner.wait()
    return statistics.median(times)


def interleave(
    runners: Sequence[Runner],
    seconds: float,
    rounds: int = 7,
    slice_us: float = 10_000.0,
    heat_s: float = 0.0,
    meter: Meter | None = None,
    failed: Callable[[Runner, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time runners in an order that rotates and turns round, so that none always follows the same one or the warmest.

    Those on the host's clock begin at rest, one like the other.

    Parameters
    ----------
    runners
        Implementations of one case.
    seconds
        Stop starting rounds after this long; one round is always finished.
    rounds
        Rounds at most.
    slice_us
        A runner launches for about this long in each round.
    heat_s
        And for this long before each of its slices, untimed.
    meter
        Reads clock and power during the slices.
    failed
        Called with a runner that raised, which takes no further part; without it the exception goes on.

    Returns
    -------
    dict[str, Timing]
        The time of each implementation that did not fail, by its name.
    """
    alive = {runner.impl: runner for runner in runners}
    gpu_us: dict[str, list[float]] = {impl: [] for impl in alive}
    readings: dict[str, list[Reading]] = {impl: [] for impl in alive}
    host_us: dict[str, float] = {}
    repeats: dict[str, int] = {}

    def attempt(impl: str, work: Callable[[Runner], None]) -> None:
        runner = alive[impl]
        try:
            with runner.scope():
                work(runner)
        except Exception as error:
            if failed is None:
                raise
            del alive[impl]
            failed(runner, error)

    def prepare(runner: Runner) -> None:
        if runner.clock == "wall":
            settle()
        runner.launch()  # the first one may still allocate or upload
        runner.wait()
        estimate_us = max(measure(runner, 1), 1.0)
        repeats[runner.impl] = max(1, round(slice_us / (estimate_us * runner.calls)))
        runner.call()
        runner.wait()
        calls = min(5 * slice_us, 50_000.0) / estimate_us
        host_us[runner.impl] = measure_host(runner, min(50, max(3, round(calls))))

    def one_round(runner: Runner) -> None:
        if runner.clock == "wall":
            settle()
        runner.launch()  # brings back this implementation's own caches after the previous one's
        hot_s = time.perf_counter() + heat_s
        while time.perf_counter() < hot_s:
            measure(runner, repeats[runner.impl])
        with nullcontext() if meter is None else meter.watch(readings[runner.impl]):
            gpu_us[runner.impl].append(measure(runner, repeats[runner.impl]))

    for impl in list(alive):
        attempt(impl, prepare)
    deadline_s = time.perf_counter() + seconds
    for turn in range(rounds):
        names = list(alive)
        shift = turn // 2 % max(len(names), 1)
        order = names[shift:] + names[:shift]
        for impl in order if turn % 2 == 0 else reversed(order):
            attempt(impl, one_round)
        if time.perf_counter() > deadline_s:
            break
    return {impl: _timing(gpu_us[impl], host_us[impl], readings[impl]) for impl in alive}


def _timing(gpu_us: list[float], host_us: float, readings: list[Reading]) -> Timing:
    """Medians of what was measured."""
    if not readings:
        return Timing(statistics.median(gpu_us), host_us)
    sm_mhz, watts = (statistics.median(values) for values in zip(*readings, strict=True))
    return Timing(statistics.median(gpu_us), host_us, sm_mhz, watts)
