"""Options that are numbers: the scale of the scores, their soft cap, the number of splits."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.dtypes import DType
from cuflash.errors import InvalidArgument
from cuflash.numbers import finite, integer, is_array, pair, scalar, shown
from cuflash.ops.call import Options
from cuflash.problem import MAX_SPLITS

_RANGES = {"float32": (2.0**-126, 2.0**126), "float64": (2.0**-1022, 2.0**1022)}
"""What numbers beside the tensors may be at least, 0 aside, and at most, by the accumulator's dtype."""


def settled(options: Options) -> Options:
    """The options with the numbers that arrays and lists stand for; the same ones where there are none.

    What is left can be part of a key: two arrays may be one and hold other numbers later.
    """
    changes: dict[str, Any] = {
        name: scalar(value)
        for name, value in options.values().items()
        if name != "window_size" and isinstance(value, np.ndarray) and not value.shape
    }
    window = options.window_size
    if not isinstance(window, tuple) or any(map(is_array, window)):
        sides = pair(window)
        changes |= {} if sides is None else {"window_size": sides}
    return options.replace(**changes) if changes else options


def softmax_scale_of(options: Options, dtype: DType, dim_qk: int) -> float:
    """What scores are multiplied by."""
    name, scale = options.name("softmax_scale"), options.softmax_scale
    return dim_qk**-0.5 if scale is None else _in_range(name, finite(name, scale), dtype, least=0)


def softcap_of(options: Options, dtype: DType) -> float:
    """What bounds the scores; 0 where nothing does."""
    softcap = finite("softcap", options.softcap)
    if softcap < 0:
        raise InvalidArgument(f"softcap is {softcap}; expected 0 (none) or a positive number.")
    return _in_range("softcap", softcap, dtype, least=_RANGES[dtype.accumulator.name][0]) if softcap else softcap


def _in_range(name: str, value: float, dtype: DType, least: float) -> float:
    """Refuse what leaves the range in which logits are computed, its product with log2(e) included."""
    most = _RANGES[dtype.accumulator.name][1]
    if not least <= abs(value) <= most:
        bounds = f"from {least:.3g} to {most:.3g}" if least else f"at most {most:.3g} in magnitude"
        raise InvalidArgument(f"{name} is {value:g}; expected {bounds}, as {dtype} is computed in {dtype.accumulator}.")
    return value


def num_splits_of(options: Options) -> int:
    """How many blocks share the keys of a query tile; 0 where the plan decides."""
    value = integer(options.num_splits)
    if value is None or not 0 <= value <= MAX_SPLITS:
        raise InvalidArgument(
            f"num_splits is {shown(options.num_splits)}; expected an integer from 1 to {MAX_SPLITS}, "
            "or 0 to leave it to the plan."
        )
    return value
