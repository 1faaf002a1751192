"""Scores and masks from the command line: an expression, as a problem shows it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.mods import Captured, Symbol, Traced

_PLACES = {"score_mod": "score, b, h, q, k", "mask_mod": "b, h, q, k"}
_FUNCTIONS = {name: function for name, function in vars(mods).items() if name in mods.__all__ and name.islower()}
_CAPTURED = 8
"""Arrays that an expression may name: captured0 to captured7."""


class _Array:
    """An array of float32 that is indexed by as many numbers as it has axes."""

    def __init__(self) -> None:
        self._held: Captured | None = None

    def __getitem__(self, index: Any) -> Symbol:
        if self._held is None:
            self._held = Captured(np.zeros((1,) * len(index if isinstance(index, tuple) else (index,)), np.float32))
        return self._held[index]


def traced(argument: str, text: str | None) -> Traced | None:
    """What an expression of the score and its place does, as in ``score - captured0[h] * abs(q - k)``.

    Raises
    ------
    InvalidArgument
        If it is none.
    """
    if text is None:
        return None
    names: dict[str, Any] = {f"captured{i}": _Array() for i in range(_CAPTURED)}
    option = "--" + argument.replace("_", "-")
    try:
        function = eval(f"lambda {_PLACES[argument]}: ({text})", {"__builtins__": {}, **_FUNCTIONS, **names})
    except SyntaxError:
        raise InvalidArgument(f"{option} {text!r} is not an expression of {_PLACES[argument]}.") from None
    return mods.trace(argument, function)
