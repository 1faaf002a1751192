"""``cache``: where compiled kernels are kept, how much they take, and clearing them."""

from __future__ import annotations

import click
from rich.filesize import decimal

from cuflash.cli.console import console, show, table
from cuflash.errors import InvalidArgument
from cuflash.jit import cache as store


@click.command(
    "cache",
    short_help="Show, list or clear the compiled kernels that are kept.",
    help="Show the place, number and size of the compiled kernels that are kept, list them or clear them.",
)
@click.option("--clear", is_flag=True, help="Delete every compiled kernel.")
@click.option("--list", "listing", is_flag=True, help="List every compiled kernel.")
def command(clear: bool, listing: bool) -> None:
    """Show what is kept."""
    screen = console()
    if clear and listing:
        raise InvalidArgument("--list and --clear exclude each other; list the kernels before they are deleted.")
    if clear:
        screen.print(f"deleted {store.clear()} kernels from {store.root()}")
        return
    entries = list(store.entries())
    screen.print(f"place    {store.root()}")
    screen.print(f"kernels  {len(entries)}")
    screen.print(f"size     {decimal(sum(size for _, size, _ in entries))}")
    if listing:
        lines = table(None, "kernel", "arch", "registers", "size", right=("arch", "registers", "size"))
        for folder, size, report in entries:
            lines.add_row(folder.name, report["arch"], str(report["registers"]), decimal(size))
        show(screen, lines)
