"""Gradients of attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, Guest, Launcher, framework_of, framework_of_type
from cuflash.ops.answer import answer
from cuflash.ops.call import Arrays, CapturedGradients, Gradients, Options


def backward(options: Options, arrays: Arrays) -> tuple[Any, ...]:
    """(dq, dk, dv) as arrays of the same framework, all Gradients where a bias' or a sink's are among them.

    dq, dk and dv are written where they are given. If the options keep delta, a pair of those gradients and delta.
    """
    kind: type = type(arrays.q)
    framework = framework_of_type(kind)
    if not isinstance(framework, Launcher):
        framework = framework_of(options.names(arrays), arrays.each())
    if isinstance(framework, Guest):
        framework = framework.beyond(arrays.each()) or framework
    if isinstance(framework, Adapter):
        results = framework.answer("backward", options, arrays)
    else:
        results = answer(framework, "backward", options, arrays)
    if len(results) == 3 and not options.captured_grad:
        return results
    dq, dk, dv, *others = results
    delta = others.pop() if options.keep_delta else None
    gradients: Any = dq, dk, dv
    if others or options.captured_grad:
        dbias = others.pop(0) if options.bias_grad else None
        dsink = None if arrays.sink is None else others.pop(0)
        gradients = Gradients(dq, dk, dv, dbias, dsink)
        if options.captured_grad and options.score_mod is not None:
            kinds = (operand.kind for operand in options.score_mod.operands)
            dcaptured = tuple(others.pop(0) if kind == "real" else None for kind in kinds)
            gradients = CapturedGradients(dq, dk, dv, dbias, dsink, dcaptured)
    return (gradients, delta) if options.keep_delta else gradients
