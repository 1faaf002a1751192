"""Forward attention over keys and values in the pages of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import reference
from cuflash.arrays import View, framework_of, numpy_arrays
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import check, draw, host, packed
from cuflash.ops.options import Options, given


def forward_paged(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    block_table: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    sink: Any = None,
    out: Any = None,
    generator: Any = None,
) -> tuple[Any, ...]:
    """(out, lse), and rng_state with dropout, of packed queries; k and v are (num_pages, page_size, heads_kv, d).

    Key j of sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. How many keys it has
    is what `seqused_k` says, or the differences of `cu_seqlens_k`.
    """
    arrays = (
        q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, attn_bias, sink, out,
    )  # fmt: skip
    if generator is not None:
        draw.check(generator)
    table = options.name("block_table")
    framework = framework_of([*options.names("forward"), table], [*arrays, block_table])
    if framework is not numpy_arrays:
        raise UnsupportedProblem(
            f"{table} is given with {framework.name} arrays; no kernel reads pages yet, only the NumPy backend does. "
            "Gather the pages into packed k and v."
        )
    arguments = given("forward", arrays)
    views = {name: numpy_arrays.view(options.name(name), x) for name, x in arguments.items()}
    pages = numpy_arrays.view(table, block_table)
    _check_pages(views["k"], views["v"], pages)
    packed.is_packed(options, views)
    if len(block_table) != len(cu_seqlens_q) - 1:
        raise InvalidArgument(
            f"{table} has {len(block_table)} rows; expected one for each of the {len(cu_seqlens_q) - 1} sequences."
        )

    spans = [view.span() for view in views.values()]
    # Pages may be shared and cu_seqlens_k may leave room, so their rows do not bound those of all sequences.
    views |= {name: _flat(views[name], int(cu_seqlens_k[-1])) for name in ("k", "v")}
    options = packed.with_lengths(options, views, arguments)
    lengths = np.diff(cu_seqlens_k) if seqused_k is None else seqused_k
    _check_values(pages, block_table, lengths, k)
    problem = check.problem_of("forward", options, views)
    if out is None:
        out = np.empty(check.shapes(options, views)["out"], q.dtype)
    else:
        check.check_separate(spans, num_outputs=1)
    rng_state = draw.on_host(generator, problem) if problem.dropout else None
    keywords = host.keywords(problem, options, arrays, rng_state) | {"cu_seqlens_q": cu_seqlens_q, "out": out}
    keywords["seqused_k"] = lengths
    _, lse = reference.forward_paged(q, k, v, block_table, **keywords)
    return (out, lse) if rng_state is None else (out, lse, rng_state)


def _check_pages(k: View, v: View, table: View) -> None:
    for view in (k, v):
        if len(view.shape) != 4:
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected (num_pages, page_size, heads_kv, d).")
    if k.shape[:3] != v.shape[:3]:
        raise InvalidArgument(f"{v.name} has shape {v.shape} but {k.name} has {k.shape}; only the last may differ.")
    if k.shape[1] == 0:
        raise InvalidArgument(f"{k.name} has pages of 0 rows, shape {k.shape}; expected at least 1.")
    if table.dtype != "int32":
        raise InvalidArgument(f"{table.name} is {table.dtype}; expected int32. Convert it.")
    if len(table.shape) != 2:
        raise InvalidArgument(f"{table.name} has shape {table.shape}; expected (b, max_pages).")


def _flat(view: View, rows: int) -> View:
    """The pages as packed rows, for the checks of sizes and alignment."""
    return view._replace(shape=(rows, *view.shape[2:]), strides=view.strides[1:])


def _check_values(table: View, block_table: np.ndarray, lengths: np.ndarray, k: np.ndarray) -> None:
    """Every key must be in a page that is there."""
    num_pages, page_size = k.shape[:2]
    max_pages = block_table.shape[1]
    for b, length in enumerate(lengths.tolist()):
        if length > max_pages * page_size:
            raise InvalidArgument(
                f"{table.name} has {max_pages} pages of {page_size} rows a sequence, but sequence {b} has {length} "
                "keys; pass more pages for each."
            )
        used = block_table[b, : -(-length // page_size)]
        wrong = np.flatnonzero((used < 0) | (used >= num_pages))
        if wrong.size:
            at = wrong[0]
            raise InvalidArgument(
                f"{table.name}[{b}, {at}] is {used[at]}, but there are {num_pages} pages; "
                "expected the number of one, from 0."
            )
