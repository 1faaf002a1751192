"""A call with scores and masks that its caller wrote as functions, and with masks as lists of blocks."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, framework_of_type
from cuflash.errors import InvalidArgument
from cuflash.mods import Mod, Traced, trace
from cuflash.mods.emit import cap_of
from cuflash.ops.call import Arrays, Options


def with_mods(
    options: Options,
    arrays: Arrays,
    score_mod: Any,
    mask_mod: Any,
    captured_grad: Any = False,
    block_mask: Any = None,
) -> tuple[Options, Arrays]:
    """The call with what the functions do and the block mask in its options, and with the arrays that they read.

    Raises
    ------
    InvalidArgument
        If a function cannot be traced.
    """
    kind: type = type(arrays.q)
    framework = framework_of_type(kind)
    tracer = (framework.tracer() if isinstance(framework, Adapter) else None) or traced
    score, mask = (
        _NOTHING if function is None else tracer(argument, function)
        for argument, function in (("score_mod", score_mod), ("mask_mod", mask_mod))
    )
    capped = isinstance(score.mod, Mod) and options.softcap == 0 and captured_grad is False
    if capped and (cap := cap_of(score.mod.expression)) is not None:  # for which there is a keyword
        options, score = options.replace(softcap=cap), _NOTHING
    options = options.replace(score_mod=score.mod, mask_mod=mask.mod, captured_grad=captured_grad)
    if block_mask is not None:  # which cannot be hashed, so that such options are kept nowhere
        options = options.replace(block_mask=block_mask)
    return options, arrays._replace(captured=(*score.arrays, *mask.arrays) or None)


_NOTHING = Traced(None, ())  # type: ignore[arg-type]


def traced(argument: str, function: Any) -> Traced:
    """What a function does, which may have been traced before."""
    if not isinstance(function, Traced):
        return trace(argument, function)
    is_mask = function.mod.expression.kind == "bool"
    if is_mask != (argument == "mask_mod"):
        other = "mask_mod" if is_mask else "score_mod"
        raise InvalidArgument(f"{argument} was traced as a {other}; pass it as that, or trace it as a {argument}.")
    if len(function.arrays) != len(function.mod.operands):
        reads, given = len(function.mod.operands), len(function.arrays)
        raise InvalidArgument(
            f"{argument} reads {reads} {'array' if reads == 1 else 'arrays'}, and {given} are given; pass what "
            "cuflash.mods.trace returns."
        )
    return function
