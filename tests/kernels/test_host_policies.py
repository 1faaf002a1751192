"""kernels/attention/*.cuh compiled for the CPU, against brute force and NumPy."""

from __future__ import annotations

import ctypes
import itertools
from ctypes import c_double, c_longlong, c_void_p
from functools import cache

import numpy as np
import pytest
from host.build import build, why_not
from hypothesis import given
from hypothesis import strategies as st

from cuflash.ops.block import UNBOUNDED

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

UNIT = r"""
#include "attention/gradient.cuh"
#include "attention/heads.cuh"
#include "attention/mask.cuh"
#include "attention/query_tile.cuh"
#include "attention/schedule.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "attention/split.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace cuflash;

struct Lengths { int len_q, len_kv; int64 batch; };

template <class Mask>
void mask_rules(const Attention& a, const Lengths& lengths, int head, int rows_kv, int tile_q, int tile_kv, bool* keep,
                Tiles* kv_tiles, Tiles* q_tiles) {
  const Mask mask(a, lengths, head);
  for (int q = 0; q < lengths.len_q; ++q) {
    for (int kv = 0; kv < rows_kv; ++kv) keep[q * rows_kv + kv] = mask.keep(q, kv);
  }
  for (int q = 0; q < lengths.len_q; q += tile_q) kv_tiles[q / tile_q] = mask.kv_tiles(q, tile_q, tile_kv);
  for (int kv = 0; kv < rows_kv; kv += tile_kv) q_tiles[kv / tile_kv] = mask.q_tiles(kv, tile_kv, tile_q);
}

EXPORT void band(int kind, int len_q, int len_kv, int rows_kv, int left, int right, int top_left, int tile_q,
                 int tile_kv, bool* keep, Tiles* kv_tiles, Tiles* q_tiles) {
  Attention a{};
  a.window_left = left;
  a.window_right = right;
  a.top_left = top_left;
  const Lengths lengths{len_q, len_kv, 0};
  const auto rules = kind == 0 ? mask_rules<NoMask> : kind == 1 ? mask_rules<CausalMask> : mask_rules<WindowMask>;
  rules(a, lengths, 0, rows_kv, tile_q, tile_kv, keep, kv_tiles, q_tiles);
}

EXPORT void bounds(int len_q, int len_kv, int left, int right, int top_left, int row, int* out) {
  Attention a{};
  a.window_left = left;
  a.window_right = right;
  a.top_left = top_left;
  const WindowMask mask(a, Lengths{len_q, len_kv, 0}, 0);
  out[0] = mask.kv_begin(row);
  out[1] = mask.kv_end(row);
  out[2] = mask.q_begin(row);
  out[3] = mask.q_end(row);
}

EXPORT void tensor(const uint8* mask, const int64* strides, int batch, int head, int len_q, int len_kv, int rows_kv,
                   int tile_q, int tile_kv, bool* keep, Tiles* kv_tiles, Tiles* q_tiles) {
  Attention a{};
  a.mask = mask;
  a.mask_batch = strides[0];
  a.mask_head = strides[1];
  a.mask_row = strides[2];
  a.mask_column = strides[3];
  const Lengths lengths{len_q, len_kv, batch};
  mask_rules<TensorMask<NoMask>>(a, lengths, head, rows_kv, tile_q, tile_kv, keep, kv_tiles, q_tiles);
}

// Feeds x [tiles, width] to one row; value: the running sum of p * value.
template <class Real>
void row(const double* x, const double* value, int tiles, int width, double unit, double* lse, double* out) {
  const Real log2_unit = static_cast<Real>(unit * kLog2E);
  RowState<Real> state;
  state.init();
  Real sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Real top = -infinity<Real>();
    for (int i = 0; i < width; ++i) top = max_of(top, static_cast<Real>(x[tile * width + i]));
    sum *= state.update(top, log2_unit);
    for (int i = 0; i < width; ++i) {
      const Real p = state.weight(static_cast<Real>(x[tile * width + i]), log2_unit);
      state.l += p;
      sum += p * static_cast<Real>(value[tile * width + i]);
    }
  }
  *lse = state.lse(static_cast<Real>(unit), -infinity<Real>());
  *out = sum * state.inverse_sum();
}
EXPORT void row_float(const double* x, const double* v, int tiles, int width, double unit, double* lse, double* out) {
  row<float>(x, v, tiles, width, unit, lse, out);
}
EXPORT void row_double(const double* x, const double* v, int tiles, int width, double unit, double* lse, double* out) {
  row<double>(x, v, tiles, width, unit, lse, out);
}

// Merges parts of one row, each with the largest logit, a sum relative to it and an output, in their order.
template <class Real>
void parts(const double* tops, const double* sums, const double* outs, int count, double* lse, double* out) {
  RowState<Real> state;
  state.init();
  Real sum = 0;
  for (int i = 0; i < count; ++i) {
    Real part_rescale;
    const RowState<Real> part{static_cast<Real>(tops[i]), static_cast<Real>(sums[i])};
    const Real rescale = state.merge(part, static_cast<Real>(kLog2E), part_rescale);
    sum = sum * rescale + static_cast<Real>(outs[i]) * part.l * part_rescale;
  }
  *lse = state.lse(Real(1), -infinity<Real>());
  *out = sum * state.inverse_sum();
}
EXPORT void parts_float(const double* m, const double* l, const double* outs, int count, double* lse, double* out) {
  parts<float>(m, l, outs, count, lse, out);
}
EXPORT void parts_double(const double* m, const double* l, const double* outs, int count, double* lse, double* out) {
  parts<double>(m, l, outs, count, lse, out);
}

EXPORT void split(int64 block, int num_splits, const Tiles* tiles, Tiles* part, int64* left) {
  FwdParams p{};
  p.num_splits = num_splits;
  const KeySplits split(p, block);
  *part = split.part(*tiles);
  left[0] = split.index;
  left[1] = split.block;
}

EXPORT void group(int heads_q, int heads_kv, int index, int row, const Strides* stride, int64* out) {
  Attention a{};
  a.heads_q = heads_q;
  a.heads_kv = heads_kv;
  const HeadGroup heads(a, index);
  const int64 values[] = {heads.kv, heads.query(row), heads.head(row), heads.offset(row, *stride),
                          HeadGroup::count(a), HeadGroup::rows(a, 5)};
  for (int64 value : values) *out++ = value;
}

template <template <class> class Score, class Real>
void score(double scale, double softcap, const double* s, int count, double* logit, double* slope) {
  Attention a{};
  a.softmax_scale = scale;
  a.softcap = softcap;
  const Score<Real> score(a, Lengths{1, 1, 0}, 0);
  for (int i = 0; i < count; ++i) {
    const Real x = static_cast<Real>(s[i]);
    logit[i] = score.unit() * score.apply(x, 0, 0);
    slope[i] = score.slope(x, 0, 0) * static_cast<Real>(scale);
  }
}
template <class Real>
using NaturalSoftCapScore = NaturalScore<SoftCapScore<Real>>;

EXPORT void scores(int kind, int is_double, double scale, double softcap, const double* s, int count, double* logit,
                   double* slope) {
  const auto f = kind == 0 ? (is_double ? score<ScaledScore, double> : score<ScaledScore, float>)
                 : kind == 1 ? (is_double ? score<SignedScore, double> : score<SignedScore, float>)
                 : kind == 2 ? (is_double ? score<SoftCapScore, double> : score<SoftCapScore, float>)
                 : kind == 3 ? (is_double ? score<ExactSoftCapScore, double> : score<ExactSoftCapScore, float>)
                             : (is_double ? score<NaturalSoftCapScore, double> : score<NaturalSoftCapScore, float>);
  f(scale, softcap, s, count, logit, slope);
}

// A score and a dropout that differ from place to place.
template <class Real>
struct LopsidedScore {
  CF_DEVICE static constexpr bool any_slope() { return false; }
  CF_DEVICE static constexpr bool finite_beyond() { return true; }
  CF_DEVICE Real within(Real x, int) const { return x; }
  Real softmax_scale;
  template <class Sequence>
  LopsidedScore(const Attention& a, const Sequence&, int) : softmax_scale(static_cast<Real>(a.softmax_scale)) {}
  static Real factor(int q, int kv) { return Real(1) + Real(q) / 4 - Real(kv) / 8; }
  Real unit() const { return softmax_scale; }
  Real apply(Real s, int q, int kv) const { return factor(q, kv) * s; }
  Real slope(Real, int q, int kv) const { return factor(q, kv); }
};
struct ChessboardDropout {
  template <class Sequence>
  ChessboardDropout(const Attention&, const Sequence&, int) {}
  static bool keep(int q, int kv) { return (q + kv) % 2 == 0; }
  static double scale(const Attention& a) { return a.keep_scale; }
};

template <class Real, class Mask_, class Score_, class Dropout_>
struct GradientConfig {
  using Element = Real;
  using Mask = Mask_;
  using Score = Score_;
  using Dropout = Dropout_;
};

// Of every (query, key), from s and dp (len_q, len_kv): p, ds before and after the slope of the score.
template <class Config>
void gradients(const Attention& a, const Lengths& lengths, const double* s, const double* dp, const double* m,
               const double* l, const double* delta, double* p, double* of_logit, double* of_product) {
  using Real = typename Config::Element;
  const ScoreGradient<Config> gradient(a, lengths, 0);
  for (int q = 0; q < lengths.len_q; ++q) {
    const auto shift = RowShift<Real>::of(RowState<Real>{static_cast<Real>(m[q]), static_cast<Real>(l[q])});
    for (int kv = 0; kv < lengths.len_kv; ++kv) {
      const int at = q * lengths.len_kv + kv;
      const Real x = static_cast<Real>(s[at]), d = static_cast<Real>(dp[at]), row_delta = static_cast<Real>(delta[q]);
      const bool full = gradient.mask.kv_tiles(q, 1, 1).is_full(kv), kept = gradient.dropout.keep(q, kv);
      const Real weight = gradient.probability(x, shift, q, kv, full);
      p[at] = weight;
      of_logit[at] = gradient.of_logit(weight, d, row_delta, kept);
      of_product[at] = gradient.of_product(x, weight, d, row_delta, kept, q, kv);
    }
  }
}

template <class Real>
auto gradients_of(int score, bool drops) {
  using Lopsided = LopsidedScore<Real>;
  using Capped = ExactSoftCapScore<Real>;
  return score == 0 ? drops ? gradients<GradientConfig<Real, CausalMask, ScaledScore<Real>, ChessboardDropout>>
                            : gradients<GradientConfig<Real, CausalMask, ScaledScore<Real>, NoDropout>>
         : score == 1 ? drops ? gradients<GradientConfig<Real, CausalMask, Capped, ChessboardDropout>>
                              : gradients<GradientConfig<Real, CausalMask, Capped, NoDropout>>
                      : drops ? gradients<GradientConfig<Real, CausalMask, Lopsided, ChessboardDropout>>
                              : gradients<GradientConfig<Real, CausalMask, Lopsided, NoDropout>>;
}

EXPORT void score_gradients(int score, int drops, int is_double, int len_q, int len_kv, double scale, double softcap,
                            double keep_scale, const double* s, const double* dp, const double* m, const double* l,
                            const double* delta, double* p, double* of_logit, double* of_product) {
  Attention a{};
  a.softmax_scale = scale;
  a.softcap = softcap;
  a.keep_scale = keep_scale;
  const auto f = is_double ? gradients_of<double>(score, drops) : gradients_of<float>(score, drops);
  f(a, Lengths{len_q, len_kv, 0}, s, dp, m, l, delta, p, of_logit, of_product);
}

EXPORT int tiles_of(int longest, int tile) { return num_tiles(longest, tile); }
EXPORT void schedule(int keys, int64 block, int tiles, int heads, int* out) {
  const Work work = keys ? key_work(block, tiles, heads) : query_work(block, tiles, heads);
  out[0] = work.tile;
  out[1] = work.head;
  out[2] = work.batch;
}

const char* const kBase = reinterpret_cast<const char*>(1ll << 60);

template <class Sequence>
void describe(const Attention& a, int batch, int tile, const Strides& stride, int64* out) {
  const Sequence s(a, batch);
  const int64 values[] = {s.len_q, s.len_kv, s.tail_q, s.tail_kv, s.q_offset(stride), s.kv_offset(stride),
                          s.first_q_tile(tile), Sequence::num_q_tiles(a, tile),
                          first_query<const char>(kBase, stride, s, 3) - kBase,
                          first_key<const char>(kBase, stride, s, 3) - kBase};
  for (int64 value : values) *out++ = value;
}
EXPORT void varlen(const int* cu_q, const int* cu_kv, const int* used_q, const int* used, int batches, int total_q,
                   int total_kv, int batch, int tile, const Strides* stride, int64* out) {
  Attention a{};
  a.cu_seqlens_q = cu_q;
  a.cu_seqlens_kv = cu_kv;
  a.seqused_q = used_q;
  a.seqused_kv = used;
  a.batch = batches;
  a.total_q = total_q;
  a.total_kv = total_kv;
  describe<VarlenSequence>(a, batch, tile, *stride, out);
}
EXPORT void dense(int batches, int len_q, int len_kv, int batch, int tile, const Strides* stride, int64* out) {
  Attention a{};
  a.batch = batches;
  a.len_q = len_q;
  a.len_kv = len_kv;
  describe<DenseSequence>(a, batch, tile, *stride, out);
}

template <class Sequence_, class Heads_, class Split_>
struct TileConfig {
  using Sequence = Sequence_;
  using Heads = Heads_;
  using Split = Split_;
  static constexpr int kTileQ = 16;
};

// Counts the blocks that work on each (split, batch, head, query), and those that have the tail of each (batch, head).
template <class Sequence, class Heads, class Split>
void query_tiles(const FwdParams& p, int blocks, int* worked_on, int* tails) {
  const Attention& a = p.attention;
  for (int block = 0; block < blocks; ++block) {
    const QueryTile<TileConfig<Sequence, Heads, Split>> own(p, block);
    own.heads.for_each([&](int head) { tails[own.sequence.batch * a.heads_q + head] += own.has_tail(); });
    for (int row = own.first; row < own.first + min_of(own.rows, 16); ++row) {
      const int query = static_cast<int>(own.heads.offset(row, Strides{0, 1, 0})), head = own.heads.head(row);
      ++worked_on[((own.split.index * a.batch + own.sequence.batch) * a.heads_q + head) * a.len_q + query];
    }
  }
}
EXPORT void cover(int packed, int grouped, int num_splits, int batch, int heads_q, int heads_kv, int len_q,
                  const int* cu_q, const int* cu_kv, int blocks, int* worked_on, int* tails) {
  FwdParams p{};
  p.num_splits = num_splits;
  p.attention.batch = batch;
  p.attention.heads_q = heads_q;
  p.attention.heads_kv = heads_kv;
  p.attention.len_q = len_q;
  p.attention.cu_seqlens_q = cu_q;
  p.attention.cu_seqlens_kv = cu_kv;
  const auto f = packed ? grouped ? query_tiles<VarlenSequence, HeadGroup, KeySplits>
                                  : query_tiles<VarlenSequence, OneHead, KeySplits>
                 : grouped ? query_tiles<DenseSequence, HeadGroup, KeySplits>
                 : num_splits > 1 ? query_tiles<DenseSequence, OneHead, KeySplits>
                                  : query_tiles<DenseSequence, OneHead, NoSplit>;
  f(p, blocks, worked_on, tails);
}

// p of a score by a row's state, and by its lse alone.
template <class Real>
void probabilities(double x, double unit, double m, double l, double lse, double* p) {
  const Real log2_unit = static_cast<Real>(unit * kLog2E), score = static_cast<Real>(x);
  const RowState<Real> row{static_cast<Real>(m), static_cast<Real>(l)};
  p[0] = RowShift<Real>::of(row).probability(score, log2_unit);
  p[1] = RowShift<Real>::of_lse(static_cast<Real>(lse)).probability(score, log2_unit);
}
EXPORT void probabilities_float(double x, double unit, double m, double l, double lse, double* p) {
  probabilities<float>(x, unit, m, l, lse, p);
}
EXPORT void probabilities_double(double x, double unit, double m, double l, double lse, double* p) {
  probabilities<double>(x, unit, m, l, lse, p);
}
"""


@cache
def policies() -> ctypes.CDLL:
    library = build(UNIT)
    return library


def pointer(array: np.ndarray) -> c_void_p:
    return c_void_p(array.ctypes.data)


class Rules:
    """What a mask says about a (len_q, rows_kv) square of scores cut into tiles."""

    def __init__(self, len_q: int, rows_kv: int, tile_q: int, tile_kv: int) -> None:
        self.tile_q, self.tile_kv = tile_q, tile_kv
        self.keep = np.zeros((len_q, rows_kv), bool)
        self.kv_tiles = np.full((-(-len_q // tile_q), 4), -1, np.int32)  # begin, full_begin, full_end, end
        self.q_tiles = np.full((-(-rows_kv // tile_kv), 4), -1, np.int32)

    def check(self, visible: np.ndarray, tight: bool) -> None:
        """Compare with the mask's definition, ``visible``; tight: no tile is visited or tested in vain."""
        np.testing.assert_array_equal(self.keep, visible)
        tiles_q, tiles_kv = len(self.kv_tiles), len(self.q_tiles)
        some = np.zeros((tiles_q, tiles_kv), bool)
        whole = np.zeros((tiles_q, tiles_kv), bool)
        for m, n in np.ndindex(some.shape):
            rows = slice(m * self.tile_q, (m + 1) * self.tile_q)
            tile = visible[rows, n * self.tile_kv : (n + 1) * self.tile_kv]
            some[m, n] = tile.any()
            whole[m, n] = tile.all() and tile.shape[1] == self.tile_kv
        m, n = np.indices(some.shape)
        walks = []
        for cuts, index in ((self.kv_tiles[:, None, :], n), (self.q_tiles[None, :, :], m)):
            begin, full_begin, full_end, end = np.moveaxis(cuts, -1, 0)
            assert ((begin >= 0) & (begin <= full_begin) & (full_begin <= full_end) & (full_end <= end)).all(), cuts
            walk, full = (begin <= index) & (index < end), (full_begin <= index) & (index < full_end)
            assert (walk >= some).all(), "a visible element lies outside [begin, end)"
            assert (whole >= full).all(), "a tile in [full_begin, full_end) is not visible whole"
            if tight:
                np.testing.assert_array_equal(walk, some, "a tile without visible elements is visited")
                np.testing.assert_array_equal(full, whole, "a tile that is visible whole is tested")
            walks.append(walk)
        by_query, by_key = walks
        assert (by_key >= by_query).all(), "OrderedReduction waits for a key tile that does not visit the query tile"


LENGTHS = (0, 1, 4, 7, 8, 13)
TILES = ((4, 4), (2, 8), (8, 2), (3, 5))


@pytest.mark.parametrize("kind", ["NoMask", "CausalMask", "WindowMask"])
def test_band_masks_exhaustively(kind: str) -> None:
    unbounded = 1000
    lefts, rights = ([0, 2, 5, unbounded], [0, 3, unbounded]) if kind == "WindowMask" else ([0], [0])
    for len_q, len_kv, left, right, top_left in itertools.product(LENGTHS, LENGTHS, lefts, rights, (0, 1)):
        diagonal = np.arange(len_q)[:, None] + (0 if top_left else len_kv - len_q)
        # Two key rows more than take part (seqused_kv): nothing sees them.
        keys = np.arange(len_kv + 2)
        visible = np.broadcast_to(keys < len_kv, (len_q, len_kv + 2)).copy()
        if kind != "NoMask":
            visible &= keys <= diagonal + right
        if kind == "WindowMask":
            visible &= keys >= diagonal - left
        for tile_q, tile_kv in TILES:
            rules = Rules(len_q, len_kv + 2, tile_q, tile_kv)
            policies().band(
                ["NoMask", "CausalMask", "WindowMask"].index(kind),
                *(len_q, len_kv, len_kv + 2, left, right, top_left, tile_q, tile_kv),
                *(pointer(x) for x in (rules.keep, rules.kv_tiles, rules.q_tiles)),
            )
            try:
                rules.check(visible, tight=True)
            except AssertionError as error:
                raise AssertionError(f"{len_q=} {len_kv=} {left=} {right=} {top_left=} {tile_q=} {tile_kv=}") from error


@pytest.mark.parametrize("len_q", [1, 2**29, 2**30])
@pytest.mark.parametrize("len_kv", [1, 2**29, 2**30])
def test_open_sides_of_the_longest_sequences(len_q: int, len_kv: int) -> None:
    for row, open_side, closed, top_left in itertools.product((0, 2**30 - 1), (0, 1), (0, 2**30 - 1), (0, 1)):
        left, right = (UNBOUNDED, closed) if open_side else (closed, UNBOUNDED)
        got = np.empty(4, np.int32)
        policies().bounds(len_q, len_kv, left, right, top_left, row, pointer(got))
        off = 0 if top_left else len_kv - len_q
        if row < len_q:
            assert got[:2].tolist() == np.clip([row + off - left, row + off + right + 1], 0, len_kv).tolist()
            assert got[1 - open_side] == (len_kv, 0)[open_side], "an open side hides nothing"
        if row < len_kv:
            assert got[2:].tolist() == np.clip([row - off - right, row - off + left + 1], 0, len_q).tolist()


@pytest.mark.parametrize("tile_q", [16, 32, 64, 128])
@pytest.mark.parametrize("tile_kv", [64, 128])
def test_window_mask_at_real_tile_sizes(tile_q: int, tile_kv: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        len_q, len_kv = (int(x) for x in rng.integers(1, 600, 2))
        left, right = (int(x) for x in rng.integers(0, 300, 2))
        top_left = int(rng.integers(2))
        diagonal = np.arange(len_q)[:, None] + (0 if top_left else len_kv - len_q)
        keys = np.arange(len_kv)
        rules = Rules(len_q, len_kv, tile_q, tile_kv)
        policies().band(
            *(2, len_q, len_kv, len_kv, left, right, top_left, tile_q, tile_kv),
            *(pointer(x) for x in (rules.keep, rules.kv_tiles, rules.q_tiles)),
        )
        rules.check((keys <= diagonal + right) & (keys >= diagonal - left), tight=True)


@pytest.mark.parametrize("len_kv", [0, 9, 12])
def test_tensor_mask(len_kv: int) -> None:
    rng = np.random.default_rng(2)
    shape = 3, 2, 10, 12
    for kept in itertools.product((False, True), repeat=4):
        mask = rng.random([n if keep else 1 for n, keep in zip(shape, kept, strict=True)]) < 0.5
        mask = mask.swapaxes(2, 3).copy().swapaxes(2, 3)
        strides = np.where(kept, mask.strides, 0).astype(np.int64)
        for batch, head in itertools.product(range(3), range(2)):
            rules = Rules(10, 12, 4, 8)
            policies().tensor(
                *(pointer(mask), pointer(strides), batch, head, 10, len_kv, 12, 4, 8),
                *(pointer(x) for x in (rules.keep, rules.kv_tiles, rules.q_tiles)),
            )
            rules.check(np.broadcast_to(mask, shape)[batch, head] & (np.arange(12) < len_kv), tight=False)


SCORE = st.one_of(st.just(-np.inf), st.floats(-50, 50))


@given(x=st.lists(st.tuples(SCORE, SCORE, SCORE), max_size=6), unit=st.sampled_from([0.125, 1.0, 30.0]))
def test_row_state_is_softmax(x: list, unit: float) -> None:
    scores = np.array(x, np.float64).reshape(-1, 3)
    values = np.random.default_rng(3).standard_normal(scores.shape)
    logits = scores.ravel() * unit
    top = logits.max(initial=-np.inf)
    if top == -np.inf:
        exact = -np.inf, 0.0
    else:
        weights = np.exp(logits - top)
        exact = top + np.log(weights.sum()), weights @ values.ravel() / weights.sum()
    # Exponents reach unit * 50 * log2(e) and are rounded once, so p is off by that many units of the last place.
    for name, eps in (("float", 2.0**-24), ("double", 2.0**-53)):
        lse, out = c_double(), c_double()
        getattr(policies(), f"row_{name}")(
            pointer(scores), pointer(values), *(len(scores), 3, c_double(unit)), ctypes.byref(lse), ctypes.byref(out)
        )
        tolerance = 16 * eps * (1 + 2 * 50 * unit)
        np.testing.assert_allclose((lse.value, out.value), exact, rtol=tolerance, atol=tolerance, err_msg=name)


def test_row_state_survives_empty_tiles_first_and_last() -> None:
    scores = np.array([[-np.inf] * 3, [1.0, -np.inf, 2.0], [-np.inf] * 3])
    lse, out = c_double(), c_double()
    policies().row_double(
        pointer(scores), pointer(np.ones(9)), *(3, 3, c_double(1.0)), ctypes.byref(lse), ctypes.byref(out)
    )
    assert lse.value == pytest.approx(np.log(np.exp(1) + np.exp(2)), rel=1e-14)
    assert out.value == pytest.approx(1.0, rel=1e-14)


@given(parts=st.lists(st.tuples(st.floats(-50, 50), st.floats(1, 500), st.floats(-3, 3)), max_size=9))
def test_merged_parts_are_the_whole_row(parts: list) -> None:
    tops, sums, outs = np.array(parts, np.float64).reshape(-1, 3).T.copy()
    top = tops.max(initial=-np.inf)
    exact = -np.inf, 0.0
    if top > -np.inf:
        weights = sums * np.exp(tops - top)
        exact = top + np.log(weights.sum()), weights @ outs / weights.sum()
    for name, eps in (("float", 2.0**-24), ("double", 2.0**-53)):
        lse, out = c_double(), c_double()
        numbers = pointer(tops), pointer(sums), pointer(outs), len(tops)
        getattr(policies(), f"parts_{name}")(*numbers, ctypes.byref(lse), ctypes.byref(out))
        np.testing.assert_allclose((lse.value, out.value), exact, rtol=2000 * eps, atol=2000 * eps, err_msg=name)


@given(
    first=st.integers(0, 2**25), count=st.integers(0, 2**25), num_splits=st.integers(1, 128), block=st.integers(0, 9)
)
def test_splits_share_the_tiles_out(first: int, count: int, num_splits: int, block: int) -> None:
    """Neighbours, in order, all of them once, and near-equal numbers; which tiles are full does not change."""
    tiles = np.array([first, first + count // 3, first + count // 2, first + count], np.int32)
    end, sizes = first, []
    for index in range(num_splits):
        part, left = np.zeros(4, np.int32), np.zeros(2, np.int64)
        number = c_longlong((2**33 + block) * num_splits + index)
        policies().split(number, num_splits, *(pointer(x) for x in (tiles, part, left)))
        assert left.tolist() == [index, 2**33 + block]
        assert part[0] == end and part[1:3].tolist() == tiles[1:3].tolist()
        end = int(part[3])
        sizes.append(end - int(part[0]))
    assert end == first + count and max(sizes) - min(sizes) <= 1


@given(size=st.integers(1, 16), heads_kv=st.integers(1, 5), row=st.integers(0, 10**6))
def test_rows_of_a_group_of_heads(size: int, heads_kv: int, row: int) -> None:
    stride = np.array([0, 2**33 + 1, -(2**32)], np.int64)
    for index in range(heads_kv):
        out = np.zeros(6, np.int64)
        policies().group(size * heads_kv, heads_kv, index, row, pointer(stride), pointer(out))
        query, member = divmod(row, size)
        offset = query * int(stride[1]) + member * int(stride[2])
        assert out.tolist() == [index, query, index * size + member, offset, heads_kv, 5 * size]


@pytest.mark.parametrize("is_double", [False, True], ids=["float", "double"])
@pytest.mark.parametrize(
    ("kind", "scale", "softcap"),
    [("ScaledScore", 0.125, 0), ("SignedScore", -0.5, 0), ("SignedScore", 0, 0)]
    + [(f"{kind}SoftCapScore", s, c) for kind in ("", "Exact") for s in (0.125, -2.0, 0.0) for c in (0.5, 30.0)]
    + [("NaturalSoftCapScore", 0.125, 30.0)],
)
def test_score_and_its_slope(kind: str, scale: float, softcap: float, is_double: bool) -> None:
    def logits(s: np.ndarray) -> np.ndarray:
        return softcap * np.tanh(scale * s / softcap) if softcap else scale * s

    def run(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logit, slope = np.empty_like(s), np.empty_like(s)
        kinds = ["ScaledScore", "SignedScore", "SoftCapScore", "ExactSoftCapScore", "NaturalSoftCapScore"]
        arguments = kinds.index(kind), int(is_double), c_double(scale), c_double(softcap)
        policies().scores(*arguments, pointer(s), s.size, pointer(logit), pointer(slope))
        return logit, slope

    s = np.concatenate([np.linspace(-40, 40, 401), [-1e4, 1e4]])
    logit, slope = run(s)
    eps = np.finfo(np.float64 if is_double else np.float32).eps
    np.testing.assert_allclose(logit, logits(s), rtol=8 * eps, atol=8 * eps * max(1.0, softcap))
    h = 1e-5
    np.testing.assert_allclose(slope, (logits(s + h) - logits(s - h)) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keys", [0, 1], ids=["query_work", "key_work"])
@pytest.mark.parametrize(("tiles", "heads", "batch"), [(1, 1, 1), (5, 3, 4), (1, 7, 2), (9, 1, 3)])
def test_schedule_covers_every_tile_once(keys: int, tiles: int, heads: int, batch: int) -> None:
    work = np.empty((tiles * heads * batch, 3), np.int32)
    for block in range(len(work)):
        policies().schedule(keys, c_longlong(block), tiles, heads, pointer(work[block]))
    assert sorted(map(tuple, work.tolist())) == sorted(itertools.product(range(tiles), range(heads), range(batch)))
    of_a_head = work[:tiles, 0]
    assert (np.diff(of_a_head) == (1 if keys else -1)).all(), "key tiles rise, query tiles fall"


def test_schedule_beyond_32_bits() -> None:
    work = np.empty(3, np.int32)
    policies().schedule(0, c_longlong(2**33 + 5), 1 << 20, 1 << 10, pointer(work))
    assert work.tolist() == [(1 << 20) - 1 - 5, 0, 8]


def test_number_of_tiles() -> None:
    assert [policies().tiles_of(n, 64) for n in (0, 1, 64, 65)] == [1, 1, 1, 2]


STRIDES = np.array([2**33, 2**20, 7], np.int64)  # batch, row, head
FIELDS = ("len_q", "len_kv", "tail_q", "tail_kv", "q_offset", "kv_offset", "first_q_tile", "num_q_tiles")
FIELDS += ("first_query", "first_key")  # of head 3


@given(
    lens=st.lists(st.tuples(*(st.integers(0, n) for n in (200, 200, 250, 250))), min_size=1, max_size=8),
    tails=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    tile=st.sampled_from([16, 64, 128]),
    seqused=st.booleans(),
)
def test_varlen_sequence(lens: list, tails: tuple[int, int], tile: int, seqused: bool) -> None:
    rows_q, rows_kv, used_q, used = (np.array(x, np.int32) for x in zip(*lens, strict=True))
    len_q = np.minimum(rows_q, used_q) if seqused else rows_q
    cu_q, cu_kv = (np.cumsum([0, *x], dtype=np.int32) for x in (rows_q, rows_kv))
    total_q, total_kv = cu_q[-1] + tails[0], cu_kv[-1] + tails[1]
    next_free = 0
    for b in range(len(lens)):
        values = np.empty(len(FIELDS), np.int64)
        policies().varlen(
            *(pointer(cu_q), pointer(cu_kv)),
            *((pointer(used_q), pointer(used)) if seqused else (None, None)),
            *(len(lens), int(total_q), int(total_kv), b, tile, pointer(STRIDES), pointer(values)),
        )
        got = dict(zip(FIELDS, values.tolist(), strict=True))
        last = b == len(lens) - 1
        first = got.pop("first_q_tile")
        assert first >= next_free, "the tiles of two sequences overlap"
        next_free = first + -(-len_q[b] // tile)
        assert next_free <= got.pop("num_q_tiles"), "a tile lies outside the accumulator"
        assert got == {
            "len_q": len_q[b],
            "len_kv": min(rows_kv[b], used[b]) if seqused else rows_kv[b],
            "tail_q": rows_q[b] - len_q[b] + tails[0] * last,
            "tail_kv": rows_kv[b] - got["len_kv"] + tails[1] * last,
            "q_offset": int(cu_q[b]) * 2**20,
            "kv_offset": int(cu_kv[b]) * 2**20,
            "first_query": int(cu_q[b]) * 2**20 + 3 * 7,
            "first_key": int(cu_kv[b]) * 2**20 + 3 * 7,
        }


def test_dense_sequence() -> None:
    for b in range(3):
        values = np.empty(len(FIELDS), np.int64)
        policies().dense(3, 130, 70, b, 64, pointer(STRIDES), pointer(values))
        assert values.tolist() == [130, 70, 0, 0, b * 2**33, b * 2**33, b * 3, 9, *[b * 2**33 + 3 * 7] * 2]


@given(
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    packed=st.booleans(),
    grouped=st.booleans(),
    group=st.integers(1, 3),
    num_splits=st.integers(1, 3),
)
def test_query_tiles_cover_every_query_once(
    lens: list[int], packed: bool, grouped: bool, group: int, num_splits: int
) -> None:
    """Every split has every query of every head, and of the blocks of a head one fills its tail."""
    if not packed:
        lens = lens[:1] * len(lens)
    batch, heads_kv, longest = len(lens), 2, max(lens)
    heads = heads_kv * group
    tiles = max(1, -(-longest * (group if grouped else 1) // 16))
    blocks = num_splits * batch * tiles * (heads_kv if grouped else heads)
    cu = np.cumsum([0, *lens], dtype=np.int32)
    worked_on, tails = np.zeros((num_splits, batch, heads, longest), np.int32), np.zeros((batch, heads), np.int32)
    policies().cover(
        *(packed, grouped, num_splits, batch, heads, heads_kv, longest, pointer(cu), pointer(cu), blocks),
        *(pointer(worked_on), pointer(tails)),
    )
    there = np.arange(longest) < np.array(lens)[:, None, None]
    np.testing.assert_array_equal(worked_on, np.broadcast_to(there, worked_on.shape))
    assert (tails == 1).all()


@pytest.mark.parametrize("unit", [0.125, 1.0])
def test_probabilities_from_what_the_forward_leaves(unit: float) -> None:
    """By a row's state exact at any size, by its lse to within that one's rounding; 0 in empty rows."""
    low = np.finfo(np.float32).min
    for name, eps in (("float", 2.0**-24), ("double", 2.0**-53)):

        def both(x: float, m: float, l: float, lse: float, name: str = name) -> list[float]:
            probabilities = np.empty(2)
            getattr(policies(), f"probabilities_{name}")(*map(c_double, (x, unit, m, l, lse)), pointer(probabilities))
            return probabilities.tolist()

        for size in (0.0, 3.0, -1e4, 1e9, -1e30, 2.9e38, low):
            lse = size * unit + np.log(7)
            by_state, by_lse = both(size, size, 7.0, lse)
            assert by_state == pytest.approx(1 / 7, rel=8 * eps)
            if abs(size) < 1e5:
                assert by_lse == pytest.approx(1 / 7, rel=8 * eps * (1 + abs(lse)))
            assert both(size - 1, size, 7.0, lse)[0] <= by_state
            assert both(-np.inf, size, 7.0, lse)[0] == 0
        for empty in (np.inf, -np.inf):
            assert both(3.0, low, 0.0, empty) == [0, 0]


@pytest.mark.parametrize("is_double", [0, 1], ids=["float", "double"])
@pytest.mark.parametrize("softcap", [2.0**-126, 1e-9, 1.0, 50.0, 1e4, 1e9, 1e30, 2.0**126])
@pytest.mark.parametrize("scale", [1.0, -0.125])
def test_soft_caps_of_every_size(softcap: float, scale: float, is_double: int) -> None:
    """To a few units in the last place of the logit, also of scores far below the cap."""
    real, eps = (np.float64, 2.0**-52) if is_double else (np.float32, 2.0**-23)
    s = np.geomspace(1e-6, 1e9, 200)
    s = np.concatenate([-s, [0.0], s]).astype(real).astype(np.float64)
    logit, slope = np.empty_like(s), np.empty_like(s)
    numbers = c_double(scale), c_double(softcap), pointer(s), len(s), pointer(logit), pointer(slope)
    policies().scores(3, is_double, *numbers)
    with np.errstate(over="ignore", under="ignore"):
        exact = softcap * np.tanh(s * scale / softcap)
        exact_slope = scale * (1 - np.tanh(s * scale / softcap) ** 2)
    np.testing.assert_allclose(logit, exact, rtol=4 * eps, atol=2.0**-126)
    np.testing.assert_allclose(slope, exact_slope, rtol=4 * eps, atol=8 * eps * abs(scale))


@pytest.mark.parametrize("is_double", [0, 1], ids=["float", "double"])
@pytest.mark.parametrize("drops", [0, 1], ids=["whole", "dropout"])
@pytest.mark.parametrize("score", ["scaled", "capped", "lopsided"])
@pytest.mark.parametrize(("len_q", "len_kv"), [(7, 7), (5, 12), (9, 4)])
def test_gradient_of_a_score(score: str, drops: int, is_double: int, len_q: int, len_kv: int) -> None:
    """P and dS are what the Jacobian of the whole row says; 0 where masked and in rows that see nothing."""
    rng = np.random.default_rng(len_q)
    shape = len_q, len_kv
    q, kv = np.indices(shape)
    scale, softcap, keep_scale = 0.375, 5.0, 1.75 if drops else 1.0
    s, dp = rng.standard_normal(shape) * 8, rng.standard_normal(shape)
    factor = 1 + q / 4 - kv / 8
    if score == "capped":
        logits, slope = softcap * np.tanh(scale * s / softcap), 1 - np.tanh(scale * s / softcap) ** 2
        unit = 1.0
    else:
        slope = factor if score == "lopsided" else np.ones(shape)
        logits, unit = scale * slope * s, scale
    visible = kv <= q + len_kv - len_q
    kept = (q + kv) % 2 == 0 if drops else np.ones(shape, bool)
    top = np.where(visible, logits, -np.inf).max(1, initial=-1e300)
    weights = np.exp(np.where(visible, logits - top[:, None], -np.inf))
    l = weights.sum(1)
    exact_p = weights / np.where(l == 0, 1, l)[:, None]
    # d(loss)/d(p) of each probability, and d(p)/d(logit) = diag(p) - p p^T of each row.
    reaches = kept * keep_scale * dp
    jacobians = np.einsum("qk,kn->qkn", exact_p, np.eye(len_kv)) - np.einsum("qk,qn->qkn", exact_p, exact_p)
    exact_logit = np.einsum("qkn,qk->qn", jacobians, reaches)

    p, of_logit, of_product = (np.full(shape, np.nan) for _ in range(3))
    delta = (exact_p * reaches).sum(1)
    policies().score_gradients(
        *(["scaled", "capped", "lopsided"].index(score), drops, is_double, len_q, len_kv),
        *map(c_double, (scale, softcap, keep_scale)),
        *map(pointer, (s, dp, top / unit, l, delta, p, of_logit, of_product)),
    )
    tolerance = 200 * (2.0**-53 if is_double else 2.0**-24)
    np.testing.assert_allclose(p, exact_p, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(of_logit, exact_logit, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(of_product, exact_logit * slope, rtol=tolerance, atol=tolerance)
    for gradient in (p, of_logit, of_product):
        assert (gradient[~visible] == 0).all()
