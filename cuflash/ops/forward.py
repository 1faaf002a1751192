"""Forward attention on whatever arrays are given."""

from __future__ import annotations

from typing import Any

from cuflash.arrays import Adapter, Guest, Launcher, framework_of, framework_of_type
from cuflash.ops import draw
from cuflash.ops.answer import answer
from cuflash.ops.call import Arrays, Options


def out(options: Options, arrays: Arrays, generator: Any = None) -> Any:
    """The first result of :func:`forward`, for callers who want no other, as autograd takes time for each."""
    kind: type = type(arrays.q)
    framework = framework_of_type(kind)
    if isinstance(framework, Launcher) and isinstance(framework, Adapter):
        return framework.out(options, arrays, generator)
    return forward(options, arrays, generator)[0]


def forward(options: Options, arrays: Arrays, generator: Any = None, cached: int | None = None) -> tuple[Any, ...]:
    """(out, lse), row_state if the options keep it, and rng_state with dropout, as arrays of the same framework.

    They are packed when cu_seqlens are given; out is written where it is given.
    With a `table`, key j of sequence b is row ``j % page_size`` of page ``table[b, j // page_size]`` of k and v,
    (num_pages, page_size, heads_kv, d). `seqused_kv`, or the differences of `cu_seqlens_kv`, count the keys.
    Of a cache every sequence uses `cached` rows before the call where `seqused_kv` says nothing, all of them if None.
    """
    kind: type = type(arrays.q)
    framework = framework_of_type(kind)
    if not isinstance(framework, Launcher):
        framework = framework_of(options.names(arrays), arrays.each())
    if isinstance(framework, Guest):
        framework = framework.beyond(arrays.each(), generator) or framework
    if isinstance(framework, Adapter):
        return framework.answer("forward", options, arrays, generator, cached)
    if generator is not None:
        draw.check(generator)
    return answer(framework, "forward", options, arrays, generator, cached)
