"""Memory-efficient attention with the names, argument orders and results of PyTorch's ``_efficient_attention_*``.

Those are the operators over the kernel of ``mem_eff_attention/kernel_forward.h``, with masks by number, padded
log-sum-exps and that kernel's dropout. Arrays are NumPy's, CuPy's or torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuflash import ops
from cuflash.api.padding import extended, longest, padded
from cuflash.api.pytorch import backend as backends
from cuflash.api.pytorch import explicit
from cuflash.arrays import Library
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.generator import PhiloxGenerator
from cuflash.numbers import flag, integer, is_array, shown
from cuflash.ops import Arrays, Options, asked, new

Array = Any

LSE_ROWS = 32
"""What the kernel's log-sum-exps are padded to a multiple of."""


class Efficient(NamedTuple):
    """What `efficient_attention_forward` returns, in this order."""

    output: Array
    logsumexp: Array
    philox_seed: Array
    philox_offset: Array
    max_seqlen_batch_q: int
    max_seqlen_batch_k: int


def efficient_attention_forward(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    custom_mask_type: int = 0,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Array | None = None,
    window_size: int | None = None,
    gen_: PhiloxGenerator | tuple[int, int] | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> Efficient:
    """Attention with the arguments and results of PyTorch's ``_efficient_attention_forward``.

    Parameters
    ----------
    query : array, (b, len_q, heads_q, dim)
        Queries; (1, total_q, heads_q, dim) of packed sequences.
    key, value : array, (b, len_kv, heads_kv, dim) and (b, len_kv, heads_kv, dim_v)
        Keys and values; heads_q must be a multiple of heads_kv.
    bias : array, broadcastable to (b, heads_q, len_q, len_kv), optional
        Added to the scaled scores, in the dtype of query or float32, with any strides, 0 among them.
    cu_seqlens_q, cu_seqlens_k : array of int32, (b + 1,), optional
        Where packed sequences start, and the end of the last; both or neither.
    max_seqlen_q, max_seqlen_k : int, optional
        At least as long as the longest packed sequence; None reads `cu_seqlens`, for which a GPU is waited. Lengths of
        dense tensors are theirs.
    dropout_p : float
        Probability of dropping, 0 <= p < 1, by the 32-bit scheme of PyTorch's memory-efficient kernels. Pairs of packed
        sequences are numbered by the longest lengths, so the backward needs the same ones.
    custom_mask_type : {0, 1, 2}
        No mask, causal top-left or causal bottom-right aligned.
    compute_log_sumexp : bool
        Return the log-sum-exp.
    scale : float, optional
        Factor of ``query @ key.T``, of any sign; ``dim ** -0.5`` by default.
    seqlen_k : array of int32, (b,), optional
        How many keys of each packed sequence take part.
    window_size : int, optional
        With a causal mask, how many keys up to its own a query sees; None and 0 are all.
    gen_ : PhiloxGenerator, torch.Generator or (int, int), optional
        As for `mha_fwd`.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    output : array, (b, len_q, heads_q, dim_v)
        Or (1, total_q, heads_q, dim_v); 0 for queries that see no key.
    logsumexp : array, (b, heads_q, longest len_q rounded up to a multiple of 32)
        Natural logarithms in float32 (float64 for float64 tensors); +inf in the padding and for queries that see no
        key. (b, heads_q, 0) unless `compute_log_sumexp`.
    philox_seed, philox_offset : array of int64, ()
        For the backward; empty without dropout.
    max_seqlen_batch_q, max_seqlen_batch_k : int
        The longest lengths.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        library = explicit.library_of("query", query)
        packed = _is_packed(cu_seqlens_q, cu_seqlens_k)
        flag("compute_log_sumexp", compute_log_sumexp)
        options = _options(scale, custom_mask_type, window_size, dropout_p, max_seqlen_q, max_seqlen_k, validate)
        if packed:
            q, k, v = (_unbatched(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        else:
            q, k, v = query, key, value
            options = explicit.dense_lengths(options, query, key)
        with explicit.drawing_from(gen_) as generator:
            arrays = new(
                Arrays, q=q, k=k, v=v, bias=bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
                seqused_kv=seqlen_k,
            )  # fmt: skip
            out, lse, *drawn = backends.call(ops.forward, options, backend, arrays, generator)

        heads = q.shape[-2]
        if cu_seqlens_q is not None:
            lengths = longest(cu_seqlens_q, max_seqlen_q), longest(cu_seqlens_k, max_seqlen_k)
            batch, out = len(cu_seqlens_q) - 1, out[None]
        else:
            lengths, batch = (q.shape[1], k.shape[1]), q.shape[0]
        if compute_log_sumexp:
            rows = -(-lengths[0] // LSE_ROWS) * LSE_ROWS
            with library.arithmetic(query):
                if packed:
                    lse = padded(library, lse, cu_seqlens_q, rows, np.inf)
                else:
                    lse = extended(library, lse, rows, np.inf)
        else:
            lse = library.full((batch, heads, 0), 0, lse.dtype, query)
        seed, offset = explicit.scalars(library, drawn[0] if drawn else None, query)
        return Efficient(out, lse, seed, offset, *lengths)
    except REFUSALS as error:
        shorten(error)
        raise


def efficient_attention_backward(
    grad_out_: Array,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    out: Array,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    logsumexp: Array,
    dropout_p: float,
    philox_seed: Array | int | None,
    philox_offset: Array | int | None,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: int | None = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
    seqlen_k: Array | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients with the arguments and results of PyTorch's ``_efficient_attention_backward``.

    Parameters
    ----------
    grad_out_ : array, shaped like `out`
        Gradient of the output.
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, custom_mask_type : array or int
        Arguments of the forward, with the longest lengths that it returned.
    out, logsumexp, philox_seed, philox_offset : array
        Results of the forward with ``compute_log_sumexp=True``; the random state may also be two integers. logsumexp is
        one number a row, with the limit of `flash_attn_backward`.
    dropout_p, scale, window_size, seqlen_k
        As in the forward.
    bias_requires_grad : bool
        Compute the gradient of the bias.
    num_splits_key : int, optional
        1 adds the shares of key tiles to the gradient of the queries in a fixed order, like `deterministic`. None and
        greater numbers let as many blocks as there are key tiles add in any order.
    shared_storage_dqdkdv : bool
        Return slices of one (b, len, 3, heads, dim) array; query, key and value must have one shape.
    deterministic : bool
        Give the same bits on every run; not with more than one key split.
    backend : {"flash", "mem_eff", "default"}, optional
        As for `preferred_backend`, for this call.
    validate : bool
        As for `flash_attn_varlen_func`.

    Returns
    -------
    grad_query, grad_key, grad_value : array
        Shaped and typed like query, key and value.
    grad_bias : array or None
        Typed like the bias and shaped like it, with size 1 along axes of stride 0: summed over what it is broadcast
        over. None unless `bias_requires_grad`.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `mha_fwd`.
    """
    try:
        library = explicit.library_of("query", query)
        packed = _is_packed(cu_seqlens_q, cu_seqlens_k)
        ordered = _ordered(num_splits_key, flag("deterministic", deterministic))
        options = _options(scale, custom_mask_type, window_size, dropout_p, max_seqlen_q, max_seqlen_k, validate)
        options = options.replace(deterministic=ordered)
        tensors = {"q": query, "k": key, "v": value, "out": out, "dout": grad_out_}
        if packed:
            tensors = {name: _unbatched(options.name(name), x) for name, x in tensors.items()}
        explicit.require(logsumexp=logsumexp)
        if not packed:
            options = explicit.dense_lengths(options, query, key)
            if len(query.shape) == 4 and is_array(logsumexp) and len(logsumexp.shape) == 3:  # others are refused later
                logsumexp = logsumexp[..., : query.shape[1]]
        if flag("shared_storage_dqdkdv", shared_storage_dqdkdv):
            with library.arithmetic(query):
                shared = _shared(library, query, key, value)
            for i, name in enumerate(("dq", "dk", "dv")):
                tensors[name] = shared[0, :, i] if packed else shared[:, :, i]
        arrays = new(
            Arrays, **tensors, bias=bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k, seqused_kv=seqlen_k,
            lse=logsumexp,
        )  # fmt: skip
        *gradients, _, grad_bias = explicit.gradients(
            explicit.CK, options, backend, arrays, philox_seed=philox_seed, philox_offset=philox_offset,
            bias_requires_grad=bias_requires_grad,
        )  # fmt: skip
        return (*(x[None] if packed else x for x in gradients), grad_bias)
    except REFUSALS as error:
        shorten(error)
        raise


def _options(
    scale: float | None,
    mask_type: int,
    window: int | None,
    p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    validate: bool,
) -> Options:
    """The keywords of the kernel's functions in those of ops."""
    kind = integer(mask_type)
    if kind not in (0, 1, 2):
        raise InvalidArgument(
            f"custom_mask_type is {shown(mask_type)}; "
            "expected 0 for none, 1 for causal top-left or 2 for causal bottom-right."
        )
    keys = 0 if window is None else integer(window)
    if keys is None or keys < 0:
        raise InvalidArgument(
            f"window_size is {shown(window)}; expected a number of keys from 1, or None or 0 for all."
        )
    if keys and not kind:
        raise InvalidArgument(
            f"window_size is {keys} but custom_mask_type is 0; windows end at a query's own key. "
            "Pass custom_mask_type 1 or 2."
        )
    return asked(
        softmax_scale=scale, causal=kind > 0, window_size=(keys - 1, -1),
        alignment="top-left" if kind == 1 else "bottom-right", dropout_p=p, dropout_scheme="word",
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, validate=validate, vocabulary="efficient",
        empty_lse=np.inf, tail_lse=np.inf,
    )  # fmt: skip


def _is_packed(cu_seqlens_q: Array | None, cu_seqlens_k: Array | None) -> bool:
    """Whether sequences are packed."""
    is_there = {"cu_seqlens_q": cu_seqlens_q is not None, "cu_seqlens_k": cu_seqlens_k is not None}
    if sum(is_there.values()) == 1:
        one, other = sorted(is_there, key=is_there.__getitem__, reverse=True)
        raise InvalidArgument(f"{one} is given but {other} is not; packed sequences need both.")
    return is_there["cu_seqlens_q"]


def _unbatched(name: str, x: Array) -> Array:
    """(1, total, h, d) to (total, h, d)."""
    explicit.require(**{name: x})
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 4 or shape[0] != 1:
        raise InvalidArgument(f"{name} has shape {shape}; expected (1, total, h, d) with cu_seqlens_q.")
    return x[0]


def _ordered(num_splits_key: int | None, deterministic: bool) -> bool:
    """Whether key tiles add to a gradient in a fixed order."""
    if num_splits_key is None:
        return deterministic
    splits = integer(num_splits_key)
    if splits is None or splits < 1:
        raise InvalidArgument(f"num_splits_key is {shown(num_splits_key)}; expected a number from 1, or None.")
    if deterministic and splits > 1:
        raise InvalidArgument(
            f"num_splits_key is {splits} and deterministic is True; only one split has a fixed order. Drop one."
        )
    return splits == 1


def _shared(library: Library, query: Array, key: Array, value: Array) -> Array:
    """One array for three gradients."""
    shapes = [tuple(getattr(x, "shape", ())) for x in (query, key, value)]
    if len(set(shapes)) > 1:
        raise InvalidArgument(
            f"shared_storage_dqdkdv is True and query, key and value have shapes {shapes[0]}, {shapes[1]} and "
            f"{shapes[2]}; expected one shape."
        )
    if len(shapes[0]) != 4:
        raise InvalidArgument(f"query has shape {shapes[0]}; expected (b, s, h, d).")
    batch, rows, heads, dim = shapes[0]
    return library.full((batch, rows, 3, heads, dim), 0, query.dtype, query)
