"""Attention of sequences that are divided over devices, with the arguments and the meaning of `flash_attn_func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuflash import ops
from cuflash.arrays import Adapter, Array, Guest, framework_of
from cuflash.errors import REFUSALS, InvalidArgument, UnsupportedProblem, shorten
from cuflash.numbers import flag, integer, shown
from cuflash.parallel.asked import Asked, asked_for, checked_order, starts_of
from cuflash.parallel.devices import HEADS, RING, Devices, Method
from cuflash.parallel.schedule import Order, tokens_at

Shard = Array | Sequence[Array]
"""One device's part of a tensor; or those of all devices, where one process stands for them."""
Pullback = Callable[..., tuple[Shard, Shard, Shard]]


def ring_attention(
    q: Shard,
    k: Shard,
    v: Shard,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    order: Order = "contiguous",
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of sequences of which every device has a part, while keys and values go round the devices.

    Every device calls this with its own rows, and gets its own rows of what `flash_attn_func` gives for whole
    sequences. While it attends to some keys, the next are on their way to it. Keys that none of its queries sees do not
    come: with a window, only those of the neighbours do that reach into it. Partial results are merged by their
    log-sum-exps in float32 (float64 for float64 tensors), always in one order; those of 16-bit tensors have been
    rounded to 16 bits before.

    Under JAX, call it inside ``jax.shard_map``; gradients are those of ``jax.grad``. Under CuPy every process or thread
    of a GPU calls it, on its current stream, and `ring_attention_vjp` gives gradients. Where q, k and v are lists, of
    NumPy's or CuPy's arrays, one process computes what each of so many devices would, one after the other.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim_qk), or list of them
        This device's queries, of which all devices have as many; in a list, those of every device. With `cu_seqlens`
        (total, heads_q, dim_qk).
    k, v : array, or list of them
        This device's keys and values, (b, len_kv, heads_kv, dim). `len_kv` is `len_q`, unless every key is seen.
    group : str, tuple of str, NcclCommunicator, Nccl or Exchange, optional
        The devices that the sequences are divided over: under JAX an axis of the mesh, or several; under CuPy a
        ``cupy.cuda.nccl.NcclCommunicator`` or what ``cupyx.distributed`` made, with a process for each GPU; with a
        thread for each, `Nccl` of a communicator and the threads' barrier. None where q, k and v are lists.
    softmax_scale, causal, window_size, softcap
        As for `flash_attn_func`; `causal` and `window_size` are about places in the whole sequence.
    order : {"contiguous", "zigzag"}
        Which rows of a sequence a device has. ``contiguous``: device i of n has the i-th of n equal parts.
        ``zigzag``: of 2n equal parts the i-th and, behind it, the (2n - 1 - i)-th, so that all devices have as much to
        do where attention is causal; in contiguous order the first ones wait for the last. `token_order` says which
        token lies where.
    cu_seqlens : array of int32, (b + 1,), optional
        Sequences of different lengths are packed: the row at which each whole sequence starts, and the end of the last,
        as for `flash_attn_varlen_func`, the same for queries and keys. Every device has its parts of each sequence, one
        sequence after the other, so that the length of each is a multiple of n, or of 2n in zigzag order. A NumPy
        array; under JAX it may also be traced, if `max_seqlen` is given and there is no window.
    max_seqlen : int, optional
        With `cu_seqlens`: at least the length of the longest whole sequence; None reads it.
    deterministic : bool
        Make gradients the same to the bit on every run, for some of the speed.
    return_lse : bool
        Also return the log-sum-exp.

    Returns
    -------
    out : array, (b, len_q, heads_q, dim_v), or list of them
        This device's rows, in the dtype of q.
    lse : array, (b, heads_q, len_q), or list of them
        With `return_lse`: that of all keys of all devices.

    Raises
    ------
    InvalidArgument
        If an argument is wrong or does not fit another, or rows cannot be divided as `order` says.
    UnsupportedProblem
        If no kernel runs this, or arrays of this library are not divided.

    Notes
    -----
    At step t a device has the keys of the device t places before it [1]_, which come straight from there: as many bytes
    as from hand to hand, and no step waits for another's transfer. Gradients of keys go home in their own dtype, and
    are added there in float32, in the order of the steps. In zigzag order causal work is balanced as in [2]_. Under JAX
    keys without a window do go from hand to hand, and the float32 sums of their gradients behind them, in a loop whose
    size and memory do not depend on the number of devices. A device holds the keys of two steps, besides its own; under
    JAX with a window, those of all neighbours in it.

    References
    ----------
    .. [1] Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.
    .. [2] Brandon et al., "Striped Attention: Faster Ring Attention for Causal Transformers", 2023, on the balance of
       causal work.

    Examples
    --------
    Four devices in one process:

    >>> import numpy as np
    >>> from cuflash import flash_attn_func
    >>> from cuflash.parallel import ring_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 8))
    >>> parts = [np.split(x, 4, axis=1) for x in (q, k, v)]
    >>> out = np.concatenate(ring_attention(*parts, causal=True), axis=1)
    >>> bool(np.allclose(out, flash_attn_func(q, k, v, causal=True)))
    True

    The same under JAX, on arrays that are divided along an axis of a mesh, and under CuPy, by one of four processes::

        divided = PartitionSpec(None, "sequence")
        attend = partial(ring_attention, group="sequence", causal=True)
        out = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(divided,) * 3, out_specs=divided))(q, k, v)

        from cupy.cuda import nccl

        communicator = nccl.NcclCommunicator(4, nccl_id, rank)
        out, pullback = ring_attention_vjp(q, k, v, communicator, causal=True)
    """
    try:
        asked = asked_for(softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic)
        return _forward(RING, asked, (q, k, v), group, return_lse)
    except REFUSALS as error:
        shorten(error)
        raise


def ring_attention_vjp(
    q: Shard,
    k: Shard,
    v: Shard,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    order: Order = "contiguous",
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Any, Pullback]:
    """`ring_attention` and the function that pulls gradients back through it, under NumPy and CuPy.

    Parameters
    ----------
    q, k, v, group, softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic,
    return_lse
        As for `ring_attention`. The tensors, the output and the log-sum-exp are kept until the pullback is dropped.

    Returns
    -------
    out : array or list of array
        As from `ring_attention`; (out, lse) with `return_lse`.
    pullback : callable
        ``pullback(dout, dlse=None) -> (dq, dk, dv)``, of this device's rows, or lists of those of every device. All
        devices call it.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `ring_attention`; under JAX, whose ``jax.vjp`` and ``jax.grad`` are what gives gradients there.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.parallel import ring_attention_vjp
    >>> parts = [np.ones((1, 4, 2, 8)) for device in range(3)]
    >>> out, pullback = ring_attention_vjp(parts, parts, parts, causal=True)
    >>> dq, dk, dv = pullback(out)
    >>> len(dq), dq[0].shape
    (3, (1, 4, 2, 8))
    """
    try:
        asked = asked_for(softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic)
        return _with_pullback(RING, asked, (q, k, v), group, return_lse)
    except REFUSALS as error:
        shorten(error)
        raise


def all_to_all_attention(
    q: Shard,
    k: Shard,
    v: Shard,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    order: Order = "contiguous",
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of sequences of which every device has a part, where devices exchange heads for rows before and after.

    Every device attends to whole sequences with some of the heads, so that nothing is merged and every bit is that of
    one device [1]_. Long sequences of an even number of key heads on each device are attended to in two calls under
    CuPy: half of the heads travel while the others are computed. `ring_attention` needs no heads to divide, and hides
    all of its transfers; ``python -m cuflash explain --devices 8`` compares the two.

    Parameters
    ----------
    q, k, v, group, softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic,
    return_lse
        As for `ring_attention`, any window with traced `cu_seqlens` included. There are as many query heads as devices
        or a multiple of that, and key heads are a multiple of the devices or, each of them sent to several, a divisor.

    Returns
    -------
    out, lse
        As from `ring_attention`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `ring_attention`, and if heads cannot be divided.

    References
    ----------
    .. [1] Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
       Transformer Models", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import flash_attn_func
    >>> from cuflash.parallel import all_to_all_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 8))
    >>> parts = [np.split(x, 2, axis=1) for x in (q, k, v)]
    >>> out = np.concatenate(all_to_all_attention(*parts, causal=True), axis=1)
    >>> bool(np.allclose(out, flash_attn_func(q, k, v, causal=True)))
    True
    """
    try:
        asked = asked_for(softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic)
        return _forward(HEADS, asked, (q, k, v), group, return_lse)
    except REFUSALS as error:
        shorten(error)
        raise


def all_to_all_attention_vjp(
    q: Shard,
    k: Shard,
    v: Shard,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    order: Order = "contiguous",
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Any, Pullback]:
    """`all_to_all_attention` and the function that pulls gradients back through it, under NumPy and CuPy.

    Parameters
    ----------
    q, k, v, group, softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic,
    return_lse
        As for `all_to_all_attention`. Whole sequences of this device's heads are kept until the pullback is dropped.

    Returns
    -------
    out, pullback
        As from `ring_attention_vjp`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `ring_attention_vjp`, and if heads cannot be divided.
    """
    try:
        asked = asked_for(softmax_scale, causal, window_size, softcap, order, cu_seqlens, max_seqlen, deterministic)
        return _with_pullback(HEADS, asked, (q, k, v), group, return_lse)
    except REFUSALS as error:
        shorten(error)
        raise


def token_order(sequences: int | Array, devices: int, order: Order = "zigzag") -> np.ndarray:
    """Which token lies at each place, where the rows of one device follow those of another.

    Parameters
    ----------
    sequences : int or array of int32, (b + 1,)
        The length of the sequences, or `cu_seqlens` of packed ones.
    devices : int
        Over how many they are divided.
    order : {"contiguous", "zigzag"}
        As for `ring_attention`.

    Returns
    -------
    tokens : array of int64, (total,)
        ``x[:, tokens]``, cut into equal parts, is what the devices have of x, and ``tokens`` the same of positions.
        ``numpy.argsort(tokens)`` is the way back.

    Raises
    ------
    InvalidArgument
        If a sequence cannot be divided so.

    Examples
    --------
    >>> from cuflash.parallel import token_order
    >>> token_order(8, devices=2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    >>> token_order([0, 4, 8], devices=2, order="contiguous").tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    try:
        order = checked_order(order)
        count = integer(devices)
        if count is None or count < 1:
            raise InvalidArgument(f"devices is {shown(devices)}; expected an integer of at least 1.")
        length = integer(sequences)
        starts = np.array([0, length], np.int32) if length is not None else starts_of("sequences", sequences)
        if not isinstance(starts, np.ndarray):
            raise InvalidArgument(f"sequences is {shown(sequences)}; expected a length, or cu_seqlens of NumPy.")
        asked = Asked(ops.asked(), order, starts)
        asked.longest(int(starts[-1]))
        asked.check_chunks(count, 0)
        return np.argsort(tokens_at(np, starts, int(starts[-1]), order, count))
    except REFUSALS as error:
        shorten(error)
        raise


def _forward(method: Method, asked: Asked, tensors: tuple[Any, ...], group: Any, return_lse: Any) -> Any:
    """Of out and lse what the caller asks for."""
    return_lse = flag("return_lse", return_lse)
    divided = _adapter(tensors)
    if divided is not None:
        results = divided.divided(method.name, asked, tensors, group)
    else:
        results = Devices(asked, tensors, group).forward(method)[:2]
    return results if return_lse else results[0]


def _with_pullback(
    method: Method, asked: Asked, tensors: tuple[Any, ...], group: Any, return_lse: Any
) -> tuple[Any, Pullback]:
    """The same, and what pulls gradients back."""
    return_lse = flag("return_lse", return_lse)
    if (adapter := _adapter(tensors)) is not None:
        raise UnsupportedProblem(
            f"q is traced by {adapter.name}, which takes gradients itself. Call {method.name} inside jax.grad or "
            "jax.vjp."
        )
    devices = Devices(asked, tensors, group)
    out, lse, held = devices.forward(method)

    def pullback(dout: Shard, dlse: Shard | None = None) -> tuple[Shard, Shard, Shard]:
        """Gradients of this device's rows for those of the output, and of the log-sum-exp if it is not zero."""
        try:
            return devices.backward(method, held, (out, lse), (dout, dlse))
        except REFUSALS as error:
            shorten(error)
            raise

    return ((out, lse) if return_lse else out), pullback


def _adapter(tensors: tuple[Any, ...]) -> Adapter | None:
    """What divides calls on arrays that a compiler traces; None for arrays in memory."""
    if any(isinstance(x, list | tuple) for x in tensors):
        return None
    framework = framework_of(("q", "k", "v"), tensors)
    if isinstance(framework, Guest):
        raise UnsupportedProblem(
            f"q is a {framework.name} array outside a program of several devices. Under JAX call this inside "
            "jax.shard_map, with the axis of the mesh as group; lists of NumPy arrays stand for devices without one."
        )
    return framework if isinstance(framework, Adapter) else None
