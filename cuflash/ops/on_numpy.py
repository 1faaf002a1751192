"""One call on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuflash import reference
from cuflash.arrays import numpy_arrays
from cuflash.dropout import Dropout
from cuflash.dtypes import TF32
from cuflash.ops import check, draw, lengths, overlap
from cuflash.ops.call import Arrays, Options, Tangents
from cuflash.problem import Direction, Problem

_MAX_CHECKED = 1024
_checked: dict[tuple[Any, ...], Checked] = {}


class Checked(NamedTuple):
    """What the checks of a kind of call found."""

    problem: Problem
    shapes: dict[str, tuple[int, ...]]
    """Of its results."""
    dropout: Dropout | None
    written: tuple[str, ...]
    """The given arrays that are written."""
    check_separate: Callable[[tuple[int, ...]], None] | None
    """Refuses pointers with which one of them meets another; None when all results are allocated."""


def forward(
    options: Options,
    arrays: Arrays,
    generator: Any = None,
    cached: int | None = None,
    along: Tangents | None = None,
) -> tuple[Any, ...]:
    """(out, lse), row_state if the options keep it, and rng_state with dropout.

    Tangents of out and lse are filled in `along`, those of the arrays there.
    """
    place = arrays.out  # of a subclass as it came
    arrays = _plain(arrays)
    kind = checked("forward", options, arrays)
    problem, shapes = kind.problem, kind.shapes
    if problem.layout == "cache":
        arrays = lengths.read_cache(options, problem, arrays, cached)
    if place is None:
        place = np.empty(shapes["out"], arrays.q.dtype)
        arrays = arrays._replace(out=place)
    row_state = np.empty(shapes["row_state"], problem.dtype.accumulator) if options.keep_state else None
    rng_state = draw.on_host(generator, problem) if problem.dropout else None
    keywords = _keywords(kind, options, arrays._replace(row_state=row_state, rng_state=rng_state))
    keywords["empty_lse"] = options.empty_lse
    if along is not None:
        keywords["along"] = _along(options, arrays, along)
    if problem.layout == "varlen":
        keywords["tail_lse"] = options.tail_lse
    elif options.manner.layout == "bhsd":
        keywords |= {name: keywords[name].swapaxes(1, 2) for name in ("q", "k", "v", "out")}
    if problem.layout == "cache":
        _, lse = reference.forward_cache(**keywords, rotary=problem.rotary)
    elif problem.page_size:
        _, lse = reference.forward_paged(**keywords)
    elif problem.layout == "varlen":
        _, lse = reference.forward_varlen(**keywords)
    else:
        _, lse = reference.forward(**keywords)
    return (place, lse, *(x for x in (row_state, rng_state) if x is not None))


def places(options: Options, arrays: Arrays) -> tuple[Any, np.ndarray]:
    """Where a forward of such a call may write out and lse again and again; its own out if it is given."""
    problem, shapes = checked("forward", options, _plain(arrays))[:2]
    out = np.empty(shapes["out"], arrays.q.dtype) if arrays.out is None else arrays.out
    return out, np.empty(shapes["lse"], problem.dtype.accumulator)


def jvp(options: Options, arrays: Arrays, tangents: Tangents, generator: Any = None) -> tuple[np.ndarray, ...]:
    """(out, lse) and the tangents of both, along those of the arrays."""
    kind = checked("forward", options, _plain(arrays))
    tangent_out = np.empty(kind.shapes["out"], kind.problem.dtype.numpy)
    tangent_lse = np.empty(kind.shapes["lse"], kind.problem.dtype.accumulator)
    out, lse, *_ = forward(options, arrays, generator, along=tangents._replace(out=tangent_out, lse=tangent_lse))
    return out, lse, tangent_out, tangent_lse


def backward(options: Options, arrays: Arrays, along: Tangents | None = None) -> tuple[Any, ...]:
    """(dq, dk, dv), and of dbias, dsink and delta those that are asked for; or the tangents of all but delta."""
    places = arrays.outputs("backward")  # of a subclass as they came
    arrays = _plain(arrays)
    kind = checked("backward", options, arrays)
    problem = kind.problem
    keywords = _keywords(kind, options, arrays._replace(dq=None, dk=None, dv=None))
    if "rng_state" in keywords:
        keywords["rng_state"] = np.ascontiguousarray(keywords["rng_state"]).view(np.uint64)
    if along is not None:
        check.refuse_second_derivatives(options)
        keywords["along"] = _along(options, arrays, along)
    delta = np.empty(kind.shapes["delta"], problem.dtype.accumulator) if options.keep_delta else None
    run = reference.backward_varlen if problem.layout == "varlen" else reference.backward
    heads_first = options.manner.layout == "bhsd"
    if heads_first:
        keywords |= {name: keywords[name].swapaxes(1, 2) for name in ("q", "k", "v", "out", "dout")}
    *gradients, dbias, dsink, dcaptured = run(
        **keywords, bias_grad=problem.bias_grad, captured_grad=problem.captured_grad, delta=delta
    )
    if heads_first:
        gradients = [x.swapaxes(1, 2) for x in gradients]
    with np.errstate(all="ignore"):
        dsink = None if dsink is None else dsink.astype(np.float32)
    stored = (_stored(result, place) for result, place in zip(gradients, places, strict=True))
    return (*stored, *(x for x in (dbias, dsink, *(dcaptured or ()), delta) if x is not None))


def _along(options: Options, arrays: Arrays, tangents: Tangents) -> reference.Tangents:
    """Tangents that fit their arrays, with rows before heads; those of out and lse are of our making."""
    along = reference.Tangents(*(None if x is None else np.asarray(x) for x in tangents))
    given = {name: x for name, x in along._asdict().items() if x is not None}
    views = {name: numpy_arrays.view(f"d{name}", x) for name, x in given.items() if name not in ("out", "lse")}
    check.check_tangents(options.views(numpy_arrays, arrays), views, options)
    if options.manner.layout == "bhsd":
        along = along._replace(**{name: given[name].swapaxes(1, 2) for name in given.keys() & {"q", "k", "v", "out"}})
    return along


def _plain(arrays: Arrays) -> Arrays:
    """The arrays without the arithmetic of subclasses, whose ``*`` may be another product or know of units."""
    return arrays.like([None if x is None else np.asarray(x) for x in arrays.each()])


def checked(direction: Direction, options: Options, arrays: Arrays) -> Checked:
    """Check a call on NumPy arrays, or look up what was found for one of its kind.

    The values of cu_seqlens, and whether outputs may be written where they are, are no part of a kind: they are checked
    in every call.
    """
    if arrays.cu_seqlens_q is not None:
        views = options.views(numpy_arrays, arrays)
        if check.layout_of(direction, options, views) == "varlen":
            options = lengths.read(options, views, arrays)
    pointers, described = numpy_arrays.describe(options.names(arrays), arrays.each())
    key = direction, options.kind, described
    kind = _checked.get(key)
    if kind is None:
        settled = check.settled(options)
        if settled is not options:
            return checked(direction, settled, arrays)
        kind = check_kind(direction, options, arrays)
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        if options.kind.is_kind:
            _checked[key] = kind
    if kind.check_separate is not None:
        if not all(getattr(arrays, name).flags.writeable for name in kind.written):
            check_kind(direction, options, arrays)  # says which
        kind.check_separate(tuple(pointers))
    return kind


def check_kind(direction: Direction, options: Options, arrays: Arrays) -> Checked:
    """Check a call on arrays of this kind."""
    views = options.views(numpy_arrays, arrays)
    problem = check.problem_of(direction, options, views)
    written = check.written(direction, views)
    separate = overlap.checker(views, written) if written else None
    return Checked(problem, check.shapes(options, views), check.dropout_of(options), written, separate)


def _keywords(kind: Checked, options: Options, arrays: Arrays) -> dict[str, Any]:
    """The keywords of every function of the backend."""
    problem = kind.problem
    keywords = {name: x for name, x in zip(arrays._fields, arrays, strict=True) if x is not None}
    keywords |= {
        "band": problem.mask, "softmax_scale": problem.softmax_scale, "softcap": problem.softcap,
        "score_mod": problem.score_mod, "mask_mod": problem.mask_mod, "dropout": kind.dropout,
        "block_mask": options.block_mask,
    }  # fmt: skip
    if problem.dtype == TF32:
        with np.errstate(over="ignore"):
            keywords |= {name: TF32.rounded(keywords[name]) for name in ("q", "k", "v", "dout") if name in keywords}
    if problem.layout == "dense":
        return keywords
    return keywords | {"len_q": problem.len_q, "len_kv": problem.len_kv}


def _stored(result: np.ndarray, output: np.ndarray | None) -> np.ndarray:
    """The result, in the caller's array if there is one."""
    if output is None:
        return result
    np.asarray(output)[...] = result
    return output
