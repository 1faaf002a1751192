"""What both directions need to call the NumPy backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash.arrays import numpy_arrays
from cuflash.dropout import Dropout
from cuflash.ops import check, lengths, overlap
from cuflash.ops.call import ARGUMENTS, OUTPUTS, Options, given
from cuflash.problem import Direction, Problem

_CU_SEQLENS = ARGUMENTS["forward"].index("cu_seqlens_q")
_MAX_CHECKED = 1024
_checked: dict[tuple[Any, ...], Checked] = {}


class Checked(NamedTuple):
    """What the checks of a kind of call found."""

    problem: Problem
    shapes: dict[str, tuple[int, ...]]
    """Of its results."""
    dropout: Dropout | None
    extents: list[overlap.Extent]
    """Of every given array; empty when all results are allocated."""
    num_outputs: int
    """How many of the given arrays, the last ones, are written."""


def plain(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays without the arithmetic of subclasses, whose ``*`` may be another product or know of units."""
    return tuple(None if x is None else np.asarray(x) for x in arrays)


def checked(direction: Direction, options: Options, arrays: Sequence[np.ndarray | None]) -> Checked:
    """Check a call on NumPy arrays, or look up what was found for one of its kind.

    The values of cu_seqlens, and whether outputs may be written where they are, are no part of a kind: they are checked
    in every call.
    """
    if arrays[_CU_SEQLENS] is not None:
        arguments = given(direction, arrays)
        views = {name: numpy_arrays.view(options.name(name), x) for name, x in arguments.items()}
        if check.layout_of(direction, options, views) == "varlen":
            options = lengths.read(options, views, arguments)
    pointers, described = numpy_arrays.describe(ARGUMENTS[direction], arrays)
    key: tuple[Any, ...] | None
    try:
        key = direction, options.kind(), described
        found = _checked.get(key)
    except TypeError:  # an option that cannot be part of a key
        key = found = None
    if found is None:
        settled = check.settled(options)
        if settled is not options:
            return checked(direction, settled, arrays)
        found = check_kind(direction, options, given(direction, arrays))
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        if key is not None:
            _checked[key] = found
    if found.num_outputs:
        if not all(x is None or x.flags.writeable for x in arrays[-len(OUTPUTS[direction]) :]):
            check_kind(direction, options, given(direction, arrays))  # says which
        overlap.check_separate(found.extents, pointers, found.num_outputs)
    return found


def check_kind(direction: Direction, options: Options, arguments: Mapping[str, np.ndarray]) -> Checked:
    """Check a call on arrays of this kind."""
    views = {name: numpy_arrays.view(options.name(name), x) for name, x in arguments.items()}
    check.layout_of(direction, options, views)
    problem = check.problem_of(direction, options, views)
    num_outputs = sum(name in views for name in OUTPUTS[direction])
    extents = list(map(overlap.extent, views.values())) if num_outputs else []
    return Checked(problem, check.shapes(options, views), check.dropout_of(options), extents, num_outputs)


def keywords(found: Checked, arrays: Sequence[np.ndarray | None], rng_state: np.ndarray | None) -> dict[str, Any]:
    """The keywords of every function of the backend."""
    problem = found.problem
    arguments = dict(zip(ARGUMENTS[problem.direction], arrays, strict=True))
    shared = {
        "mask": problem.mask,
        "softmax_scale": problem.softmax_scale,
        "softcap": problem.softcap,
        "mask_tensor": arguments["attn_mask"],
        "alibi_slopes": arguments["alibi_slopes"],
        "bias": arguments["attn_bias"],
        "sink": arguments["sink"],
        "dropout": found.dropout,
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
    np.asarray(output)[...] = result
    return output
