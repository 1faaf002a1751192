"""create_block_mask: the lists of blocks that a mask leaves visible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from cuflash.arrays import Array
from cuflash.blocks import kinds, rules
from cuflash.blocks.kinds import Grid
from cuflash.blocks.lists import listed
from cuflash.blocks.mask import BlockMask
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.masks import Mask
from cuflash.mods import Traced
from cuflash.mods.library import both
from cuflash.numbers import integer, is_array, pair, shown

_LONGEST = 2**30
"""Positions and the distances between any two are 32-bit numbers in the kernels."""


def create_block_mask(
    mask: Callable[..., Any] | Mask | BlockMask | Array | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
    len_q: int | None = None,
    len_kv: int | None = None,
    block_size: int | tuple[int, int] = 128,
    blocks: Array | None = None,
    cu_seqlens: Array | None = None,
) -> BlockMask:
    """Find the blocks of scores that a mask leaves visible, for attention that visits no others.

    Blocks are judged by bounds of the rule where these tell, as they do of bands and of documents in order, and else
    pair by pair, a few at a time: memory grows with the number of visible blocks. What is no more than a band runs on a
    GPU as the keywords `causal` and `window_size` do.

    Parameters
    ----------
    mask : callable, array of bool, Mask or BlockMask, optional
        What visible pairs fulfil: a function ``(b, h, q, k)`` as `mask_mod` is, traced or not, written by you or made
        by `document`, `prefix_lm`, `sliding_window` and others in ``cuflash.mods``; an array of up to four axes that
        broadcasts to (batch, heads, len_q, len_kv), True where a query sees a key; a band, aligned to `len_q` and
        `len_kv`; or another block mask, whose sizes stand in for those that are left out. None hides nothing. Arrays
        may be of any library and lie anywhere: of those on a GPU a copy is made, for which it is waited for. Those in
        host memory may be read again by every call that takes the block mask; make another one where they change.
    batch, heads : int, optional
        Batch elements, and query heads; needed where the function depends on them. Where it does not, or they are left
        out, all share one list.
    len_q, len_kv : int, optional
        Queries and keys; left out, those of the array or of `cu_seqlens`.
    block_size : int or (int, int)
        Queries and keys of a block.
    blocks : array of bool, optional
        Blocks to keep, of up to four axes that broadcast to (batch, heads, query blocks, key blocks): those where it is
        False are hidden, whatever `mask` says.
    cu_seqlens : array of int, (documents + 1,), optional
        First row of each document in one row of packed ones, and the end of the last: queries see keys of their own
        document. Rows behind the last are one more document.

    Returns
    -------
    BlockMask
        Prints as its sizes and the share of empty blocks; ``plot`` draws it, ``&``, ``|`` and ``~`` compose it.

    Raises
    ------
    InvalidArgument
        If a size is missing or does not fit, an array has another dtype, or lies on a GPU while a CUDA graph is
        captured, or a function cannot be traced.

    Examples
    --------
    >>> import cuflash
    >>> causal = cuflash.create_block_mask(cuflash.Mask(right=0), len_q=1024, len_kv=1024)
    >>> causal
    <BlockMask: 1024 x 1024 in blocks of 128 x 128, 43.8% empty>
    >>> causal & (lambda b, h, q, k: q - k < 256)
    <BlockMask: 1024 x 1024 in blocks of 128 x 128, 67.2% empty>
    """
    try:
        return _created(mask, batch, heads, len_q, len_kv, block_size, blocks, cu_seqlens)
    except REFUSALS as error:
        shorten(error)
        raise


def _created(
    mask: Any,
    batch: int | None,
    heads: int | None,
    len_q: int | None,
    len_kv: int | None,
    block_size: int | tuple[int, int],
    blocks: Array | None,
    cu_seqlens: Array | None,
) -> BlockMask:
    """The block mask of these arguments."""
    seen = _bools("mask", mask) if is_array(mask) else None
    kept = None if blocks is None else _bools("blocks", blocks)
    starts = None if cu_seqlens is None else _starts(cu_seqlens)
    if isinstance(mask, BlockMask):
        len_q, len_kv = (mask.len_q if len_q is None else len_q), (mask.len_kv if len_kv is None else len_kv)
        batch, heads = (mask.batch if batch is None else batch), (mask.heads if heads is None else heads)
    one = integer(block_size)
    sizes = pair(block_size) if one is None else (one, one)
    if sizes is None or min(sizes) < 1:
        raise InvalidArgument(f"block_size is {shown(block_size)}; expected one or two integers from 1.")
    implied = seen.shape[2:] if seen is not None else (None, None) if starts is None else (starts[-1],) * 2
    grid = Grid(_length("len_q", len_q, implied[0]), _length("len_kv", len_kv, implied[1]), sizes)
    if starts is not None and grid.len_q != grid.len_kv:
        raise InvalidArgument(
            f"cu_seqlens is given but len_q is {grid.len_q} and len_kv {grid.len_kv}; documents are one row of queries "
            "and keys. Write a function for others."
        )
    numbers = _number("batch", batch, seen, kept, 0), _number("heads", heads, seen, kept, 1)
    shape = *numbers, grid.len_q, grid.len_kv
    if seen is not None:
        _check_broadcasts("mask", seen, shape)
    if kept is not None:
        _check_broadcasts("blocks", kept, (*numbers, *grid.shape))

    conditions = [_rule(mask, seen, grid)] if mask is not None else []
    conditions += [] if kept is None else [rules.of_blocks(kept, sizes)]
    conditions += [] if starts is None else [rules.of_documents(starts, grid.len_q)]
    if len(conditions) == 1:  # whose own mistakes the trace then speaks of
        rule = rules.traced_rule(conditions[0])
    else:
        rule = rules.traced_rule(both(*conditions) if conditions else lambda b, h, q, k: k >= 0)
    read = [kinds.reads(rule, position) for position in ("b", "h")]
    for name, given, number, needed, position in zip(
        ("batch", "heads"), (batch, heads), numbers, read, "bh", strict=True
    ):
        if needed and given is None and number == 1:
            raise InvalidArgument(f"{name} is None but the mask depends on {position}; pass how many there are.")
    own_batch, own_heads = (number if needed else min(number, 1) for number, needed in zip(numbers, read, strict=True))
    of_blocks = _kinds(rule, seen if len(conditions) == 1 else None, grid, own_batch, own_heads)
    return BlockMask(rule, grid.len_q, grid.len_kv, sizes, own_batch, own_heads, listed(of_blocks))


def _rule(mask: Any, seen: np.ndarray | None, grid: Grid) -> Callable[..., Any]:
    """What visible pairs fulfil, as a function."""
    if seen is not None:
        return rules.of_array(seen)
    if isinstance(mask, BlockMask):
        return mask.mask_mod
    if not isinstance(mask, Mask):
        return mask  # the trace says what is no function
    if mask.tensor:
        raise InvalidArgument(
            f"mask is {mask!r}, whose boolean tensor is given at the call; pass the band and the array apart: "
            "create_block_mask(band, ...) & array."
        )
    return rules.of_band(mask, grid.len_q, grid.len_kv)


def _kinds(rule: Traced, seen: np.ndarray | None, grid: Grid, batch: int, heads: int) -> Iterator[np.ndarray]:
    """The kinds of all blocks of all matrices, some rows of blocks at a time."""
    for b, h in product(range(batch), range(heads)):
        if seen is None:
            yield from kinds.of_rule(rule, grid, b, h)
        else:
            yield from kinds.of_array(seen[b if len(seen) > 1 else 0, h if seen.shape[1] > 1 else 0], grid)


def _bools(name: str, array: Array) -> np.ndarray:
    """A boolean array with four axes."""
    bools = rules.in_host_memory(name, array)
    if bools.dtype != bool or bools.ndim > 4:
        raise InvalidArgument(
            f"{name} is {bools.dtype} with {bools.ndim} axes; expected bool with up to four, True where pairs are seen."
        )
    return bools.reshape((1,) * (4 - bools.ndim) + bools.shape)


def _starts(cu_seqlens: Array) -> np.ndarray:
    """The first rows of documents and the end of the last."""
    starts = rules.in_host_memory("cu_seqlens", cu_seqlens)
    if starts.ndim != 1 or starts.dtype.kind not in "iu" or not len(starts) or starts[0] or np.any(np.diff(starts) < 0):
        raise InvalidArgument(f"cu_seqlens is {shown(starts)}; expected integers that ascend from 0, one axis of them.")
    return starts


def _length(name: str, given: Any, implied: int | None) -> int:
    """A length, or what another argument says of it."""
    if given is None:
        if implied is None:
            raise InvalidArgument(f"{name} is None; expected a length, as the mask has none of its own.")
        return int(implied)
    length = integer(given)
    if length is None or not 0 <= length <= _LONGEST:
        raise InvalidArgument(f"{name} is {shown(given)}; expected a length from 0 to 2**30.")
    return length


def _number(name: str, given: Any, seen: np.ndarray | None, kept: np.ndarray | None, axis: int) -> int:
    """How many batch elements or heads there are; 1 where nothing says so."""
    if given is None:
        return max([1, *(x.shape[axis] for x in (seen, kept) if x is not None)])
    number = integer(given)
    if number is None or number < 1:
        raise InvalidArgument(f"{name} is {shown(given)}; expected an integer from 1, or None where all are alike.")
    return number


def _check_broadcasts(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if any(n not in (1, size) for n, size in zip(array.shape, shape, strict=True)):
        raise InvalidArgument(f"{name} has shape {array.shape}; expected one that broadcasts to {shape}.")
