"""Where cuflash stands: a few lines of the newest recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cuflash.bench.report import Report, beside_peers, by_case, geometric_mean, markdown_table, times
from cuflash.cases import sets
from cuflash.errors import InvalidArgument
from cuflash.verify.deviations import OWN


class Line(NamedTuple):
    """One line of the table."""

    what: str
    sets: tuple[str, ...]
    """The cases whose ratios are averaged."""
    phase: Literal["forward", "backward"]


LINES: tuple[Line, ...] = (
    Line("forward", ("prefill",), "forward"),
    Line("backward", ("prefill",), "backward"),
    Line("forward with features", ("gqa", "window", "varlen", "scores", "ramp"), "forward"),
    Line("backward with features", ("features",), "backward"),
    Line("NumPy backend, forward", ("numpy",), "forward"),
    Line("NumPy backend, backward", ("numpy",), "backward"),
)


class Recorded(NamedTuple):
    """A run and the file that it is kept in."""

    name: str
    report: Report


def recorded(folder: Path) -> list[Recorded]:
    """The runs in a folder, the newest first; files that hold something else are left out."""
    runs = []
    for path in folder.glob("*.json"):
        try:
            runs.append(Recorded(path.name, Report.read(path)))
        except InvalidArgument:
            continue
    if not runs:
        raise InvalidArgument(f"{folder} has no file that `bench --json` wrote; name the folder of recorded runs.")
    return sorted(runs, key=lambda run: run.report.date, reverse=True)


def markdown(runs: Sequence[Recorded]) -> str:
    """The table; a line of which nothing is recorded is left out."""
    lines = [cells for line in LINES if (cells := _compared(line, runs)) is not None]
    lines += [line for phase in ("forward", "backward") if (line := _host(phase, runs)) is not None]
    lines += [line for line in [_start(runs)] if line is not None]
    header = ["", "of the fastest peer", "where least", "recorded in"]
    return markdown_table(header, lines, numbers=False) + "\n"


def _compared(line: Line, runs: Sequence[Recorded]) -> list[str] | None:
    """The mean over the cases, each of the newest run that has it beside a peer."""
    cases = {case.id: case.problem for name in line.sets for case in sets.SETS[name]()}
    best: dict[str, tuple[float, str]] = {}
    files: dict[str, None] = {}
    for name, report in runs:
        for case, group in by_case(report.rows).get((line.phase, "burst"), {}).items():
            peers, problem = beside_peers(group), cases.get(case)
            if not peers or problem is None or case in best:
                continue
            if (group[OWN].dtype, group[OWN].b) == (problem.dtype.name, problem.batch):  # sets share ids
                best[case] = min((ratio, impl) for impl, ratio in peers.items())
                files[name] = None
    if not best:
        return None
    least, impl, slowest = min((ratio, impl, case) for case, (ratio, impl) in best.items())
    count = f"{len(best)} cases" if len(best) == len(cases) else f"{len(best)} of {len(cases)} cases"
    mean = geometric_mean([ratio for ratio, _ in best.values()])
    return [f"{line.what}, {count}", times(mean), f"{times(least)} {impl} ({slowest})", ", ".join(map(_file, files))]


def _host(phase: str, runs: Sequence[Recorded]) -> list[str] | None:
    """What a call on a tiny problem costs the host of a GPU, beside the peer that costs it least."""
    for name, report in runs:
        if not report.driver:  # without a GPU the host computes it
            continue
        costs = {str(cost["impl"]): float(str(cost["host_us"])) for cost in report.host if cost["phase"] == phase}
        own = costs.pop(OWN, None)
        if own is not None and costs:
            least = min(costs, key=costs.__getitem__)
            beside = f"{own:.1f} µs, {costs[least]:.1f} {least}"
            return [f"host time of a tiny {phase}", times(costs[least] / own), beside, _file(name)]
    return None


def _start(runs: Sequence[Recorded]) -> list[str] | None:
    """How long the first call of a variant takes in a new process."""
    for name, report in runs:
        if "forward, cold" in report.start:
            first = {key: f"{seconds['first_call_s']:.2f}" for key, seconds in report.start.items()}
            cold, cached = (f"{first[f'forward, {of}']} and {first[f'backward, {of}']}" for of in ("cold", "cached"))
            return ["first call, forward and backward", f"{cold} s", f"{cached} s once it was compiled", _file(name)]
    return None


def _file(name: str) -> str:
    return f"[{name.removesuffix('.json')}](benchmarks/results/{name})"
