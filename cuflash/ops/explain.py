"""Which kernels would run for a call, without running it."""

from __future__ import annotations

from dataclasses import replace

from cuflash import device as devices
from cuflash import plan
from cuflash.arrays import Guest, framework_of
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag
from cuflash.ops import check
from cuflash.ops.call import Arrays, Options, asked
from cuflash.ops.lengths import with_lengths
from cuflash.plan.choose import Explanation
from cuflash.problem import Problem


def explain(options: Options, arrays: Arrays, device: str | None, backward: bool) -> Explanation:
    """The choice for the arrays of a forward call, or for a Problem in place of q, on a device.

    Without a device it is the arrays' own.
    """
    backward = flag("backward", backward)
    if isinstance(arrays.q, Problem):
        if options is not asked() or backward or any(x is not None for x in arrays[1:]):
            raise InvalidArgument("explain takes only a device next to a Problem, which says everything else itself.")
        if device is None:
            raise InvalidArgument("device is None; name the one to explain a Problem for, for example device='h100'.")
        return plan.explain(arrays.q, devices.named(device))

    names = options.names(arrays)
    framework = framework_of(names, arrays.each())
    library = framework.name
    if isinstance(framework, Guest):
        framework, borrowed = framework.borrow(names, arrays.each())
        arrays = arrays.like(borrowed)
    options = with_lengths("forward", options, arrays)
    views = {name: framework.outline(options.name(name), x) for name, x in arrays.by_name().items()}
    problem = check.problem_of("forward", options, views)
    if backward:
        problem = replace(
            problem, direction="backward", num_splits=0, deterministic=bool(options.deterministic),
            bias_grad=bool(options.bias_grad), captured_grad=bool(options.captured_grad),
        )  # fmt: skip
    if device is not None:
        return _with_blocks(plan.explain(problem, devices.named(device)), options)
    where = views["q"].device
    if not where.startswith("cuda"):
        place = "" if library == "NumPy" else f" on {where}"
        raise InvalidArgument(
            f"device is None and the arrays are {library} arrays{place}, which no kernel runs on; "
            "name the device to explain the choice for, for example device='h100'."
        )
    return _with_blocks(plan.explain(problem, devices.current(int(where.removeprefix("cuda:")))), options)


def _with_blocks(explanation: Explanation, options: Options) -> Explanation:
    """The same with what a block mask, if there is one, leaves to be visited."""
    if options.block_mask is None or options.band is not None:
        return explanation
    full, partial, empty = options.block_mask.counts
    share = (full + partial) / max(full + partial + empty, 1)
    return replace(explanation, blocks=f"{share:.1%} are visited: {full:,} full, {partial:,} partial, {empty:,} empty")
