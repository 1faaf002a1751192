"""Where the command line prints, and how: to narrow terminals, to files, in any encoding, or nowhere."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

Item = TypeVar("Item")

WIDTH = 160
"""Columns of output that goes to a file."""

_LEAST = 8
"""Columns that a column of text keeps in a narrow terminal."""

_ASCII = {"✓": "yes", "–": "-", "−": "-", "∞": "inf", "×": "x", "µ": "u", "…": "...", "“": '"', "”": '"', "─": "-"}
"""What stands for characters that an encoding lacks."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


def prepare_streams() -> None:
    """Let both streams replace what their encoding lacks, and keep files from being opened in the place of closed ones.

    A file that gets the number of a closed stdout would also get what C libraries and child processes print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    codecs.register_error("cuflash.ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):  # None where a program was started without them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cuflash.ascii")


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or as COLUMNS says, or wide where there is neither."""
    stream = sys.stderr if stderr else sys.stdout
    to_terminal = stream is not None and stream.isatty()
    width = None if to_terminal or os.environ.get("COLUMNS") else WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def bar() -> Progress:
    """A bar of how much is done, on a terminal; nothing elsewhere."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    printed = console().is_terminal  # elsewhere it does not pass the bar's lines
    return Progress(*columns, console=_terminal(), transient=True, redirect_stdout=printed)


def followed(items: Iterable[Item], description: str, total: float | None = None) -> Iterable[Item]:
    """The items, with a bar of how many have been taken on a terminal."""
    return track(items, description, total, console=_terminal(), transient=True)


def _terminal() -> Console:
    """Stderr where it is a terminal; else a console that prints nothing."""
    screen = console(stderr=True)
    screen.quiet = not screen.is_terminal
    return screen


def table(title: str | None, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table with these columns; those in ``right`` are numbers, which stay on one line."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        number = name in right
        made.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def show(screen: Console, lines: Table) -> None:
    """Print a table in the width there is; a narrower terminal than the least that it needs breaks its lines itself."""
    texts = [column for column in lines.columns if not column.no_wrap]
    for column in texts:
        column.max_width = _LEAST
    least = Measurement.get(screen, screen.options.update(max_width=10 * WIDTH), lines).minimum
    for column in texts:
        column.max_width = None
    screen.width = max(screen.width, least)
    screen.print(lines)


def options_written(*but: str) -> list[str]:
    """The arguments and options of the command that were written, without those named."""
    context = click.get_current_context()
    written = [
        param.human_readable_name if isinstance(param, click.Argument) else param.opts[0]
        for param in context.command.params
        if param.name not in but and context.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]
    return written


class Seconds(click.FloatRange):
    """Seconds, which NaN is no number of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a number that can be compared."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number.", param, ctx)
        return number
