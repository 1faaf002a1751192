"""Attention probabilities, and which of them dropout dropped, by attention to one-hot values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash import ops
from cuflash.api.padding import longest, padded_tensors, sequences_and_rows
from cuflash.arrays import Framework, Guest, Library, framework_in_memory
from cuflash.ops import Arrays, Options, asked
from cuflash.ops.lengths import check_readable

MULTIPLE = 128
"""What both lengths are rounded up to where PyTorch's and flash-attn's are."""
_COLUMNS = 256
"""Keys at a time: a head dimension that every kernel family runs."""


def check_drawn(framework: Framework, options: Options) -> None:
    """Refuse what would have to read a seed and an offset from a GPU while a graph is captured."""
    if options.dropout_p:
        check_readable(framework, "the seed and offset of dropout", "Do not ask for probabilities while capturing.")


def probabilities(options: Options, arrays: Arrays, rng_state: Any) -> Any:
    """`signed_probabilities` of the arrays of a forward call, of any library."""
    names, arrays = options.names(arrays), arrays._replace(out=None)
    framework = framework_in_memory(names, arrays.each())
    if isinstance(framework, Guest):
        _, views = framework.borrow(names, arrays._replace(rng_state=rng_state).each())
        borrowed = arrays.like(views)
        state = None if rng_state is None else borrowed.rng_state.view(np.uint64)
        signed = probabilities(options, borrowed._replace(rng_state=None), state)
        return framework.lend([signed], borrowed, arrays.q)[0]
    with framework.arithmetic(arrays.q):
        return signed_probabilities(framework, ops.forward, options, rng_state, MULTIPLE, arrays)


def signed_probabilities(
    framework: Library,
    forward: Callable[..., tuple[Any, ...]],
    options: Options,
    rng_state: Any,
    multiple: int,
    arrays: Arrays,
) -> Any:
    """(b, heads_q, len_q, len_kv) probabilities in the dtype of q, zeros behind len_q and len_kv up to `multiple`.

    The sign bit says what dropout dropped, of hidden pairs (0) as well. Attention to the identity matrix, by `forward`,
    gives the probabilities themselves; dropout of a uniform softmax, whose every probability is positive, what is kept.
    """
    q, k, v, starts_q, starts_kv = arrays.q, arrays.k, arrays.v, arrays.cu_seqlens_q, arrays.cu_seqlens_kv
    if starts_q is not None:
        batch, len_q = len(starts_q) - 1, longest(starts_q, options.max_seqlen_q)
        len_kv = longest(starts_kv, options.max_seqlen_k)
    else:
        (batch, len_q), len_kv = q.shape[:2], k.shape[1]
    plain = options.replace(dropout_p=0.0)
    uniform = asked(
        softmax_scale=0.0, dropout_p=options.dropout_p, dropout_scheme=options.dropout_scheme,
        max_seqlen_q=options.max_seqlen_q, max_seqlen_k=options.max_seqlen_k, vocabulary=options.manner.vocabulary,
    )  # fmt: skip
    every_pair = arrays._replace(mask=None, bias=None, alibi=None, sink=None, captured=None)
    drawn = tuple(int(x) % 2**64 for x in rng_state.tolist()) if options.dropout_p else None

    rounded = (length + -length % multiple for length in (len_q, len_kv))
    signed = framework.full((batch, q.shape[-2], *rounded), 0, q.dtype, q)
    for first in range(0, len_kv, _COLUMNS):
        columns = min(_COLUMNS, len_kv - first)
        one_hot = _one_hot(framework, v, starts_kv, first, columns)
        part = forward(plain, arrays._replace(v=one_hot))[0]
        if drawn is not None:
            kept = forward(uniform, every_pair._replace(v=one_hot), drawn)[0]
            part = framework.xp.where(kept > 0, part, -part)
        if starts_q is not None:
            part = padded_tensors(framework, part, starts_q, len_q)
        signed[:, :, :len_q, first : first + columns] = part.swapaxes(1, 2)
    return signed


def random_values(framework: Library, probabilities: Any) -> Any:
    """A byte for each pair, which was kept where it is at most ``floor((1 - p) * 255)``: 0, and 255 where dropped."""
    return framework.cast(framework.xp.signbit(probabilities), framework.xp.uint8) * 255


def _one_hot(framework: Library, v: Any, cu_seqlens_kv: Any, first: int, columns: int) -> Any:
    """Values of which key j has 1 in column j - first."""
    if cu_seqlens_kv is None:
        rows = framework.arange(v.shape[1], v)
    else:
        _, rows = sequences_and_rows(framework, cu_seqlens_kv, v.shape[0])
    values = framework.cast(rows[:, None] == first + framework.arange(columns, v), v.dtype)[:, None]
    return framework.xp.broadcast_to(values, (*v.shape[:-1], columns))
