"""``bench``: time cuflash and every installed peer on a named problem set."""

from __future__ import annotations

import subprocess
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cuflash.bench import report, sets, start
from cuflash.bench.cases import Case
from cuflash.bench.peers import PEERS, find
from cuflash.bench.peers import chosen as chosen_peers
from cuflash.bench.run import Bench
from cuflash.cli.console import console
from cuflash.cli.problem import has_gpu
from cuflash.cli.support import write_between
from cuflash.errors import InvalidArgument
from cuflash.problem import Direction


class Phase(StrEnum):
    """Which directions to time."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BOTH = "both"


def bench(
    problems: Annotated[
        str | None,
        typer.Argument(
            help=f"{', '.join([*sets.SETS, *sets.UNIONS])}; prefill on a GPU and numpy elsewhere if not given."
        ),
    ] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose id contains this or matches it as a glob.")] = None,
    phase: Annotated[Phase, typer.Option()] = Phase.BOTH,
    peers: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {','.join(PEERS)}, or torch, jax for all of these; '' for none, all installed if not given."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Stop starting cases after this long.")] = 240.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter rounds.")] = False,
    sustained: Annotated[
        bool,
        typer.Option("--sustained", help="Also time each one on the card as hot as it makes it; takes seconds each."),
    ] = False,
    processes: Annotated[bool, typer.Option(help="Also time new processes and calls on a tiny problem.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    render: Annotated[
        Path | None, typer.Option(help="Measure nothing; print such a file as Markdown, or one --phase of it.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="With --render: put it between this file's markers measurements, or measurements-<phase>."),
    ] = None,
) -> None:
    """Time cuflash and its peers in one process, in rotated order, on the same inputs.

    GPU time is the median over rounds of replays of a captured graph, by CUDA events; host time the median of calls
    that do not wait. With --sustained a second pass lets each implementation run for a second before its slice, when
    clocks have sagged to what its power allows. The matrix product ``gemm`` in the rotation is the yardstick for the
    card. Runs on the NumPy backend against naive NumPy attention where there is no GPU.
    """
    if render is not None:
        whole = report.Report.read(render)
        text = report.markdown(whole if phase is Phase.BOTH else whole.of(phase.value))
        if write is None:
            typer.echo(text)
        else:
            write_between(write, "measurements" if phase is Phase.BOTH else f"measurements-{phase.value}", text)
        return
    if write is not None:
        raise InvalidArgument("--write needs --render, the file of a finished run.")
    gpu = has_gpu()
    by_set = _matching(problems or ("prefill" if gpu else "numpy"), case)
    directions: list[Direction] = ["forward", "backward"] if phase is Phase.BOTH else [phase.value]
    cases = [each.turned(direction) for direction in directions for chosen in by_set.values() for each in chosen]
    found = find(chosen_peers(peers, gpu), gpu)
    run = Bench(found.implementations, gpu, quick, sustained)
    run.report.sets = {name: [each.id for each in chosen] for name, chosen in by_set.items()}
    run.report.notes += found.notes
    with _progress() as progress:
        task = progress.add_task("", total=len(cases))

        def done(each: Case) -> None:
            progress.update(task, advance=1, description=f"{each.problem.direction} {each.id}")

        run.run(cases, seconds, done)
    if gpu:
        run.report.clocks |= {f"{name}, after": value for name, value in report.clocks().items()}
    if processes:
        tiny = (sets.latency() if gpu else sets.cpu())[0]
        run.host([tiny.turned(direction) for direction in ("forward", "backward")])
        try:
            run.report.start = start.measure(gpu)
        except subprocess.SubprocessError as error:
            run.report.notes.append(f"start: {error}")
    _print(run.report, console())
    if json is not None:
        run.report.write(json)


def _matching(problems: str, pattern: str | None) -> dict[str, list[Case]]:
    """The cases of one or several sets, by set, that match the pattern."""
    known = sets.of(problems)
    if pattern is None:
        return known
    found = {
        name: [each for each in cases if pattern in each.id or fnmatchcase(each.id, pattern)]
        for name, cases in known.items()
    }
    if not any(found.values()):
        ids = ", ".join(each.id for cases in known.values() for each in cases)
        raise InvalidArgument(f"--case {pattern!r} matches nothing in {problems}; it has: {ids}.")
    return {name: cases for name, cases in found.items() if cases}


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console(stderr=True), transient=True)


def _print(found: report.Report, screen: Console) -> None:
    screen.print(report.table(found))
    for each in found.host:
        screen.print(f"host, tiny problem: {each['impl']} {each['phase']} {each['host_us']} µs a call")
    for key, times in found.start.items():
        screen.print(f"new process, {key}: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    for note in found.notes:
        screen.print(f"left out: {note}", style="dim")
