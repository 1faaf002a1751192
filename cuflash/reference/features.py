"""What a call asks for beyond its tensors, and how that looks to one dense problem in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cuflash.dropout import Dropout
from cuflash.masks import Mask
from cuflash.mods import Mod
from cuflash.reference.dropout import KeepMask
from cuflash.reference.listed import Listed
from cuflash.reference.scores import Scores
from cuflash.reference.tiles import grouped_pairs
from cuflash.reference.written import Written

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


class Policies(NamedTuple):
    """The rules of one dense problem."""

    scores: Scores
    sink: np.ndarray | None  # (heads_kv, group)
    dropout: KeepMask | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The keywords of every function of the backend.

    Of packed and paged sequences, b is their number, and len_q and len_kv the longest one's: pairs are numbered from 0
    in every sequence.
    """

    band: Mask
    """Which keys a query sees by its position."""
    softmax_scale: float
    """Factor of q.k, of any sign."""
    softcap: float = 0.0
    """Logits become ``softcap * tanh(logit / softcap)``; 0 leaves them alone."""
    mask: np.ndarray | None = None
    """bool, broadcastable to (b, heads_q, len_q, len_kv); True lets a pair take part that the band lets through too."""
    alibi: np.ndarray | None = None
    """(heads_q,) or (b, heads_q) fp32; ``slope * |i + off - j|`` is taken off, ``i + off`` on the band's diagonal."""
    bias: np.ndarray | None = None
    """Added to the logits, any float dtype, broadcastable to (b, heads_q, len_q, len_kv); -inf hides a pair."""
    score_mod: Mod | None = None
    """What a caller's function makes of the capped score, before ALiBi and bias; -inf hides a pair."""
    mask_mod: Mod | None = None
    """Lets a pair take part that the band lets through too."""
    block_mask: BlockMask | None = None
    """The same, by lists of blocks; those in no list are not visited. Of the lengths of q and k, or longer."""
    captured: tuple[np.ndarray, ...] = ()
    """The arrays that `score_mod` reads, then those of `mask_mod`."""
    sink: np.ndarray | None = None
    """(heads_q,) logits that take part in every row's softmax, and in its lse, without a value."""
    dropout: Dropout | None = None
    """What happens to probabilities after the softmax; lse is not affected."""
    rng_state: tuple[int, int] | np.ndarray | None = None
    """Philox seed and offset, needed with dropout."""

    @property
    def of_score_mod(self) -> tuple[np.ndarray, ...]:
        """The arrays that `score_mod` reads."""
        return () if self.score_mod is None else self.captured[: len(self.score_mod.operands)]

    def policies(
        self,
        q: tuple[int, ...],
        k: tuple[int, ...],
        *,
        first: int = 0,
        longest: tuple[int, int] | None = None,
    ) -> Policies:
        """The rules of batch elements from `first` on, (b, s, h, d) shapes `q` and `k`.

        `longest` are the query and key lengths that the word scheme of dropout numbers by; None: those of q and k.
        """
        (batch, len_q, heads_q, _), (_, len_kv, heads_kv, _) = q, k
        here, group = slice(first, first + batch), heads_q // heads_kv

        def pairs(x: np.ndarray | None) -> np.ndarray | None:
            if x is None:
                return None
            x = grouped_pairs(x, heads_kv)
            return x[here] if len(x) > 1 else x

        # (h,) and (b, h) slopes are pairs that broadcast along rows and keys.
        slopes = None if self.alibi is None else pairs(self.alibi[..., None, None])
        unit, softcap = float(self.softmax_scale), float(self.softcap)
        read = self.of_score_mod
        score_mod, mask_mod = (
            None if mod is None else Written(mod, captured, first, group)
            for mod, captured in ((self.score_mod, read), (self.mask_mod, self.captured[len(read) :]))
        )
        listed = None if self.block_mask is None else Listed(self.block_mask, first, group)
        terms = pairs(self.mask), slopes, pairs(self.bias), score_mod, mask_mod, listed
        scores = Scores(self.band, len_q, len_kv, unit, softcap, *terms)
        sink = None if self.sink is None else self.sink.reshape(heads_kv, group)
        if self.dropout is None or not self.dropout.p:
            return Policies(scores, sink, None)
        assert self.rng_state is not None
        seed, offset = (int(x) % 2**64 for x in self.rng_state)
        numbers = np.arange(first * heads_q, (first + batch) * heads_q, dtype=np.uint64)
        max_q, max_kv = longest or (len_q, len_kv)
        dropout = KeepMask(
            self.dropout, seed, offset, numbers.reshape(batch, heads_kv, group), len_kv, plane=max_q * max_kv
        )
        return Policies(scores, sink, dropout)
