"""``bench``: time cuflash and every installed peer on a named problem set, or compare their results with exact ones."""

from __future__ import annotations

import subprocess
import textwrap
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from cuflash.bench import exactness, guests, parallel, plots, report, start
from cuflash.bench import standing as standings
from cuflash.bench.peers import PEERS, find
from cuflash.bench.peers import chosen as chosen_peers
from cuflash.bench.run import Bench
from cuflash.cases import sets
from cuflash.cases.table import Case
from cuflash.cli.console import Seconds, bar, console, options_written, show
from cuflash.cli.problem import has_gpu
from cuflash.cli.soak import check_cublas, compile_all
from cuflash.cli.support import FILE, write_between
from cuflash.drawing import SUFFIXES, panels
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.problem import Direction


@click.command(
    "bench",
    short_help="Time cuflash and every installed peer on named problems.",
    help=f"""Time cuflash and its peers in one process, in rotated order, on the same inputs.

    PROBLEMS is one of {", ".join([*sets.SETS, *sets.UNIONS])}; if not given, prefill on a GPU and numpy elsewhere.
    exactness times nothing: it compares what all of them compute with the same in float64, on a GPU by cuBLAS.
    guests times cuflash on arrays of JAX and torch, and what calls there cost the host.
    parallel times cuflash.parallel on all GPUs, beside one of them and what `explain --devices` expects.
    Peers that --peers takes:

    \b
    {textwrap.fill(", ".join(PEERS), 74, break_on_hyphens=False, subsequent_indent="    ")}

    GPU time is the median over rounds of replays of a captured graph, by CUDA events; host time the median of calls
    that do not wait. With --sustained a second pass lets each implementation run for a second before its slice, when
    clocks have sagged to what its power allows. The matrix product gemm in the rotation is the yardstick for the
    card. Where there is no GPU it runs on the NumPy backend, beside naive NumPy attention and torch's on the CPU, each
    once the threads of the one before have come to rest.""",
)
@click.argument("problems", required=False)
@click.option("--case", help="Only cases whose id contains this or matches it as a glob.")
@click.option("--phase", type=click.Choice(["forward", "backward", "both"]), default="both", help="What to time.")
@click.option(
    "--peers",
    help="Some of the names above, with commas and without spaces, or torch, jax for all of these; '' for none, "
    f"all installed if not given ({exactness.PEERS.replace(',', ', ')} for exactness).",
)
@click.option("--seconds", type=Seconds(min=0), default=240.0, help="Stop starting cases after this long.")
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds.")
@click.option(
    "--sustained", is_flag=True, help="Also time each one on the card as hot as it makes it; takes seconds each."
)
@click.option("--processes/--no-processes", default=True, help="Also time new processes and calls on a tiny problem.")
@click.option(
    "--json",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write everything here, after each case what is known by then.",
)
@click.option("--render", type=FILE, help="Measure nothing; print such a file as Markdown, or one --phase of it.")
@click.option(
    "--standing",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure nothing; print where cuflash stands by the runs in this folder.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw ratios beside peers and rates below the roofs of the card (PNG, SVG, PDF); with --render, instead.",
)
@click.option(
    "--write",
    type=FILE,
    help="With --render or --standing: put it between markers of this file.",
)
@click.option("--marker", help="With --write: their name; measurements, measurements-<phase> or standing if not given.")
def command(
    problems: str | None,
    case: str | None,
    phase: Literal["forward", "backward", "both"],
    peers: str | None,
    seconds: float,
    quick: bool,
    sustained: bool,
    processes: bool,
    json: Path | None,
    render: Path | None,
    standing: Path | None,
    plot: Path | None,
    write: Path | None,
    marker: str | None,
) -> None:
    """Time and print, or print what was timed."""
    if marker is not None and write is None:
        raise InvalidArgument("--marker needs --write, the file that has the markers.")
    if plot is not None:
        _check_drawable(plot, write)
    if standing is not None:
        if render is not None:
            raise InvalidArgument("--standing and --render exclude each other; drop one of them.")
        _refuse_others("--standing", options_written("standing", "write", "marker"))
        _put(standings.markdown(standings.recorded(standing)), marker or "standing", write)
        return
    if render is not None:
        _refuse_others("--render", options_written("render", "write", "marker", "phase", "plot"))
        _render(render, phase, plot, write, marker)
        return
    if write is not None:
        raise InvalidArgument("--write needs --render, the file of a finished run, or --standing, a folder of them.")
    gpu = has_gpu()
    by_set = _matching(problems or ("prefill" if gpu else "numpy"), case)
    cases = _turned(by_set, phase)
    if not cases:
        raise InvalidArgument(f"{problems} has no backward; drop --phase, or name another set.")
    if problems in (parallel.NAME, guests.NAME) and not gpu:
        raise UnsupportedProblem(f"{problems} is measured on GPUs, and here is none. Name another set.")
    if problems == parallel.NAME:
        measured = _divided(by_set, seconds, gpu)
    else:
        measured = _measured(problems, by_set, cases, gpu, peers, seconds, quick, sustained, processes, json)
    _print(measured, console())
    if json is not None:
        measured.write(json)
    if plot is not None:
        plots.draw(measured).save(plot)


def _render(
    render: Path,
    phase: Literal["forward", "backward", "both"],
    plot: Path | None,
    write: Path | None,
    marker: str | None,
) -> None:
    """Print or draw a finished run, or one phase of it."""
    measured = report.Report.read(render)
    measured = measured if phase == "both" else measured.of(phase)
    if plot is not None:
        plots.draw(measured).save(plot)
        return
    name = "measurements" if phase == "both" else f"measurements-{phase}"
    _put(report.markdown(measured, render.name), marker or name, write)


def _turned(by_set: dict[str, list[Case]], phase: Literal["forward", "backward", "both"]) -> list[Case]:
    """The cases of these sets in the directions that are asked for and that they have."""
    directions: list[Direction] = ["forward", "backward"] if phase == "both" else [phase]
    return [
        case.turned(direction)
        for direction in directions
        for name, chosen in by_set.items()
        for case in chosen
        if direction == "forward" or name not in sets.FORWARD_ONLY
    ]


def _ids(by_set: dict[str, list[Case]]) -> dict[str, list[str]]:
    return {name: [case.id for case in chosen] for name, chosen in by_set.items()}


def _divided(by_set: dict[str, list[Case]], seconds: float, gpu: bool) -> report.Report:
    """What several GPUs take."""
    others = options_written("problems", "case", "seconds", "json")
    if others:
        raise InvalidArgument(f"{others[0]} does nothing with {parallel.NAME}, which divides both phases; drop it.")
    measured = report.new(gpu)
    measured.sets = _ids(by_set)
    measured.divided = parallel.measure(by_set[parallel.NAME], seconds)
    return measured


def _measured(
    problems: str | None,
    by_set: dict[str, list[Case]],
    cases: list[Case],
    gpu: bool,
    peers: str | None,
    seconds: float,
    quick: bool,
    sustained: bool,
    processes: bool,
    json: Path | None,
) -> report.Report:
    """What each implementation takes or computes, written after each case."""
    run: Bench
    if problems == exactness.NAME:
        timing = options_written("problems", "case", "phase", "peers", "seconds", "json")
        if timing:
            raise InvalidArgument(f"{timing[0]} is for timing, and {exactness.NAME} times nothing; drop one of them.")
        processes = False
        installed = find(chosen_peers(exactness.PEERS if gpu and peers is None else peers, gpu), gpu)
        if gpu:
            check_cublas(exactness.NAME)
            compile_all(exactness.steps(cases))
        run = exactness.Exactness(installed.implementations, gpu)
    else:
        through = problems == guests.NAME and gpu
        installed = find(chosen_peers(guests.PEERS if through and peers is None else peers, gpu), gpu)
        run = Bench(installed.implementations, gpu, quick, sustained)
    measured = run.report
    measured.sets = _ids(by_set)
    measured.notes += installed.notes
    _run(run, cases, seconds, json)
    if gpu:
        measured.clocks |= {f"{name}, after": value for name, value in report.clocks().items()}
    if problems == guests.NAME:
        measured.host = guests.costs()
    elif processes:
        _time_starts(
            run, problems == "mods", {implementation.name for implementation in installed.implementations}, gpu
        )
    return measured


def _run(run: Bench, cases: list[Case], seconds: float, json: Path | None) -> None:
    """Measure cases, beside a bar."""
    with bar() as progress:
        task = progress.add_task("", total=len(cases))

        def done(measured: Case) -> None:
            progress.update(task, advance=1, description=f"{measured.problem.direction} {measured.id}")
            if json is not None:
                run.report.write(json)

        run.run(cases, seconds, done)


def _time_starts(run: Bench, mods: bool, peers: set[str], gpu: bool) -> None:
    """Time calls on a tiny problem, and new processes."""
    tiny = (sets.latency() if gpu else sets.cpu())[0]
    run.host([tiny.turned(direction) for direction in ("forward", "backward")])
    try:
        run.report.start = start.measure(gpu, mods, mods and "flex" in peers)
    except subprocess.SubprocessError as error:
        run.report.notes.append(f"start: {error}")


def _check_drawable(plot: Path, write: Path | None) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    if write is not None:
        raise InvalidArgument("--plot and --write exclude each other; drop one of them.")
    if plot.suffix not in SUFFIXES:
        raise InvalidArgument(f"--plot {plot} is no picture; expected a name that ends in {', '.join(SUFFIXES)}.")
    try:
        panels(1, 1, 1, 1)
    except ImportError as error:
        raise InvalidArgument(f"--plot {plot}: {error}") from None


def _refuse_others(option: str, others: list[str]) -> None:
    if others:
        raise InvalidArgument(f"{others[0]} is for a measurement, and {option} measures nothing; drop one of them.")


def _put(text: str, marker: str, write: Path | None) -> None:
    """Print, or write between the markers of a file."""
    if write is None:
        print(text, end="")
    else:
        write_between(write, marker, text)


def _matching(problems: str, pattern: str | None) -> dict[str, list[Case]]:
    """The cases of one or several sets, by set, that match the pattern."""
    known = sets.of(problems)
    if pattern is None:
        return known
    matching = {
        name: [case for case in cases if pattern in case.id or fnmatchcase(case.id, pattern)]
        for name, cases in known.items()
    }
    if not any(matching.values()):
        ids = ", ".join(case.id for cases in known.values() for case in cases)
        raise InvalidArgument(f"--case {pattern!r} matches nothing in {problems}; it has: {ids}.")
    return {name: cases for name, cases in matching.items() if cases}


def _print(measured: report.Report, screen: Console) -> None:
    if measured.divided:
        show(screen, report.divided_table(measured))
        return
    show(screen, report.deviations_table(measured) if measured.deviations else report.table(measured))
    for cost in measured.host:
        screen.print(f"host, tiny problem: {cost['impl']} {cost['phase']} {cost['host_us']} µs a call")
    for key, times in measured.start.items():
        screen.print(f"new process, {key}: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    for note in measured.notes:
        screen.print(f"left out: {note}", style="dim")
