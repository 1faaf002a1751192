"""The longest lengths of packed sequences, read from cu_seqlens when the caller does not say them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuflash.arrays import CuPy, Framework, Guest, Torch, cupy_arrays
from cuflash.errors import InvalidArgument
from cuflash.ops import check, packed
from cuflash.ops.call import ARGUMENTS, Options, given
from cuflash.problem import Direction

_CU_SEQLENS = ARGUMENTS["forward"].index("cu_seqlens_q")


def with_lengths(framework: Framework, direction: Direction, options: Options, arrays: Sequence[Any]) -> Options:
    """The options with the longest lengths in them and nothing left to validate.

    Where that needs the values of cu_seqlens and seqused, reading them waits for a GPU, and checks them all. Page
    numbers are read only to be validated.
    """
    if arrays[_CU_SEQLENS] is None:
        return options
    derived = options.max_seqlen_q is None or options.max_seqlen_k is None
    if not (derived or options.validate):
        return options
    if derived:
        what, remedy = "max_seqlen_q or max_seqlen_k is None and", "Pass both."
    else:
        what, remedy = "validate is True:", "Validate before capturing."
    check_readable(framework, f"{what} cu_seqlens", remedy)
    if isinstance(framework, Guest):
        arrays, framework = framework.borrow(options.names(direction), arrays), cupy_arrays()
    arguments = given(direction, arrays)
    views = {name: framework.view(options.name(name), x) for name, x in arguments.items()}
    check.layout_of(direction, options, views)
    return packed.with_lengths(options, views, arguments)


def check_readable(framework: Framework, what: str, remedy: str) -> None:
    """Refuse to read from a GPU while a graph is captured, which waiting for the GPU would break."""
    if isinstance(framework, CuPy | Torch) and framework.is_capturing():
        raise InvalidArgument(
            f"{what} would be read from the GPU, which is not possible while a CUDA graph is captured. {remedy}"
        )
