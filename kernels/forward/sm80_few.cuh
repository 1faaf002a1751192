// Forward attention of few queries over many keys, on mma.sync tensor cores (sm_80 and later): memory decides.
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//              kv tiles ->
//           +----+----+----+      The rows of a tile, 16 or 32 queries of all heads that share keys, are every warp's;
//    q tile |0123|0123|0123|      its keys are shared out: each warp has 16 of every kv tile, copies them for itself
//           +----+----+----+      some tiles ahead, and waits for no other. It finds a part of every row.
//
//   for each stretch:   load_q
//     each warp, for each kv tile:   load K and V, kStages - 1 tiles ahead | S = Q K^T | mask | softmax_tile | out += P V
//     warps' parts -> shared memory -> merged: whole rows, or a part of them in scratch memory
//     whoever leaves the last part of a query tile merges them all
//
// Warps' parts and blocks' parts are merged by the same few lines (tile/parts.cuh), in the order of warps and of keys.
#pragma once

#include "attention/dropout.cuh"
#include "attention/ranges.cuh"
#include "tile/copy.cuh"
#include "tile/gemm_sm80.cuh"
#include "tile/parts.cuh"
#include "tile/softmax_sm80.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSm80Few {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Heads = typename Config::Heads;
  using Stretches = typename Config::Split::template Stretches<Config>;
  using Results = WholeRows<Config>;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32, kStages = Config::kStages;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kKeys = kTileKv / kWarps;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes;
  static_assert(kKeys == 16 && kStages > 1);
  static_assert(IsSame<typename Config::Dropout, NoDropout>::value, "16 keys are half of what shares a call of Philox");

  using Finder = KeyFinder<Sequence, kKeys>;
  struct Stage {
    SharedTile<Element, kKeys, kDimQk> k;
    SharedTile<Element, kKeys, kDimV> v;
  };
  // What each warp found of every row.
  struct WarpParts {
    float out[kWarps][kTileQ][kDimV];
    RowState<float> states[kWarps][kTileQ];
  };
  struct SmemPlan {
    SharedTile<Element, kTileQ, kDimQk> q;
    union {
      Stage stages[kWarps][kStages];
      WarpParts parts;  // after the last kv tile
    };
    int64 offsets[kWarps][2 * kKeys];  // Finder's
    bool is_last;                      // whether this block left the last part
  };
  static_assert(sizeof(typename Finder::Offsets) <= 2 * kKeys * sizeof(int64));

  using Scores = Fragment<kTileQ, kKeys>;
  using Output = Fragment<kTileQ, kDimV>;
  static constexpr int kRowsPerLane = Scores::kRowsPerLane;
  using FourColumns = Columns<float, 4>;

  // What blocks found of four columns of a row, from where slot 0 has them.
  struct SlotParts {
    const Stretch& stretch;
    const RowState<float>* states;
    const float* outs;

    CF_DEVICE RowState<float> state(int part) const { return states[stretch.slot(part) * kTileQ]; }
    CF_DEVICE FourColumns out(int part) const {
      return *reinterpret_cast<const FourColumns*>(outs + stretch.slot(part) * (kTileQ * kDimV));
    }
  };

  // A block's work on one stretch.
  struct Visit {
    const FwdParams& p;
    SmemPlan& smem;
    const Stretch& stretch;
    const Sequence sequence;
    const Heads heads;
    const int q_first, q_rows;  // the tile's first row among the sequence's, and how many there are from that one on
    const typename Heads::template Bound<typename Config::Mask, Sequence> mask;
    const typename Heads::template Bound<typename Config::Score, Sequence> score;

    CF_DEVICE Visit(const FwdParams& params, SmemPlan& plan, const Stretch& its_stretch)
        : p(params), smem(plan), stretch(its_stretch), sequence(p.attention, stretch.work.batch),
          heads(p.attention, stretch.work.head), q_first(stretch.work.tile * kTileQ),
          q_rows(Heads::rows(p.attention, sequence.len_q) - q_first),
          mask(heads.template bind<typename Config::Mask>(p.attention, sequence)),
          score(heads.template bind<typename Config::Score>(p.attention, sequence)) {}

    CF_DEVICE float log2_unit() const { return score.unit() * static_cast<float>(kLog2E); }

    CF_DEVICE void run(const Stretches& stretches) {
      if (stretch.work.tile == 0 && stretch.part == 0) {
        heads.for_each([&](int head) { store_tail<Config, kThreads>(p, sequence, head); });
      }
      if (q_rows <= 0) return;
      walk(stretches.part(mask.kv_tiles(q_first, kTileQ, kTileKv)));
      ptx::sync_threads();  // every warp's part is here
      merge<kWarps>(kWarps, stretch.parts == 1, [&](int row, int col) {
        return Parts<float, 4>{&smem.parts.states[0][row], &smem.parts.out[0][row][col], kTileQ, kTileQ * kDimV};
      });
      if (stretch.parts > 1 && is_last()) {
        merge<8>(stretch.parts, true,
                 [&](int row, int col) { return SlotParts{stretch, state_in(0, row), out_in(0, row) + col}; });
      }
      ptx::sync_threads();  // before the next stretch's keys take the place of the parts
    }

    // Whether this block leaves the query tile's last part; what the others left can be read then.
    CF_DEVICE bool is_last() const {
      ptx::sync_threads();
      if (ptx::thread_index() == 0) {
        const int last = stretch.parts - 1;
        smem.is_last = ptx::count_around_in_order(p.tickets + stretch.query_tile, last) == last;
      }
      ptx::sync_threads();
      return smem.is_last;
    }

    // A row's place in a slot of scratch memory.
    CF_DEVICE RowState<float>* state_in(int64 slot, int row) const {
      return static_cast<RowState<float>*>(p.partial_state) + slot * kTileQ + row;
    }
    CF_DEVICE float* out_in(int64 slot, int row) const {
      return static_cast<float*>(p.partial_out) + (slot * kTileQ + row) * kDimV;
    }

    // This warp's part of every row: its keys of every tile.
    CF_DEVICE void walk(const Tiles& tiles) {
      const int lane = ptx::lane_index(), warp = ptx::warp_index(), count = tiles.end - tiles.begin;
      const Element* g_q = first_query<const Element>(p.q, p.q_stride, sequence, heads.first);
      load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.q, rows_of(heads, g_q, p.q_stride, q_first, q_rows));
      ptx::cp_async_commit();

      const Element* g_k = first_key<const Element>(p.k, p.k_stride, sequence, heads.kv);
      const Element* g_v = first_key<const Element>(p.v, p.v_stride, sequence, heads.kv);
      const int first_key = tiles.begin * kTileKv + warp * kKeys;
      Finder finder(p, sequence, mask.kv_tiles(q_first, kTileQ, 1).begin);
      auto& offsets = reinterpret_cast<typename Finder::Offsets&>(smem.offsets[warp]);
      Stage(&stages)[kStages] = smem.stages[warp];
      if (count > 0) finder.look_up(first_key);
      const auto load = [&](int number) {
        if (number < count) {
          Stage& stage = stages[number % kStages];
          finder.settle(offsets);
          load_tile_async<Config::kDimQk, kBytes, 32>(stage.k, finder.keys(offsets, g_k), lane);
          load_tile_async<Config::kDimV, kBytes, 32>(stage.v, finder.values(offsets, g_v), lane);
          if (number + 1 < count) finder.look_up(first_key + (number + 1) * kTileKv);
        }
        ptx::cp_async_commit();
      };
#pragma unroll 1
      for (int number = 0; number < kStages - 1; ++number) load(number);
      ptx::cp_async_wait<kStages - 1>();
      ptx::sync_threads();  // Q is here

      Output out;
      out.clear();
      RowState<float> rows[kRowsPerLane];
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) rows[r].init();
      for (int number = 0; number < count; ++number) {
        ptx::cp_async_wait<kStages - 2>();
        ptx::sync_warp();  // K and V are here, and every lane is done with those before
        load(number + kStages - 1);
        Stage& stage = stages[number % kStages];
        const int tile = tiles.begin + number, kv_first = first_key + number * kTileKv;
        Scores s;
        s.clear();
        gemm_abt<Element>(s, smem.q, 0, stage.k);
        s.for_each(lane, [&](float& x, int row, int col) { x = score.apply(x, q_first + row, kv_first + col); });
        if (!tiles.is_full(tile)) {
          s.for_each(lane, [&](float& x, int row, int col) {
            if (!mask.keep(q_first + row, kv_first + col)) x = -infinity<float>();
          });
        }
        softmax_tile(s, rows, out, log2_unit());
        Operand<kTileQ, kKeys> weights;
        pack_operand<Element>(weights, s);
        gemm_ab<Element>(out, weights, stage.v);
      }
      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // every warp is done with its keys
      leave(warp, rows, out);
    }

    CF_DEVICE void leave(int warp, RowState<float> (&rows)[kRowsPerLane], Output& out) {
      const int lane = ptx::lane_index();
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        rows[r].l = row_sum(rows[r].l);
        scale_row(out, r, rows[r].inverse_sum());
        if (lane % 4 == 0) smem.parts.states[warp][row_of(lane, r)] = rows[r];
      }
      Output::for_each_index([&](int r, int n, int i) {
        if (i == 0) {
          *reinterpret_cast<Columns<float, 2>*>(&smem.parts.out[warp][row_of(lane, r)][col_of(lane, n, 0)]) = {
              {out.at(r, n, 0), out.at(r, n, 1)}};
        }
      });
    }

    // Merges the parts of every row, four columns a thread, into the result, or into this stretch's part of it.
    template <int kAtOnce, class PartsOf>
    CF_DEVICE void merge(int count, bool whole, const PartsOf& parts_of) {
      constexpr int kAcross = kDimV / 4;
#pragma unroll 1
      for (int index = ptx::thread_index(); index < min_of(q_rows, kTileQ) * kAcross; index += kThreads) {
        const int row = index / kAcross, col = index % kAcross * 4;
        FourColumns out;
        RowState<float> state = merge_parts<kAtOnce>(out, parts_of(row, col), count, log2_unit());
        if (whole) {
          close(row, col, out, state);
        } else {
          const int64 slot = stretch.slot(stretch.part);
          const float inverse = state.inverse_sum();
#pragma unroll
          for (float& x : out.x) x *= inverse;
          *reinterpret_cast<FourColumns*>(out_in(slot, row) + col) = out;
          if (col == 0) *state_in(slot, row) = state;
        }
      }
    }

    CF_DEVICE void close(int row, int col, const FourColumns& sums, RowState<float>& state) const {
      const int head = heads.head(q_first + row);
      const float rescale = Config::Sink::close(state, p.attention, head, score.unit());
      const float factor = rescale * state.inverse_sum();
      Element* out = Results::out(p, sequence, heads.first, 0) + heads.offset(q_first + row, p.out_stride) + col;
      using Vector = typename VectorOf<min_of(8, kBytes)>::Type;
      constexpr int kWidth = sizeof(Vector) / sizeof(Element);
      alignas(8) Element rounded[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[i] = from_accumulator<Element>(sums.x[i] * factor);
#pragma unroll
      for (int i = 0; i < 4; i += kWidth) {
        if (col + i < Config::kDimV) {
          *reinterpret_cast<Vector*>(out + i) = *reinterpret_cast<const Vector*>(rounded + i);
        }
      }
      if (col == 0) {
        const int64 number = Results::number(p, sequence, heads.first, 0);
        Results::close(p, number + heads.offset(q_first + row, Results::lse_stride(p)), state, score.unit());
      }
    }
  };

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    Stretches stretches(p);
    Stretch stretch;
    while (stretches.next(p, stretch)) Visit(p, smem, stretch).run(stretches);
  }
};

template <class Config>
CF_DEVICE void forward_sm80_few(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm80Few<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm80Few<Config>::run(params);
}

}  // namespace cuflash
