"""The command line: ``python -m cuflash explain | source | compile | check | bench | cache | support``.

Texts of help are strings: docstrings are not there under ``python -OO``.
"""

from __future__ import annotations

import os
import sys

import click

import cuflash
from cuflash.cli import bench, cache, check, compile, divided, explain, source, support
from cuflash.cli.console import console, prepare_streams
from cuflash.cli.problem import command
from cuflash.errors import CompileError, InvalidArgument, UnsupportedProblem

app = click.Group(
    "cuflash",
    help="Exact attention on NumPy and CUDA arrays: look at, compile, check and measure its kernels.",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    commands=[
        command(
            "explain",
            explain.show,
            "Say which kernels run a problem, with which tiles, and why not the others.",
            divided.OPTIONS,
        ),
        command("source", source.show, "Print the config.cuh of a problem's kernels and the files they are made of."),
        compile.command,
        check.command,
        bench.command,
        cache.command,
        support.command,
    ],
)
click.version_option(cuflash.__version__, message="cuflash %(version)s")(app)


def main() -> None:
    """Run the command line; errors of cuflash and of files end it with their message and status 2."""
    prepare_streams()
    try:
        app()
    except (InvalidArgument, UnsupportedProblem, CompileError) as error:
        _end(f"{type(error).__name__}: {error}")
    except BrokenPipeError:  # nobody reads on
        _write_nowhere()
        raise SystemExit(1) from None
    except OSError as error:
        _write_nowhere()
        _end(f"{type(error).__name__}: {error}")


def _end(message: str) -> None:
    console(stderr=True).print(message)
    raise SystemExit(2)


def _write_nowhere() -> None:
    """Let what is still in the buffer of stdout go nowhere when Python ends, where it could not be written."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
