"""The bench itself: every case, each implementation of it in turn, within a budget of seconds."""

from __future__ import annotations

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cuflash.bench import report
from cuflash.bench.meter import Meter
from cuflash.bench.peers.implementation import Implementation
from cuflash.bench.report import Mode
from cuflash.bench.timing import AT_REST, Runner, interleave
from cuflash.cases.inputs import Inputs, Normals, make
from cuflash.cases.table import Case
from cuflash.errors import UnsupportedProblem

BURST = {"rounds": 7, "slice_us": 10_000.0}
QUICK_BURST = {"rounds": 3, "slice_us": 3_000.0}
SUSTAINED = {"rounds": 2, "slice_us": 250_000.0, "heat_s": 1.0}
QUICK_SUSTAINED = {"rounds": 1, "slice_us": 100_000.0, "heat_s": 0.3}


class Bench:
    """Measures cases on one device and collects what it finds in a report."""

    def __init__(
        self, implementations: list[Implementation], gpu: bool, quick: bool = False, sustained: bool = False
    ) -> None:
        self.report = report.new(gpu)
        self._implementations = implementations
        self._gpu = gpu
        self._modes: dict[Mode, dict[str, Any]] = {"burst": QUICK_BURST if quick else BURST}
        if sustained:
            self._modes["sustained"] = (QUICK_SUSTAINED if quick else SUSTAINED) | {"meter": self._meter()}
        self._left_out: dict[str, list[str]] = defaultdict(list)
        if gpu:
            import cupy

            self._normals = Normals(cupy)
        else:
            import numpy

            self.report.timing = AT_REST
            self._normals = Normals(numpy)

    def run(self, cases: list[Case], seconds: float, done: Callable[[Case], None]) -> None:
        """Measure cases until the seconds are used up; ``done`` is called after each."""
        deadline_s = time.perf_counter() + seconds
        with self._stream():
            for i, case in enumerate(cases):
                left_s = deadline_s - time.perf_counter()
                if left_s <= 0:
                    self._left_out["out of time (--seconds)"] += [self._label(left) for left in cases[i:]]
                    break
                try:
                    self._case(case, left_s / (len(cases) - i))
                except Exception as error:  # not an implementation's own: the device itself no longer answers
                    self._left_out[f"stopped by {_reason(error)}"] += [self._label(left) for left in cases[i:]]
                    break
                done(case)
        self.report.notes += [f"{reason}: {_listed(names)}" for reason, names in self._left_out.items()]
        self._left_out.clear()

    def host(self, cases: list[Case]) -> None:
        """Fill the report's host section from cases so small that the device keeps up."""
        before = len(self.report.rows)
        modes, self._modes = self._modes, {"burst": self._modes["burst"]}
        self.run(cases, seconds=30.0, done=lambda case: None)
        self._modes = modes
        tiny, self.report.rows = self.report.rows[before:], self.report.rows[:before]
        self.report.host = [
            {"impl": row.impl, "phase": row.phase, "host_us": row.host_us}
            for row in tiny
            if row.impl not in report.YARDSTICKS
        ]

    def _case(self, case: Case, seconds: float) -> None:
        inputs = make(case, self._normals)
        deadline_s = time.perf_counter() + seconds
        prepared = (self._prepared(implementation, case, inputs) for implementation in self._implementations)
        runners = {runner.impl: runner for runner in prepared if runner}
        for i, (mode, protocol) in enumerate(self._modes.items()):
            share_s = (deadline_s - time.perf_counter()) / (len(self._modes) - i)
            timings = interleave(list(runners.values()), share_s, failed=self._failed(case), **protocol)
            self.report.rows += [report.row(case, runners[impl], timing, mode) for impl, timing in timings.items()]
            runners = {impl: runners[impl] for impl in timings}
        runners.clear()
        self._release()

    def _prepared(self, implementation: Implementation, case: Case, inputs: Inputs) -> Runner | None:
        reason = implementation.why_not(case.problem)
        if reason is None:
            try:
                return implementation.prepare(case, inputs)
            except UnsupportedProblem as error:
                reason = str(error).splitlines()[0]
            except Exception as error:  # a peer's failure is its own; the others go on
                reason = _reason(error)
        self._left_out[f"{implementation.name} ({reason})"].append(self._label(case))
        return None

    def _failed(self, case: Case) -> Callable[[Runner, Exception], None]:
        def note(runner: Runner, error: Exception) -> None:
            self._left_out[f"{runner.impl} ({_reason(error)})"].append(self._label(case))

        return note

    def _meter(self) -> Meter | None:
        """What reads clock and power, where there is a GPU and NVML."""
        if not self._gpu:
            return None
        import cupy

        try:
            return Meter(cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id))
        except Exception as error:  # also NVML's own
            self.report.notes.append(f"SM clock and power of sustained rows, by nvidia-ml-py ({_reason(error)})")
            return None

    def _label(self, case: Case) -> str:
        return f"{case.problem.direction} {case.id}"

    def _stream(self) -> AbstractContextManager[object]:
        """Graphs cannot be captured on the default stream."""
        if not self._gpu:
            return nullcontext()
        import cupy

        return cupy.cuda.Stream(non_blocking=True)

    def _release(self) -> None:
        """Give the memory of the last case back to the device, from every pool that may hold some."""
        gc.collect()
        if self._gpu:
            import cupy

            cupy.cuda.get_current_stream().synchronize()
            cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def _reason(error: Exception) -> str:
    """The first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _listed(names: list[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
