// Before attention over a cache: new keys and values go to where the cache has room for them, and keys and queries are
// turned by their positions on the way (attention/rotary.cuh).
//
//   block (sequence, row)    k_new[row] --turn--> k[used + row]      v_new[row] --> v[used + row]
//                            append.q[row] --turn--> q[row]
//
// A position is a row of the cache, left padding included. Rows for which there is no room are written nowhere. One
// block has all heads of a row, kWidth columns a thread at a time.
#pragma once

#include "attention/rotary.cuh"
#include "ptx/sync.cuh"
#include "tile/copy.cuh"

namespace cuflash {

template <class Config>
struct CacheAppend {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Rotary = typename Config::Rotary;
  using Angle = typename Rotary::Angle;
  using Vector = typename VectorOf<Config::kCopyBytes>::Type;
  static constexpr int kWidth = Config::kCopyBytes / sizeof(Element);

  // Cosines and sines of a position; null where nothing turns.
  struct Turn {
    const Angle* cos;
    const Angle* sin;
  };

  CF_DEVICE static Turn turn_at(const Append& append, int64 position) {
    const int64 row = clamp_to(position, int64(0), int64(append.rotary_rows) - 1);
    return {static_cast<const Angle*>(append.rotary_cos) + row * append.rotary_cos_row,
            static_cast<const Angle*>(append.rotary_sin) + row * append.rotary_sin_row};
  }

  // Number `col` of a row after its turn.
  CF_DEVICE static Element turned(const Element* row, int col, const Turn& turn) {
    const int pair = Rotary::pair_of(col);
    const Real x = to_accumulator(row[col]), partner = to_accumulator(row[Rotary::partner_of(col)]);
    const Real cos = static_cast<Real>(to_accumulator(turn.cos[pair]));
    const Real sin = static_cast<Real>(to_accumulator(turn.sin[pair]));
    return from_accumulator<Element>(fma(x, cos, Rotary::is_second(col) ? partner * sin : -(partner * sin)));
  }

  // All heads of one row, kDim columns each, the first kTurned of them turned.
  template <int kDim, int kTurned>
  CF_DEVICE static void copy_row(Element* to, int64 to_head, const Element* from, int64 from_head, int heads,
                                 const Turn& turn) {
    constexpr int kAcross = kDim / kWidth;
    for (int index = ptx::thread_index(); index < heads * kAcross; index += Config::kThreads) {
      const int head = index / kAcross, first = index % kAcross * kWidth;
      const Element* row = from + head * from_head;
      Vector vector = *reinterpret_cast<const Vector*>(row + first);
      if constexpr (kTurned > 0) {
        Element* columns = reinterpret_cast<Element*>(&vector);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (first + i < kTurned) columns[i] = turned(row, first + i, turn);
        }
      }
      *reinterpret_cast<Vector*>(to + head * to_head + first) = vector;
    }
  }

  // Elements from the base of a tensor of the cache to a row of a sequence.
  CF_DEVICE static int64 place(const FwdParams&, const CacheSequence& sequence, const Strides& stride, int64 row) {
    return sequence.element * stride.batch + row * stride.row;
  }
  CF_DEVICE static int64 place(const FwdParams& p, const PagedCacheSequence& sequence, const Strides& stride,
                               int64 row) {
    const int index = static_cast<int>(row * p.pages.multiplier >> p.pages.shift);
    const int page = p.pages.table[sequence.batch * p.pages.table_batch + index * p.pages.table_page];
    CF_ASSERT(0 <= page && page < p.pages.count);
    return page * stride.batch + (row - index * p.pages.size) * stride.row;
  }

  CF_DEVICE static void run(const FwdParams& p) {
    const Attention& a = p.attention;
    const Append& append = p.append;
    const int rows = max_of(a.appended, Rotary::kDim > 0 ? a.len_q : 0);
    const int batch = static_cast<int>(ptx::block_index() / rows), row = static_cast<int>(ptx::block_index() % rows);
    const typename Config::Sequence sequence(a, batch);
    const int64 used = CacheSequence::used(a, batch), position = used + row;

    if (row < a.appended && position >= 0 && position < a.len_kv) {
      const Turn turn = turn_at(append, position);
      // The cache is the one input of attention that a call writes.
      Element* k = static_cast<Element*>(const_cast<void*>(p.k)) + place(p, sequence, p.k_stride, position);
      Element* v = static_cast<Element*>(const_cast<void*>(p.v)) + place(p, sequence, p.v_stride, position);
      const Strides &k_new = append.k_new_stride, &v_new = append.v_new_stride;
      copy_row<Config::kDimQk, Rotary::kDim>(
          k, p.k_stride.head, static_cast<const Element*>(append.k_new) + batch * k_new.batch + row * k_new.row,
          k_new.head, a.heads_kv, turn);
      copy_row<Config::kDimV, 0>(v, p.v_stride.head,
                                 static_cast<const Element*>(append.v_new) + batch * v_new.batch + row * v_new.row,
                                 v_new.head, a.heads_kv, turn);
    }
    if constexpr (Rotary::kDim > 0) {
      if (row >= a.len_q) return;
      const Strides &from = append.q_stride, &to = p.q_stride;
      copy_row<Config::kDimQk, Rotary::kDim>(
          static_cast<Element*>(const_cast<void*>(p.q)) + batch * to.batch + row * to.row, to.head,
          static_cast<const Element*>(append.q) + batch * from.batch + row * from.row, from.head, a.heads_q,
          turn_at(append, append.turn_together ? used : position));
    }
  }
};

template <class Config>
CF_DEVICE void cache_append(const FwdParams& params) {
  CacheAppend<Config>::run(params);
}

}  // namespace cuflash
