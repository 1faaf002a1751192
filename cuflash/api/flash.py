"""Attention with flash-attn's names, argument order and meaning, for every kind of array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from cuflash import ops
from cuflash.api.keywords import FlashOptions, Generator, VarlenOptions, WrittenMask, WrittenScore
from cuflash.api.probabilities import check_drawn, probabilities
from cuflash.arrays import Array, ArrayT, framework_in_memory
from cuflash.dropout import Scheme
from cuflash.dtypes import Precision
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.masks import Alignment
from cuflash.numbers import flag
from cuflash.ops import Arrays, Options, asked, new, with_mods
from cuflash.ops.lengths import with_lengths

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> ArrayT: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[False] = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array | None]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., *, return_lse: Literal[True],
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ...,
    return_rng_state: Literal[True], **keywords: Unpack[FlashOptions],
) -> tuple[ArrayT, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_func(
    q: ArrayT, k: ArrayT, v: ArrayT, dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., *, return_lse: bool = ..., return_rng_state: bool = ...,
    **keywords: Unpack[FlashOptions],
) -> ArrayT | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alignment: Alignment = "bottom-right",
    attn_mask: Array | None = None,
    attn_bias: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    block_mask: BlockMask | None = None,
    generator: Generator = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    num_splits: int = 0,
    precision: Precision = "full",
    return_lse: bool = False,
    return_rng_state: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array | None, ...]:
    """Exact attention, ``softmax(softmax_scale * q @ k.T) @ v`` per head, in memory that grows with the lengths only.

    Arrays in host memory are computed on the CPU. CuPy arrays run kernels on the current stream, torch tensors on CUDA
    devices on torch's current stream, and JAX arrays and those of other DLPack producers on CuPy's current stream,
    ordered with their own. None of them is copied, and the result belongs to the same library. Query ``i`` sees key
    ``j`` where a 1 is drawn::

        causal=True             causal=True             causal=True, window_size=(1, 0)
        len_q=2, len_kv=4       len_q=4, len_kv=2       len_q=len_kv=4
        1 1 1 0                 0 0                     1 0 0 0
        1 1 1 1                 0 0                     1 1 0 0
                                1 0                     0 1 1 0
                                1 1                     0 0 1 1

    A query that sees no key has output 0 and log-sum-exp -inf; scores hide a key if they are -inf, and not if they are
    the lowest finite number. Query head ``h`` uses key/value head ``h // (heads_q // heads_kv)``.

    A NaN or infinity in a hidden key or value may reach queries that are in a tile with it, as 0 * NaN is NaN.
    Sums of weighted values, before their division by the sum of weights, must fit into float32 (float64 for float64).
    On a GPU bfloat16 and float32 below 2^-125 may count as 0; on Hopper weights in 16 bits rise to 2^8 before the
    division, so that values above 2^119 may overflow.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim_qk)
        Queries in float16, bfloat16, float32 or float64. The last dimension of every tensor must be contiguous; the
        other strides are free.
    k : array, (b, len_kv, heads_kv, dim_qk)
        Keys; heads_q must be a multiple of heads_kv.
    v : array, (b, len_kv, heads_kv, dim_v)
        Values.
    dropout_p : float
        Chance from 0 to below 1 with which a probability is dropped, after the softmax; the others are divided by
        ``1 - dropout_p``. The log-sum-exp is not affected.
    softmax_scale : float, optional
        Factor of ``q @ k.T``, of any sign, up to 2^126 (2^1022 for float64); ``dim_qk ** -0.5`` by default.
    causal : bool
        Query ``i`` sees no key after its own, ``i + len_kv - len_q``; the right side of `window_size` becomes 0.
    window_size : (int, int)
        How many keys before and after its own a query sees, in a tuple or a list; -1 is unbounded.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)``; from 2^-126 to 2^126 (2^-1022 to 2^1022 for float64), or 0,
        which leaves them alone.
    alibi_slopes : array of float32, (heads_q,) or (b, heads_q), optional
        ``slope * |i + len_kv - len_q - j|`` is taken off the score of query ``i`` and key ``j``, after the soft cap;
        ``slope * |i - j|`` with ``alignment="top-left"``. The log-sum-exp includes it.
    deterministic : bool
        The forward gives the same bits on every run either way; the flag acts in `flash_attn_backward` and
        `flash_attn_vjp`.
    return_attn_probs : bool
        Also return the log-sum-exp and the probabilities, whose memory grows with the product of the lengths. Attention
        itself never stores them: further calls compute them, 256 keys at a time. For tests and for looking at small
        problems; ``exp(scores - lse)`` gives any one of them.
    alignment : {"bottom-right", "top-left"}
        Which key is a query's own: with ``bottom-right`` the last query's is the last key, with ``top-left`` the first
        query's is the first key.
    attn_mask : array of bool, optional
        True where a query and a key take part, if `causal` and `window_size` let them too; broadcasts to
        (b, heads_q, len_q, len_kv).
    attn_bias : array, optional
        Added to the scores after the soft cap, in the dtype of q or float32; broadcasts to
        (b, heads_q, len_q, len_kv), and may lie in memory in any way. -inf hides a key.
    sink : array of float32, (heads_q,), optional
        Logits that take part in the softmax of every query, and in the log-sum-exp, but have no value. On a GPU one
        beyond 3.4e38 times `softmax_scale` counts as that much.
    score_mod : callable, ``(score, b, h, q, k) -> score``, optional
        What becomes of a scaled score, after the soft cap and before ALiBi and `attn_bias`, of batch element ``b``,
        query head ``h``, query ``q`` and key ``k``, each from 0; -inf hides a key. Called once, with symbols: it uses
        Python's operators and the functions of `cuflash.mods`, and may index arrays, which it captures: NumPy's, or of
        the library and on the device of q. Ready ones are in `cuflash.mods`, and ``cuflash.mods.trace("score_mod",
        function)`` may be passed as well, which spares the tracing. On a GPU NumPy's arrays are copied to it in every
        call, and a function that was not met before is compiled; what arrays hold may change without that.
    mask_mod : callable, ``(b, h, q, k) -> bool``, optional
        Whether a query sees a key, if the other masks let it too; as `score_mod` otherwise.
    block_mask : BlockMask, optional
        The same as lists of blocks, from `create_block_mask`: keys in no list are never visited, in the gradients
        neither, and pairs of full blocks are not tested. Of these lengths, and of one, or all, batch elements and query
        heads. Other masks hide what they hide as well. The first call on a GPU lays the lists out in tiles of its
        kernels and moves them there, where they stay as long as the block mask; masks of a kind share a kernel.
    generator : PhiloxGenerator, (int, int) or JAX key, optional
        What dropout draws from: a generator, which moves on, or a seed and an offset. By default the generator that
        `manual_seed` seeds, torch's own for its tensors. With JAX also a key or a (4,) uint32 array like `rng_state`;
        inside its transformations nothing else but two numbers.
    dropout_scheme : {"byte", "word"}
        How random numbers decide. ``byte`` spends 8 bits on a probability and keeps the same ones as PyTorch's flash
        kernels for the same seed and offset, at chances that are multiples of 1/256. ``word`` spends 32 bits, as
        PyTorch's memory-efficient kernels.
    unbiased_dropout : bool
        With ``byte``, divide by the chance of keeping that 8 bits really give, instead of ``1 - dropout_p``.
    num_splits : int
        Into how many parts, up to 128, the keys of a query are split, for blocks of a GPU to work on at once; at most
        one for each tile of keys. 0 leaves it to the plan, which goes by the sizes of the call and the number of
        multiprocessors, see `explain`. Parts are merged in a fixed order: any number gives the same bits on every
        run, and results that serve the gradients alike. With 1 the bits of a query depend on its own sequence alone,
        not on what else is in the call. The CPU takes keys in one order whatever the number.
    precision : {"full", "tf32"}
        What products take of float32 tensors. ``full`` is as exact as float32 arithmetic. ``tf32`` rounds the numbers
        of q, k and v to the 11 significant bits of TF32, and probabilities too where a GPU multiplies them, and sums in
        float32: errors up to 2^-11 of each number instead of 2^-24, like those of float16 tensors but for their range.
        Tensor cores do it in one product instead of three; the CPU saves nothing. Numbers below 2^-28 of the largest of
        their row may keep fewer bits. Give it to the gradients as well; they round that of the output and of the
        scores, too. Head dimensions up to 256 on a GPU of compute capability 8.0 or newer.
    return_lse : bool
        Also return the log-sum-exp.
    return_rng_state : bool
        Also return the seed and offset that dropout drew with, which `flash_attn_backward` needs.
    out : array, (b, len_q, heads_q, dim_v), optional
        Written and returned instead of a new array; NumPy, CuPy and torch only. May have no element in
        common with q, k or v; slices of one buffer that lie between theirs are fine.

    Returns
    -------
    out : array, (b, len_q, heads_q, dim_v)
        In the dtype of q.
    lse : array, (b, heads_q, len_q)
        With `return_lse` or `return_attn_probs`: natural logarithm of the sum of exponentials of each query's scores,
        in float32 (float64 for float64 tensors).
    S_dmask : array in the dtype of q, (b, heads_q, len_q, len_kv), both lengths rounded up to multiples of 128
        With `return_attn_probs`: the softmax before dropout, and zeros behind both lengths. A minus sign, that of -0.0
        included, says that dropout dropped it. (flash-attn's are not normalised, and undefined where a tile is masked.)
    rng_state : array of uint64, (2,)
        With `return_rng_state`: seed and offset, None without dropout. The same 16 bytes are (4,) uint32 for JAX and
        other DLPack libraries.

    Raises
    ------
    InvalidArgument
        If an argument is wrong or does not fit another; nothing has been launched or written then.
    UnsupportedProblem
        If no kernel runs this on the device.

    Notes
    -----
    Calls on a GPU return before it is done. Once a first call has compiled its kernels, a call can be captured in a
    CUDA graph; one with dropout needs a generator whose state is on the GPU, see `PhiloxGenerator.to_device`. Scratch
    memory and new arrays come from torch's allocator for torch and from CuPy's for all others; CuPy's does not know of
    graphs, so capture with a ``cupy.cuda.MemoryPool`` that lives as long as the graph.

    Autograd of torch records calls on tensors that require grad; ``torch.func.grad``, ``vmap``, checkpoints, autocast
    and ``torch.compile`` may be around them. Inside JAX's transformations arrays have no elements yet: lengths of
    packed sequences must be given, and arguments are checked when they are traced. Forward mode and derivatives of the
    gradient are there in JAX and torch on the CPU; on a GPU, and where torch.compile traces, they are refused.
    `flash_attn_jvp` pushes changes forward outside of transformations.

    A program of JAX on several devices divides a call along the batch and the heads; where arrays are sharded
    otherwise, or with dropout, call cuflash inside ``jax.shard_map``. Programs that were stored by ``jax.export`` need
    ``cuflash.adapters.jax.register()`` before another process runs them.

    DTensors of torch have to be divided along the batch or the heads, or not at all; each process attends to its part.
    Anything else, dropout and further arrays included, is refused: call cuflash on ``to_local()`` of each.

    Calls on NumPy arrays use as many threads as ``CUFLASH_NUM_THREADS`` says, all cores that the process may use by
    default, and give the same bits with any number. While one runs, the BLAS of the process is held to one thread.

    Subclasses of ``numpy.ndarray`` are taken for the plain arrays that they hold, and masked arrays are refused.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q = k = np.zeros((1, 3, 2, 4), np.float32)
    >>> v = np.ones((1, 3, 2, 5), np.float32)
    >>> cuflash.flash_attn_func(q, k, v, causal=True).shape
    (1, 3, 2, 5)
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
            num_splits=num_splits, deterministic=deterministic, precision=precision,
        )  # fmt: skip
        arrays = new(Arrays, q=q, k=k, v=v, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink, out=out)
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        return _forward(options, arrays, generator, return_attn_probs, return_lse, return_rng_state)
    except REFUSALS as error:
        shorten(error)
        raise


@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    return_lse: Literal[False] = ..., return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> ArrayT: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    return_lse: Literal[True], return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    return_lse: Literal[False] = ..., return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: Literal[False] = ..., block_table: Array | None = ..., *,
    return_lse: Literal[True], return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ..., block_table: None = ...,
    return_rng_state: Literal[False] = ..., **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., *, return_attn_probs: Literal[True], return_lse: bool = ..., block_table: None = ...,
    return_rng_state: Literal[True], **keywords: Unpack[VarlenOptions],
) -> tuple[ArrayT, Array, Array, Array | None]: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., dropout_p: float = ..., softmax_scale: float | None = ..., causal: bool = ...,
    window_size: tuple[int, int] = ..., softcap: float = ..., alibi_slopes: Array | None = ...,
    deterministic: bool = ..., return_attn_probs: bool = ..., block_table: Array | None = ..., *,
    return_lse: bool = ..., return_rng_state: bool = ..., **keywords: Unpack[VarlenOptions],
) -> ArrayT | tuple[Any, ...]: ...  # fmt: skip
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
    *,
    alignment: Alignment = "bottom-right",
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    attn_mask: Array | None = None,
    attn_bias: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    block_mask: BlockMask | None = None,
    generator: Generator = None,
    dropout_scheme: Scheme = "byte",
    unbiased_dropout: bool = False,
    num_splits: int = 0,
    precision: Precision = "full",
    return_lse: bool = False,
    return_rng_state: bool = False,
    out: Array | None = None,
    validate: bool = False,
) -> Array | tuple[Array | None, ...]:
    """Attention of sequences of different lengths, packed one after the other without padding.

    Each sequence attends to its own keys, with masks aligned to its own lengths. Rows after the last sequence have
    output 0 and log-sum-exp -inf.

    Parameters
    ----------
    q : array, (total_q, heads_q, dim_qk)
        Queries of all sequences.
    k : array, (total_kv, heads_kv, dim_qk)
        Keys; (num_pages, page_size, heads_kv, dim_qk) with `block_table`.
    v : array, (total_kv, heads_kv, dim_v)
        Values; (num_pages, page_size, heads_kv, dim_v) with `block_table`.
    cu_seqlens_q, cu_seqlens_k : array of int32, (b + 1,)
        The row of q, and of k and v, at which each sequence starts, from 0 and rising; the last number is the end of
        the last sequence. With `block_table` the differences of `cu_seqlens_k` are the lengths, and no rows of k and v.
    max_seqlen_q, max_seqlen_k : int, optional
        At least as long as the longest sequence, or as what `seqused_q` and `seqused_k` say is used of any. None reads
        `cu_seqlens` and checks its values; on a GPU that waits for the device once, and cannot be captured in a graph.
        Given, values on a GPU are trusted, see `validate`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for `flash_attn_func`.
    block_table : array of int32, (b, max_pages), optional
        Keys and values lie in the pages of a cache: key ``j`` of sequence ``b`` is row ``j % page_size`` of page
        ``block_table[b, j // page_size]``, for any size of pages. Pages may be shared, and numbers behind a sequence's
        last key are not read. The forward only: gather the pages into packed k and v for gradients.
    alignment, sink, generator, dropout_scheme, unbiased_dropout, num_splits, precision, return_lse, return_rng_state
        As for `flash_attn_func`.
    seqused_q, seqused_k : array of int32, (b,), optional
        How many queries and keys of each sequence, from its first, take part; the others are not read. Masks are
        aligned to these lengths. Queries that take no part have output 0 and log-sum-exp -inf.
    attn_mask, attn_bias : array, optional
        As for `flash_attn_func`, of the shape (b, heads_q, max_seqlen_q, max_seqlen_k): row and column count from the
        first query and key of each sequence. The ``word`` scheme of dropout numbers probabilities by this shape.
    score_mod, mask_mod : callable, optional
        As for `flash_attn_func`; ``b`` is the number of a sequence, in which ``q`` and ``k`` count from 0.
    block_mask : BlockMask, optional
        As for `flash_attn_func`, of the lengths max_seqlen_q and max_seqlen_k: queries and keys count from the first of
        each sequence, and shorter ones have the first blocks of the lists. A band in it is aligned to these lengths;
        one that follows each sequence's own end is `causal` and `window_size`.
    out : array, (total_q, heads_q, dim_v), optional
        Written and returned instead of a new array.
    validate : bool
        Check the values of `cu_seqlens_q`, `cu_seqlens_k`, `seqused_q`, `seqused_k` and `block_table`, for which a GPU
        is waited, and not while a CUDA graph is captured. Those of NumPy arrays are checked either way.

    Returns
    -------
    out : array, (total_q, heads_q, dim_v)
        In the dtype of q.
    lse : array, (heads_q, total_q)
        With `return_lse` or `return_attn_probs`, as for `flash_attn_func`.
    S_dmask : array in the dtype of q, (b, heads_q, max_seqlen_q, max_seqlen_k), rounded up to multiples of 128
        With `return_attn_probs`, as for `flash_attn_func`; not with `block_table`.
    rng_state : array of uint64, (2,)
        With `return_rng_state`, as for `flash_attn_func`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.ones((5, 2, 4), np.float32)
    >>> starts = np.array([0, 2, 5], np.int32)
    >>> cuflash.flash_attn_varlen_func(x, x, x, starts, starts, causal=True).shape
    (5, 2, 4)
    """
    try:
        _require(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            dropout_p=dropout_p, dropout_scheme=dropout_scheme, unbiased_dropout=unbiased_dropout,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, num_splits=num_splits, deterministic=deterministic,
            validate=validate, precision=precision,
        )  # fmt: skip
        arrays = new(
            Arrays, q=q, k=k, v=v, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k, seqused_q=seqused_q, seqused_kv=seqused_k,
            table=block_table, out=out,
        )  # fmt: skip
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        return _forward(options, arrays, generator, return_attn_probs, return_lse, return_rng_state)
    except REFUSALS as error:
        shorten(error)
        raise


def _forward(
    options: Options,
    arrays: Arrays,
    generator: Generator,
    return_attn_probs: bool,
    return_lse: bool,
    return_rng_state: bool,
) -> Array | tuple[Array | None, ...]:
    """Of out, lse, probabilities and rng_state, what the caller asks for."""
    if not (type(return_attn_probs) is type(return_lse) is type(return_rng_state) is bool):
        return_attn_probs = flag("return_attn_probs", return_attn_probs)
        return_lse = flag("return_lse", return_lse)
        return_rng_state = flag("return_rng_state", return_rng_state)
    if return_attn_probs:
        options = _countable(options, arrays)
    if not (return_lse or return_attn_probs or return_rng_state):
        return ops.out(options, arrays, generator)
    out, lse, *drawn = ops.forward(options, arrays, generator)
    rng_state = drawn[0] if drawn else None
    results = (out, lse) if return_lse or return_attn_probs else (out,)
    if return_attn_probs:
        results = (*results, probabilities(options, arrays, rng_state))
    return (*results, rng_state) if return_rng_state else results


def _countable(options: Options, arrays: Arrays) -> Options:
    """The options of a call that returns probabilities, with the longest lengths in them."""
    if arrays.table is not None:
        raise InvalidArgument(
            "return_attn_probs is True and block_table is given; probabilities of keys in pages are not returned. "
            "Gather the pages into packed k and v."
        )
    check_drawn(framework_in_memory(options.names(arrays), arrays.each()), options)
    return with_lengths("forward", options, arrays)


def _require(**arrays: Array | None) -> None:
    """Refuse None for arrays that make a call what it is."""
    for name, x in arrays.items():
        if x is None:
            raise InvalidArgument(f"{name} is None; expected an array.")
