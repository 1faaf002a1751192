// Split: which of the key tiles that a query tile sees a block walks, and where its rows go.
//
//              kv tiles ->
//           +----+----+----+----+----+    NoSplit: one block walks all of them and writes out and lse.
//    q tile |    0    |    1    | 2  |    KeySplits: as many blocks as there are splits share the query tile. Each
//           +----+----+----+----+----+    walks neighbours, near-equal numbers of them, and finds a part of each row;
//                                         forward/combine.cuh merges the parts in the order of the splits.
//
// A part is what the row would be if its keys were all there are: out divided by its own sum, and its RowState to merge
// by. So values stay in the range of V's, and a split ends like a block that walks all keys.
#pragma once

#include "attention/mask.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "element.cuh"
#include "ptx/sync.cuh"

namespace cuflash {

// Where rows of a head of a sequence go: query 0, and the strides to other queries and heads.
template <class Config>
struct WholeRows {
  static constexpr bool kWhole = true;
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;

  CF_DEVICE static Element* out(const FwdParams& p, const Sequence& sequence, int head, int /*split*/) {
    return first_query<Element>(p.out, p.out_stride, sequence, head);
  }
  // Number of query 0 among all rows of lse.
  CF_DEVICE static int64 number(const FwdParams& p, const Sequence& sequence, int head, int /*split*/) {
    return query_offset(p.lse_stride, sequence, head);
  }
  CF_DEVICE static void close(const FwdParams& p, int64 number, const RowState<Real>& row, Real unit) {
    static_cast<Real*>(p.lse)[number] = row.lse(unit, static_cast<Real>(p.empty_lse));
    if (p.row_state) static_cast<RowState<Real>*>(p.row_state)[number] = row;
  }
  CF_DEVICE static const Strides& out_stride(const FwdParams& p) { return p.out_stride; }
  CF_DEVICE static Strides lse_stride(const FwdParams& p) { return {0, 1, p.lse_stride.head}; }
};

// Where parts of rows go: [num_splits, rows, heads_q] of dim_v numbers and a RowState, in accumulator type, rows
// numbered like query tiles of one row. Each split writes every query of its sequence; where l is 0, out is of no use.
template <class Config>
struct PartRows {
  static constexpr bool kWhole = false;
  using Real = Accumulator<typename Config::Element>;
  using Sequence = typename Config::Sequence;

  CF_DEVICE static int64 number(const FwdParams& p, const Sequence& sequence, int head, int split) {
    const Attention& a = p.attention;
    return (split * Sequence::num_q_tiles(a, 1) + sequence.first_q_tile(1)) * a.heads_q + head;
  }
  CF_DEVICE static Real* out(const FwdParams& p, const Sequence& sequence, int head, int split) {
    return static_cast<Real*>(p.partial_out) + number(p, sequence, head, split) * Config::kDimV;
  }
  CF_DEVICE static void close(const FwdParams& p, int64 number, const RowState<Real>& row, Real /*unit*/) {
    static_cast<RowState<Real>*>(p.partial_state)[number] = row;
  }
  CF_DEVICE static Strides out_stride(const FwdParams& p) {
    return {0, static_cast<int64>(p.attention.heads_q) * Config::kDimV, Config::kDimV};
  }
  CF_DEVICE static Strides lse_stride(const FwdParams& p) { return {0, p.attention.heads_q, 1}; }
  // The number of a row's first part, the distance to the next, and how many there are.
  CF_DEVICE static int64 first(const FwdParams& p, const Sequence& sequence, int head, int row) {
    return number(p, sequence, head, 0) + row * lse_stride(p).row;
  }
  CF_DEVICE static int64 step(const FwdParams& p, const Sequence& sequence, int head) {
    return number(p, sequence, head, 1) - number(p, sequence, head, 0);
  }
  CF_DEVICE static int count(const FwdParams& p, const Sequence&, int /*head*/) { return p.num_splits; }
};

template <class Config>
struct OneStretch;  // attention/ranges.cuh

struct NoSplit {
  template <class Config>
  using Rows = WholeRows<Config>;
  static constexpr bool kRanges = false, kHalves = false;
  static constexpr int index = 0;
  int64 block;  // number of the query tile

  CF_DEVICE NoSplit(const FwdParams&, int64 block_index) : block(block_index) {}

  template <class Walk>
  CF_DEVICE Walk part(const Walk& tiles) const {
    return tiles;
  }
  template <class Walk>
  CF_DEVICE static Walk part(const FwdParams&, int /*split*/, const Walk& tiles) {
    return tiles;
  }
};

struct KeySplits {
  template <class Config>
  using Rows = PartRows<Config>;
  template <class Config>
  using Stretches = OneStretch<Config>;
  static constexpr bool kRanges = false, kHalves = false;
  int index;
  int count;
  int64 block;

  CF_DEVICE KeySplits(const FwdParams& p, int64 block_index)
      : index(static_cast<int>(block_index % p.num_splits)), count(p.num_splits), block(block_index / p.num_splits) {}

  CF_DEVICE int parts() const { return count; }
  template <class Walk>
  CF_DEVICE Walk part(const Walk& tiles) const {
    return share(tiles, index, count);
  }
  template <class Walk>
  CF_DEVICE static Walk part(const FwdParams& p, int split, const Walk& tiles) {
    return share(tiles, split, p.num_splits);
  }
  template <class Walk>
  CF_DEVICE static Walk share(Walk tiles, int index, int count) {
    const int first = tiles.begin;
    const int64 number = tiles.end - first;
    tiles.begin = first + static_cast<int>(number * index / count);
    tiles.end = first + static_cast<int>(number * (index + 1) / count);
    return tiles;
  }
};

// What a work of another policy walks, in halves: two neighbouring blocks have one each. Where they are a cluster, they merge
// what they find in their shared memory (tile/half_rows.cuh).
template <class Split>
struct Halves : Split {
  static constexpr bool kHalves = true;

  CF_DEVICE Halves(const FwdParams& p, int64 block_index) : Split(p, block_index / 2) {}

  template <class Walk>
  CF_DEVICE static Walk part(const FwdParams& p, int split, const Walk& tiles) {
    return KeySplits::share(Split::part(p, split, tiles), static_cast<int>(ptx::block_index() % 2), 2);
  }
};

}  // namespace cuflash
