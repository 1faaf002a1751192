// Lists of tiles: a mask that names the tiles with a visible pair, of which no other is walked.
//
//   line of a query tile     k k k k | k k        numbers of key tiles, those that are visible whole first
//   line of a key tile       q q q | q q q q      of the query tiles of all heads of its group: number and member
//
// Either part ascends. blocks/walks.py makes the lines, in tiles of the kernel that reads them; there is one set for
// all batch elements or heads where the distance between theirs is 0.
#pragma once

#include "attention/mask.cuh"
#include "attention/mods.cuh"

namespace cuflash {

// Where the tiles of a line are in the list: those that are visible whole in [begin, full_end), the others behind.
struct alignas(16) Line {
  int begin;
  int full_end;
  int end;
  int ranked;  // another thing, of this line's place in its matrix: the number of the line that as many are longer than
};

// What a block walks of a line. Places count from 0: first tiles that are listed as visible whole, then the others.
struct ListedTiles {
  static constexpr bool kListed = true;
  static constexpr int full_begin = 0;

  const int* list;
  const int* earlier;  // of each entry: key tiles that take their turn at its query tile before
  int begin, full_end, end;
  int full, partial;         // from places before `full_end`, and from the others, to places in the list
  int shift;                 // of an entry: bits for a member, below its number
  bool whole;                // what is listed as visible whole is so beside the other mask, too
  int seen_begin, seen_end;  // or, if not `whole`, where its number is one of these

  ListedTiles() = default;
  // `seen` are the tiles, of `count`, that another mask leaves visible, and which of them whole.
  CF_DEVICE ListedTiles(const int* entries, const int* turns, const Line& line, const Tiles& seen, int count, int bits)
      : list(entries), earlier(turns), begin(0), full(line.begin), shift(bits),
        whole(seen.full_begin <= seen.begin && seen.full_end >= seen.end), seen_begin(seen.full_begin),
        seen_end(seen.full_end) {
    int first_partial = line.full_end, last_full = line.full_end, last = line.end;
    if (seen.begin > 0 || seen.end < count) {
      full = find(line.begin, line.full_end, seen.begin);
      last_full = find(full, line.full_end, seen.end);
      first_partial = find(line.full_end, line.end, seen.begin);
      last = find(first_partial, line.end, seen.end);
    }
    full_end = last_full - full;
    partial = first_partial - full_end;
    end = last - partial;
  }

  CF_DEVICE int entry(int place) const { return list[in_list(place)]; }
  CF_DEVICE int number_of(int entry) const { return entry >> shift; }
  CF_DEVICE int member_of(int entry) const { return entry & ((1 << shift) - 1); }

  CF_DEVICE int number(int place) const { return number_of(entry(place)); }
  CF_DEVICE int number_after(int place) const { return number(place + 1); }
  CF_DEVICE bool is_full(int place) const { return is_full(place, whole ? 0 : number(place)); }
  CF_DEVICE bool is_full(int place, int number) const {
    return place < full_end && (whole || (seen_begin <= number && number < seen_end));
  }

  CF_DEVICE int steps(int /*group*/) const { return end - begin; }
  CF_DEVICE Step first_step() const { return {begin, 0}; }
  CF_DEVICE Step next_step(Step step) const { return {step.place + 1, 0}; }
  CF_DEVICE int member(Step step) const { return member_of(entry(step.place)); }
  CF_DEVICE bool is_of(int place, int member) const { return member_of(entry(place)) == member; }

  template <class Mask>
  CF_DEVICE Turn turn(const Mask&, int place, int /*q*/, int /*rows*/, int /*tile*/, int /*kv_tile*/) const {
    return {true, earlier[in_list(place)]};
  }

 private:
  CF_DEVICE int in_list(int place) const { return place + (place < full_end ? full : partial); }

  // The first place in the list, of [first, last), whose number is not below a bound.
  CF_DEVICE int find(int first, int last, int bound) const {
    while (first < last) {
      const int middle = first + (last - first) / 2;
      if (number_of(list[middle]) < bound) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
};

// Another mask and lists of tiles, of which those that are not visible whole are tested by a rule: elements must pass
// both.
template <class Inner, class Mod>
struct ListedMask {
  static constexpr bool kFullFromStart = false, kFullToEnd = false, kNoneFull = Inner::kNoneFull;
  using Walk = ListedTiles;

  Inner inner;
  Mod mod;
  const Attention* a;
  int batch, head;

  template <class Sequence>
  CF_DEVICE ListedMask(const Attention& attention, const Sequence& sequence, int query_head)
      : inner(attention, sequence, query_head), mod(attention, static_cast<int>(sequence.batch), query_head),
        a(&attention), batch(static_cast<int>(sequence.batch)), head(query_head) {}

  CF_DEVICE bool keep(int q, int kv) const {
    const bool seen = mod.template value<float>(batch, head, q, kv);  // anywhere, so that what it reads is read once
    return inner.keep(q, kv) && seen;
  }

  // The query tile of which as many of this head's are longer as a number says, if no other mask shortens them.
  CF_DEVICE int ranked_query(int number, int rows) const {
    return kAlone ? kv_lines()[number].ranked : cdiv(a->len_q, rows) - 1 - number;
  }
  CF_DEVICE ListedTiles kv_tiles(int q, int rows, int tile) const {
    return ListedTiles(static_cast<const int*>(a->kv_list), nullptr, kv_lines()[q / rows],
                       inner.kv_tiles(q, rows, tile), cdiv(a->len_kv, tile), 0);
  }
  // The same of key tiles.
  CF_DEVICE int ranked_key(int number) const { return kAlone ? q_lines()[number].ranked : number; }
  CF_DEVICE ListedTiles q_tiles(int kv, int rows, int tile) const {
    int bits = 0;
    while ((1 << bits) < a->heads_q / a->heads_kv) ++bits;
    return ListedTiles(static_cast<const int*>(a->q_list), static_cast<const int*>(a->q_turns), q_lines()[kv / rows],
                       inner.q_tiles(kv, rows, tile), cdiv(a->len_q, tile), bits);
  }

 private:
  static constexpr bool kAlone = Inner::kFullFromStart && Inner::kFullToEnd;

  // Those of this head.
  CF_DEVICE const Line* kv_lines() const {
    return static_cast<const Line*>(a->kv_lines) + batch * a->kv_lines_batch + head * a->kv_lines_head;
  }
  CF_DEVICE const Line* q_lines() const {
    const int group = a->heads_q / a->heads_kv;
    return static_cast<const Line*>(a->q_lines) + batch * a->q_lines_batch + head / group * a->q_lines_head;
  }
};

}  // namespace cuflash
