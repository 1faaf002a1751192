"""``compile``: every kernel variant of the case table for several architectures, with what each takes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import track

from cuflash import jit
from cuflash.bench.cases import ARCHITECTURES, matrix
from cuflash.bench.resources import complaints
from cuflash.cli.console import console, table
from cuflash.device import named
from cuflash.errors import CompileError, InvalidArgument
from cuflash.jit.compile import version


def compile_cases(
    case: Annotated[str | None, typer.Argument(help="An id, a part of ids, a glob, or 'smoke'.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole table.")] = False,
    arch: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; {', '.join(ARCHITECTURES)} if not given.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
) -> None:
    """Compile kernel variants without a GPU and print registers, stack, spills, shared memory and seconds.

    Status 1 when one does not compile, spills more than is recorded as acceptable, or takes more registers or shared
    memory than the architecture has. With --all, sm_80 and sm_90a take the whole table of their families, others smoke.
    """
    if (case is None) != everything:
        raise InvalidArgument("name the cases to compile, or give --all for the whole table; not both.")
    version()  # without a compiler every kernel would fail with the same message
    rows = matrix(arch or ARCHITECTURES, case)
    work = [(step.kernel, step.config, step.params, target) for target, _, step in rows]
    numbers = ("registers", "stack", "spills", "shared memory", "seconds")
    lines = table(f"{len(rows)} kernels", "arch", "case", "kernel", *numbers, "", right=numbers)
    wrong = 0
    progress = track(
        jit.compile_many(work, jobs), "compiling", total=len(work), console=console(stderr=True), transient=True
    )
    for (target, case_id, step), cubin in zip(rows, progress, strict=True):
        if isinstance(cubin, CompileError):
            wrong += 1
            first = str(cubin).splitlines()
            lines.add_row(target, case_id, step.kernel, *[""] * 5, "\n".join(first[:4]), style="bold red")
            continue
        found = complaints(case_id, step, cubin, named(target))
        wrong += bool(found)
        lines.add_row(
            target,
            case_id,
            step.kernel,
            str(cubin.registers),
            str(cubin.stack),
            str(cubin.spill_stores + cubin.spill_loads),
            f"{step.config.smem_bytes:,}",
            "cached" if cubin.cached else f"{cubin.seconds:.2f}",
            "\n".join(found),
            style="bold red" if found else None,
        )
    screen = console()
    screen.print(lines)
    screen.print(f"{len(rows) - wrong} of {len(rows)} kernels are as they should be.")
    if wrong:
        raise typer.Exit(1)
