"""``check``: run cases and compare them with exact answers, optionally under a sanitizer."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from types import ModuleType

import click
import numpy as np

from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import Case, select
from cuflash.cli import soak as soaking
from cuflash.cli.console import Seconds, console, followed, show, table
from cuflash.cli.problem import has_gpu
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.verify.soak import Job
from cuflash.verify.verdict import verdicts

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""Tools of compute-sanitizer that find errors of kernels."""


@click.command(
    "check",
    short_help="Run cases and compare every result with exact attention.",
    help="""Run cases and compare every output with naive attention in float64; status 1 if one is too far off.

    CASE is an id, a part of ids, a glob, or 'smoke'; all cases if not given. A result may be twice as far from the
    exact answer as the naive formula in the same element type, plus a few roundings. Runs the kernels where there is a
    GPU, else the NumPy backend.

    With --soak the lengths, heads, strides, windows and numbers of the cases are drawn at random, and everything around
    the tensors is looked at, too; on a GPU that needs cuBLAS.""",
)
@click.argument("case", required=False)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the random inputs.")
@click.option("--numpy", is_flag=True, help="Check the NumPy backend even where there is a GPU.")
@click.option("--sanitize", type=click.Choice(TOOLS), help="Run under this tool of compute-sanitizer.")
@click.option("--pool/--no-pool", default=True, help="Allocate from CuPy's pool; a sanitizer sees more without.")
@click.option("--soak", type=click.IntRange(1), help="Run so many random problems around the cases instead of these.")
@click.option("--seconds", type=Seconds(min=0), help="With --soak: start none after this long.")
@click.option("--first", type=click.IntRange(0), help="With --soak: the number of the first one.")
@click.option("--patience", type=Seconds(min=1), help="With --soak: seconds after which one hangs; 60 if not given.")
def command(
    case: str | None,
    seed: int,
    numpy: bool,
    sanitize: str | None,
    pool: bool,
    soak: int | None,
    seconds: float | None,
    first: int | None,
    patience: float | None,
) -> None:
    """Run, compare and print."""
    cases = select(case)
    on_gpu = not numpy and has_gpu()
    if soak is not None and sanitize is not None:
        raise InvalidArgument("--soak and --sanitize exclude each other; a sanitizer takes minutes for some cases.")
    if sanitize is not None:
        if numpy:
            raise InvalidArgument("--numpy and --sanitize exclude each other; a sanitizer looks at kernels.")
        _refuse_without_soak(seconds, first, patience)
        raise click.exceptions.Exit(_sanitized(sanitize, case, seed))
    if not (pool or on_gpu):
        raise InvalidArgument("--no-pool is for a GPU, and this check runs on the NumPy backend; drop it.")
    if soak is not None:
        ids = tuple(chosen.id for chosen in cases)
        job = Job(ids, seed, first or 0, soak, gpu=on_gpu, pool=pool, patience_s=patience or 60.0)
        raise click.exceptions.Exit(not soaking.run(job, math.inf if seconds is None else seconds))
    _refuse_without_soak(seconds, first, patience)
    xp = _arrays(on_gpu, pool)
    numbers = ("error", "naive error", "allowed")
    where = "the NumPy backend" if xp is np else "the GPU"
    lines = table(f"{len(cases)} cases on {where}", "case", "tensor", *numbers, "", right=numbers)
    failures = 0
    normals = Normals(xp, seed)
    for chosen in followed(cases, "checking"):
        for line, passed in _lines(chosen, normals):
            lines.add_row(*line, style=None if passed else "bold red")
            failures += not passed
    screen = console()
    show(screen, lines)
    if failures:
        screen.print(f"{failures} outputs are too far from the exact answer.")
        raise click.exceptions.Exit(1)


def _lines(case: Case, normals: Normals) -> list[tuple[tuple[str, ...], bool]]:
    """Table lines of a case, each with whether it passed."""
    try:
        judged = verdicts(case, make(case, normals))
    except UnsupportedProblem as error:
        return [((case.id, "", "", "", "", f"not run: {str(error).splitlines()[0]}"), True)]
    return [
        (
            (
                case.id,
                v.tensor,
                f"{v.error:.2e}",
                f"{v.naive_error:.2e}",
                f"{v.allowed:.2e}",
                "" if v.passed else v.worst,
            ),
            v.passed,
        )
        for v in judged
    ]


def _refuse_without_soak(seconds: float | None, first: int | None, patience: float | None) -> None:
    for option, value in (("--seconds", seconds), ("--first", first), ("--patience", patience)):
        if value is not None:
            raise InvalidArgument(f"{option} needs --soak, the number of random problems.")


def _arrays(on_gpu: bool, pool: bool) -> ModuleType:
    """The array module to run on."""
    if not on_gpu:
        return np
    import cupy

    if not pool:
        cupy.cuda.set_allocator(None)
    return cupy


def _sanitized(tool: str, pattern: str | None, seed: int) -> int:
    """Run the same check in a process under compute-sanitizer; its status."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=_toolkit())
    if program is None:
        raise InvalidArgument(
            "--sanitize needs the program compute-sanitizer, which is neither on PATH nor below CUDA_PATH; "
            "it comes with the CUDA toolkit."
        )
    again = [sys.executable, "-m", "cuflash", "check", *([pattern] if pattern else []), f"--seed={seed}", "--no-pool"]
    # Which has every lane arrive by itself at the barriers that racecheck follows (kernels/tile/ring.cuh).
    env = os.environ | ({"CUFLASH_DEBUG": "1"} if tool == "racecheck" else {})
    return subprocess.run([program, f"--tool={tool}", "--error-exitcode=97", *again], check=False, env=env).returncode


def _toolkit() -> str:
    """Where an installed toolkit keeps its programs."""
    root = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return os.pathsep.join([f"{root}/bin", f"{root}/compute-sanitizer"])
