// Forward attention of few queries over many keys, on mma.sync tensor cores (sm_80 and later): memory decides.
//
//   out = softmax(score(Q K^T)) V,   lse = log sum exp
//
//              kv tiles ->
//           +----+----+----+      The rows of a tile, 16 or 32 queries of all heads that share keys, are every warp's;
//    q tile |0123|0123|0123|      its keys are shared out: each warp has 16 of every kv tile, copies them for itself
//           +----+----+----+      some tiles ahead, and waits for no other. It finds a part of every row.
//
//   for each stretch:
//     each warp, for each kv tile:   load K and V, kStages - 1 tiles ahead | S = Q K^T | mask | softmax_tile | out += P V
//     warps' parts -> shared memory -> merged: whole rows, or a part of them in scratch memory
//     whoever leaves the last part of a query tile merges them all
//
// Loads run on into the next stretch, whose Q and first keys arrive while the parts of this one are merged.
// Warps' parts and blocks' parts are merged by the same few lines (tile/parts.cuh), in the order of warps and of keys.
// Where the blocks of a query tile are a cluster, parts stay in their shared memory, and each merges some of the columns.
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
  static constexpr bool kCluster = Config::kCluster;
  static_assert(!kCluster || IsSame<typename Config::Split, KeySplits>::value, "a block has one stretch then");
  static_assert(kKeys == 16 && kStages > 1);
  static_assert(IsSame<typename Config::Dropout, NoDropout>::value, "16 keys are half of what shares a call of Philox");

  using Finder = KeyFinder<Sequence, kKeys>;
  struct Stage {
    SharedTile<Element, kKeys, kDimQk> k;
    SharedTile<Element, kKeys, kDimV> v;
  };
  // What a warp found of as many rows as are merged at a time.
  static constexpr int kRows = 16;
  struct WarpPart {
    float out[kRows][kDimV];
    RowState<float> states[kRows];
  };
  union Buffer {
    Stage keys;
    WarpPart part;  // in the buffer of the last keys, while the others fill
  };
  struct SmemPlan {
    SharedTile<Element, kTileQ, kDimQk> q[2];  // of this stretch and of the next
    Buffer buffers[kWarps][kStages];
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

  // A stretch, whose rows and which of their key tiles it is.
  struct Job {
    Stretch stretch;
    Sequence sequence;
    Heads heads;
    int q_first, q_rows;  // the tile's first row among the sequence's, and how many there are from that one on
    Tiles tiles;
    int first_visible;  // key

    CF_DEVICE Job(const FwdParams& p, const Stretches& stretches, const Stretch& its_stretch)
        : stretch(its_stretch), sequence(p.attention, stretch.work.batch), heads(p.attention, stretch.work.head),
          q_first(stretch.work.tile * kTileQ), q_rows(Heads::rows(p.attention, sequence.len_q) - q_first) {
      const auto mask = heads.template bind<typename Config::Mask>(p.attention, sequence);
      tiles = q_rows > 0 ? stretches.part(mask.kv_tiles(q_first, kTileQ, kTileKv)) : Tiles{0, 0, 0, 0};
      first_visible = mask.kv_tiles(q_first, kTileQ, 1).begin;
    }

    CF_DEVICE int num_tiles() const { return max_of(0, tiles.end - tiles.begin); }
  };

  // The keys of a job on their way to a warp.
  struct Loader {
    Finder finder;
    const Element *k, *v;  // key 0
    int key;               // the next
    int left = 0;          // tiles that have not been started

    CF_DEVICE void turn(const FwdParams& p, const Job& job) {
      finder.turn(p, job.sequence, job.first_visible);
      k = first_key<const Element>(p.k, p.k_stride, job.sequence, job.heads.kv);
      v = first_key<const Element>(p.v, p.v_stride, job.sequence, job.heads.kv);
      key = job.tiles.begin * kTileKv + ptx::warp_index() * kKeys;
      left = job.num_tiles();
      if (left > 0) finder.look_up(p, key);
    }

    CF_DEVICE void load(const FwdParams& p, Stage& stage, typename Finder::Offsets& offsets) {
      const int lane = ptx::lane_index();
      finder.settle(p, offsets);
      load_tile_async<Config::kDimQk, kBytes, 32, 32, true>(stage.k, finder.keys(p, offsets, k), lane);
      load_tile_async<Config::kDimV, kBytes, 32, 32, true>(stage.v, finder.values(p, offsets, v), lane);
      key += kTileKv;
      if (--left > 0) finder.look_up(p, key);
    }
  };

  // What a warp keeps from stretch to stretch.
  struct Warp {
    const FwdParams& p;
    SmemPlan& smem;
    const int lane, index;
    Stretches& stretches;
    Job job, next_job;  // at hand, and the one after it, if there is one
    bool has_next;
    Loader loader;
    int turned = 0;                 // to how many of the two jobs the loader has turned
    int ahead = 0;                  // tiles under way
    int load_stage = 0, stage = 0;  // buffers of the next tile to be loaded, and to be used
    int q_buffer = 0;

    CF_DEVICE Warp(const FwdParams& params, SmemPlan& plan, Stretches& its_stretches, const Stretch& first)
        : p(params), smem(plan), lane(ptx::lane_index()), index(ptx::warp_index()), stretches(its_stretches),
          job(p, stretches, first), next_job(job) {}

    CF_DEVICE void run() {
      for (;;) {
        Stretch stretch;
        has_next = stretches.next(p, stretch);
        if (has_next) next_job = Job(p, stretches, stretch);
        Visit(*this, job).run();
        if (!has_next) break;
        job = next_job;
        turned = max_of(turned - 1, 0);
        q_buffer ^= 1;
      }
    }

    CF_DEVICE static int after(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }

    // Starts the tile after those under way, if there is one: of this job or of the next, no further.
    CF_DEVICE void load() {
      if (loader.left == 0 && turned <= has_next) {
        Job to = next_job;  // a copy, as a choice between two references would keep both in memory
        if (turned == 0) to = job;
        turn(to, q_buffer ^ turned);
        ++turned;
      }
      if (loader.left > 0) {
        loader.load(p, smem.buffers[index][load_stage].keys,
                    reinterpret_cast<typename Finder::Offsets&>(smem.offsets[index]));
        load_stage = after(load_stage);
        ++ahead;
      }
      ptx::cp_async_commit();
    }

    // The keys of a job follow; its queries come with the first.
    CF_DEVICE void turn(const Job& to, int buffer) {
      loader.turn(p, to);
      const Element* g_q = first_query<const Element>(p.q, p.q_stride, to.sequence, to.heads.first);
      load_tile_async<Config::kDimQk, kBytes, kThreads>(smem.q[buffer],
                                                        rows_of(to.heads, g_q, p.q_stride, to.q_first, to.q_rows));
    }
  };

  // A block's work on one stretch.
  struct Visit {
    Warp& me;
    const FwdParams& p;
    SmemPlan& smem;
    const Job& job;
    const Stretch& stretch;
    const Heads& heads;
    const int q_first, q_rows;
    const typename Heads::template Bound<typename Config::Mask, Sequence> mask;
    const typename Heads::template Bound<typename Config::Score, Sequence> score;

    CF_DEVICE Visit(Warp& warp, const Job& its_job)
        : me(warp), p(me.p), smem(me.smem), job(its_job), stretch(job.stretch), heads(job.heads), q_first(job.q_first),
          q_rows(job.q_rows), mask(heads.template bind<typename Config::Mask>(p.attention, job.sequence)),
          score(heads.template bind<typename Config::Score>(p.attention, job.sequence)) {}

    CF_DEVICE float log2_unit() const { return score.unit() * static_cast<float>(kLog2E); }

    CF_DEVICE void run() {
      if (stretch.work.tile == 0 && stretch.part == 0) {
        heads.for_each([&](int head) { store_tail<Config, kThreads>(p, job.sequence, head); });
      }
      if (q_rows > 0) walk();
    }

    // This warp's part of every row, its keys of every tile; then all warps'.
    CF_DEVICE void walk() {
      Output out;
      out.clear();
      RowState<float> rows[kRowsPerLane];
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) rows[r].init();
      // The first rounds only load, until as many tiles are under way as there can be beside one in use.
#pragma unroll 1
      for (int tile = job.tiles.begin - (kStages - 1 - me.ahead); tile < job.tiles.end; ++tile) {
        if (tile >= job.tiles.begin) {
          ptx::cp_async_wait<kStages - 2>();
          if (tile == job.tiles.begin) {
            ptx::sync_threads();  // Q is here
          } else {
            ptx::sync_warp();  // K and V are here, and every lane is done with those before
          }
          --me.ahead;
        }
        me.load();
        if (tile < job.tiles.begin) continue;
        weigh(tile, smem.buffers[me.index][me.stage].keys, rows, out);
        me.stage = Warp::after(me.stage);
      }
      // Into the buffer of the last keys: the others are full, or being filled, with the next stretch's. In a cluster no
      // keys come any more, and parts are where all blocks have them.
      const int free = kCluster ? 0 : me.stage == 0 ? kStages - 1 : me.stage - 1;
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        rows[r].l = row_sum(rows[r].l);
        scale_row(out, r, rows[r].inverse_sum());
      }
#pragma unroll
      for (int first = 0; first < kTileQ; first += kRows) {
        if (first >= q_rows) break;
        ptx::sync_warp();  // every lane is done with the keys
        leave(smem.buffers[me.index][free].part, first, rows, out);
        ptx::sync_threads();  // every warp's part is here
        merge<kWarps>(first, first + kRows, kWarps, stretch.parts == 1, 0, kThreads, [&](int row, int col) {
          const WarpPart& part = smem.buffers[0][free].part;
          constexpr int kStep = sizeof(Buffer) / sizeof(float) * kStages;
          return Parts<float, 4>{&part.states[row - first], &part.out[row - first][col],
                                 kStep / (sizeof(RowState<float>) / sizeof(float)), kStep};
        });
        ptx::sync_threads();  // before the next parts or keys take their place
      }
      if constexpr (kCluster) {
        ptx::sync_cluster();
        merge<8>(0, kTileQ, stretch.parts, true, stretch.part * kThreads, stretch.parts * kThreads,
                 [&](int row, int col) { return ClusterParts<4>{state_in(0, row), out_in(0, row) + col}; });
        ptx::sync_cluster();  // nobody reads this block's shared memory any more
      } else if (stretch.parts > 1 && is_last()) {
        merge<8>(0, kTileQ, stretch.parts, true, 0, kThreads,
                 [&](int row, int col) { return SlotParts{stretch, state_in(0, row), out_in(0, row) + col}; });
      }
    }

    // Adds a tile's keys to this warp's part.
    CF_DEVICE void weigh(int tile, Stage& keys, RowState<float> (&rows)[kRowsPerLane], Output& out) {
      const int lane = me.lane, kv_first = tile * kTileKv + me.index * kKeys;
      Scores s;
      s.clear();
      gemm_abt<Element>(s, smem.q[me.q_buffer], 0, keys.k);
      s.for_each(lane, [&](float& x, int row, int col) { x = score.apply(x, q_first + row, kv_first + col); });
      if (!job.tiles.is_full(tile)) {
        s.for_each(lane, [&](float& x, int row, int col) {
          if (!mask.keep(q_first + row, kv_first + col)) x = -infinity<float>();
        });
      }
      softmax_tile(s, rows, out, log2_unit());
      Operand<kTileQ, kKeys> weights;
      pack_operand<Element>(weights, s);
      gemm_ab<Element>(out, weights, keys.v);
    }

    // Whether this block leaves the query tile's last part; what the others left can be read then.
    CF_DEVICE bool is_last() const {
      if (ptx::thread_index() == 0) {
        const int last = stretch.parts - 1;
        smem.is_last = ptx::count_around_in_order(p.tickets + stretch.query_tile, last) == last;
      }
      ptx::sync_threads();
      return smem.is_last;
    }

    // A row's place in a slot of scratch memory; or of a cluster's block, in a buffer beside that of warps' parts.
    CF_DEVICE WarpPart& found(int row) const { return smem.buffers[row / kRows][1].part; }
    CF_DEVICE RowState<float>* state_in(int64 slot, int row) const {
      if constexpr (kCluster) return &found(row).states[row % kRows];
      return static_cast<RowState<float>*>(p.partial_state) + slot * kTileQ + row;
    }
    CF_DEVICE float* out_in(int64 slot, int row) const {
      if constexpr (kCluster) return found(row).out[row % kRows];
      return static_cast<float*>(p.partial_out) + (slot * kTileQ + row) * kDimV;
    }

    // Leaves the rows from `first` on.
    CF_DEVICE void leave(WarpPart& part, int first, RowState<float> (&rows)[kRowsPerLane], Output& out) {
      const int lane = me.lane;
      Output::for_each_index([&](int r, int n, int i) {
        const int row = row_of(lane, r) - first;
        if (r / 2 * 16 != first || first + row >= q_rows || i != 0) return;
        if (n == 0 && lane % 4 == 0) part.states[row] = rows[r];
        *reinterpret_cast<Columns<float, 2>*>(&part.out[row][col_of(lane, n, 0)]) = {
            {out.at(r, n, 0), out.at(r, n, 1)}};
      });
    }

    // Merges the parts of the rows [first, end), four columns a thread, into the result, or into this stretch's part. Of
    // `threads` that share them this block's are those from `first_thread` on.
    template <int kAtOnce, class PartsOf>
    CF_DEVICE void merge(int first, int end, int count, bool whole, int first_thread, int threads,
                         const PartsOf& parts_of) {
      constexpr int kAcross = kDimV / 4;
      const int rows = min_of(q_rows, end) - first;
#pragma unroll 1
      for (int index = first_thread + ptx::thread_index(); index < rows * kAcross; index += threads) {
        const int row = first + index / kAcross, col = index % kAcross * 4;
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
      Element* out = Results::out(p, job.sequence, heads.first, 0) + heads.offset(q_first + row, p.out_stride) + col;
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
        const int64 number = Results::number(p, job.sequence, heads.first, 0);
        Results::close(p, number + heads.offset(q_first + row, Results::lse_stride(p)), state, score.unit());
      }
    }
  };

  CF_DEVICE static void run(const FwdParams& p) {
    SmemPlan& smem = *reinterpret_cast<SmemPlan*>(ptx::dynamic_smem());
    Stretches stretches(p);
    Stretch stretch;
    if (stretches.next(p, stretch)) Warp(p, smem, stretches, stretch).run();
  }
};

template <class Config>
CF_DEVICE void forward_sm80_few(const FwdParams& params) {
  SmemSizeCheck<sizeof(typename ForwardSm80Few<Config>::SmemPlan), Config::kSmemBytes>();
  ForwardSm80Few<Config>::run(params);
}

}  // namespace cuflash
