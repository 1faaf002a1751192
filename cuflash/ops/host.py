"""What both directions need to call the NumPy backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash.arrays import numpy_arrays
from cuflash.ops import check, packed
from cuflash.ops.options import ARGUMENTS, OUTPUTS, Options, given
from cuflash.problem import Direction, Problem


def problem_of(
    direction: Direction, options: Options, arrays: Sequence[np.ndarray | None]
) -> tuple[Problem, dict[str, tuple[int, ...]]]:
    """Check a call on NumPy arrays, values of cu_seqlens included; its problem, and the shapes of its results."""
    arguments = given(direction, arrays)
    views = {name: numpy_arrays.view(options.name(name), x) for name, x in arguments.items()}
    if check.layout_of(direction, options, views) == "varlen":
        options = packed.with_lengths(options, views, arguments)
    problem = check.problem_of(direction, options, views)
    num_outputs = sum(name in views for name in OUTPUTS[direction])
    if num_outputs:
        extents = list(map(check.extent, views.values()))
        check.check_separate(extents, [view.pointer for view in views.values()], num_outputs)
    return problem, check.shapes(options, views)


def keywords(
    problem: Problem, options: Options, arrays: Sequence[np.ndarray | None], rng_state: np.ndarray | None
) -> dict[str, Any]:
    """The keywords of every function of the backend."""
    arguments = dict(zip(ARGUMENTS[problem.direction], arrays, strict=True))
    shared = {
        "mask": problem.mask,
        "softmax_scale": problem.softmax_scale,
        "softcap": problem.softcap,
        "mask_tensor": arguments["attn_mask"],
        "alibi_slopes": arguments["alibi_slopes"],
        "bias": arguments["attn_bias"],
        "sink": arguments["sink"],
        "dropout": check.dropout_of(options),
        "rng_state": rng_state,
    }
    if problem.layout == "dense":
        return shared
    lengths = {"max_seqlen_q": problem.len_q, "max_seqlen_k": problem.len_kv}
    return shared | lengths | {name: arguments[name] for name in ("seqused_q", "seqused_k")}


def stored(result: np.ndarray, output: np.ndarray | None) -> np.ndarray:
    """The result, in the caller's array if there is one."""
    if output is None:
        return result
    output[...] = result
    return output
