"""What the axes of a call's arrays are of, in words that arrays of one call share."""

from __future__ import annotations

from itertools import count
from typing import Any

from cuflash.mods.expression import in_order
from cuflash.ops.call import Options
from cuflash.ops.given import GivenCall

DIVISIBLE = ("batch", "heads", "kvheads")
"""Axes along which a call is many calls."""
LIKE = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias", "dsink": "sink"}
"""Gradients, and what they are of."""

_DENSE = {"bshd": ("batch", "rows", "heads", "dim"), "bhsd": ("batch", "heads", "rows", "dim")}
_PACKED = ("rows", "heads", "dim")
_OF_KEYS = ("k", "v", "dk", "dv")
_OF_VALUES = ("v", "dv", "out", "dout")
_PER_ROW = ("lse", "dlse", "delta", "row_state")
_PAIRS = ("mask", "bias", "dbias")


def axes_of(call: GivenCall) -> dict[str, tuple[str, ...]]:
    """A word for every axis of what a call reads and writes; words that begin with ``own`` are of one axis alone."""
    numbers = count()
    problem = call.problem

    elsewhere = problem.layout == "cache" and any(name == "cache_batch" for name, *_ in call.arrays)

    def own() -> str:
        return f"own{next(numbers)}"

    def axes(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        if name in _PAIRS:
            words = ("batch", "heads", "rows", "keys")[4 - len(shape) :]
            return tuple(word if n > 1 else own() for word, n in zip(words, shape, strict=True))
        if name in ("alibi", "sink", "dsink"):
            return ("batch", "heads")[2 - len(shape) :]
        if name in _PER_ROW:
            words = ("heads", "rows") if problem.layout == "varlen" else ("batch", "heads", "rows")
            return (*words, own()) if name == "row_state" else words
        if problem.layout == "cache" and name in ("seqused_kv", "leftpad", "cache_batch", "table"):
            return ("batch", *(own() for _ in shape[1:]))
        if name not in ("q", "dq", *_OF_KEYS, *_OF_VALUES):  # where sequences lie, seed and offset
            return tuple(own() for _ in shape)
        if problem.page_size and name in _OF_KEYS:
            words = ("pages", "keys", "heads", "dim")
        else:
            words = _PACKED if problem.layout == "varlen" else _DENSE[call.options.manner.layout]
        if name in _OF_KEYS and elsewhere:
            words = (own(), *words[1:])
        renamed = {"rows": "keys", "heads": "kvheads"} if name in _OF_KEYS else {}
        renamed |= {"dim": "dimv"} if name in _OF_VALUES else {}
        return tuple(renamed.get(word, word) for word in words)

    shapes = {name: shape for name, shape, _ in call.arrays} | {r.name: r.shape for r in call.results}
    apart = _told_apart(call)
    return {name: tuple(apart.get(word, word) for word in axes(name, shape)) for name, shape in shapes.items()}


def _told_apart(call: GivenCall) -> dict[str, str]:
    """Other words for axes along which a call is one call, as what its caller wrote depends on the number there."""
    read = positions_read(call.options)
    batch = {"batch": "numberedbatch"} if "b" in read else {}
    return batch | ({"heads": "numberedheads", "kvheads": "numberedkvheads"} if "h" in read else {})


def positions_read(options: Options) -> set[str]:
    """Which of b, h, q and k written scores and masks depend on."""
    mods = (mod for mod in (options.score_mod, options.mask_mod) if mod is not None)
    return {node.value for mod in mods for node in in_order(mod.expression) if node.op == "position"}


def places_of(sharding: Any, rank: int) -> list[tuple[str, ...]]:
    """The axes of the mesh that each axis of an array lies along."""
    spec = (*sharding.spec, *[None] * rank)[:rank]
    return [() if place is None else (place,) if isinstance(place, str) else tuple(place) for place in spec]
