// Forward attention on mma.sync tensor cores (sm_80 and later), after FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//              kv tiles ->
//           +----+----+----+      One block owns one q tile of one head and walks the kv tiles its mask can let
//    q tile |####|####|##\ |      through, keeping Q in shared memory and S, P and out in registers. Each warp owns
//           +----+----+----+      kTileQ / kWarps whole rows, so softmax needs shuffles inside four lanes only.
//
//   load_q, load_k(first)
//   for each kv tile:   load_v | S = Q K^T | mask_tile | softmax_tile, dropout | load_k(next) | out += P V
//   store_out, store_lse
//
// K and V have one buffer each: V's copy runs under S = Q K^T, the next K's under P V, and that of the bias' tile with it,
// where it is held.
#pragma once

#include "attention/query_tile.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/held_bias.cuh"
#include "tile/products_sm80.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct ForwardSm80 {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Sequence = typename Config::Sequence;
  using Heads = typename Config::Heads;
  using Results = typename Config::Split::template Rows<Config>;
  using Dropout = typename Config::Dropout;
  static constexpr int kThreads = Config::kThreads, kWarps = kThreads / 32;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kWarpRows = kTileQ / kWarps;
  static constexpr int kDimQk = round_up(Config::kDimQk, 16), kDimV = round_up(Config::kDimV, 16);
  static constexpr int kBytes = Config::kCopyBytes;
  using Products = cuflash::Products<Element, kWarpRows, Config::kHalves>;

  using Bias = typename Config::BiasHeld::template Tile<kTileQ, kTileKv>;
  struct SmemPlan : Bias {
    union {
      typename Products::template Tile<kTileQ, kDimQk> q;
      typename Products::template OutTile<kTileQ, kDimV> out;  // after the last Q K^T
    };
    typename Products::template Tile<kTileKv, kDimQk> k;
    typename Products::template Tile<kTileKv, kDimV> v;
  };

  // Whether tiles that need the mask's test have code of their own, so that no branch keeps a product from what is around
  // it: where scores are products alone.
  static constexpr bool kApart = sizeof(Element) == 2 && !Config::Mask::kNoneFull &&
                                 IsSame<typename Config::Score, ScaledScore<Real>>::value &&
                                 IsSame<Dropout, NoDropout>::value;

  using Scores = Fragment<kWarpRows, kTileKv, Real>;
  using Output = Fragment<kWarpRows, kDimV, Real>;
  static constexpr int kRowsPerLane = Scores::kRowsPerLane;
  static constexpr bool kStaged = Results::kWhole && Products::kStagesOut;

  // Whole rows leave through Q's memory, in the element type: the loop's last barrier came after every warp's last
  // Q K^T. A warp's rows go once all of them are there. What is not rounded, as parts of rows never are, goes from the
  // registers.
  template <class OutRows>
  CF_DEVICE static void store(const OutRows& rows, SmemPlan& smem, Output& out, int warp_row) {
    if constexpr (kStaged) {
      ptx::sync_warp();
      store_tile<kWarpRows, kDimV, kBytes, 32>(rows, Config::kDimV, smem.out, warp_row, ptx::lane_index());
    } else {
      out.for_each(ptx::lane_index(), [&](Real x, int row, int col) {
        if (row < rows.count && col < Config::kDimV) rows.data[rows.offset(row) + col] = x;
      });
    }
  }

  // Divides this warp's rows by their sums, and writes them, or parts of them, and lse. Addresses are made only here:
  // registers are scarce inside the loop.
  template <class Score>
  CF_DEVICE static void finish(SmemPlan& smem, const FwdParams& p, const QueryTile<Config>& own, const Score& score,
                               const Products& products, RowState<Real> (&rows)[kRowsPerLane], Output& out,
                               int warp_row, int lane) {
    const Heads& heads = own.heads;
    const int q_first = own.first;
    auto* g_out = Results::out(p, own.sequence, heads.first, own.split.index) +
                  heads.offset(q_first + warp_row, Results::out_stride(p));
    const int64 first_number =
        Results::number(p, own.sequence, heads.first, own.split.index) + heads.offset(q_first, Results::lse_stride(p));
    const auto numbers = rows_at(heads, static_cast<Real*>(p.lse), Results::lse_stride(p), q_first, own.rows);
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      rows[r].l = row_sum(rows[r].l);
      const int head = heads.head(q_first + warp_row + row_of(lane, r));
      const Real rescale = Config::Sink::close(rows[r], p.attention, head, score.unit());
      const Real factor = rescale * rows[r].inverse_sum() * static_cast<Real>(Dropout::scale(p.attention));
      const int row = warp_row + row_of(lane, r);
      if constexpr (kStaged) {
        store_row<Element>(smem.out, row, out, r, factor);
      } else {
        scale_row(out, r, factor);
        scale_row(out, r, products.unit());
      }
      if (lane % 4 == 0 && row < own.rows) {
        Results::close(p, first_number + numbers.offset(row), rows[r], score.unit());
      }
    }
    store(rows_at(heads, g_out, Results::out_stride(p), q_first + warp_row, own.rows - warp_row), smem, out, warp_row);
  }

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    const Attention& a = p.attention;
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() * kWarpRows;

    const QueryTile<Config> own(p, ptx::block_index());
    const Sequence& sequence = own.sequence;
    const Heads& heads = own.heads;
    if (own.has_tail()) heads.for_each([&](int head) { store_tail<Config, kThreads>(p, sequence, head); });
    const int q_first = own.first, q_rows = own.rows;
    if (q_rows <= 0) return;

    const Element* g_q = first_query<const Element>(p.q, p.q_stride, sequence, heads.first);
    const auto q = rows_of(heads, g_q, p.q_stride, q_first, q_rows);
    const Element* g_k = first_key<const Element>(p.k, p.k_stride, sequence, heads.kv);
    const Element* g_v = first_key<const Element>(p.v, p.v_stride, sequence, heads.kv);
    const auto mask = own.template bind<typename Config::Mask>(a);
    const int visible = first_visible_key<typename Config::Mask>(mask, q_first, kTileQ);
    const auto load_k = [&](int tile) {
      const auto k = kv_rows(p, sequence, g_k, p.k_stride, tile * kTileKv, visible);
      Products::template load<Config::kDimQk, kBytes, kThreads>(smem.k, k);
      smem.Bias::template load<kThreads>(a, sequence.batch, heads.first, q_first, tile * kTileKv);
      ptx::cp_async_commit();
    };
    const auto load_v = [&](int tile) {
      const auto v = kv_rows(p, sequence, g_v, p.v_stride, tile * kTileKv, visible);
      Products::template load<Config::kDimV, kBytes, kThreads>(smem.v, v);
      ptx::cp_async_commit();
    };

    const auto score = own.template bind<typename Config::Score>(a);
    const auto dropout = own.template bind<Dropout>(a);
    const Real log2_unit = score.unit() * static_cast<Real>(kLog2E);
    const auto tiles = own.split.part(mask.kv_tiles(q_first, kTileQ, kTileKv));

    Products products;
    Output out;
    out.clear();
    RowState<Real> rows[kRowsPerLane];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) rows[r].init();

    if (tiles.begin < tiles.end) {
      Products::template load<Config::kDimQk, kBytes, kThreads>(smem.q, q);
      load_k(tiles.number(tiles.begin));
      Products::template prepare_first<kBytes, kThreads>(smem.q);
    }
    const auto visit = [&](int place, bool full) {
      const int tile = tiles.number(place);
      ptx::cp_async_wait<0>();
      Products::template prepare<kBytes, kThreads>(smem.k);
      ptx::sync_threads();  // K is here, and every warp is done with the V before
      load_v(tile);

      Scores s;
      Products::multiply(s, smem.q, warp_row, smem.k);
      s.for_each(
          lane, [&](Real& x, int row, int col) { x = score.apply(x, q_first + warp_row + row, tile * kTileKv + col); });
      if constexpr (Config::BiasHeld::kHeld) {
        using Block = Fragment<16, 16>;
#pragma unroll
        for (int m = 0; m < Scores::kM; ++m) {
#pragma unroll
          for (int n = 0; n < Scores::kN; n += 2) {
            const auto block = smem.block(warp_row + m * 16, n * 8, lane);
            Block::for_each_index([&](int down, int across, int i) {
              Real& x = s.at(m * 2 + down, n + across, i);
              x = block.plus(x, down, across, i);
            });
          }
        }
      }
      if (!full) {
        s.for_each(lane, [&](Real& x, int row, int col) {
          if (!mask.keep(q_first + warp_row + row, tile * kTileKv + col)) x = -infinity<Real>();
        });
      }
      products.weigh(s, rows, out, log2_unit);
      drop(dropout, s, q_first + warp_row, tile * kTileKv);

      ptx::cp_async_wait<0>();
      Products::template prepare<kBytes, kThreads>(smem.v);
      ptx::sync_threads();  // V is here, and every warp is done with K
      if (place + 1 < tiles.end) load_k(tiles.number_after(place));

      products.accumulate(out, s, smem.v);
    };
    for (int place = tiles.begin; place < tiles.end; ++place) {
      const bool full = tiles.is_full(place);
      if constexpr (kApart) {
        if (full) {
          visit(place, true);
        } else {
          visit(place, false);
        }
      } else {
        visit(place, full);
      }
    }

    finish(smem, p, own, score, products, rows, out, warp_row, lane);
  }
};

template <class Config>
CF_DEVICE void forward_sm80(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm80<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm80<Config>::run(params);
}

}  // namespace cuflash
