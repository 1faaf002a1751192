// What both Hopper backward kernels are made of: a block's key tile and its walk, the producer, P and dS in registers,
// and the ways of the gradients out of the block.
#pragma once

#include "attention/bias_gradient.cuh"
#include "attention/gradient.cuh"
#include "attention/schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/keep.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/bias.cuh"
#include "tile/captured_gradient.cuh"
#include "tile/copy_tma.cuh"
#include "tile/dq_accum.cuh"
#include "tile/dropout.cuh"
#include "tile/query_tiles.cuh"
#include "tile/ring.cuh"
#include "tile/tail.cuh"

namespace cuflash {

template <class Config>
struct BackwardBlock {
  using Element = typename Config::Element;
  using Sequence = typename Config::Sequence;
  using Gradient = ScoreGradient<Config, true>;
  using Sums = QueryTiles<Config>;
  using Walk = typename Config::Mask::Walk;
  static constexpr int kTileQ = Config::kTileQ, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr int kRows = 64, kKeyTiles = kTileKv / kRows;
  static constexpr int kConsumers = 2, kConsumerThreads = kConsumers * ptx::kWarpgroupThreads;
  // Blocks of a cluster that share the columns of a head, in whole chunks: each makes an addend of every score.
  static constexpr int kSlices = Config::kSlices;
  CF_DEVICE static constexpr int slice_of(int dim) {
    return kSlices == 1 ? round_up(dim, 16) : 64 * cdiv(dim, 64 * kSlices);
  }
  static constexpr int kDimQk = slice_of(Config::kDimQk), kDimV = slice_of(Config::kDimV);
  // Of dO: beside so many columns, and what slices hand to each other, there is no room for a second one.
  static constexpr int kDoutStages = kSlices == 1 ? kStages : 1;
  static_assert(Config::kThreads == ptx::kWarpgroupThreads + kConsumerThreads);

  using KTile = SwizzledTile<Element, kRows, kDimQk>;
  using VTile = SwizzledTile<Element, kRows, kDimV>;
  using QTile = SwizzledTile<Element, kTileQ, kDimQk>;
  using DoutTile = SwizzledTile<Element, kTileQ, kDimV>;
  using DsTile = SwizzledTile<Element, kTileQ, kTileKv>;
  using Rows = RowTile<kTileQ>;
  using Cursor = RingCursor<kStages>;
  using DoutCursor = RingCursor<kDoutStages>;
  using Scores = Fragment<16, kTileQ>;  // transposed: rows are keys
  using Weights = Operand<16, kTileQ>;
  using Kept = ElementSet<Scores>;  // those that dropout keeps
  // One stage: a tile of the bias is read at once, so that the next one has the rest of a visit to come.
  using Bias = typename Config::BiasCopies::template Buffers<kTileQ, kTileKv, 1>;
  using BiasCursor = typename Bias::Cursor;

  struct Keys {
    KTile k[kKeyTiles];  // dk on the way out
    VTile v[kKeyTiles];  // dv on the way out
  };

  // What the producer fills.
  struct Inputs : Keys {
    QTile q[kStages];
    DoutTile dout[kDoutStages];
    Rows rows[kStages];           // come with q
    Ring<kStages> q_ring;         // given back by every warp, which reads rows by itself
    Ring<kDoutStages> dout_ring;  // given back by every warpgroup
    uint64 k_full, v_full;
    Bias bias;

    CF_DEVICE void init() {
      q_ring.init(kConsumerThreads / 32 * kWarpArrivals);
      dout_ring.init(kConsumers);
      ptx::mbarrier_init(ptx::smem_u32(&k_full), 1);
      ptx::mbarrier_init(ptx::smem_u32(&v_full), 1);
      bias.init(kConsumerThreads / 32);
    }
    CF_DEVICE void wait_k() { ptx::mbarrier_wait(ptx::smem_u32(&k_full), 0); }
    CF_DEVICE void wait_v() { ptx::mbarrier_wait(ptx::smem_u32(&v_full), 0); }
  };

  const BwdParams& p;
  Work work;
  Sequence sequence;
  int kv_first, head_first, head_end;
  Walk tiles;      // of queries: the same for every head, or a list of those of all heads
  int first_tile;  // the walk over the tiles of a head, or over the list, goes from this one, or this place, on and round

  CF_DEVICE explicit BackwardBlock(const BwdParams& params)
      : p(params), work(find(params)), sequence(params.attention, work.batch), kv_first(work.tile * kTileKv) {
    const Attention& a = p.attention;
    const int group = a.heads_q / a.heads_kv;
    head_first = work.head * group;
    head_end = head_first + group;
    tiles = typename Config::Mask(a, sequence, head_first).q_tiles(kv_first, kTileKv, kTileQ);
    first_tile = tiles.begin + Config::Reduction::first_query_tile(work.tile) % max_of(1, tiles.end - tiles.begin);
  }
  // Of a work that somebody has found, with the tiles that it walks.
  CF_DEVICE BackwardBlock(const BwdParams& params, const Work& its_work, const Walk& its_tiles)
      : p(params), work(its_work), sequence(params.attention, work.batch), kv_first(work.tile * kTileKv),
        tiles(its_tiles) {
    const int group = p.attention.heads_q / p.attention.heads_kv;
    head_first = work.head * group;
    head_end = head_first + group;
    first_tile = tiles.begin + Config::Reduction::first_query_tile(work.tile) % max_of(1, tiles.end - tiles.begin);
  }
  CF_DEVICE static Work find(const BwdParams& params) {
    return find(params, static_cast<int>(ptx::block_index() / kSlices));
  }
  CF_DEVICE static Work find(const BwdParams& params, int index) {
    const Attention& a = params.attention;
    const int longest = num_tiles(a.len_kv, kTileKv), heads = a.heads_kv * a.batch;
    Work work = section_work(index, longest, a.heads_kv, heads, params.heads_per_section);
    work.tile = Config::Reduction::key_tile(longest - 1 - work.tile, longest);
    if constexpr (Walk::kListed && !Config::Reduction::kOrdered && IsSame<Sequence, DenseSequence>::value) {
      const Sequence sequence(a, work.batch);
      work.tile = typename Config::Mask(a, sequence, work.head * (a.heads_q / a.heads_kv)).ranked_key(work.tile);
    }
    return work;
  }

  CF_DEVICE static int slice() { return kSlices == 1 ? 0 : static_cast<int>(ptx::block_index() % kSlices); }
  // Of `dim` columns, bytes of the boxes of this slice's; the last chunk of the last slice may be none of the head's.
  template <class Tile>
  CF_DEVICE static int box_bytes(int dim) {
    return Tile::kChunkBytes * min_of(Tile::kChunks, cdiv(dim - slice() * Tile::kCols, Tile::kChunkCols));
  }
  // Which buffer has the dO of a step.
  CF_DEVICE static DoutCursor dout_at(const Cursor& at) {
    if constexpr (kDoutStages == kStages) {
      return at;
    } else {
      static_assert(kDoutStages == 1 && kStages == 2);
      return {0, at.stage};
    }
  }

  // The buffer of a product: no constant, as the compiler would hold addresses of all its parts in registers.
  CF_DEVICE static int dout_stage(int stage) { return kDoutStages == 1 ? ptx::keep(0) : stage; }

  CF_DEVICE bool empty() const { return tiles.begin >= tiles.end; }
  CF_DEVICE int num_steps() const { return tiles.steps(head_end - head_first); }
  CF_DEVICE int tile_after(int tile) const { return tile + 1 == tiles.end ? tiles.begin : tile + 1; }

  // A tile of queries that is visited: whose, which, and its place in a list if the walk goes by one.
  struct Visit {
    int head, tile, place;
  };
  CF_DEVICE Visit first_visit() const { return {head_first, first_tile, first_tile}; }

  // A walk over all visits, of a thread or of a warp. By a list, the next tile is looked up while one is worked on. A
  // warp's lanes look at several, of which the first counts: of what they all read the compiler would make a uniform
  // register, and wait for it at once.
  template <bool kWarp>
  struct Steps {
    int upcoming;  // what is listed next

    CF_DEVICE void start(const BackwardBlock& block, Visit& at) {
      if constexpr (Walk::kListed) block.take(block.tiles.entry(at.place), at);
    }
    CF_DEVICE void look_ahead(const BackwardBlock& block, const Visit& at) {
      if constexpr (Walk::kListed) {
        const int after = block.tile_after(at.place);
        upcoming = block.tiles.entry(kWarp ? min_of(after + ptx::lane_index(), block.tiles.end - 1) : after);
      }
    }
    // Whether the next tile is another head's.
    CF_DEVICE bool go_on(const BackwardBlock& block, Visit& at) {
      if constexpr (Walk::kListed) {
        const int before = at.head;
        at.place = block.tile_after(at.place);
        block.take(kWarp ? ptx::shuffle(upcoming, 0) : upcoming, at);
        return at.head != before;
      } else {
        at.place = at.tile = block.tile_after(at.tile);
        return at.tile == block.first_tile && ++at.head < block.head_end;
      }
    }
  };
  CF_DEVICE void take(int entry, Visit& at) const {
    at.head = head_first + tiles.member_of(entry);
    at.tile = tiles.number_of(entry);
  }

  // A box of keys that would lie behind the last one begins with it: see load_boxes. No element of it is visible.
  CF_DEVICE BoxOrigin kv_box(int number) const {
    return sequence.kv_box(p.attention, min_of(kv_first + number * kRows, sequence.len_kv - 1), work.head);
  }

  // One thread loads everything, in the order in which it is used.
  CF_DEVICE void produce(Inputs& smem) const {
    if (empty()) return;
    const uint32 k_full = ptx::smem_u32(&smem.k_full), v_full = ptx::smem_u32(&smem.v_full);
    ptx::mbarrier_arrive_expect_tx(k_full, key_bytes<KTile>(Config::kDimQk));
    load_keys(smem.k, p.k_map, k_full, Config::kDimQk);
    Cursor at;
    produce_queries(smem, at, [&] {
      ptx::mbarrier_arrive_expect_tx(v_full, key_bytes<VTile>(Config::kDimV));
      load_keys(smem.v, p.v_map, v_full, Config::kDimV);
    });
  }
  // What the block walks, from a place in the rings on, and under the first of it the values.
  template <class LoadValues>
  CF_DEVICE void produce_queries(Inputs& smem, Cursor& at, const LoadValues& load_values) const {
    const Attention& a = p.attention;
    BiasCursor bias_at;
    Visit visit = first_visit();
    Steps<false> steps;
    steps.start(*this, visit);
#pragma unroll 1
    for (int step = 0; step < num_steps(); ++step) {
      steps.look_ahead(*this, visit);
      const BoxOrigin origin = sequence.q_box(a, visit.tile * kTileQ, visit.head);
      const uint32 q_barrier = smem.q_ring.acquire(at, box_bytes<QTile>(Config::kDimQk) + sizeof(Rows));
      load_slice(smem.q[at.stage], p.q_map, origin, q_barrier, Config::kDimQk);
      ptx::bulk_load(ptx::smem_u32(&smem.rows[at.stage]),
                     static_cast<const Rows*>(p.row_tiles) + Sums::index(a, sequence, visit.head, visit.tile),
                     sizeof(Rows), q_barrier);
      if (step == 0) load_values();
      load_slice(smem.dout[dout_at(at).stage], p.dout_map, origin,
                 smem.dout_ring.acquire(dout_at(at), box_bytes<DoutTile>(Config::kDimV)), Config::kDimV);
      smem.bias.load(p.bias_map, a, sequence, visit.head, visit.tile * kTileQ, kv_first, bias_at);
      bias_at = bias_at.next();
      at = at.next();
      steps.go_on(*this, visit);
    }
  }
  template <class Tile>
  CF_DEVICE static int key_bytes(int dim) {
    return kKeyTiles * box_bytes<Tile>(dim);
  }
  template <class Tile>
  CF_DEVICE void load_keys(Tile (&all)[kKeyTiles], const TensorMap& map, uint32 barrier, int dim) const {
#pragma unroll
    for (int number = 0; number < kKeyTiles; ++number) load_slice(all[number], map, kv_box(number), barrier, dim);
  }
  template <class Tile>
  CF_DEVICE static void load_slice(Tile& tile, const TensorMap& map, const BoxOrigin& at, uint32 barrier, int dim) {
    load_boxes(tile, map, at, barrier, 0, slice() * Tile::kCols, dim);
  }

  // Chunks that no box brings hold zeros. Called by all threads.
  CF_DEVICE static void clear_padding(Inputs& smem) {
    for (KTile& tile : smem.k) clear_bytes<Config::kThreads>(tile, box_bytes<KTile>(Config::kDimQk));
    for (VTile& tile : smem.v) clear_bytes<Config::kThreads>(tile, box_bytes<VTile>(Config::kDimV));
    for (QTile& tile : smem.q) clear_bytes<Config::kThreads>(tile, box_bytes<QTile>(Config::kDimQk));
    for (DoutTile& tile : smem.dout) clear_bytes<Config::kThreads>(tile, box_bytes<DoutTile>(Config::kDimV));
  }

  // Asked once for all tiles that the block walks: few blocks have such a row, and it need not be known tile by tile.
  CF_DEVICE bool some_row_is_far() const {
    bool far = false;
    if constexpr (Walk::kListed) {
#pragma unroll 1
      for (int place = tiles.begin + ptx::lane_index(); place < tiles.end; place += 32) {
        Visit at;
        take(tiles.entry(place), at);
        far = far || static_cast<const Rows*>(p.row_tiles)[Sums::index(p.attention, sequence, at.head, at.tile)].far;
      }
    } else {
#pragma unroll 1
      for (int head = head_first; head < head_end; ++head) {
        const Rows* rows = static_cast<const Rows*>(p.row_tiles) + Sums::index(p.attention, sequence, head, 0);
#pragma unroll 1
        for (int tile = tiles.begin + ptx::lane_index(); tile < tiles.end; tile += 32) far = far || rows[tile].far;
      }
    }
    return ptx::any(far);
  }

  // Whether some element of a visit may be hidden, or has a bias that belongs to no query.
  CF_DEVICE bool is_full(int place, int tile) const {
    return tiles.is_full(place, tile) && (!Config::BiasCopies::kLoaded || (tile + 1) * kTileQ <= sequence.len_q);
  }

  // Products of a warp's 16 keys from `kv_first` on with queries, from s = Q K^T to P * slope; what of P is kept into
  // `weights`. `bias_of(k)` is the bias block of queries 16 * k and on.
  template <bool kCareful, class BiasOf>
  CF_DEVICE static void weigh(Scores& s, Weights& weights, const Gradient& gradient, const Rows& rows, int q_first,
                              int kv_first, int len_q, const Kept& kept, const BiasOf& bias_of) {
    const int lane = ptx::lane_index();
#pragma unroll
    for (int k = 0; k < kTileQ / 16; ++k) {
      const auto shifts = Rows::of_lane(rows.shift, k, lane);
      const auto m = Rows::of_lane(rows.m, k, kCareful ? lane : 0);
      const auto beside = bias_of(k);
#pragma unroll
      for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float weight[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const Place q(q_first + col_of(lane, n, i), col_of(0, n, i)), kv(kv_first + row_of(lane, r), row_of(0, r));
            const RowShift<float> shift{kCareful ? m.x[n % 2 * 2 + i] : 0.f, shifts.x[n % 2 * 2 + i]};
            const float product = s.at(r, n, i);
            if (beside.kSome) {
              const float bias = !kCareful || q < len_q ? beside.at(r, n % 2, i) : 0.f;
              weight[i] = gradient.probability(product, bias, shift, q, kv, !kCareful);
            } else {
              weight[i] = gradient.probability(product, shift, q, kv, !kCareful);
            }
            s.at(r, n, i) = gradient.times_slope(weight[i], product, q, kv);
            if (!kept.has(r, n, i)) weight[i] = 0.f;
          }
          weights.x[0][k][n % 2 * 2 + r] = ptx::pack<Element>(weight[0], weight[1]);
        }
      }
    }
  }

  // From P * slope and dP to dS, in place of dP.
  CF_DEVICE static void differentiate(Scores& p_slope, Scores& dp, const Gradient& gradient, const Rows& rows,
                                      const Kept& kept) {
#pragma unroll
    for (int k = 0; k < kTileQ / 16; ++k) {
      const auto deltas = Rows::of_lane(rows.delta, k, ptx::lane_index());
#pragma unroll
      for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            dp.at(r, n, i) =
                gradient.of_logit(p_slope.at(r, n, i), dp.at(r, n, i), deltas.x[n % 2 * 2 + i], kept.has(r, n, i));
          }
        }
      }
    }
  }

  // Leaves dS of a warp's 16 keys from `kv_first` on as the gradient of the bias, if that is what it is.
  CF_DEVICE void store_bias_gradient(Scores& ds, int head, int q_first, int kv_first) const {
    const typename Config::BiasGradient bias_gradient(p, sequence, head);
    const int lane = ptx::lane_index();
    auto place = bias_gradient.walk(q_first + col_of(lane, 0, 0), kv_first + row_of(lane, 0));
#pragma unroll
    for (int n = 0; n < Scores::kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        place.store(0, ds.at(0, n, i));
        place.store(8, ds.at(1, n, i));
        place.go_down(i == 0 ? 1 : 7);
      }
    }
  }

  // Shares of dQ that a block makes: of the columns of its slice.
  static constexpr int kShares = kSlices == 1 ? Sums::kShares : kDimQk / 64;

  // Adds a warpgroup's share to the sums, if `some`; `barrier` is its own named barrier, and `adder` this warp's.
  template <class Adder>
  CF_DEVICE void add_to_sums(Adder& adder, const typename Sums::Share& dq, const Visit& of, int share, int barrier,
                             bool some) const {
    const Attention& a = p.attention;
    if constexpr (kSlices > 1) {
      share += slice() * kShares;
      some = some && share < Sums::kShares;
    }
    const int64 index = Sums::index(a, sequence, of.head, of.tile);
    const Turn order =
        tiles.turn(typename Config::Mask(a, sequence, of.head), of.place, of.tile * kTileQ, kTileQ, kTileKv, work.tile);
    // The mask's two views of a tile may differ at its edge, where dS is 0.
    if (Config::Reduction::kOrdered && !(some && order.adds)) return;
    const int thread = ptx::thread_index() % ptx::kWarpgroupThreads;
    int* turn = p.dq_turn + index * Sums::kShares + share;
    Config::Reduction::wait_turn(turn, order.before, thread == 0, barrier);
    adder.add(static_cast<float*>(p.dq_accum) + Sums::part(index, share, thread), dq, some);
    Config::Reduction::pass_turn(turn, thread == 0, barrier);
  }

  // Writes a warpgroup's 64 rows of dk or dv through a tile that nobody reads any more; `columns` has the whole head.
  template <class Tile, int kDim>
  CF_DEVICE void store(Tile& tile, int number, Fragment<16, kDim>& gradient, double scale, const TensorMap& map,
                       int barrier, int columns = kDim) const {
    const int thread = ptx::thread_index() % ptx::kWarpgroupThreads, lane = ptx::lane_index();
    const float factor = static_cast<float>(scale);
    gradient.for_each(0, [&](float& x, int, int) { x *= factor; });
    store_fragment<Element>(tile, thread / 32 * 16, 0, lane, gradient);
    ptx::fence_proxy_async();
    ptx::sync_named(barrier, ptx::kWarpgroupThreads);
    if (thread == 0 && kv_first + number * kRows < sequence.len_kv) {
      store_boxes(map, kv_box(number), tile, slice() * kDim, columns);
      ptx::tma_store_commit();
    }
  }

  // Roles: `consume(block, smem, number of the consumer)` is the kernel's own.
  template <class Smem, class Consume>
  CF_DEVICE static void run(const BwdParams& params, Consume&& consume) {
    Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
    const BackwardBlock block(params);
    if (ptx::thread_index() == 0) {
      smem.init();
      ptx::fence_mbarrier_init();
    }
    if constexpr (kSlices == 1) {
      ptx::sync_threads();
    } else {
      clear_padding(smem.inputs);
      ptx::sync_cluster();
    }
    const int warpgroup = ptx::warpgroup_index();
    const bool some = block.kv_first < block.sequence.len_kv;
    if (warpgroup == 0) {
      ptx::lower_registers<Config::kProducerRegisters>();
      if (some && ptx::warp_index() == 0 && ptx::elect()) block.produce(smem.inputs);
    } else {
      ptx::raise_registers<Config::kConsumerRegisters>();
      if (block.work.tile == 0 && slice() == 0) {
        store_key_tail<Config, kConsumerThreads>(params, block.sequence, block.work.head,
                                                 ptx::thread_index() - ptx::kWarpgroupThreads);
      }
      if (some) consume(block, smem, warpgroup - 1);
    }
    if constexpr (kSlices > 1) ptx::sync_cluster();  // the other block may still arrive at barriers of this one
  }
};

}  // namespace cuflash
