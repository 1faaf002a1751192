"""Forward attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import reference
from cuflash.arrays import framework_of, numpy_arrays
from cuflash.ops import host, launch
from cuflash.ops.options import Options


def forward(
    options: Options,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """(out, lse) as arrays of the same framework; q is packed when cu_seqlens are given."""
    arrays = (q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, seqused_k, out)
    framework = framework_of(options.names("forward"), arrays)
    if framework is not numpy_arrays:
        return launch.run(framework, "forward", options, arrays)
    problem, shapes = host.problem_of("forward", options, arrays)
    if out is None:
        out = np.empty(shapes["out"], q.dtype)
    rows = [x.swapaxes(1, 2) if options.sdpa else x for x in (q, k, v)]
    keywords = host.keywords(problem, attn_mask, seqused_k)
    keywords["out"] = out.swapaxes(1, 2) if options.sdpa else out
    if problem.layout == "varlen":
        return out, reference.forward_varlen(*rows, cu_seqlens_q, cu_seqlens_k, **keywords)[1]
    return out, reference.forward(*rows, **keywords)[1]
