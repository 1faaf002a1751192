"""``explain``: the plan of one problem, what its kernels cost, and why not the other families."""

from __future__ import annotations

from typing import Any

import click

from cuflash import jit, plan
from cuflash.cli import divided
from cuflash.cli.console import console
from cuflash.cli.problem import Asked
from cuflash.device import Device
from cuflash.errors import CompileError
from cuflash.jit.compile import check_arch
from cuflash.sheet import Sheet


def show(asked: Asked, device: Device, **divided_by: Any) -> None:
    """Print the choice, and what dividing it over devices takes; status 1 when no family runs the problem."""
    chosen = plan.explain(asked.problem, device, asked.family)
    steps = iter(() if chosen.plan is None else chosen.plan.steps)
    why_unknown = _why_no_compiler(device)
    lines = []
    for label, text in chosen.lines():
        if label == "FLOPs":  # with the true lengths of packed sequences
            text = f"{asked.flops / 1e9:,.2f} G, at least {asked.nbytes / 1e6:,.1f} MB read and written"
        if label == "kernel" and why_unknown is None:
            text += _compiled(next(steps), device)
        lines.append((label, text))
    if chosen.plan is not None and why_unknown is not None:
        lines.append(("", f"registers, spills and stack are known after compiling: {why_unknown}"))
    lines += divided.lines(asked, device, **divided_by)
    console().print(Sheet(chosen.sheet().title, lines))
    if chosen.plan is None:
        raise click.exceptions.Exit(1)


def _compiled(step: plan.Step, device: Device) -> str:
    """What the compiler says of a kernel."""
    cubin = jit.compile_kernel(step.kernel, step.config, step.params, device.arch)
    spilled = cubin.spill_stores + cubin.spill_loads
    return f", {cubin.registers} registers, {spilled} bytes spilled, {cubin.stack} bytes of stack a thread"


def _why_no_compiler(device: Device) -> str | None:
    """Why nothing can be compiled here for a device; None when it can."""
    try:
        check_arch(device.arch)
    except CompileError as error:
        return str(error)
    return None
