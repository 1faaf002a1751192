"""Rotary embeddings: the cosines and sines that turn queries and new keys."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.dtypes import BY_NUMPY_NAME, DType
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag, pair
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_like, check_rows
from cuflash.problem import Rotary


def rotary_of(options: Options, views: Mapping[str, View], dtype: DType, room: int) -> Rotary | None:
    """How positions turn queries and new keys; cosines and sines must be there for every row of the cache."""
    interleaved = flag("rotary_interleaved", options.rotary_interleaved)
    given = [name for name in ("rotary_cos", "rotary_sin") if name in views]
    if not given:
        return None
    if len(given) == 1:
        missing = "rotary_sin" if given[0] == "rotary_cos" else "rotary_cos"
        raise InvalidArgument(f"{given[0]} is given but {missing} is not; a turn needs both.")
    if "k_new" not in views:
        raise InvalidArgument(
            f"rotary_cos is given but {options.name('k_new')} is not; queries are turned with the keys that are "
            "appended. Turn q before the call, or append."
        )
    cos, dim = views["rotary_cos"], views["q"].shape[3]
    allowed = list(dict.fromkeys((dtype.numpy.name, "float32")))
    if cos.dtype not in allowed:
        raise InvalidArgument(f"rotary_cos is {cos.dtype}; expected {' or '.join(allowed)}. Convert it.")
    if len(cos.shape) != 2 or not 0 < 2 * cos.shape[1] <= dim or cos.shape[0] < room:
        raise InvalidArgument(
            f"rotary_cos has shape {cos.shape}; expected (rows, rotary_dim / 2), at least {room} rows as the cache has "
            f"and at most {dim // 2} columns."
        )
    check_like(views["rotary_sin"], cos.shape, cos.dtype)
    for name in given:
        check_rows(views[name])
    together = not flag("causal", options.causal) and pair(options.window_size) == (-1, -1)
    return Rotary(2 * cos.shape[1], interleaved, BY_NUMPY_NAME[cos.dtype], together)
