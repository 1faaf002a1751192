"""``explain``: the plan of one problem, what its kernels cost, and why not the other families."""

from __future__ import annotations

import click
from rich.console import Console

from cuflash import jit, plan
from cuflash.cli.console import console, say
from cuflash.cli.problem import Asked
from cuflash.device import Device
from cuflash.errors import CompileError
from cuflash.jit.compile import version


def show(asked: Asked, device: Device) -> None:
    """Print the choice; status 1 when no family runs the problem."""
    screen = console()
    chosen = plan.explain(asked.problem, device, asked.family)
    say(screen, "", f"{chosen.problem} on {device}", "bold")
    say(screen, "FLOPs", f"{asked.flops / 1e9:,.2f} G, at least {asked.nbytes / 1e6:,.1f} MB read and written")
    if chosen.plan is not None:
        _show_plan(chosen.plan, screen)
    for name, reasons in chosen.why_not.items():
        if chosen.plan is None or name != chosen.plan.family:
            first = "not asked for" if chosen.plan is None or asked.family else f"{chosen.plan.family} comes first"
            say(screen, f"not {name}", "; ".join(reasons) or first)
    if chosen.plan is None:
        raise click.exceptions.Exit(1)


def _show_plan(chosen: plan.Plan, screen: Console) -> None:
    say(screen, "family", f"{chosen.family}: {chosen.reason}")
    if chosen.ceiling is not None:
        say(screen, "at most", str(chosen.ceiling))
    if chosen.division:
        say(screen, "splits", f"{chosen.num_splits}: {chosen.division}")
    scratch = ", ".join(f"{w.name} {w.nbytes:,}" for w in chosen.workspaces)
    say(screen, "workspace", f"{chosen.workspace_bytes:,} bytes" + (f" ({scratch})" if scratch else ""))
    why_unknown = _why_no_compiler()
    for step in chosen.steps:
        config = step.config
        parts = [
            f"{step.num_blocks:,} blocks of {config.threads} threads",
            f"tile {config.tile_q} x {config.tile_kv}",
            f"{config.copy_bytes}-byte accesses",
            f"{config.smem_bytes:,} bytes of shared memory",
        ]
        if why_unknown is None:
            cubin = jit.compile_kernel(step.kernel, config, step.params, chosen.device.arch)
            spilled = cubin.spill_stores + cubin.spill_loads
            parts.append(f"{cubin.registers} registers, {spilled} bytes spilled, {cubin.stack} bytes of stack a thread")
        say(screen, "kernel", f"{step.kernel}: {', '.join(parts)}")
    if why_unknown is not None:
        say(screen, "", f"registers, spills and stack are known after compiling: {why_unknown}")


def _why_no_compiler() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    try:
        version()
    except CompileError as error:
        return str(error)
    return None
