"""``source``: what the compiler is given for one problem."""

from __future__ import annotations

from rich.syntax import Syntax

from cuflash import jit, plan
from cuflash.bench.cases import Case
from cuflash.cli.console import console
from cuflash.device import Device


def show(case: Case, device: Device) -> None:
    """Print, for each kernel, the files it is made of and its rendered ``config.cuh``."""
    screen = console()
    for step in plan.choose(case.problem, device, case.family).steps:
        text = jit.render.config_header(step.kernel, step.config, step.params)
        screen.rule(step.kernel)
        for name in sorted(set(jit.sources.gather(step.kernel, text)) - {jit.sources.CONFIG}):
            screen.print(str(jit.sources.root() / name))
        screen.print(Syntax(text, "cuda", background_color="default") if screen.is_terminal else text, markup=False)
