"""The probability of dropping, and the seed and offset that a backward is given."""

from __future__ import annotations

from typing import get_args

from cuflash.arrays import View
from cuflash.dropout import Dropout, Scheme
from cuflash.errors import InvalidArgument
from cuflash.numbers import finite, flag, shown
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_rows, misaligned

_RNG_STATES = [((2,), "uint64"), ((2,), "int64"), ((4,), "uint32")]
"""Shapes and dtypes that 16 bytes of seed and offset may have; JAX has no 64-bit integers by default."""


def dropout_of(options: Options) -> Dropout | None:
    """What happens to probabilities after the softmax; None where all are kept."""
    name = options.name("dropout_p")
    p = finite(name, options.dropout_p)
    if not 0 <= p < 1:
        raise InvalidArgument(f"{name} is {p}; expected a probability of dropping, from 0 to below 1.")
    if not isinstance(options.dropout_scheme, str) or options.dropout_scheme not in get_args(Scheme):
        raise InvalidArgument(f"dropout_scheme is {shown(options.dropout_scheme)}; expected 'byte' or 'word'.")
    unbiased = flag("unbiased_dropout", options.unbiased_dropout)
    return Dropout(p, options.dropout_scheme, unbiased) if p else None


def check_rng_state(options: Options, dropout: Dropout | None, view: View | None) -> None:
    """The backward draws what the forward drew."""
    name, p = options.name("rng_state"), options.name("dropout_p")
    if view is None:
        if dropout is not None:
            raise InvalidArgument(f"{name} is None but {p} is {dropout.p}; pass the seed and offset of the forward.")
        return
    if dropout is None:
        raise InvalidArgument(f"{name} is given but {p} is 0; pass the {p} of the forward.")
    if (view.shape, view.dtype) not in _RNG_STATES:
        raise InvalidArgument(
            f"{name} is {view.dtype} of shape {view.shape}; expected uint64 of shape (2,). "
            "Pass the seed and offset that the forward returned."
        )
    check_rows(view)
    if view.pointer % 8:
        raise misaligned(view)
