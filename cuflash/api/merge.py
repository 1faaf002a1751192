"""Merging attention of the same queries over different keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cuflash.arrays import Array, ArrayT
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import shown
from cuflash.ops import merge as ops


def merge_attention(outs: Sequence[ArrayT], lses: Sequence[Array]) -> tuple[ArrayT, Array]:
    """Attention over all keys, from results of the same queries over some of them each.

    With ``lse = log(sum(exp(lses)))`` over the parts, ``out = sum(exp(lses - lse) * outs)``: what one call over the
    keys of all parts would have returned, but for rounding of the parts. Parts are taken in their order, and sums are
    in float32 (float64 for float64 tensors). A part that saw no key, whose log-sum-exp is -inf or +inf, adds nothing,
    whatever its output holds; where all are such, the output is 0 and the log-sum-exp -inf.

    Parameters
    ----------
    outs : sequence of array, (b, s, h, d) or (total, h, d)
        Outputs of the parts, at least one, of one shape and dtype.
    lses : sequence of array, (b, h, s) or (h, total)
        Their log-sum-exps, in float32 (float64 for float64 outputs).

    Returns
    -------
    out : array, (b, s, h, d) or (total, h, d)
        In the dtype of `outs`.
    lse : array, (b, h, s) or (h, total)
        In that of `lses`.

    Raises
    ------
    InvalidArgument
        If there is no part, or the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 2, 4))
    >>> parts = [cuflash.flash_attn_func(q, k[:, n], v[:, n], return_lse=True) for n in (slice(3), slice(3, 8))]
    >>> out, lse = cuflash.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, cuflash.flash_attn_func(q, k, v)))
    True
    """
    try:
        merged = ops.merge(*_parts(outs, lses))
        return merged.out, merged.lse
    except REFUSALS as error:
        shorten(error)
        raise


def merge_attention_vjp(
    outs: Sequence[ArrayT], lses: Sequence[Array]
) -> tuple[tuple[ArrayT, Array], Callable[..., tuple[list[ArrayT], list[Array]]]]:
    """`merge_attention` and the function that pulls gradients back through it.

    Parameters
    ----------
    outs, lses : sequence of array
        As for `merge_attention`. They and the merged results are kept until the pullback is dropped.

    Returns
    -------
    (out, lse) : (array, array)
        As from `merge_attention`.
    pullback : callable
        ``pullback(dout, dlse=None) -> (douts, dlses)``, lists of gradients like `outs` and `lses`. Those of parts and
        rows that saw no key are 0.

    Raises
    ------
    InvalidArgument
        As `merge_attention`.

    Examples
    --------
    Through attention over two halves of the keys::

        (out0, lse0), pull0 = cuflash.flash_attn_vjp(q, k0, v0, return_lse=True)
        (out1, lse1), pull1 = cuflash.flash_attn_vjp(q, k1, v1, return_lse=True)
        (out, lse), pull = cuflash.merge_attention_vjp([out0, out1], [lse0, lse1])
        (dout0, dout1), (dlse0, dlse1) = pull(dout)
        dq0, dk0, dv0 = pull0(dout0, dlse0)
    """
    try:
        parts = _parts(outs, lses)
        merged = ops.merge(*parts, exact=True)
        out = ops.as_parts(merged)

        def pullback(dout: Array, dlse: Array | None = None) -> tuple[list[ArrayT], list[Array]]:
            """Gradients of the parts for those of the output, and of the log-sum-exp if it is not zero."""
            try:
                return ops.merge_backward(merged, dout, dlse)
            except REFUSALS as error:
                shorten(error)
                raise

        return (out, merged.lse), pullback
    except REFUSALS as error:
        shorten(error)
        raise


def _parts(outs: Sequence[ArrayT], lses: Sequence[Array]) -> tuple[list[ArrayT], list[Array]]:
    """The parts as lists; stacked arrays are sequences, too."""
    for name, arrays in (("outs", outs), ("lses", lses)):
        if not hasattr(arrays, "__len__") or not hasattr(arrays, "__getitem__") or isinstance(arrays, str | dict):
            raise InvalidArgument(f"{name} is {shown(arrays)}; expected a list of arrays, one for each part.")
    if not len(outs) or len(outs) != len(lses):
        raise InvalidArgument(
            f"outs has {len(outs)} arrays and lses {len(lses)}; expected one of each for every part, of which there is "
            "one at least."
        )
    return [outs[i] for i in range(len(outs))], [lses[i] for i in range(len(lses))]
