"""The command line: ``python -m cuflash explain | source | compile | check | bench | cache | support``."""

from __future__ import annotations

import typer

from cuflash.cli import bench, cache, check, compile, explain, source, support
from cuflash.cli.console import console
from cuflash.cli.problem import register
from cuflash.errors import CompileError, InvalidArgument, UnsupportedProblem

app = typer.Typer(
    name="cuflash",
    help="Exact attention on NumPy and CUDA arrays: look at, compile, check and measure its kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register(app, "explain", explain.show, "Which kernels run a problem, with which tiles, and why not the others.")
register(app, "source", source.show, "The config.cuh of a problem's kernels and the files they are made of.")
app.command("compile")(compile.compile_cases)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("cache")(cache.cache)
app.command("support")(support.support)


def main() -> None:
    """Run the command line; the three errors of cuflash end it with their message and status 2."""
    try:
        app()
    except (InvalidArgument, UnsupportedProblem, CompileError) as error:
        console(stderr=True).print(f"{type(error).__name__}: {error}", markup=False)
        raise SystemExit(2) from None
