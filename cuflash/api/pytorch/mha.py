"""Multi-head attention with the names, argument orders and results of PyTorch's flash functions (``flash_api.h``).

These are for programs that manage outputs, random state and row sums themselves. Arrays are NumPy's, CuPy's or torch's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from cuflash.api.pytorch import explicit
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.generator import PhiloxGenerator
from cuflash.numbers import shown
from cuflash.ops import Arrays, asked, new

Array = Any


Parameters = ParamSpec("Parameters")
Results = TypeVar("Results")


def _conventional(function: Callable[Parameters, Results]) -> Callable[Parameters, Results]:
    """Let the positional arguments be those of the convention: in the same order, without what it lacks."""
    parameters = inspect.signature(function).parameters.values()
    names = [x.name for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    inner: Callable[..., Results] = function

    @functools.wraps(function)
    def call(*arguments: Any, convention: str = "current", **keywords: Any) -> Results:
        try:
            if not isinstance(convention, str) or convention not in explicit.CONVENTIONS:
                known = ", ".join(map(repr, explicit.CONVENTIONS))
                raise InvalidArgument(f"convention is {shown(convention)}; expected one of {known}.")
            lacks = explicit.CONVENTIONS[convention].lacks
            for name in lacks:
                if name in keywords:
                    raise InvalidArgument(f"{name} is given, which convention {convention!r} does not have. Drop it.")
            positional = [name for name in names if name not in lacks]
            if len(arguments) > len(positional):
                raise TypeError(
                    f"{function.__name__}() takes at most {len(positional)} positional arguments in convention "
                    f"{convention!r}, but {len(arguments)} were given"
                )
            named = dict(zip(positional, arguments, strict=False))
            return inner(**named, **keywords, convention=convention)
        except REFUSALS as error:
            shorten(error)
            raise

    return cast("Callable[Parameters, Results]", call)


@_conventional
def mha_fwd(
    q: Array,
    k: Array,
    v: Array,
    out_: Array | None = None,
    alibi_slopes_: Array | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    softcap: float = 0.0,
    return_softmax: bool = False,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    *,
    convention: str = "current",
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Attention of dense tensors, with PyTorch's arguments and its eight results.

    Parameters
    ----------
    q : array, (b, len_q, heads_q, dim)
        Queries in float16, bfloat16, float32 or float64; rows contiguous, other strides free.
    k : array, (b, len_kv, heads_kv, dim)
        Keys; heads_q must be a multiple of heads_kv.
    v : array, (b, len_kv, heads_kv, dim_v)
        Values.
    out_ : array, (b, len_q, heads_q, dim_v), optional
        Filled and returned instead of a new array, a slice of a larger one if need be.
    alibi_slopes_ : array of float32, (heads_q,) or (b, heads_q), optional
        ``slope * |i + len_kv - len_q - j|`` is taken off the scores. The log-sum-exp is that of these scores, whereas
        PyTorch's causal kernel adds a constant to each row.
    p_dropout : float
        Probability of dropping, 0 <= p < 1.
    softmax_scale : float, optional
        Factor of ``q @ k.T``, of any sign; ``dim ** -0.5`` by default.
    is_causal : bool
        Bottom-right aligned; the right side of the window becomes 0.
    window_size_left, window_size_right : int, optional
        How many keys before and after its own a query sees; None and negative numbers are unbounded.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)``; 0 leaves them alone.
    return_softmax : bool
        Also return the probabilities, whose memory grows with the product of the lengths.
    gen_ : PhiloxGenerator, torch.Generator or (int, int), optional
        What dropout draws from: a generator, which moves on, or a seed and an offset. By default the generator that
        `manual_seed` seeds.
    convention : {"current", "legacy", "rocm", "aotriton"}
        Whose arguments and results. ``legacy`` is the older CUDA function: without `softcap` in the argument list, seed
        and offset as two numbers. ``rocm`` and ``aotriton`` return two numbers as well, and round no lengths up;
        ``aotriton`` has no `softcap`.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.

    Returns
    -------
    out : array, (b, len_q, heads_q, dim_v)
        In the dtype of q; 0 for queries that see no key.
    q, k, v : array
        The arguments.
    softmax_lse : array, (b, heads_q, len_q)
        Natural log-sum-exp in float32 (float64 for float64 tensors); +inf for queries that see no key.
    rng_state : array of uint64, (2,)
        Seed and offset for `mha_bwd`; zeros without dropout. In the other conventions the seed, int64 without
        dimensions, and empty without dropout.
    unused : array of uint64, ()
        A placeholder. In the other conventions the offset.
    probabilities : array in the dtype of q
        With `return_softmax` the softmax before dropout, (b, heads_q, len_q, len_kv) with both lengths rounded up to
        multiples of 128 by zeros; a minus sign, that of -0.0 included, says that dropout dropped it. Otherwise empty.

    Raises
    ------
    InvalidArgument
        If an argument is wrong or does not fit another; nothing has been launched or written then.
    UnsupportedProblem
        If no kernel runs this on the device, or not the preferred one.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> results = cuflash.mha_fwd(x, x, x, None, None, 0.0, 0.5, True, -1, -1, 0.0, False, None)
    >>> [result.shape for result in results[4:]]
    [(1, 2, 3), (2,), (), (0,)]
    """
    options = asked(
        softmax_scale=softmax_scale, causal=is_causal, window_size=explicit.window(window_size_left, window_size_right),
        softcap=softcap, dropout_p=p_dropout, vocabulary="mha_fwd",
    )  # fmt: skip
    return tuple(
        explicit.forward(
            explicit.CONVENTIONS[convention], options, backend,
            new(Arrays, q=q, k=k, v=v, alibi=alibi_slopes_, out=out_), gen_, return_softmax,
        )
    )  # fmt: skip


@_conventional
def mha_varlen_fwd(
    q: Array,
    k: Array,
    v: Array,
    out_: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    seqused_k: Array | None = None,
    block_table_: Array | None = None,
    alibi_slopes_: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    softcap: float = 0.0,
    return_softmax: bool = False,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    *,
    convention: str = "current",
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, ...]:
    """Attention of packed sequences, with PyTorch's arguments and its eight results.

    Parameters
    ----------
    q : array, (total_q, heads_q, dim)
        Queries of all sequences.
    k, v : array, (total_kv, heads_kv, dim) and (total_kv, heads_kv, dim_v)
        Keys and values; with `block_table_` (num_pages, page_size, heads_kv, dim) and likewise.
    out_ : array, (total_q, heads_q, dim_v), optional
        Filled and returned instead of a new array.
    cu_seqlens_q, cu_seqlens_k : array of int32, (b + 1,)
        Where sequences start, and the end of the last. With pages, the differences of `cu_seqlens_k` are lengths.
    seqused_k : array of int32, (b,), optional
        How many keys of each sequence, from its first, take part.
    block_table_ : array of int32, (b, max_pages), optional
        Key ``j`` of sequence ``b`` is row ``j % page_size`` of page ``block_table_[b, j // page_size]``, for any size
        of pages. Pages may be shared, and numbers behind a sequence's last key are not read.
    alibi_slopes_ : array of float32, (heads_q,) or (b, heads_q), optional
        As for `mha_fwd`, with each sequence's own lengths.
    max_seqlen_q, max_seqlen_k : int, optional
        At least as long as the longest sequence; None reads `cu_seqlens`, for which a GPU is waited.
    zero_tensors : bool
        Rows behind the last sequence have output 0 either way. Their log-sum-exp is -inf if True and +inf if not.
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, return_softmax, gen_
        As for `mha_fwd`.
    convention : {"current", "legacy", "rocm", "aotriton"}
        As for `mha_fwd`; ``legacy`` has no `block_table_` either, and all but ``current`` pad the log-sum-exp.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    out : array, (total_q, heads_q, dim_v)
        In the dtype of q.
    q, k, v : array
        The arguments.
    softmax_lse : array, (heads_q, total_q)
        As for `mha_fwd`; (b, heads_q, max_seqlen_q) in the other conventions, padded like rows of no sequence.
    rng_state, unused, probabilities : array
        As for `mha_fwd`, with the probabilities (b, heads_q, max_seqlen_q, max_seqlen_k), lengths rounded up.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    options = asked(
        softmax_scale=softmax_scale, causal=is_causal, window_size=explicit.window(window_size_left, window_size_right),
        softcap=softcap, dropout_p=p_dropout, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        vocabulary="mha_fwd", validate=validate,
    )  # fmt: skip
    explicit.require(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    arrays = new(
        Arrays, q=q, k=k, v=v, alibi=alibi_slopes_, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
        seqused_kv=seqused_k, table=block_table_, out=out_,
    )  # fmt: skip
    return tuple(
        explicit.forward(
            explicit.CONVENTIONS[convention], options, backend, arrays, gen_, return_softmax, zero_tensors,
        )
    )  # fmt: skip


@_conventional
def mha_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dq_: Array | None = None,
    dk_: Array | None = None,
    dv_: Array | None = None,
    alibi_slopes_: Array | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    philox_seed: Array | int | None = None,
    philox_offset: Array | int | None = None,
    *,
    convention: str = "current",
    backend: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of `mha_fwd`, with PyTorch's arguments and its four results.

    Parameters
    ----------
    dout : array, (b, len_q, heads_q, dim_v)
        Gradient of the output, in the dtype of q.
    q, k, v, out, softmax_lse : array
        Arguments and results of `mha_fwd`; softmax_lse is one number a row, with the limit of `flash_attn_backward`.
    dq_, dk_, dv_ : array, optional
        Filled and returned instead of new arrays, for example slices of one packed array.
    alibi_slopes_, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        As in the forward.
    deterministic : bool
        Give the same bits on every run, for some of the speed.
    philox_seed, philox_offset : array or int, optional
        What the forward returned, needed with dropout: the pair and the placeholder, or two numbers.
    convention : {"current", "legacy", "rocm", "aotriton"}
        As in the forward.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v; 0 where nothing is visible.
    softmax_d : array, (b, heads_q, len_q rounded up to a multiple of 128)
        ``(1 - p_dropout) * sum(dout * out)`` of each row in float32 (float64 for float64 tensors), then zeros; not
        rounded up in the conventions ``rocm`` and ``aotriton``.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    options = asked(
        softmax_scale=softmax_scale, causal=is_causal, window_size=explicit.window(window_size_left, window_size_right),
        softcap=softcap, dropout_p=p_dropout, deterministic=deterministic, vocabulary="mha_bwd",
    )  # fmt: skip
    arrays = new(
        Arrays, q=q, k=k, v=v, alibi=alibi_slopes_, dout=dout, lse=softmax_lse, out=out, dq=dq_, dk=dk_, dv=dv_
    )
    results = explicit.backward(
        explicit.CONVENTIONS[convention], options, backend, arrays, philox_seed=philox_seed,
        philox_offset=philox_offset,
    )  # fmt: skip
    return results[:4]


@_conventional
def mha_varlen_bwd(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    softmax_lse: Array,
    dq_: Array | None,
    dk_: Array | None,
    dv_: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    alibi_slopes_: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    p_dropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = False,
    window_size_left: int | None = -1,
    window_size_right: int | None = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    philox_seed: Array | int | None = None,
    philox_offset: Array | int | None = None,
    *,
    seqused_k: Array | None = None,
    convention: str = "current",
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of `mha_varlen_fwd`, with PyTorch's arguments and its four results.

    Parameters
    ----------
    dout : array, (total_q, heads_q, dim_v)
        Gradient of the output, in the dtype of q.
    q, k, v, out, softmax_lse : array
        Arguments and results of `mha_varlen_fwd`, without pages; softmax_lse as for `mha_bwd`.
    dq_, dk_, dv_ : array, optional
        Filled and returned instead of new arrays.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As in the forward.
    zero_tensors : bool
        Rows that belong to no sequence have gradients 0 either way; PyTorch leaves them undefined if False.
    alibi_slopes_, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        As in the forward.
    deterministic, philox_seed, philox_offset
        As for `mha_bwd`.
    seqused_k : array of int32, (b,), optional
        As in the forward; PyTorch's backward has no such argument.
    convention : {"current", "legacy", "rocm", "aotriton"}
        As in the forward.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    dq, dk, dv : array
        Shaped and typed like q, k and v.
    softmax_d : array, (heads_q, total_q + 128 * b)
        As from `mha_bwd`; sequence ``e`` starts at column ``cu_seqlens_q[e] + 128 * e``. In the other conventions
        (b, heads_q, max_seqlen_q), rounded up to a multiple of 128 in ``legacy``.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    options = asked(
        softmax_scale=softmax_scale, causal=is_causal, window_size=explicit.window(window_size_left, window_size_right),
        softcap=softcap, dropout_p=p_dropout, deterministic=deterministic, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, vocabulary="mha_bwd", validate=validate,
    )  # fmt: skip
    explicit.require(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    arrays = new(
        Arrays, q=q, k=k, v=v, alibi=alibi_slopes_, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
        seqused_kv=seqused_k, dout=dout, lse=softmax_lse, out=out, dq=dq_, dk=dk_, dv=dv_,
    )  # fmt: skip
    results = explicit.backward(
        explicit.CONVENTIONS[convention], options, backend, arrays, philox_seed=philox_seed,
        philox_offset=philox_offset, zero_tensors=zero_tensors,
    )  # fmt: skip
    return results[:4]
