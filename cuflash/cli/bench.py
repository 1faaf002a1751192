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
        str | None, typer.Argument(help=f"{', '.join(sets.SETS)}; prefill on a GPU and numpy elsewhere if not given.")
    ] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose id contains this or matches it as a glob.")] = None,
    phase: Annotated[Phase, typer.Option()] = Phase.BOTH,
    peers: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(PEERS)}; '' for none, all that are installed if not given.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Stop starting cases after this long.")] = 240.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter rounds.")] = False,
    processes: Annotated[bool, typer.Option(help="Also time new processes and calls on a tiny problem.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    render: Annotated[Path | None, typer.Option(help="Measure nothing; print such a file as Markdown.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="With --render: put it between this file's measurements markers.")
    ] = None,
) -> None:
    """Time cuflash and its peers in one process, in rotated order, on the same inputs.

    GPU time is the median over rounds of replays of a captured graph, by CUDA events; host time the median of calls
    that do not wait. Runs on the NumPy backend against naive NumPy attention where there is no GPU.
    """
    if render is not None:
        text = report.markdown(report.Report.read(render))
        if write is None:
            typer.echo(text)
        else:
            write_between(write, "measurements", text)
        return
    if write is not None:
        raise InvalidArgument("--write needs --render, the file of a finished run.")
    gpu = has_gpu()
    cases = _cases(problems or ("prefill" if gpu else "numpy"), case, phase)
    found = find(_peer_names(peers, gpu), gpu)
    run = Bench(found.implementations, gpu, quick)
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


def _cases(problems: str, pattern: str | None, phase: Phase) -> list[Case]:
    """The cases of a set, filtered, in each direction asked for."""
    if problems not in sets.SETS:
        raise InvalidArgument(f"problem set {problems!r} is not known; expected one of: {', '.join(sets.SETS)}.")
    chosen = sets.SETS[problems]()
    if pattern is not None:
        chosen = [each for each in chosen if pattern in each.id or fnmatchcase(each.id, pattern)]
        if not chosen:
            ids = ", ".join(each.id for each in sets.SETS[problems]())
            raise InvalidArgument(f"--case {pattern!r} matches nothing in {problems}; it has: {ids}.")
    directions: list[Direction] = ["forward", "backward"] if phase is Phase.BOTH else [phase.value]
    return [each.turned(direction) for direction in directions for each in chosen]


def _peer_names(text: str | None, gpu: bool) -> list[str]:
    if text is None:
        return [name for name in PEERS if gpu != (name == "numpy")]
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InvalidArgument(f"--peers names {unknown[0]!r}; expected some of: {', '.join(PEERS)}.")
    return names


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
