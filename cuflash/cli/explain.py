"""``explain``: the plan of one problem, what its kernels cost, and why not the other families."""

from __future__ import annotations

import typer
from rich.console import Console

from cuflash import jit, plan
from cuflash.bench.cases import Case
from cuflash.cli.console import console, table
from cuflash.device import Device
from cuflash.errors import CompileError
from cuflash.jit.compile import version


def show(case: Case, device: Device) -> None:
    """Print the choice; status 1 when no family runs the problem."""
    screen = console()
    chosen = plan.explain(case.problem, device, case.family)
    screen.print(f"{chosen.problem} on {device}", style="bold")
    screen.print(f"FLOPs      {case.flops() / 1e9:,.2f} G, at least {case.nbytes() / 1e6:,.1f} MB read and written")
    if chosen.plan is not None:
        _show_plan(chosen.plan, screen)
    for name, reasons in chosen.why_not.items():
        if chosen.plan is None or name != chosen.plan.family:
            first = "not asked for" if chosen.plan is None or case.family else f"{chosen.plan.family} comes first"
            screen.print(f"not {name:<7}{'; '.join(reasons) or first}")
    if chosen.plan is None:
        raise typer.Exit(1)


def _show_plan(chosen: plan.Plan, screen: Console) -> None:
    screen.print(f"family     {chosen.family}: {chosen.reason}")
    if chosen.ceiling is not None:
        screen.print(f"at most    {chosen.ceiling}")
    if chosen.division:
        screen.print(f"splits     {chosen.num_splits}: {chosen.division}")
    scratch = ", ".join(f"{w.name} {w.nbytes:,}" for w in chosen.workspaces)
    screen.print(f"workspace  {chosen.workspace_bytes:,} bytes" + (f" ({scratch})" if scratch else ""))
    numbers = ("blocks", "threads", "tile", "accesses", "shared memory", "registers", "spills", "stack")
    lines = table(None, "kernel", *numbers, right=numbers)
    why_unknown = _why_no_compiler()
    for step in chosen.steps:
        config = step.config
        compiled = ("?", "?", "?")
        if why_unknown is None:
            cubin = jit.compile_kernel(step.kernel, config, step.params, chosen.device.arch)
            compiled = (str(cubin.registers), str(cubin.spill_stores + cubin.spill_loads), str(cubin.stack))
        lines.add_row(
            step.kernel,
            f"{step.num_blocks:,}",
            str(config.threads),
            f"{config.tile_q} x {config.tile_kv}",
            f"{config.copy_bytes} B",
            f"{config.smem_bytes:,} B",
            *compiled,
        )
    screen.print(lines)
    if why_unknown is not None:
        screen.print(f"registers, spills and stack are known after compiling: {why_unknown}", markup=False)


def _why_no_compiler() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    try:
        version()
    except CompileError as error:
        return str(error)
    return None
