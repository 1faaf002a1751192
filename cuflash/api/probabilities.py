"""Attention probabilities, and which of them dropout dropped, by attention to one-hot values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash import ops
from cuflash.api.pytorch import backend
from cuflash.api.pytorch.layouts import Place, longest
from cuflash.arrays import Framework, Guest, framework_of
from cuflash.ops import Options
from cuflash.ops.call import SHARED
from cuflash.ops.lengths import check_readable

MULTIPLE = 128
"""What both lengths are rounded up to where PyTorch's and flash-attn's are."""
_COLUMNS = 256
"""Keys at a time: a head dimension that every kernel family runs."""


def check_drawn(framework: Framework, options: Options) -> None:
    """Refuse what would have to read a seed and an offset from a GPU while a graph is captured."""
    if options.dropout_p:
        check_readable(framework, "the seed and offset of dropout", "Do not ask for probabilities while capturing.")


def probabilities(options: Options, arrays: Sequence[Any], rng_state: Any) -> Any:
    """`signed_probabilities` of arrays of any library, in the order of :data:`SHARED`."""
    names = [*map(options.name, SHARED), "rng_state"]
    framework = framework_of(names[:-1], arrays)
    if isinstance(framework, Guest):
        *borrowed, state = framework.borrow(names, [*arrays, rng_state])
        found = probabilities(options, borrowed, None if state is None else state.view(np.uint64))
        return framework.lend([found], borrowed)[0]
    place = Place(names[0], arrays[0])
    with place.here:
        return signed_probabilities(
            place, options, "default", rng_state, MULTIPLE, **dict(zip(SHARED, arrays, strict=True))
        )


def signed_probabilities(
    place: Place, options: Options, choice: str | None, rng_state: Any, multiple: int, **arrays: Any
) -> Any:
    """(b, heads_q, len_q, len_kv) probabilities in the dtype of q, zeros behind len_q and len_kv up to `multiple`.

    The sign bit says what dropout dropped, of hidden pairs (0) as well. Attention to the identity matrix gives the
    probabilities themselves; dropout of a uniform softmax, whose every probability is positive, what is kept.
    """
    q, k, v = (arrays.pop(name) for name in ("q", "k", "v"))
    lengths = {name: x for name, x in arrays.items() if name.startswith(("cu_seqlens", "seqused")) and x is not None}
    if "cu_seqlens_q" in lengths:
        batch, len_q = len(lengths["cu_seqlens_q"]) - 1, longest(lengths["cu_seqlens_q"], options.max_seqlen_q)
        len_kv = longest(lengths["cu_seqlens_k"], options.max_seqlen_k)
    else:
        (batch, len_q), len_kv = q.shape[:2], k.shape[1]
    plain = options._replace(dropout_p=0.0)
    uniform = Options(
        softmax_scale=0.0, dropout_p=options.dropout_p, dropout_scheme=options.dropout_scheme,
        max_seqlen_q=options.max_seqlen_q, max_seqlen_k=options.max_seqlen_k, vocabulary=options.vocabulary,
    )  # fmt: skip
    drawn = tuple(int(x) % 2**64 for x in rng_state.tolist()) if options.dropout_p else None

    parts = []
    for first in range(0, len_kv, _COLUMNS):
        one_hot = _one_hot(place, v, lengths.get("cu_seqlens_k"), first, min(_COLUMNS, len_kv - first))
        part = backend.call(ops.forward, plain, choice, q=q, k=k, v=one_hot, **arrays)[0]
        if drawn is not None:
            kept = backend.call(ops.forward, uniform, choice, q=q, k=k, v=one_hot, generator=drawn, **lengths)[0]
            part = place.xp.where(kept > 0, part, -part)
        parts.append(_rows_last(place, part, lengths.get("cu_seqlens_q"), len_q))
    if not parts:
        parts.append(place.full((batch, q.shape[-2], len_q, 0), 0, q.dtype))
    whole = place.xp.concatenate(parts, axis=-1)
    return place.rounded(place.rounded(whole, multiple, axis=-2), multiple)


def random_values(place: Place, probabilities: Any) -> Any:
    """A byte for each pair, which was kept where it is at most ``floor((1 - p) * 255)``: 0, and 255 where dropped."""
    return place.cast(place.xp.signbit(probabilities), "uint8") * 255


def _one_hot(place: Place, v: Any, cu_seqlens_k: Any, first: int, columns: int) -> Any:
    """Values of which key j has 1 in column j - first."""
    rows = place.count(v.shape[1]) if cu_seqlens_k is None else place.locals(cu_seqlens_k, v.shape[0])
    values = place.cast(rows[:, None] == first + place.count(columns), v.dtype)[:, None]
    shape = (*v.shape[:-1], columns)
    return place.xp.broadcast_to(values, shape)


def _rows_last(place: Place, x: Any, cu_seqlens_q: Any, len_q: int) -> Any:
    """(b, len_q, h, n) or packed (total, h, n) to (b, h, len_q, n)."""
    if cu_seqlens_q is not None:
        total, *others = x.shape
        x = place.xp.concatenate([x, place.full((1, *others), 0, x.dtype)])
        x = x[place.padded_index(cu_seqlens_q, len_q, total)]
    return x.swapaxes(1, 2)
