"""The longest lengths of packed sequences, read from cu_seqlens when the caller does not say them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuflash.arrays import Framework, Guest, cupy_arrays
from cuflash.ops import check, packed
from cuflash.ops.options import ARGUMENTS, Options, given
from cuflash.problem import Direction

_CU_SEQLENS = ARGUMENTS["forward"].index("cu_seqlens_q")


def with_lengths(framework: Framework, direction: Direction, options: Options, arrays: Sequence[Any]) -> Options:
    """The options with the longest lengths in them; reading them waits for a GPU, and checks the values."""
    if arrays[_CU_SEQLENS] is None or None not in (options.max_seqlen_q, options.max_seqlen_k):
        return options
    if isinstance(framework, Guest):
        framework, arrays = cupy_arrays(), framework.borrow(options.names(direction), arrays)
    arguments = given(direction, arrays)
    views = {name: framework.view(options.name(name), x) for name, x in arguments.items()}
    check.layout_of(direction, options, views)
    return packed.with_lengths(options, views, arguments)
