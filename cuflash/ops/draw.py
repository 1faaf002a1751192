"""Where the random numbers of a call with dropout come from: a generator, or a seed and an offset."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.arrays import Launcher
from cuflash.errors import InvalidArgument
from cuflash.generator import PhiloxGenerator, checked, default_generator
from cuflash.numbers import shown
from cuflash.problem import Problem


def increment(problem: Problem) -> int:
    """How far a call moves its generator on, a multiple of 4; what PyTorch's kernels do with the same scheme."""
    planes = problem.batch * problem.heads_q
    count = planes * 32 if problem.dropout == "byte" else planes * problem.len_q * problem.len_kv
    return -(-count // 4) * 4 % 2**64


def check(generator: Any) -> None:
    """Refuse what numbers cannot be drawn from."""
    if generator is None or isinstance(generator, PhiloxGenerator):
        return
    if not isinstance(generator, tuple) or len(generator) != 2 or any(x is None for x in generator):
        raise InvalidArgument(
            f"generator is {shown(generator)}; expected a cuflash.PhiloxGenerator, a tuple (seed, offset), "
            "or None for the one that cuflash.manual_seed seeds."
        )
    checked(*generator)


def on_host(generator: PhiloxGenerator | tuple[int, int] | None, problem: Problem) -> np.ndarray:
    """Seed and offset of a call on NumPy arrays, (2,) uint64."""
    state = generator if isinstance(generator, tuple) else (generator or default_generator).next(increment(problem))
    return np.array(state, np.uint64)


def on_device(
    generator: PhiloxGenerator | tuple[int, int] | None, step: int, framework: Launcher, device: int
) -> tuple[int, int, int]:
    """Address of a generator's state on the device, or 0 and the seed and offset of a call that moves on by `step`."""
    if isinstance(generator, tuple):
        return 0, int(generator[0]), int(generator[1])
    generator = generator or framework.generator(device) or default_generator
    address = generator.address(device)
    if address:
        return address, 0, 0
    if framework.is_capturing():
        raise InvalidArgument(
            f"generator keeps its state where cuda:{device} cannot advance it, so that every replay of the graph being "
            "captured would drop the same probabilities. Call generator.to_device() before capturing "
            "(cuflash.manual_seed(seed).to_device() for the default one), or pass a tuple (seed, offset)."
        )
    return 0, *generator.next(step)
