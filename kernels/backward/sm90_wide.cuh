// Backward attention on Hopper for 129 to 512 columns, whose dK and dV are too wide for the registers of one warpgroup.
//
//   P = exp(score(Q K^T) - lse),  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//   producer warpgroup, one thread   as in backward/sm90.cuh
//   warpgroup of the values          S^T = K Q^T | P, to the other | dV += P^T dO | half the columns of dQ
//   warpgroup of the keys            dP^T = V dO^T | dS from P and dP | dK += dS^T Q | half the columns of dQ
//
// One block owns 64 keys. P passes from one warpgroup to the other through shared memory, in fp32, as dS would show its
// rounding, and dS from the keys' to both. dQ is of the tile before, as in backward/sm90.cuh.
//
// Of more than 256 columns each of two blocks of a cluster has one half, a slice: of K, V, Q and dO, and so of dK, dV and
// dQ. S and dP sum over all columns, so the warpgroups of one block hand their addends to those of the other, which do the
// same, through shared memory; then both make the same P and dS:
//
//   block 0   S0 = K0 Q0^T, to block 1 | S0 + S1 to P | dV0 += P^T dO0    dP0 = V0 dO0^T, to block 1 | dP0 + dP1 to dS | ...
//   block 1   S1 = K1 Q1^T, to block 0 | S1 + S0 to P | dV1 += P^T dO1    dP1 = V1 dO1^T, to block 0 | dP1 + dP0 to dS | ...
#pragma once

#include "backward/block_sm90.cuh"

namespace cuflash {

template <class Config>
struct BackwardSm90Wide {
  using Block = BackwardBlock<Config>;
  using Element = typename Config::Element;
  using Gradient = typename Block::Gradient;
  using Cursor = typename Block::Cursor;
  using Scores = typename Block::Scores;
  using Weights = typename Block::Weights;
  static constexpr bool kSliced = Block::kSlices > 1;
  static_assert(Block::kKeyTiles == 1 && Config::kTileQ == 64 && !Config::kCopiedSums);
  static_assert(Block::kSlices == 1 || Block::kSlices == ptx::kClusterBlocks);

  struct alignas(16) Four {
    float x[4];
  };
  using InOrder = Four[Scores::kN][ptx::kWarpgroupThreads];  // a warpgroup's scores in fragment order

  struct SmemPlan {
    typename Block::Inputs inputs;
    typename Block::DsTile ds[2];
    InOrder p_slope;  // P * slope; of slices, before, the other's addend of S
    Ring<2> ds_ring;  // of dS, from every warp of the keys to both warpgroups
    Ring<1> p_ring;   // of P, from every warp of the values to every warp of the keys

    CF_DEVICE void init() {
      constexpr int kWarps = ptx::kWarpgroupThreads / 32 * kWarpArrivals;
      inputs.init();
      ds_ring.init(Block::kConsumers, kWarps);
      p_ring.init(kWarps, kWarps);
    }
  };

  // Beside it, of slices: what they hand to each other. Every thread stores what the same thread of the other block adds,
  // 16 bytes at a time, whose coming the leader there has announced; every warp gives the room back.
  struct SlicedPlan : SmemPlan {
    InOrder dp;
    Ring<1> s_ring, dp_ring;

    CF_DEVICE void init() {
      constexpr int kWarps = ptx::kWarpgroupThreads / 32;
      SmemPlan::init();
      s_ring.init(kWarps);
      dp_ring.init(kWarps);
    }
  };
  using Plan = typename If<kSliced, SlicedPlan, SmemPlan>::Type;
  using DsCursor = RingCursor<2>;
  using PCursor = RingCursor<1>;

  // A visit, and where its dS and P are.
  struct Step {
    typename Block::Visit visit;
    DsCursor ds;
    PCursor p;
  };

  // Named barriers: K is no longer read, of both warpgroups' threads, and of a warpgroup's own, one for each.
  static constexpr int kKeysDone = 1, kMyWarps = 2;

  // Of the only tile of keys. The compiler does not know it, or it would make the descriptors of scores once, before the
  // walk, and spill them.
  CF_DEVICE static int only_tile() { return ptx::keep(0); }

  // What both warpgroups have and do; Role says what is its own.
  template <class Role, int kNumber, int kDim>
  struct Consumer {
    const Block& block;
    Plan& plan;
    SmemPlan& smem;
    typename Block::Inputs& in;
    const int thread, warp_row;
    const bool leader, far;
    Scores scores;           // S or dP, transposed, of the tile that comes
    Fragment<16, kDim> sum;  // dv or dk

    CF_DEVICE Consumer(const Block& b, Plan& shared)
        : block(b), plan(shared), smem(shared), in(shared.inputs), thread(ptx::thread_index() % ptx::kWarpgroupThreads),
          warp_row(thread / 32 * 16), leader(thread == 0), far(b.some_row_is_far()) {
      sum.clear();
    }

    CF_DEVICE void walk() {
      Role& me = static_cast<Role&>(*this);
      Cursor at;
      Step step{block.first_visit(), {}, {}};
      typename Block::template Steps<true> walk;
      walk.start(block, step.visit);
      Step before{step.visit, {1, 1}, {}};
      Gradient gradient(block.p.attention, block.sequence, step.visit.head);
      in.wait_k();
      in.wait_v();
      me.wait(at);
      me.start(at.stage);
      const int steps = block.num_steps();
#pragma unroll 1
      for (int done = 0; done < steps; ++done) {
        walk.look_ahead(block, step.visit);
        Weights operand;  // P or dS: the product with sum reads it until add_dq has waited
        me.visit(gradient, step, at, operand);
        const Cursor next = at.next();
        const bool more = done + 1 < steps;
        if (!kSliced && more) me.wait(next);
        // Always the next scores: a choice would end what is under way. Behind the last tile they are for nothing, as is
        // the dQ before the first.
        add_dq(before, at, more ? next : at, more, done > 0, true);
        if (leader) {
          if (done > 0) smem.ds_ring.release(before.ds);
          if (!kSliced) in.dout_ring.release(Block::dout_at(at));
        }
        in.q_ring.release_by_warp(at);
        at = next;
        before = step;
        step.ds = step.ds.next();
        step.p = step.p.next();
        if (walk.go_on(block, step.visit)) {
          gradient = Gradient(block.p.attention, block.sequence, step.visit.head);
        }
      }
      add_dq(before, at, at, false, true, false);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(scores.x[0]);
    }

    // Every other chunk of dQ's columns, one after the other in the same registers, and behind them the next scores, if
    // there are `more` when they are there. The product with sum is done before the first chunk, and with it, if it is
    // `under_way`, the dO of this step.
    CF_DEVICE void add_dq(const Step& of, const Cursor& at, const Cursor& next, bool more, bool some, bool under_way) {
      Role& me = static_cast<Role&>(*this);
      constexpr int kShares = Block::kShares, kLast = (kShares - 1 - kNumber) / 2 * 2 + kNumber;
      ShareAdder<typename Block::Sums::Share, false> adder;
      smem.ds_ring.wait(of.ds);
      if (kNumber >= kShares) {
        if (kSliced && more) me.wait(next);
        me.start(next.stage);
        ptx::wgmma_wait<1>();
        if (under_way) me.give_dout_back(at);
      }
#pragma unroll
      for (int share = kNumber; share < kShares; share += 2) {
        typename Block::Sums::Share dq;
        ptx::wgmma_fence();
        Block::Sums::template issue<Element>(dq, smem.ds, of.ds.stage, in.k, share);
        ptx::wgmma_commit();
        if (share == kLast) {
          if (kSliced && more) me.wait(next);
          me.start(next.stage);
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        if (share == kNumber && under_way) me.give_dout_back(at);
        ptx::wgmma_hold(dq.x[0]);
        block.add_to_sums(adder, dq, of.visit, share, kMyWarps + kNumber, some);
      }
      ptx::wgmma_hold(sum.x[0]);
    }

    // Adds what the other slice has of the scores, which come in `buffer`.
    CF_DEVICE void add_other_slice(InOrder& buffer, Ring<1>& ring, const PCursor& at) {
      constexpr int kBytes = sizeof(InOrder);
      const int slice = Block::slice();
      if (leader) ring.announce(at, kBytes);
      ring.wait_empty_across(at);
      const uint32 place = ptx::across(ptx::smem_u32(&buffer[0][thread]), slice), barrier = ring.full_across(at, slice);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        ptx::store_across(place + n * int(sizeof(buffer[0])), scores.x[0][n], barrier);
      }
      ring.wait_across(at);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        const Four four = buffer[n][thread];
#pragma unroll
        for (int i = 0; i < 4; ++i) scores.x[0][n][i] += four.x[i];
      }
    }
  };

  struct ValueRole : Consumer<ValueRole, 0, Block::kDimV> {
    static constexpr int kNumber = 0;
    using Consumer<ValueRole, 0, Block::kDimV>::Consumer;

    CF_DEVICE void run() {
      if (!this->block.empty()) this->walk();
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      this->block.store(this->in.v[0], 0, this->sum, Config::Dropout::scale(this->block.p.attention),
                        this->block.p.dv_map, kMyWarps + kNumber, Config::kDimV);
      if (this->leader) ptx::tma_store_wait_read();
    }

    CF_DEVICE void wait(const Cursor& at) { this->in.q_ring.wait(at); }
    CF_DEVICE void give_dout_back(const Cursor& at) {
      if (kSliced && this->leader) this->in.dout_ring.release(Block::dout_at(at));
    }
    CF_DEVICE void start(int stage) {
      ptx::wgmma_fence();
      issue_abt<Element>(this->scores, this->in.k[only_tile()], this->in.q, stage);
      ptx::wgmma_commit();
    }

    CF_DEVICE void visit(const Gradient& gradient, const Step& step, const Cursor& at, Weights& weights) {
      auto& in = this->in;
      auto& p_ring = this->smem.p_ring;
      const int q_first = step.visit.tile * Config::kTileQ, kv_first = this->block.kv_first + this->warp_row;
      const auto& rows = in.rows[at.stage];
      Scores& s = this->scores;
      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s.x[0]);
      if constexpr (kSliced) this->add_other_slice(this->smem.p_slope, this->plan.s_ring, step.p);
      // Products that are scores are changed where that is needed, so that all others take the short way.
      constexpr bool kProducts = IsSame<typename Config::Score, ScaledScore<float>>::value;
      if (kProducts && (this->far || !this->block.tiles.is_full(step.visit.place, step.visit.tile))) {
        s.for_each(ptx::lane_index(), [&](float& x, int row, int col) {
          const bool visible = gradient.mask.keep(q_first + col, kv_first + row);
          x = visible ? x - rows.m[Block::Rows::place(col)] : -infinity<float>();
        });
      }
      Block::template weigh<!kProducts>(s, weights, gradient, rows, q_first, kv_first, this->block.sequence.len_q, kept,
                                        [](int) { return NoBiasBlock{}; });
      if (!kSliced) p_ring.wait_empty(step.p);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        this->smem.p_slope[n][this->thread] = {s.x[0][n][0], s.x[0][n][1], s.x[0][n][2], s.x[0][n][3]};
      }
      p_ring.publish_by_warp(step.p);
      in.dout_ring.wait(Block::dout_at(at));
      ptx::wgmma_fence();
      issue_ab<Element>(this->sum, weights, in.dout, Block::dout_stage(at.stage));
      ptx::wgmma_commit();
    }
  };

  struct KeyRole : Consumer<KeyRole, 1, Block::kDimQk> {
    static constexpr int kNumber = 1;
    using Consumer<KeyRole, 1, Block::kDimQk>::Consumer;

    CF_DEVICE void run() {
      if (!this->block.empty()) this->walk();
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      this->block.store(this->in.k[0], 0, this->sum, this->block.p.attention.softmax_scale, this->block.p.dk_map,
                        kMyWarps + kNumber, Config::kDimQk);
      if (this->leader) ptx::tma_store_wait_read();
    }

    CF_DEVICE void wait(const Cursor& at) { this->in.dout_ring.wait(Block::dout_at(at)); }
    CF_DEVICE void give_dout_back(const Cursor&) {}  // of slices it was as soon as dP was there
    CF_DEVICE void start(int stage) {
      ptx::wgmma_fence();
      issue_abt<Element>(this->scores, this->in.v[only_tile()], this->in.dout, Block::dout_stage(stage));
      ptx::wgmma_commit();
    }

    CF_DEVICE void visit(const Gradient& gradient, const Step& step, const Cursor& at, Weights& ds) {
      auto& in = this->in;
      auto& p_ring = this->smem.p_ring;
      auto& ds_ring = this->smem.ds_ring;
      const int q_first = step.visit.tile * Config::kTileQ, kv_first = this->block.kv_first + this->warp_row;
      Scores p_slope, &dp = this->scores;
      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      in.q_ring.wait(at);
      if constexpr (kSliced) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(dp.x[0]);
        if (this->leader) in.dout_ring.release(Block::dout_at(at));
        auto& dp_ring = this->plan.dp_ring;
        this->add_other_slice(this->plan.dp, dp_ring, step.p);
        ptx::sync_warp();
        if (ptx::lane_index() == 0) dp_ring.release_across(step.p, Block::slice());
      }
      p_ring.wait(step.p);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        const Four four = this->smem.p_slope[n][this->thread];
#pragma unroll
        for (int i = 0; i < 4; ++i) p_slope.x[0][n][i] = four.x[i];
      }
      if constexpr (kSliced) {
        ptx::sync_warp();
        if (ptx::lane_index() == 0) this->plan.s_ring.release_across(step.p, Block::slice());
      } else {
        p_ring.release_by_warp(step.p);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(dp.x[0]);
      }
      Block::differentiate(p_slope, dp, gradient, in.rows[at.stage], kept);
      const bool once = Block::slice() == 0;
      if (once) this->block.store_bias_gradient(dp, step.visit.head, q_first, kv_first);
      pack_operand<Element>(ds, dp);
      if (once) Config::CapturedGradient::add_all(gradient.score, dp, q_first, kv_first);
      ds_ring.wait_empty(step.ds);
      store_transposed(this->smem.ds[step.ds.stage], this->warp_row, ptx::lane_index(), ds);
      ptx::fence_proxy_async();
      ds_ring.publish_by_warp(step.ds);
      ptx::wgmma_fence();
      issue_ab<Element>(this->sum, ds, in.q, at.stage);
      ptx::wgmma_commit();
    }
  };

  CF_DEVICE static void run(const BwdParams& params) {
    Block::template run<Plan>(params, [](const Block& block, Plan& smem, int consumer) {
      if (consumer == 0) {
        ValueRole(block, smem).run();
      } else {
        KeyRole(block, smem).run();
      }
    });
  }
};

template <class Config>
CF_DEVICE void backward_sm90_wide(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm90Wide<Config>::Plan), Config::kSmemBytes>();
  BackwardSm90Wide<Config>::run(params);
}

}  // namespace cuflash
