"""Where the command line prints."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 160
"""Columns of output that goes to a file, where nothing may be cut off."""


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for every table where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if stream.isatty() else WIDTH)


def table(title: str | None, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table with these columns, those in ``right`` aligned for numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=name in right)
    return made
