"""Gradients of attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, Guest, Launcher, framework_of, framework_of_type
from cuflash.ops.answer import answer
from cuflash.ops.call import Arrays, Gradients, Options


def backward(options: Options, arrays: Arrays) -> tuple[Any, ...]:
    """(dq, dk, dv) as arrays of the same framework, all Gradients where a bias' or a sink's are among them.

    dq, dk and dv are written where they are given. If the options keep delta, a pair of those gradients and delta.
    """
    kind: type = type(arrays.q)
    framework = framework_of_type(kind)
    if not isinstance(framework, Launcher):
        framework = framework_of(options.manner.names, arrays)
    if isinstance(framework, Guest):
        framework = framework.beyond(arrays) or framework
    if isinstance(framework, Adapter):
        results = framework.answer("backward", options, arrays)
    else:
        results = answer(framework, "backward", options, arrays)
    if len(results) == 3:
        return results
    dq, dk, dv, *others = results
    delta = others.pop() if options.keep_delta else None
    gradients: Any = dq, dk, dv
    if others:
        dbias, dsink = others[0] if options.bias_grad else None, None if arrays.sink is None else others[-1]
        gradients = Gradients(dq, dk, dv, dbias, dsink)
    return (gradients, delta) if options.keep_delta else gradients
