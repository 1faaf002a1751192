"""Time attention that is divided over the GPUs of this machine, by a process for each, beside one of them alone.

Run as a module it is one of those processes: its argument is JSON of what to do, and the first prints what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from math import inf
from pathlib import Path
from statistics import median_low
from time import perf_counter
from typing import Any, NamedTuple

import cuflash
from cuflash.bench.divided import ALONE, Divided
from cuflash.cases import calls, sets
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import Case
from cuflash.device import current
from cuflash.errors import UnsupportedProblem
from cuflash.parallel import Exchange, all_to_all_attention_vjp, model, ring_attention_vjp, token_order
from cuflash.parallel.exchange import Post, Wait
from cuflash.parallel.schedule import Order
from cuflash.problem import Direction

NAME = "parallel"
"""The problem set whose cases are divided over all GPUs."""

ORDER: Order = "zigzag"
_WAYS = {"ring": (ring_attention_vjp, model.ring), "all-to-all": (all_to_all_attention_vjp, model.all_to_all)}
_PHASES: tuple[Direction, Direction] = "forward", "backward"
_BACKWARDS, _FORWARDS = 2.0**35, 2.0**37
"""Queries times keys of all repetitions of a case: of those with a backward, one of which is always done, and of all,
which are two to eight."""


def measure(cases: Sequence[Case], seconds: float) -> list[Divided]:
    """Time cases on all GPUs that are visible.

    Raises
    ------
    UnsupportedProblem
        If there is one alone, or CuPy has no NCCL.
    """
    import cupy
    from cupy.cuda import nccl

    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        raise UnsupportedProblem(f"{NAME} divides attention over GPUs, of which {count} is visible; it needs two.")
    if not nccl.available:
        raise UnsupportedProblem(
            f"{NAME} needs NCCL, which CuPy cannot load. Install nvidia-nccl for its CUDA version."
        )
    asked = {"size": count, "unique": nccl.get_unique_id().hex(), "cases": [case.id for case in cases]}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, json.dumps(asked | {"rank": rank})],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed, _ = processes[0].communicate(timeout=seconds)
        failed = [process for process in processes if process.wait(timeout=10)]
    finally:
        for process in processes:
            process.kill()
    if failed:
        raise subprocess.CalledProcessError(failed[0].returncode, failed[0].args)
    return [Divided(**row) for row in json.loads(printed.splitlines()[-1])]  # NCCL may print before


class Still(Exchange):
    """Nothing travels: what a device sends is copied, again and again, to where it would receive."""

    def __init__(self, exchange: Exchange) -> None:
        self.rank, self.size = exchange.rank, exchange.size

    def post(self, post: Post) -> Wait:
        """Copy on the stream that computes."""
        for sent, received in zip(post.sent, post.received, strict=True):
            given, filled = sent.array.reshape(-1), received.array.reshape(-1)
            for first in range(0, filled.size, given.size):
                some = filled[first : first + given.size]
                some[...] = given[: some.size]
        return lambda: None


class Noting(Exchange):
    """Another exchange, with a list of what was posted."""

    def __init__(self, exchange: Exchange) -> None:
        self.rank, self.size = exchange.rank, exchange.size
        self._exchange = exchange
        self.posts: list[Post] = []

    def post(self, post: Post) -> Wait:
        """Note, and pass on."""
        self.posts.append(post)
        return self._exchange.post(post)

    def again(self) -> None:
        """Post all of it, one after the other."""
        for post in self.posts:
            self._exchange.post(post)()


Pair = tuple[float, float]
"""Seconds of the forward and of the backward; infinitely many of what was not timed."""


class _Took(NamedTuple):
    """What was timed, and bytes and differences of the first repetition."""

    whole: Pair
    kernels: Pair | None = None
    transfers: Pair | None = None
    nbytes: tuple[int, int] | None = None
    apart: tuple[float, float] | None = None


class _Member:
    """One process of several, with a GPU to itself."""

    def __init__(self, rank: int, size: int, unique: bytes) -> None:
        import cupy
        from cupy.cuda import nccl

        from cuflash.parallel.nccl import Nccl

        self._cupy, self._nccl, self._rank, self._size = cupy, nccl, rank, size
        cupy.cuda.Device(rank).use()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._stream.use()
        self._communicator = nccl.NcclCommunicator(size, unique, rank)
        self._exchange = Nccl(self._communicator)
        self._normals = Normals(cupy)

    def case(self, case: Case) -> list[Divided]:
        """Time both phases of each way, in turn."""
        length = case.problem.len_q
        inputs = make(case, self._normals)
        whole = [inputs.q, inputs.k, inputs.v, inputs.dout]
        tokens = self._cupy.asarray(token_order(length, self._size, ORDER).reshape(self._size, -1)[self._rank])
        parts = [x[:, tokens] for x in whole]
        words = {name: calls.keywords(case)[name] for name in ("softmax_scale", "causal", "window_size")}
        times: dict[str, list[_Took]] = {name: [] for name in (ALONE, *_WAYS)}
        ways = list(times)
        for repetition in range(min(8, max(2, int(_FORWARDS / length**2)))):
            backward, mine = repetition < max(1, int(_BACKWARDS / length**2)), None
            first = repetition % len(ways)  # they take turns, as each leaves the GPUs warmer than it found them
            for way in ways[first:] + ways[:first]:
                if way != ALONE:
                    function, turned = _WAYS[way][0], repetition % 2 == 1
                    times[way].append(self._divided(function, parts, words, mine, backward, turned))
                    continue
                results, took = self._step(lambda: cuflash.flash_attn_vjp(*whole[:3], **words), whole[3], backward)
                times[ALONE].append(_Took(took))
                mine = [x[:, tokens] for x in results] if repetition == 0 else None
                del results
        return self._rows(case, times)

    def _rows(self, case: Case, times: Mapping[str, Sequence[_Took]]) -> list[Divided]:
        """What each way took in each phase, beside what it takes on paper."""
        rows = []
        speeds = [model.speeds_of(current(self._rank), case.turned(phase).problem) for phase in _PHASES]
        for name, runs in times.items():
            for i, phase in enumerate(_PHASES):
                problem = case.turned(phase).problem
                paper = (
                    model.one_device(problem, speeds[i])
                    if name == ALONE
                    else _WAYS[name][1](problem, self._size, ORDER, speeds[i])
                )
                timed = [run.whole for run in runs], [run.kernels for run in runs], [run.transfers for run in runs]
                seconds, kernels, transfers = (_middle(pairs, i) for pairs in timed)
                assert seconds is not None
                nbytes, apart = runs[0].nbytes, runs[0].apart
                rows.append(
                    Divided(
                        case.id,
                        phase,
                        name,
                        1 if name == ALONE else self._size,
                        seconds,
                        paper.seconds,
                        kernels,
                        transfers,
                        nbytes and nbytes[i],
                        apart and apart[i],
                    )
                )
        return rows

    def _divided(
        self,
        function: Callable[..., Any],
        parts: list[Any],
        words: dict[str, Any],
        mine: list[Any] | None,
        backward: bool,
        turned: bool,
    ) -> _Took:
        """Time a call, its messages, and the same call where nothing travels: that first if `turned`."""
        noting = [Noting(self._exchange) for _ in _PHASES]

        def through(exchange: Exchange) -> Callable[[], Any]:
            return lambda: function(*parts[:3], exchange, order=ORDER, **words)

        still = through(Still(self._exchange))
        kernels = self._step(still, parts[3], backward)[1] if turned else None
        both = _InTurn(*noting)
        results, whole = self._step(through(both), parts[3], backward, both.turn)
        apart = None
        if mine is not None:
            of = [self._apart(x, y) for x, y in zip(results, mine, strict=True)]
            apart = of[0], max(of[1:])
        del results
        transfers = self._timed(noting[0].again)[1], self._timed(noting[1].again)[1] if backward else inf
        nbytes = [int(self._latest(sum(m.array.nbytes for post in of.posts for m in post.received))) for of in noting]
        del noting, both
        kernels = kernels or self._step(still, parts[3], backward)[1]
        return _Took(whole, kernels, transfers, (nbytes[0], nbytes[1]), apart)

    def _step(
        self, call: Callable[[], Any], dout: Any, backward: bool, between: Callable[[], None] = lambda: None
    ) -> tuple[list[Any], Pair]:
        """The output and, with the backward, dq, dk and dv; and the seconds of both."""
        (out, pullback), seconds = self._timed(call)
        if not backward:
            return [out], (seconds, inf)
        between()
        gradients, backward_seconds = self._timed(lambda: pullback(dout))
        return [out, *gradients], (seconds, backward_seconds)

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives and the seconds that it takes on the device that is last, when all begin together."""
        self._latest(0.0)
        start_s = perf_counter()
        result = call()
        self._stream.synchronize()
        return result, self._latest(perf_counter() - start_s)

    def _latest(self, number: float) -> float:
        """The largest number of all processes, which wait for each other."""
        nccl = self._nccl
        x = self._cupy.full(1, number, "f8")
        self._communicator.allReduce(x.data.ptr, x.data.ptr, 1, nccl.NCCL_FLOAT64, nccl.NCCL_MAX, self._stream.ptr)
        return float(x[0])

    def _apart(self, x: Any, y: Any) -> float:
        """The root mean square of a difference over that of `y`, the worst of all devices."""
        difference = x.astype("f4") - y.astype("f4")
        errors = float((difference**2).mean(dtype="f8")), float((y.astype("f4") ** 2).mean(dtype="f8"))
        return self._latest((errors[0] / errors[1]) ** 0.5)


def _middle(pairs: Sequence[Pair | None], phase: int) -> float | None:
    """The lower median of what was timed of a phase, if anything was."""
    timed = [pair[phase] for pair in pairs if pair is not None and pair[phase] < inf]
    return median_low(timed) if timed else None


class _InTurn(Exchange):
    """One exchange, and after `turn` the next."""

    def __init__(self, *exchanges: Exchange) -> None:
        self._left = list(exchanges)
        self.rank, self.size = exchanges[0].rank, exchanges[0].size

    def turn(self) -> None:
        """Use the next."""
        self._left.pop(0)

    def post(self, post: Post) -> Wait:
        """Pass on."""
        return self._left[0].post(post)


def main(asked: dict[str, Any]) -> None:
    """One process: time the cases that are named."""
    member = _Member(asked["rank"], asked["size"], bytes.fromhex(asked["unique"]))
    known = {case.id: case for case in sets.of(NAME)[NAME]}
    rows = list(chain.from_iterable(member.case(known[name]) for name in asked["cases"]))
    if asked["rank"] == 0:
        print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
