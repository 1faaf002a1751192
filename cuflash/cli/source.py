"""``source``: what the compiler is given for one problem."""

from __future__ import annotations

from cuflash import jit, plan
from cuflash.cli.problem import Asked
from cuflash.device import Device


def show(asked: Asked, device: Device) -> None:
    """Print, for each kernel, the files it is made of and its rendered ``config.cuh``."""
    for step in plan.choose(asked.problem, device, asked.family).steps:
        text = jit.render.config_header(step.kernel, step.config, step.params)
        print(f"// {step.kernel}, made of config.cuh as below and of")
        for name in sorted(set(jit.sources.gather(step.kernel, text)) - {jit.sources.CONFIG}):
            print(str(jit.sources.root() / name))
        print(f"\n{text}")
