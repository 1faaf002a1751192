// Mask: which tiles can matter (kv_tiles, q_tiles) and which elements count (keep).
#pragma once

#include "params.cuh"
#include "ptx/keep.cuh"

namespace cuflash {

// Whether a key tile adds to a query tile's gradient, and how many key tiles do so before it where they take turns.
struct Turn {
  bool adds;
  int before;
};

// A query tile that a key tile's block visits: its place, and the head's number in the group.
struct Step {
  int place;
  int member;
};

// Tiles [begin, end) hold every visible element; those in [full_begin, full_end) are visible whole and need no test.
// A block walks them in order, by their numbers; those of a list (attention/lists.cuh), which has all that this one has
// for kernels, by their places in it, which `number` turns into theirs.
struct Tiles {
  static constexpr bool kListed = false;

  int begin;
  int full_begin;
  int full_end;
  int end;

  CF_DEVICE bool is_full(int tile) const { return full_begin <= tile && tile < full_end; }
  CF_DEVICE bool is_full(int /*place*/, int tile) const { return is_full(tile); }
  CF_DEVICE bool contains(int tile) const { return begin <= tile && tile < end; }

  CF_DEVICE int number(int place) const { return place; }
  CF_DEVICE int number_after(int place) const { return place + 1; }

  // Steps over these query tiles for each head of a group, one head after the other.
  CF_DEVICE int steps(int group) const { return (end - begin) * group; }
  CF_DEVICE Step first_step() const { return {begin, 0}; }
  CF_DEVICE Step next_step(Step step) const {
    const int place = step.place + 1 < end ? step.place + 1 : begin;
    return {place, step.member + (place == begin)};
  }
  CF_DEVICE int member(Step step) const { return step.member; }
  // Whether the query tile at a place is one of a head's.
  CF_DEVICE bool is_of(int /*place*/, int /*member*/) const { return true; }

  // The turn of a key tile at the query tile from `q` on, which is at a place. Key tiles take turns in falling order.
  template <class Mask>
  CF_DEVICE Turn turn(const Mask& mask, int /*place*/, int q, int rows, int tile, int kv_tile) const {
    const Tiles kv_tiles = mask.kv_tiles(q, rows, tile);
    return {kv_tiles.contains(kv_tile), kv_tiles.end - 1 - kv_tile};
  }

  CF_DEVICE Tiles none_full() const { return Tiles{begin, end, end, end}; }

  // `some` positions are visible to some row of the other side, `all` to every row of it.
  CF_DEVICE static Tiles of(int some_begin, int some_end, int all_begin, int all_end, int tile) {
    Tiles t;
    t.begin = some_begin / tile;
    t.end = some_end > some_begin ? cdiv(some_end, tile) : t.begin;
    t.full_begin = clamp_to(cdiv(all_begin, tile), t.begin, t.end);
    t.full_end = clamp_to(all_end / tile, t.full_begin, t.end);
    return t;
  }
};

// Query q sees keys [q + off - left, q + off + right], cut to the sequence; an unbounded side costs nothing.
template <bool kLeft, bool kRight>
struct BandMask {
  // Whether kv_tiles begins at 0 with tiles that need no test, whether it ends with one alone that may need it, and
  // whether none can do without.
  static constexpr bool kFullFromStart = !kLeft;
  static constexpr bool kFullToEnd = !kRight;
  static constexpr bool kNoneFull = false;
  using Walk = Tiles;  // what kv_tiles and q_tiles return

  int len_q, len_kv;
  int first;  // off - left: the first key that query 0 sees
  int end;    // off + right + 1: the first key after those that query 0 sees

  template <class Sequence>
  CF_DEVICE BandMask(const Attention& a, const Sequence& sequence, int /*head*/)
      : len_q(sequence.len_q), len_kv(sequence.len_kv) {
    const int off = a.top_left ? 0 : len_kv - len_q;
    first = off - a.window_left;
    end = off + a.window_right + 1;
  }

  CF_DEVICE int kv_begin(int q) const { return kLeft ? clamp_to(q + first, 0, len_kv) : 0; }
  CF_DEVICE int kv_end(int q) const { return kRight ? clamp_to(q + end, 0, len_kv) : len_kv; }
  CF_DEVICE int q_begin(int kv) const { return kRight ? clamp_to(kv - end + 1, 0, len_q) : 0; }
  CF_DEVICE int q_end(int kv) const { return kLeft ? clamp_to(kv - first + 1, 0, len_q) : len_q; }

  CF_DEVICE bool keep(int q, int kv) const { return (!kLeft || kv_begin(q) <= kv) && kv < kv_end(q); }

  // Key tiles for queries [q, q + rows) of the sequence.
  CF_DEVICE Tiles kv_tiles(int q, int rows, int tile) const {
    const int last = min_of(q + rows, len_q) - 1;
    return Tiles::of(kv_begin(q), kv_end(last), kv_begin(last), kv_end(q), tile);
  }

  // Query tiles for keys [kv, kv + rows). A tile with keys past the end always needs the test.
  CF_DEVICE Tiles q_tiles(int kv, int rows, int tile) const {
    const int last = min_of(kv + rows, len_kv) - 1;
    if (last < kv) return Tiles{0, 0, 0, 0};
    int all_end = q_end(kv);
    if (all_end == len_q) all_end = round_up(len_q, tile);  // rows past the end are zeros: they add nothing
    if (kv + rows > len_kv) all_end = 0;
    return Tiles::of(q_begin(kv), q_end(last), q_begin(last), all_end, tile);
  }
};

using NoMask = BandMask<false, false>;
using CausalMask = BandMask<false, true>;
using WindowMask = BandMask<true, true>;

// A band and a boolean tensor: elements must pass both. Nothing is known about whole tiles of the tensor.
template <class Band>
struct TensorMask {
  static constexpr bool kFullFromStart = false, kFullToEnd = false, kNoneFull = true;
  using Walk = Tiles;

  Band band;
  const uint8* mask;  // (len_q, len_kv) by strides, of this batch element and head
  int64 row, column;

  template <class Sequence>
  CF_DEVICE TensorMask(const Attention& a, const Sequence& sequence, int head)
      : band(a, sequence, head), mask(a.mask + sequence.batch * a.mask_batch + head * a.mask_head), row(a.mask_row),
        column(a.mask_column) {}

  CF_DEVICE bool keep(int q, int kv) const { return q < band.len_q && band.keep(q, kv) && mask[q * row + kv * column]; }

  CF_DEVICE Tiles kv_tiles(int q, int rows, int tile) const { return band.kv_tiles(q, rows, tile).none_full(); }
  CF_DEVICE Tiles q_tiles(int kv, int rows, int tile) const { return band.q_tiles(kv, rows, tile).none_full(); }
};

// The same mask with its address in registers, which would else be added up anew for every element.
template <class Mask>
CF_DEVICE Mask in_registers(const Mask& mask) {
  return mask;
}
template <class Band>
CF_DEVICE TensorMask<Band> in_registers(TensorMask<Band> mask) {
  mask.mask = ptx::keep(mask.mask);
  return mask;
}

}  // namespace cuflash
