"""Numbers and switches of a call: what a caller may write for one, and the words for what is none.

NumPy's and ml_dtypes' scalars, its arrays without dimensions, fractions and decimals stand for numbers. Arrays of other
libraries do not: to read one may be to wait for a GPU, and its gradient would be lost.
"""

from __future__ import annotations

import math
import numbers
import operator
from decimal import Decimal
from typing import Any, TypeGuard

import numpy as np

from cuflash.errors import InvalidArgument


def is_array(value: object) -> TypeGuard[Any]:
    """Whether a value has a shape, and may change: NumPy's scalars do not."""
    return hasattr(value, "shape") and not isinstance(value, np.generic | type)


def scalar(value: Any) -> Any:
    """The number in an array of NumPy without dimensions; anything else as it is."""
    return value.item() if isinstance(value, np.ndarray) and not value.shape else value


def finite(name: str, value: Any) -> float:
    """A finite number.

    Raises
    ------
    InvalidArgument
        If it is none, or larger than any float.
    """
    given, value = value, scalar(value)
    if _is_real(value):
        try:
            number = float(value)
        except OverflowError:  # such integers may have more digits than Python shows
            sign = "-" if value < 0 else ""
            power = int(abs(value)).bit_length() - 1
            raise InvalidArgument(
                f"{name} is {sign}2**{power} or more; expected a number that a float can hold."
            ) from None
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise InvalidArgument(f"{name} is {shown(given)}; expected a finite number.")


def integer(value: Any) -> int | None:
    """The integer that a value is, or None where it is something else."""
    if type(value) is int:
        return value
    value = scalar(value)
    if isinstance(value, bool | np.bool_) or is_array(value):
        return None
    if _is_foreign(value) and "int" in value.dtype.name:
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def flag(name: str, value: Any) -> bool:
    """A switch, and nothing else that happens to stand in its place.

    Raises
    ------
    InvalidArgument
        If it is neither True nor False, nor 1 nor 0.
    """
    number = scalar(value)
    switch = bool(number) if isinstance(number, bool | np.bool_) else integer(number)
    if switch not in (0, 1):
        raise InvalidArgument(f"{name} is {shown(value)}; expected True or False.")
    return bool(switch)


def pair(value: Any) -> tuple[int, int] | None:
    """Two integers in a tuple, a list or an array, or None where there are not two."""
    if isinstance(value, np.ndarray) and value.shape == (2,):
        value = value.tolist()
    if not isinstance(value, tuple | list) or len(value) != 2:
        return None
    first, second = (integer(side) for side in value)
    return None if first is None or second is None else (first, second)


def shown(value: Any) -> str:
    """What a message says of a value, on one line and not without end."""
    if is_array(value) and not isinstance(value, np.ndarray):  # which is not read from a GPU to be shown
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # more digits than Python shows, a tensor without memory
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_real(value: Any) -> bool:
    return _is_foreign(value) or (isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool))


def _is_foreign(value: Any) -> bool:
    """Whether it is one of ml_dtypes' scalars, which are NumPy's of types that are not built in."""
    return isinstance(value, np.generic) and value.dtype.isbuiltin == 2
