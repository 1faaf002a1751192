"""``source``: what the compiler is given for one problem."""

from __future__ import annotations

from cuflash import jit, plan
from cuflash.cli.problem import Asked
from cuflash.device import Device


def show(asked: Asked, device: Device) -> None:
    """Print, for each kernel, the files it is made of and its rendered headers."""
    for step in plan.choose(asked.problem, device, asked.family).steps:
        rendered = jit.render.headers(step.kernel, step.config, step.params)
        print(f"// {step.kernel}, made of {' and '.join(rendered)} as below and of")
        for name in sorted(jit.sources.gather(step.kernel, rendered).keys() - rendered.keys()):
            print(str(jit.sources.root() / name))
        for text in rendered.values():
            print(f"\n{text}")
