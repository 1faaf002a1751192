"""``cache``: where compiled kernels are kept, how much they take, and clearing them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from cuflash.cli.console import console, table
from cuflash.jit import cache as store


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List every compiled kernel.")] = False,
) -> None:
    """Show the place, size and number of the compiled kernels that are kept, list them or clear them."""
    screen = console()
    if clear:
        screen.print(f"deleted {store.clear()} kernels from {store.root()}")
        return
    entries = list(store.entries())
    screen.print(f"place    {store.root()}")
    screen.print(f"kernels  {len(entries)}")
    screen.print(f"size     {decimal(sum(size for _, size, _ in entries))}")
    if listing:
        lines = table(None, "kernel", "arch", "registers", "size", right=("registers", "size"))
        for folder, size, report in entries:
            lines.add_row(folder.name, report["arch"], str(report["registers"]), decimal(size))
        screen.print(lines)
