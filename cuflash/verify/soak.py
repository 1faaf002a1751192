"""The soak: thousands of random problems in nasty surroundings, every element of every result compared.

Draws run in a child process, as a launch that never returns can only be ended with its process. The child says what
came of each draw; when it falls silent or dies, the parent notes the draw and starts another child behind it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from cuflash import device
from cuflash.cases import calls
from cuflash.cases.inputs import Array, host
from cuflash.cases.table import CASES, Case, variants
from cuflash.device import Device
from cuflash.errors import UnsupportedProblem
from cuflash.ops import backward, forward
from cuflash.ops.call import results
from cuflash.plan import Config, Step, choose
from cuflash.verify.answers import Answers
from cuflash.verify.draws import GPU, HOST, Draw, draw
from cuflash.verify.surroundings import Arena, Numbers, Surrounded, surround
from cuflash.verify.verdict import judge

_MORE_VARIANTS = 112
"""Kernels that draws may need beyond those of the cases, for other tiles; a draw that needs one more is left out."""

_START_S = 300.0
"""How long a child may take to its first draw."""

_END_S = 30.0
"""How long is waited for one that was killed: a driver may not let go of it while a kernel runs."""


@dataclass(frozen=True, slots=True)
class Job:
    """Which draws to run, and where."""

    case_ids: tuple[str, ...]
    seed: int
    first: int
    count: int
    gpu: bool
    pool: bool = True
    """Let CuPy allocate from its pool."""
    patience_s: float = 60.0
    """How long one draw may take."""

    def draw(self, number: int) -> Draw:
        """The draw with this number."""
        return draw([CASES[case_id] for case_id in self.case_ids], self.seed, number, GPU if self.gpu else HOST)

    def again(self, outcome: Outcome) -> str:
        """The command that repeats a draw."""
        where = "" if self.gpu else " --numpy"
        return f"python -m cuflash check {outcome.case_id} --soak=1 --seed={self.seed} --first={outcome.number}{where}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one draw."""

    number: int
    case_id: str
    problem: str
    complaints: tuple[str, ...] = ()
    """What is wrong; empty when nothing is."""
    left_out: str = ""
    """Why it did not run."""
    variants: int = 0
    """Kernel variants that have run in its process."""
    last: bool = False
    """Its process goes no further."""


def soak(job: Job) -> Generator[Outcome, None, None]:
    """Run draws in child processes, one after the other; what came of each, in order."""
    following, end = job.first, job.first + job.count
    while following < end:
        process, connection = start(replace(job, first=following, count=end - following))
        try:
            _wait_until_ready(process, connection)
            last = False
            while following < end and not last:
                outcome = _heard(process, connection, job, following)
                following, last = following + 1, outcome.last
                yield outcome
        finally:
            process.kill()
            process.join(_END_S)


def start(job: Job) -> tuple[BaseProcess, Connection]:
    """A new process that runs the draws, and where it says what came of them."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU of its parent
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, job), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def work(sender: Connection, job: Job) -> None:
    """What the process does."""
    soaker = Soaker(job)
    sender.send("ready")
    for number in range(job.first, job.first + job.count):
        outcome = soaker.run(number)
        sender.send(outcome)
        if outcome.last:
            return


def _wait_until_ready(process: BaseProcess, connection: Connection) -> None:
    try:
        if connection.poll(_START_S):
            connection.recv()
            return
        what = f"was not ready after {_START_S:g} s"
    except EOFError:
        process.join(_END_S)
        what = f"ended with status {process.exitcode} before the first"
    raise RuntimeError(f"the process that runs the draws {what}")


def _heard(process: BaseProcess, connection: Connection, job: Job, number: int) -> Outcome:
    try:
        if connection.poll(job.patience_s):
            return connection.recv()
        complaint = f"hangs: nothing came back within {job.patience_s:g} s"
    except EOFError:
        process.join(_END_S)
        complaint = f"ended its process with status {process.exitcode}"
    drawn = job.draw(number)
    return Outcome(number, drawn.case.id, str(drawn), (complaint,), last=True)


def steps_of(cases: Sequence[Case], gpu: Device) -> list[Step]:
    """The distinct kernels of the cases, and of the forward that a backward needs first."""
    both = [direction for case in cases for direction in (case.turned("forward"), case)]
    return [step for _, step in variants(both, gpu)]


class Soaker:
    """Runs draws in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._device: Device | None = None
        self._loaded: set[tuple[str, Config]] = set()
        limits, megabytes = (GPU, 1024) if job.gpu else (HOST, 64)
        self._xp: Any = np
        if job.gpu:
            import cupy

            if not job.pool:
                cupy.cuda.set_allocator(None)
            self._xp = cupy
            self._device = device.current(cupy.cuda.runtime.getDevice())
            cases = [CASES[case_id] for case_id in job.case_ids]
            self._expected = {(step.kernel, step.config) for step in steps_of(cases, self._device)}
        self._arena = Arena(self._xp, megabytes * 2**20)
        self._numbers = Numbers(self._xp, 2 * max(limits.pairs, limits.elements))

    def run(self, number: int) -> Outcome:
        """Run and judge one draw; whatever goes wrong is a complaint."""
        drawn = self._job.draw(number)
        complaints, left_out, broken = [], "", False
        try:
            left_out = self._too_many_variants(drawn)
            complaints = [] if left_out else self._complaints(drawn)
        except UnsupportedProblem as error:
            left_out = str(error).splitlines()[0]
        except Exception as error:  # the draw's own: the others go on, though not beside a GPU that may be out of order
            complaints, broken = [f"{type(error).__name__}: {error}"], self._job.gpu
        return Outcome(number, drawn.case.id, str(drawn), tuple(complaints), left_out, len(self._loaded), last=broken)

    def _too_many_variants(self, drawn: Draw) -> str:
        """Why a draw is left out, if it is; else its variants count as loaded."""
        if self._device is None:
            return ""
        directions = {drawn.case.turned("forward").problem, drawn.case.problem}
        plans = [choose(problem, self._device, drawn.case.family) for problem in directions]
        steps = [step for plan in plans for step in plan.steps]
        needed = self._loaded | {(step.kernel, step.config) for step in steps}
        if len(needed - self._expected) > _MORE_VARIANTS:
            return f"would compile more than {_MORE_VARIANTS} variants beyond those of the cases"
        self._loaded = needed
        return ""

    def _complaints(self, drawn: Draw) -> list[str]:
        self._arena.clear()
        arrays = surround(drawn, self._arena, self._numbers, self._xp)
        answers = Answers(drawn.case, arrays.inputs, self._xp, drawn.unbiased).answers()
        outputs, complaints = self._forward(drawn, arrays)
        if drawn.case.problem.direction == "backward":
            gradients, further = self._backward(drawn, arrays, outputs)
            outputs, complaints = outputs | gradients, complaints + further
        if drawn.rng_state and tuple(host(outputs.pop("rng_state")).tolist()) != drawn.rng_state:
            complaints.append("rng_state is not the one that was given")
        verdicts = [judge(name, result, answers[name], drawn.case) for name, result in outputs.items()]
        return complaints + [str(verdict) for verdict in verdicts if not verdict.passed]

    def _forward(self, drawn: Draw, arrays: Surrounded) -> tuple[dict[str, Array], list[str]]:
        problem, out = drawn.case.turned("forward").problem, arrays.outputs["out"]
        options = calls.options(drawn.case).replace(unbiased_dropout=drawn.unbiased)
        arguments = calls.arrays(arrays.inputs)._replace(out=out)

        def call() -> Sequence[Array]:
            return forward(options, arguments, drawn.rng_state)

        return self._watched(call, results(problem), [out], lambda name: True)

    def _backward(
        self, drawn: Draw, arrays: Surrounded, computed: dict[str, Array]
    ) -> tuple[dict[str, Array], list[str]]:
        case, problem, where = drawn.case, drawn.case.problem, self._xp.where
        inputs, outputs = arrays.inputs, arrays.outputs
        outputs["out"][...] = computed["out"]
        empty = computed["lse"] == -np.inf
        arrays.lse[...] = where(empty, drawn.empty_lse, computed["lse"])
        if inputs.dlse is not None:  # of a constant
            inputs.dlse[...] = where(empty, np.nan, inputs.dlse)
        options = calls.options(case).replace(
            unbiased_dropout=drawn.unbiased, deterministic=problem.deterministic, bias_grad=problem.bias_grad
        )
        upstream = {"dout": inputs.dout, "lse": arrays.lse, "dlse": inputs.dlse}
        arguments = calls.arrays(inputs)._replace(**outputs, **upstream, rng_state=computed.get("rng_state"))
        written = [outputs[name] for name in ("dq", "dk", "dv")]

        def call() -> list[Array]:
            return [x for x in backward(options, arguments) if x is not None]

        # No simt kernel adds to what another block writes, nor does the one for the bias.
        repeats = problem.deterministic or case.family == "simt"
        return self._watched(call, results(problem), written, lambda name: repeats or name == "dbias")

    def _watched(
        self,
        call: Callable[[], Sequence[Array]],
        names: Sequence[str],
        written: list[Array],
        repeats: Callable[[str], bool],
    ) -> tuple[dict[str, Array], list[str]]:
        """Call, each time with NaN in all outputs before; copies of the results, and what changed that should not.

        On a GPU the first call takes from the pool what is kept for later ones; the others have all theirs watched.
        """
        complaints, rounds = [], []
        for watched in (False, True, True) if self._job.gpu else (True, True):
            before = self._arena.snapshot()
            with self._arena.allocations() if watched else nullcontext():
                outputs = call()
            rounds.append({name: x.copy() for name, x in zip(names, outputs, strict=True)})
            del outputs
            if change := self._arena.change(before, written):
                complaints.append(f"writes outside of its outputs: {change}")
        *_, first, second = rounds
        for name in filter(repeats, names):
            bits = [x.view(f"i{x.itemsize}") for x in (first[name], second[name])]
            if (bits[0] != bits[1]).any():
                complaints.append(f"{name} is another the second time")
        return first, complaints
