"""Forward attention on whatever arrays are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash import reference
from cuflash.arrays import NumPy, framework_of
from cuflash.ops import draw, launch, on_numpy
from cuflash.ops.call import Options


def forward(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    sink: Any = None,
    block_table: Any = None,
    out: Any = None,
    generator: Any = None,
) -> tuple[Any, ...]:
    """(out, lse), row_state if the options keep it, and rng_state with dropout, as arrays of the same framework.

    They are packed when cu_seqlens are given.
    With a `block_table`, key j of sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]`` of k
    and v, (num_pages, page_size, heads_kv, d). `seqused_k`, or the differences of `cu_seqlens_k`, count the keys.
    """
    arrays = (
        q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, attn_bias, sink,
        block_table, out,
    )  # fmt: skip
    framework = framework_of(options.names("forward"), arrays)
    if generator is not None:
        draw.check(generator)
    if not isinstance(framework, NumPy):
        return launch.run(framework, "forward", options, arrays, generator)
    return on_host(options, arrays, generator)


def on_host(options: Options, arrays: Sequence[Any], generator: Any = None) -> tuple[Any, ...]:
    """The same of NumPy arrays, in the order of :data:`ARGUMENTS`."""
    place = arrays[-1]  # of a subclass as it came
    q, k, v, _, cu_seqlens_q, cu_seqlens_k, _, seqused_k, *_, block_table, out = arrays = on_numpy.plain(arrays)
    found = on_numpy.checked("forward", options, arrays)
    problem, shapes = found.problem, found.shapes
    if out is None:
        out = place = np.empty(shapes["out"], q.dtype)
    rng_state = draw.on_host(generator, problem) if problem.dropout else None
    q, k, v = (x.swapaxes(1, 2) if options.sdpa else x for x in (q, k, v))
    keywords = on_numpy.keywords(found, arrays, rng_state) | {"empty_lse": options.empty_lse}
    keywords["out"] = out.swapaxes(1, 2) if options.sdpa else out
    row_state = np.empty(shapes["row_state"], problem.dtype.accumulator) if options.keep_state else None
    if problem.layout == "varlen":
        keywords["tail_lse"] = options.tail_lse
    if problem.page_size:
        keywords["seqused_k"] = np.diff(cu_seqlens_k) if seqused_k is None else seqused_k
        _, lse = reference.forward_paged(q, k, v, block_table, cu_seqlens_q=cu_seqlens_q, **keywords)
    elif problem.layout == "varlen":
        _, lse = reference.forward_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, row_state=row_state, **keywords)
    else:
        _, lse = reference.forward(q, k, v, row_state=row_state, **keywords)
    return (place, lse, *(x for x in (row_state, rng_state) if x is not None))
