"""Which kernels would run for a call, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cuflash import device as devices
from cuflash import plan
from cuflash.arrays import Guest, cupy_arrays, framework_of, numpy_arrays
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag
from cuflash.ops import check
from cuflash.ops.call import Options, given
from cuflash.ops.lengths import with_lengths
from cuflash.plan.choose import Explanation
from cuflash.problem import Problem


def explain(
    q: Any, others: Sequence[Any], block_table: Any, options: Options, device: str | None, backward: bool
) -> Explanation:
    """The choice for q and the other arrays of a forward call, or for a Problem, on a device.

    `others` are in the order of :data:`SHARED`; without a device it is the arrays' own.
    """
    backward = flag("backward", backward)
    if isinstance(q, Problem):
        given_options = [*map(type, options)] != [*map(type, Options())] or options != Options()
        if given_options or backward or any(x is not None for x in (*others, block_table)):
            raise InvalidArgument("explain takes only a device next to a Problem, which says everything else itself.")
        if device is None:
            raise InvalidArgument("device is None; name the one to explain a Problem for, for example device='h100'.")
        return plan.explain(q, devices.named(device))

    arrays: Sequence[Any] = (q, *others, block_table, None)
    names = options.names("forward")
    framework = framework_of(names, arrays)
    library = framework.name
    if isinstance(framework, Guest):
        on_cuda = framework.is_on_cuda(names[0], next(x for x in arrays if x is not None))
        arrays = framework.borrow(names, arrays) if on_cuda else framework.on_host(names, arrays)
        framework = cupy_arrays() if on_cuda else numpy_arrays
    options = with_lengths(framework, "forward", options, arrays)
    views = {name: framework.view(options.name(name), x) for name, x in given("forward", arrays).items()}
    problem = check.problem_of("forward", options, views)
    if backward:
        wanted = bool(options.deterministic), bool(options.bias_grad)
        problem = replace(problem, direction="backward", num_splits=0, deterministic=wanted[0], bias_grad=wanted[1])
    if device is not None:
        return plan.explain(problem, devices.named(device))
    where = views["q"].device
    if not where.startswith("cuda"):
        place = "" if library == "NumPy" else f" on {where}"
        raise InvalidArgument(
            f"device is None and the arrays are {library} arrays{place}, which no kernel runs on; "
            "name the device to explain the choice for, for example device='h100'."
        )
    return plan.explain(problem, devices.current(int(where.removeprefix("cuda:"))))
