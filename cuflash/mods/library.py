"""Ready scores and masks, and how masks are composed.

Each function here makes another one, for `score_mod=` or `mask_mod=`. What they are given as arrays is captured: it may
hold other numbers in the next call without another compilation, and a score has gradients of it. Queries and keys are
numbered from 0 each; where the keys are more than the queries, `offset` says which key is that of query 0:
``len_kv - len_q`` aligns bottom-right, as `flash_attn_func` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from cuflash.arrays import Array
from cuflash.errors import InvalidArgument
from cuflash.mods.replay import function_of
from cuflash.mods.symbols import Captured, Symbol, operation
from cuflash.mods.tracing import Traced
from cuflash.numbers import finite, integer, shown

Score = Callable[[Any, Any, Any, Any, Any], Any]
"""``(score, b, h, q, k)``"""
MaskRule = Callable[[Any, Any, Any, Any], Any]
"""``(b, h, q, k)``"""


def alibi(slopes: Array, offset: int | Array = 0) -> Score:
    """``score - slope * |q + offset - k|`` (Press et al. 2022, arXiv 2108.12409).

    Parameters
    ----------
    slopes : array, (heads_q,) or (b, heads_q)
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    held, own = _held("slopes", slopes, 1, 2), _offset(offset)
    many = held.ndim == 2
    return lambda score, b, h, q, k: score - (held[b, h] if many else held[h]) * abs(own(b, q) - k)


def softcap(cap: float) -> Score:
    """``cap * tanh(score / cap)``, as `flash_attn_func` has it by its keyword."""
    cap = _positive("cap", finite("cap", cap))
    return lambda score, b, h, q, k: cap * operation("tanh", score / cap)


def relative_bias(table: Array, offset: int | Array = 0) -> Score:
    """``score + table[h, n + (k - q - offset)]`` with distances up to n; farther keys have the outermost numbers.

    Parameters
    ----------
    table : array, (heads_q, 2 n + 1)
        Of keys before a query first, as biases of Swin and BEiT are along one axis.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    held, own = _held("table", table, 2), _offset(offset)
    if held.shape[1] % 2 == 0:
        raise InvalidArgument(
            f"table has {held.shape[1]} columns; expected an odd number, one for each distance from -n to n."
        )
    middle = held.shape[1] // 2
    return lambda score, b, h, q, k: score + held[h, k - own(b, q) + middle]


def t5_bias(table: Array, bidirectional: bool = True, max_distance: int = 128, offset: int | Array = 0) -> Score:
    """``score + table[bucket(k - q - offset), h]`` with T5's buckets (Raffel et al. 2020, arXiv 1910.10683).

    Half of the buckets are for one distance each, and the others for ranges that grow with the logarithm, up to
    `max_distance`. T5 does not scale scores: pass ``softmax_scale=1.0``.

    Parameters
    ----------
    table : array, (buckets, heads_q)
        The weights of T5's embedding ``relative_attention_bias``.
    bidirectional : bool
        Of an encoder: half of the buckets are for keys after the query. In a decoder these have the bucket of distance
        0, and are to be hidden.
    max_distance : int
        Farther keys share the last bucket.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    held, own = _held("table", table, 2), _offset(offset)
    farthest = _integer("max_distance", max_distance, 1)
    bucket = Captured(t5_buckets(held.shape[0], bool(bidirectional), farthest))
    return lambda score, b, h, q, k: score + held[bucket[k - own(b, q) + farthest], h]


def t5_buckets(buckets: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    """T5's buckets of the distances ``k - q`` from ``-max_distance`` to `max_distance`, int32.

    Raises
    ------
    InvalidArgument
        If there are too few buckets, or no distance is left for those of several.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise InvalidArgument(
            f"table has {buckets} buckets and max_distance is {max_distance}; expected at least "
            f"{4 if bidirectional else 2} buckets, of which {exact} of single distances below max_distance."
        )
    first = np.where(distance > 0, side, 0) if bidirectional else 0
    far = abs(distance) if bidirectional else np.maximum(-distance, 0)
    ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)  # in fp32, as T5 rounds it
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    ranged = np.minimum(exact + steps.astype(np.int32), side - 1)
    return (first + np.where(far < exact, far, ranged)).astype(np.int32)


def distance_decay(decay: Array | float, offset: int | Array = 0) -> Score:
    """``score + log(decay) * |q + offset - k|``: weights are multiplied by ``decay`` for every key between.

    Parameters
    ----------
    decay : float, or array of shape (), (heads_q,)
        Above 0; RetNet's decays (Sun et al. 2023, arXiv 2307.08621) where the softmax stays.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    held, own = _held("decay", decay, 0, 1), _offset(offset)
    by_head = held.ndim == 1
    return lambda score, b, h, q, k: score + operation("log", held[h] if by_head else held) * abs(own(b, q) - k)


def causal(offset: int | Array = 0) -> MaskRule:
    """``k <= q + offset``.

    Parameters
    ----------
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    own = _offset(offset)
    return lambda b, h, q, k: k <= own(b, q)


def sliding_window(left: int, right: int = 0, offset: int | Array = 0) -> MaskRule:
    """``-left <= k - q - offset <= right``, where -1 is unbounded as in `window_size`.

    Parameters
    ----------
    left, right : int
        How many keys before and after its own a query sees.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    return dilated_window(left, right, 1, offset)


def dilated_window(left: int, right: int, step: int, offset: int | Array = 0) -> MaskRule:
    """A sliding window of which a query sees every `step`-th key, its own among them.

    Parameters
    ----------
    left, right : int
        How many keys before and after its own the window reaches; -1 is unbounded.
    step : int
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    left, right, step = _integer("left", left, -1), _integer("right", right, -1), _integer("step", step, 1)
    own = _offset(offset)

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = k - own(b, q)
        seen = k >= 0 if left < 0 else distance >= -left
        seen = seen if right < 0 else seen & (distance <= right)
        return seen if step == 1 else seen & (distance % step == 0)

    return rule


def block_window(size: int, before: int = 0, after: int = 0, offset: int | Array = 0) -> MaskRule:
    """Keys and queries in blocks: a query sees its own block, so many before it and so many after.

    Parameters
    ----------
    size : int
        Keys of a block.
    before, after : int
        Blocks; -1 is unbounded.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    size, own = _integer("size", size, 1), _offset(offset)
    within = sliding_window(_integer("before", before, -1), _integer("after", after, -1))
    return lambda b, h, q, k: within(b, h, own(b, q) // size, k // size)


def prefix_lm(lengths: Array, offset: int | Array = 0) -> MaskRule:
    """``(k < lengths[b]) | (k <= q + offset)``: all see the prefix, the rest is causal.

    Parameters
    ----------
    lengths : int, or array of int of shape () or (b,)
        Keys of each sequence's prefix.
    offset : int, or array of int of shape () or (b,)
        The key of query 0.
    """
    of_sequence, own = _of_sequence("lengths", lengths), _offset(offset)
    return lambda b, h, q, k: (k < of_sequence(b)) | (k <= own(b, q))


def document(ids: Array, ids_kv: Array | None = None) -> MaskRule:
    """``ids[q] == ids_kv[k]``: rows see those of their own document.

    Parameters
    ----------
    ids : array of int, (len_q,) or (b, len_q)
        The document of each query.
    ids_kv : array of int, (len_kv,) or (b, len_kv), optional
        The document of each key; `ids` by default.
    """
    queries = _held("ids", ids, 1, 2, integers=True)
    keys = queries if ids_kv is None else _held("ids_kv", ids_kv, 1, 2, integers=True)

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        of_query, of_key = (held[at] if held.ndim == 1 else held[b, at] for held, at in ((queries, q), (keys, k)))
        return of_query == of_key

    return rule


def tree(parents: Array, prefix: int | Array = 0) -> MaskRule:
    """A tree of drafts behind a common prefix: a node sees the prefix, itself and its ancestors.

    So speculative decoding checks many continuations at once (Miao et al. 2024, arXiv 2305.09781): queries are the
    nodes, and keys the prefix and then the nodes.

    Parameters
    ----------
    parents : array of int, (nodes,) or (b, nodes)
        In host memory: the number of each node's parent, a smaller one than its own; negative where there is none.
    prefix : int, or array of int of shape () or (b,)
        Keys before those of the tree.
    """
    numbers = np.asarray(parents)
    if numbers.dtype.kind not in "iu" or numbers.ndim not in (1, 2) or 0 in numbers.shape:
        raise InvalidArgument(f"parents is {shown(parents)}; expected integers of shape (nodes,) or (b, nodes).")
    nodes = numbers.shape[-1]
    if (numbers >= np.arange(nodes)).any():
        raise InvalidArgument("parents has a node whose parent is not before it; number parents before their children.")
    ancestors = np.zeros((*numbers.shape[:-1], nodes, nodes), bool)
    for node in range(nodes):
        parent = numbers[..., node, None]
        inherited = np.take_along_axis(ancestors, np.maximum(parent, 0)[..., None], axis=-2)[..., 0, :]
        ancestors[..., node, :] = inherited & (parent >= 0)
        ancestors[..., node, node] = True
    held, own = Captured(ancestors), _of_sequence("prefix", prefix)
    many = held.ndim == 3

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        node = k - own(b)
        return (node < 0) | (held[b, q, node] if many else held[q, node])

    return rule


def both(*masks: MaskRule | Traced) -> MaskRule:
    """A query sees a key where all of the masks let it."""
    return reduce(_both, _rules(masks))


def either(*masks: MaskRule | Traced) -> MaskRule:
    """A query sees a key where one of the masks lets it."""
    return reduce(_either, _rules(masks))


def negated(mask: MaskRule | Traced) -> MaskRule:
    """A query sees a key where the mask does not let it."""
    (rule,) = _rules((mask,))
    return lambda b, h, q, k: ~rule(b, h, q, k)


def _both(one: MaskRule, other: MaskRule) -> MaskRule:
    return lambda b, h, q, k: one(b, h, q, k) & other(b, h, q, k)


def _either(one: MaskRule, other: MaskRule) -> MaskRule:
    return lambda b, h, q, k: one(b, h, q, k) | other(b, h, q, k)


def _rules(masks: tuple[Any, ...]) -> list[MaskRule]:
    """Masks as functions; two of them are closed over by name, which is where arrays that they read are looked for."""
    if not masks:
        raise InvalidArgument("no mask is given; expected at least one function of (b, h, q, k).")
    for mask in masks:
        if not callable(mask) and not isinstance(mask, Traced):
            raise InvalidArgument(f"a mask is {shown(mask)}; expected a function of (b, h, q, k).")
    return [function_of(mask) if isinstance(mask, Traced) else mask for mask in masks]


def _held(name: str, value: Any, *ranks: int, integers: bool = False) -> Captured:
    """What is given, of so many axes, as an array that a mod reads; lists become float32 or int32."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        value = np.asarray(value)
        if value.dtype.kind not in ("iu" if integers else "iuf"):
            raise InvalidArgument(f"{name} is {shown(value)}; expected {'integers' if integers else 'numbers'}.")
        value = value.astype(np.int32 if integers else np.float32)
    held = Captured(value)
    if held.ndim not in ranks:
        raise InvalidArgument(f"{name} has {held.ndim} axes; expected {' or '.join(map(str, ranks))}.")
    if integers != (held.operand.kind == "int"):
        raise InvalidArgument(f"{name} is {held.dtype}; expected {'integers' if integers else 'real numbers'}.")
    return held


def _of_sequence(name: str, value: Any) -> Callable[[Any], Symbol]:
    """An integer that is the same for all sequences, or one of each."""
    held = _held(name, value, 0, 1, integers=True)
    return (lambda b: held[b]) if held.ndim else (lambda b: held)


def _offset(offset: Any) -> Callable[[Any, Any], Any]:
    """A query's own key."""
    if integer(offset) == 0:
        return lambda b, q: q
    of_sequence = _of_sequence("offset", offset)
    return lambda b, q: q + of_sequence(b)


def _integer(name: str, value: Any, least: int) -> int:
    number = integer(value)
    if number is None or number < least:
        raise InvalidArgument(f"{name} is {shown(value)}; expected an integer from {least}.")
    return number


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise InvalidArgument(f"{name} is {value}; expected a positive number.")
    return value
