"""Maps of attention: which share of its probability a query gives to which keys, for long sequences in bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import drawing
from cuflash.api.bins import BinSums, queries_and_keys
from cuflash.api.keywords import WrittenMask, WrittenScore
from cuflash.arrays import Array, Guest, framework_in_memory
from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.masks import Alignment
from cuflash.numbers import integer, shown
from cuflash.ops import Arrays, Options, asked, check, with_mods
from cuflash.ops.lengths import check_readable, with_lengths
from cuflash.sheet import Sheet

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMap:
    """What `attention_map` found; a notebook shows the numbers of each head, `plot` draws.

    Attributes
    ----------
    mass : array, (b, heads_q, rows, bins)
        The mean, over the queries of a row, of the probability that they give to the keys of a bin, in float32
        (float64 for float64 tensors). A row sums to 1 less the sink's share; to 0 where its queries see no key, or
        where a shorter sequence of a packed call has no such row.
    entropy : array, (b, heads_q)
        Of a query's distribution over the bins, and the sink where there is one, in nats, in the mean over the
        queries of the map that see a key. Where bins are single keys it is that of the attention; that of bins of n
        keys is less by at most log(n).
    first_share : array, (b, heads_q)
        The probability that the first key of its sequence gets, in the same mean: models without a sink often make one
        of that key.
    sink_share : array, (b, heads_q)
        The same of the sink; 0 without one.
    len_q, len_kv : tuple of int
        Queries and keys of each sequence, those in use.
    rows : tuple of int or None
        The queries that were chosen; None where rows are bins of queries.
    """

    mass: Array
    entropy: Array
    first_share: Array
    sink_share: Array
    len_q: tuple[int, ...]
    len_kv: tuple[int, ...]
    rows: tuple[int, ...] | None

    @property
    def _title(self) -> str:
        batch, heads, rows, bins = self.mass.shape
        longest = max(self.len_q, default=0), max(self.len_kv, default=0)
        what = f"{rows} x {bins} bins" if self.rows is None else f"{rows} chosen queries in {bins} bins of keys"
        return f"attention map: b{batch} h{heads}, {longest[0]:,} x {longest[1]:,} in {what}"

    def sheet(self) -> Sheet:
        """The numbers of each head, in the mean over the sequences that have any."""
        means = [_means(share) for share in (self.entropy, self.first_share, self.sink_share)]
        lines = []
        for head, (entropy, first, sink) in enumerate(zip(*means, strict=True)):
            text = f"entropy {entropy:.2f} nats, {first:.1%} to the first key"
            lines.append((f"head {head}", text + (f", {sink:.1%} to the sink" if any(means[2]) else "")))
        return Sheet(self._title, lines)

    def __repr__(self) -> str:
        return f"<{self._title}>"

    def __str__(self) -> str:
        return str(self.sheet())

    def _repr_html_(self) -> str:
        """The numbers, for a notebook."""
        return self.sheet()._repr_html_()

    def plot(
        self, head: int | None = None, sequence: int = 0, tokens: Sequence[str] | None = None, ax: Any = None
    ) -> drawing.Picture:
        """Draw the map of one head, or of all heads side by side.

        Shades go with the square root of the probability, from 0 to the largest of each map.

        Parameters
        ----------
        head : int, optional
            All heads if not given.
        sequence : int
            Which sequence of the batch.
        tokens : sequence of str, optional
            What stands at each key of the sequence, and at each of as many queries; for bins of single keys.
        ax : matplotlib axes, optional
            Drawn into instead of a figure of its own; for one head.

        Raises
        ------
        InvalidArgument
            If there is no such head or sequence, or not one token a key.
        ImportError
            Without matplotlib, which comes with the extra viz.
        """
        batch, heads, rows, bins = self.mass.shape
        _check_index("sequence", sequence, batch)
        if head is not None:
            _check_index("head", head, heads)
        chosen = range(heads) if head is None else [range(heads)[head]]
        if ax is not None and len(chosen) != 1:
            raise InvalidArgument("ax is given and head is None; name the head to draw.")
        len_q, len_kv = self.len_q[sequence], self.len_kv[sequence]
        rows, bins = rows if self.rows is not None else min(rows, len_q), min(bins, len_kv)
        if tokens is not None and (len(tokens) != len_kv or bins < len_kv):
            raise InvalidArgument(
                f"tokens has {len(tokens)} words for {len_kv} keys in {bins} bins; expected one for each key, in bins "
                "of single keys."
            )
        columns = min(4, len(chosen))
        side = 3.1 if len(chosen) > 1 else 4.8
        if ax is None:
            panels = drawing.panels(-(-len(chosen) // columns), columns, side, side * 1.08)[1].flat
        else:
            panels = np.array([ax]).flat
        figure = panels[0].figure
        for panel, one in zip(panels, chosen, strict=False):
            mass = np.array(self.mass[sequence, one, :rows, :bins].tolist()).reshape(rows, bins)
            self._draw(panel, mass, one, sequence, tokens, len_q, len_kv, small=len(chosen) > 1)
        for panel in panels[len(chosen) :]:
            panel.set_axis_off()
        return drawing.Picture(figure)

    def _draw(
        self,
        ax: Any,
        mass: np.ndarray,
        head: int,
        sequence: int,
        tokens: Sequence[str] | None,
        len_q: int,
        len_kv: int,
        small: bool,
    ) -> None:
        """One head."""
        numbers = [float(share[sequence, head]) for share in (self.entropy, self.first_share, self.sink_share)]
        extent = None if tokens is not None else (0, len_kv, len_q if self.rows is None else len(mass), 0)
        ax.imshow(np.sqrt(mass), cmap=drawing.SHARES, vmin=0, extent=extent, aspect="auto", interpolation="nearest")
        below = f"{numbers[0]:.2f} nats, {numbers[1]:.0%} first key"
        drawing.title(ax, f"head {head}", below + (f", {numbers[2]:.0%} sink" if numbers[2] else ""))
        drawing.quiet(ax)
        size = 6 if small else 8
        if tokens is not None:
            ax.set_xticks(range(len_kv), tokens, rotation=90, fontsize=size)
        if self.rows is not None:
            ticks = np.arange(len(mass)) + (0 if tokens is not None else 0.5)
            ax.set_yticks(ticks, [str(row) for row in self.rows], fontsize=size)
        elif tokens is not None and len(mass) == len_q == len_kv:
            ax.set_yticks(range(len_q), tokens, fontsize=size)
        if not small:
            ax.set_xlabel("key", fontsize=9, color=drawing.INK)
            ax.set_ylabel("query", fontsize=9, color=drawing.INK)


def attention_map(
    q: Array,
    k: Array,
    *,
    rows: Sequence[int] | None = None,
    bins: int = 256,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alignment: Alignment = "bottom-right",
    attn_mask: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    alibi_slopes: Array | None = None,
    attn_bias: Array | None = None,
    sink: Array | None = None,
    score_mod: WrittenScore = None,
    mask_mod: WrittenMask = None,
    block_mask: BlockMask | None = None,
) -> AttentionMap:
    """Say which share of its probability each query gives to which keys, in memory that grows with the lengths only.

    The kernels that compute attention compute the map: values that are 1 in the column of a key's bin and 0 elsewhere
    come out as the probability of each bin. The map is that of the softmax, before any dropout, and 16-bit
    probabilities are rounded as outputs are. On the way there are ``b * len_q * heads_q * bins`` numbers in the dtype
    of q.

    Parameters
    ----------
    q, k : array
        As for `flash_attn_func`, or, with `cu_seqlens_q`, packed as for `flash_attn_varlen_func`.
    rows : sequence of int, optional
        Queries to map one by one; negative ones count from the end of a sequence. By default all of them, in `bins`
        bins.
    bins : int
        Into how many bins of neighbours, of sizes as even as can be, the keys of each sequence go, and its queries
        unless `rows` chooses some. A sequence with fewer has a bin for each, and no others. More than 255 take a
        further call.
    softmax_scale, causal, window_size, softcap, alignment, attn_mask, alibi_slopes, attn_bias, sink
        As for `flash_attn_func`.
    score_mod, mask_mod, block_mask
        Likewise.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k
        As for `flash_attn_varlen_func`; their values are read and checked, for which a GPU is waited.

    Returns
    -------
    AttentionMap
        The map, and the entropy and the shares of sinks of each head, as arrays of the library of q.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        As `flash_attn_func`; if `rows` or `bins` are none that the sequences have.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q = k = np.zeros((1, 1024, 2, 8), np.float32)
    >>> cuflash.attention_map(q, k, bins=4, causal=True).mass[0, 0].round(2)
    array([[1.  , 0.  , 0.  , 0.  ],
           [0.69, 0.31, 0.  , 0.  ],
           [0.41, 0.41, 0.19, 0.  ],
           [0.29, 0.29, 0.29, 0.14]], dtype=float32)
    """
    try:
        options = asked(
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, alignment=alignment,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, validate=cu_seqlens_q is not None,
        )  # fmt: skip
        arrays = Arrays(
            q=q, k=k, v=k, mask=attn_mask, bias=attn_bias, alibi=alibi_slopes, sink=sink, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_k, seqused_q=seqused_q, seqused_kv=seqused_k,
        )  # fmt: skip
        if score_mod is not None or mask_mod is not None or block_mask is not None:
            options, arrays = with_mods(options, arrays, score_mod, mask_mod, block_mask=block_mask)
        return _map(options, arrays, _chosen(rows), _count(bins))
    except REFUSALS as error:
        shorten(error)
        raise


def _map(options: Options, arrays: Arrays, rows: tuple[int, ...] | None, bins: int) -> AttentionMap:
    """The map, for arrays of any library."""
    names = options.names(arrays)
    framework = framework_in_memory(names, arrays.each())
    if isinstance(framework, Guest):
        _, views = framework.borrow(names, arrays.each())
        borrowed = arrays.like(views)
        whole = _map(options, borrowed, rows, bins)
        lent = framework.lend([whole.mass, whole.entropy, whole.first_share, whole.sink_share], borrowed, arrays.q)
        fields = ("mass", "entropy", "first_share", "sink_share")
        return replace(whole, **dict(zip(fields, lent, strict=True)))
    check_readable(framework, "what a map of attention shows", "Draw maps before or after.")
    options = with_lengths("forward", options, arrays)
    problem = check.problem_of("forward", options, options.views(framework, arrays))
    with framework.arithmetic(arrays.q):
        queries, keys = queries_and_keys(problem, arrays)
        longest = max(queries.lengths, default=0)
        for row in rows or ():
            if not -longest <= row < longest:
                raise InvalidArgument(f"rows has {row}, but no sequence has more than {longest} queries.")
        places, inside = queries.members(rows, bins)
        sums = BinSums(framework, problem, options, arrays, places, inside)
        mass, entropy, first = sums.columns(keys, min(bins, max(keys.lengths, default=0)))
        seen, sunk, of_sink = sums.states()
        counts = framework.moved(np.maximum(inside.sum(axis=2), 1).astype(np.float64), arrays.q)
        mass = mass / framework.cast(counts, mass.dtype)[:, :, None, None]
        by_head = framework.full((*sums.shape[::2], *mass.shape[1::2]), 0, mass.dtype, arrays.q)
        by_head[...] = mass.swapaxes(1, 2)
        return AttentionMap(
            mass=by_head,
            entropy=(entropy + of_sink) / seen,
            first_share=first / seen,
            sink_share=sunk / seen,
            len_q=tuple(queries.lengths),
            len_kv=tuple(keys.lengths),
            rows=rows,
        )


def _means(shares: Any) -> list[float]:
    """Of each head, over the sequences that have a number."""
    heads = np.array(shares.tolist()).reshape(shares.shape).T
    return [float(head[~np.isnan(head)].mean()) if (~np.isnan(head)).any() else float("nan") for head in heads]


def _chosen(rows: Any) -> tuple[int, ...] | None:
    """The queries that a caller names."""
    if rows is None:
        return None
    listed = rows.tolist() if isinstance(rows, np.ndarray) else rows
    numbers = [integer(row) for row in listed] if isinstance(listed, Sequence) else []
    if not numbers or None in numbers:
        raise InvalidArgument(f"rows is {shown(rows)}; expected numbers of queries, for example [0, 1, -1].")
    return tuple(row for row in numbers if row is not None)


def _count(bins: Any) -> int:
    """A number of bins."""
    number = integer(bins)
    if number is None or number < 1:
        raise InvalidArgument(f"bins is {shown(bins)}; expected an integer of at least 1.")
    return number


def _check_index(name: str, index: Any, count: int) -> None:
    number = integer(index)
    if number is None or not -count <= number < count:
        raise InvalidArgument(f"{name} is {shown(index)}; expected the number of one, of {count}.")
