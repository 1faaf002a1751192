"""A table of problems, and the plans that there are for one."""

from __future__ import annotations

from dataclasses import replace

from cuflash import dtypes
from cuflash.device import Device
from cuflash.masks import Mask
from cuflash.plan import Plan, choose, why_not
from cuflash.problem import Problem

BASE = Problem("forward", dtypes.BF16, 2, 8, 2, 500, 700, 64, 64, softmax_scale=0.125, num_splits=1)

MASKS = {
    "full": Mask(),
    "causal": Mask(right=0),
    "window": Mask(left=100, right=20),
    "tensor": Mask(tensor=True),
}
DIMS = [(16, 16), (40, 40), (64, 64), (72, 24), (96, 96), (128, 128), (160, 160), (192, 128), (256, 256)]


def widest_copy(itemsize: int, dims: tuple[int, int]) -> int:
    return max(n for n in (2, 4, 8, 16) if all(dim * itemsize % n == 0 for dim in dims))


def table() -> list[Problem]:
    """Every direction, dtype, size, mask and layout."""
    problems = []
    for dtype in dtypes.DTYPES.values():
        for dims in DIMS:
            for mask in MASKS.values():
                packed = [{}] if mask.tensor else [{}, {"layout": "varlen", "total_q": 900, "total_kv": 1300}]
                for layout in packed:
                    problem = replace(
                        BASE,
                        dtype=dtype,
                        dim_qk=dims[0],
                        dim_v=dims[1],
                        mask=mask,
                        copy_bytes=widest_copy(dtype.itemsize, dims),
                        **layout,
                    )
                    problems += [problem, replace(problem, direction="backward")]
                    problems.append(replace(problem, direction="backward", deterministic=True))
    return problems


PROBLEMS = table()


def plans(problem: Problem, device: Device) -> list[Plan]:
    """The plan of every family without a reason against the problem."""
    return [choose(problem, device, name) for name, reasons in why_not(problem, device).items() if not reasons]
