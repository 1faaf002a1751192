"""``compile``: every kernel variant of the case table for several architectures, with what each takes."""

from __future__ import annotations

import click

from cuflash import jit
from cuflash.cases.table import ARCHITECTURES, matrix
from cuflash.cli.console import console, followed, show, table
from cuflash.device import named
from cuflash.errors import CompileError, InvalidArgument
from cuflash.jit.compile import version
from cuflash.verify.resources import complaints


@click.command(
    "compile",
    short_help="Compile kernels for any architecture, without a GPU.",
    help="""Compile kernel variants without a GPU and print registers, stack, spills, shared memory and seconds.

    CASE is an id, a part of ids, a glob, or 'smoke'. Status 1 when a kernel does not compile, spills more than is
    recorded as acceptable, or takes more registers or shared memory than the architecture has. With --all, sm_80 and
    sm_90a take the whole table of their families, others smoke.""",
)
@click.argument("case", required=False)
@click.option("--all", "everything", is_flag=True, help="The whole table.")
@click.option("--arch", multiple=True, help=f"Repeatable; {', '.join(ARCHITECTURES)} if not given.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; one a core if not given.")
def command(case: str | None, everything: bool, arch: tuple[str, ...], jobs: int | None) -> None:
    """Compile and print."""
    if (case is None) != everything:
        raise InvalidArgument("name the cases to compile, or give --all for the whole table; not both.")
    version()  # without a compiler every kernel would fail with the same message
    rows = matrix(arch or ARCHITECTURES, case)
    work = [(step.kernel, step.config, step.params, target) for target, _, step in rows]
    numbers = ("registers", "stack", "spills", "shared", "seconds")
    lines = table(f"{len(rows)} kernels", "arch", "case", "kernel", *numbers, "", right=numbers)
    wrong = 0
    progress = followed(jit.compile_many(work, jobs), "compiling", len(work))
    for (target, case_id, step), cubin in zip(rows, progress, strict=True):
        if isinstance(cubin, CompileError):
            wrong += 1
            first = str(cubin).splitlines()
            lines.add_row(target, case_id, step.kernel, *[""] * 5, "\n".join(first[:4]), style="bold red")
            continue
        faults = complaints(case_id, step, cubin, named(target))
        wrong += bool(faults)
        lines.add_row(
            target,
            case_id,
            step.kernel,
            str(cubin.registers),
            str(cubin.stack),
            str(cubin.spill_stores + cubin.spill_loads),
            f"{step.config.smem_bytes:,}",
            "cached" if cubin.cached else f"{cubin.seconds:.2f}",
            "\n".join(faults),
            style="bold red" if faults else None,
        )
    screen = console()
    show(screen, lines)
    screen.print(f"{len(rows) - wrong} of {len(rows)} kernels are as they should be.")
    if wrong:
        raise click.exceptions.Exit(1)
