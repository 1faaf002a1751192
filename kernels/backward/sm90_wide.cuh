// Backward attention on Hopper for 129 to 256 columns, whose dK and dV are too wide for the registers of one warpgroup.
//
//   P = exp(score(Q K^T) - lse),  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//   producer warpgroup, one thread   as in backward/sm90.cuh
//   warpgroup of the values          S^T = K Q^T | P, to the other | dV += P^T dO | half the columns of dQ
//   warpgroup of the keys            dP^T = V dO^T | dS from P and dP | dK += dS^T Q | half the columns of dQ
//
// One block owns 64 keys. P passes from one warpgroup to the other through shared memory, in fp32, as dS would show its
// rounding, and dS from the keys' to both.
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
  static_assert(Block::kKeyTiles == 1 && Config::kTileQ == 64);

  struct alignas(16) Four {
    float x[4];
  };

  struct SmemPlan {
    typename Block::Inputs inputs;
    typename Block::DsTile ds[2];                      // of a tile and the next
    Four p_slope[Scores::kN][ptx::kWarpgroupThreads];  // P * slope in fragment order
  };

  // Named barriers of both warpgroups' threads: P is there, for which that of the values does not wait; dS is there; K
  // is no longer read. Of a warpgroup's own, one for each.
  static constexpr int kWeightsThere = 1, kDsThere = 2, kKeysDone = 3, kMyWarps = 4;

  // What both warpgroups have and do; Role says what is its own.
  template <class Role, int kNumber, int kDim>
  struct Consumer {
    const Block& block;
    SmemPlan& smem;
    typename Block::Inputs& in;
    const int thread, warp_row;
    const bool leader, far;
    Scores scores;           // S or dP, transposed, of the tile that comes
    Fragment<16, kDim> sum;  // dv or dk

    CF_DEVICE Consumer(const Block& b, SmemPlan& shared)
        : block(b), smem(shared), in(shared.inputs), thread(ptx::thread_index() % ptx::kWarpgroupThreads),
          warp_row(thread / 32 * 16), leader(thread == 0), far(b.some_row_is_far()) {
      sum.clear();
    }

    CF_DEVICE void walk() {
      Role& me = static_cast<Role&>(*this);
      Cursor at;
      int head = block.head_first, tile = block.first_tile, buffer = 0;
      typename Block::ListStep list;
      if constexpr (Block::Walk::kListed) list.start(block, head, tile);
      Gradient gradient(block.p.attention, block.sequence, head);
      in.wait_k();
      in.wait_v();
      me.wait(at);
      me.start(at.stage);
#pragma unroll 1
      for (int left = block.num_steps(); left > 0; --left) {
        if constexpr (Block::Walk::kListed) list.look_ahead(block);
        Weights operand;  // P or dS: the product with sum reads it until add_dq has waited
        const int place = Block::Walk::kListed ? list.place : tile;
        me.visit(gradient, head, tile, place, at, buffer, operand);
        const Cursor next = at.next();
        if (left > 1) me.wait(next);
        // Always the next scores: a choice would end what is under way. Behind the last tile they are for nothing.
        add_dq(head, tile, place, buffer, left > 1 ? next.stage : at.stage);
        if (leader) {
          in.q_ring.release(at);
          in.dout_ring.release(at);
        }
        at = next;
        buffer ^= 1;
        if constexpr (Block::Walk::kListed) {
          if (list.go_on(block, head, tile)) gradient = Gradient(block.p.attention, block.sequence, head);
        } else {
          tile = block.tile_after(tile);
          if (tile == block.first_tile && ++head < block.head_end) {
            gradient = Gradient(block.p.attention, block.sequence, head);
          }
        }
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(scores.x[0]);
    }

    // Every other chunk of dQ's columns, one after the other in the same registers, and behind them the next scores.
    // The product with sum is done before the first chunk.
    CF_DEVICE void add_dq(int head, int tile, int place, int buffer, int next_stage) {
      Role& me = static_cast<Role&>(*this);
      constexpr int kShares = Block::Sums::kShares, kLast = (kShares - 1 - kNumber) / 2 * 2 + kNumber;
      if (kNumber >= kShares) {
        me.start(next_stage);
        ptx::wgmma_wait<1>();
      }
#pragma unroll
      for (int share = kNumber; share < kShares; share += 2) {
        typename Block::Sums::Share dq;
        ptx::wgmma_fence();
        Block::Sums::template issue<Element>(dq, smem.ds, buffer, in.k, share);
        ptx::wgmma_commit();
        if (share == kLast) {
          me.start(next_stage);
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        ptx::wgmma_hold(dq.x[0]);
        block.add_to_sums(dq, head, tile, place, share, kMyWarps + kNumber);
      }
      ptx::wgmma_hold(sum.x[0]);
    }
  };

  struct ValueRole : Consumer<ValueRole, 0, Block::kDimV> {
    static constexpr int kNumber = 0;
    using Consumer<ValueRole, 0, Block::kDimV>::Consumer;

    CF_DEVICE void run() {
      if (!this->block.empty()) this->walk();
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      this->block.store(this->in.v[0], 0, this->sum, Config::Dropout::scale(this->block.p.attention),
                        this->block.p.dv_map, kMyWarps + kNumber);
      if (this->leader) ptx::tma_store_wait_read();
    }

    CF_DEVICE void wait(const Cursor& at) { this->in.q_ring.wait(at); }
    CF_DEVICE void start(int stage) {
      ptx::wgmma_fence();
      issue_abt<Element>(this->scores, this->in.k[0], this->in.q, stage);
      ptx::wgmma_commit();
    }

    CF_DEVICE void visit(const Gradient& gradient, int head, int tile, int place, const Cursor& at, int buffer,
                         Weights& weights) {
      auto& in = this->in;
      const int q_first = tile * Config::kTileQ, kv_first = this->block.kv_first + this->warp_row;
      const auto& rows = in.rows[at.stage];
      Scores& s = this->scores;
      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(s.x[0]);
      // Products that are scores are changed where that is needed, so that all others take the short way.
      constexpr bool kProducts = IsSame<typename Config::Score, ScaledScore<float>>::value;
      if (kProducts && (this->far || !this->block.tiles.is_full(place, tile))) {
        s.for_each(ptx::lane_index(), [&](float& x, int row, int col) {
          const bool visible = gradient.mask.keep(q_first + col, kv_first + row);
          x = visible ? x - rows.m[Block::Rows::place(col)] : -infinity<float>();
        });
      }
      Block::template weigh<!kProducts>(s, weights, gradient, rows, q_first, kv_first, this->block.sequence.len_q, kept,
                                        [](int) { return NoBiasBlock{}; });
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        this->smem.p_slope[n][this->thread] = {s.x[0][n][0], s.x[0][n][1], s.x[0][n][2], s.x[0][n][3]};
      }
      ptx::arrive_named(kWeightsThere, Block::kConsumerThreads);
      in.dout_ring.wait(at);
      ptx::wgmma_fence();
      issue_ab<Element>(this->sum, weights, in.dout, at.stage);
      ptx::wgmma_commit();
      ptx::sync_named(kDsThere, Block::kConsumerThreads);
    }
  };

  struct KeyRole : Consumer<KeyRole, 1, Block::kDimQk> {
    static constexpr int kNumber = 1;
    using Consumer<KeyRole, 1, Block::kDimQk>::Consumer;

    CF_DEVICE void run() {
      if (!this->block.empty()) this->walk();
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      this->block.store(this->in.k[0], 0, this->sum, this->block.p.attention.softmax_scale, this->block.p.dk_map,
                        kMyWarps + kNumber);
      if (this->leader) ptx::tma_store_wait_read();
    }

    CF_DEVICE void wait(const Cursor& at) { this->in.dout_ring.wait(at); }
    CF_DEVICE void start(int stage) {
      ptx::wgmma_fence();
      issue_abt<Element>(this->scores, this->in.v[0], this->in.dout, stage);
      ptx::wgmma_commit();
    }

    CF_DEVICE void visit(const Gradient& gradient, int head, int tile, int /*place*/, const Cursor& at, int buffer,
                         Weights& ds) {
      auto& in = this->in;
      const int q_first = tile * Config::kTileQ, kv_first = this->block.kv_first + this->warp_row;
      Scores p_slope, &dp = this->scores;
      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      in.q_ring.wait(at);
      ptx::sync_named(kWeightsThere, Block::kConsumerThreads);
#pragma unroll
      for (int n = 0; n < Scores::kN; ++n) {
        const Four four = this->smem.p_slope[n][this->thread];
#pragma unroll
        for (int i = 0; i < 4; ++i) p_slope.x[0][n][i] = four.x[i];
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dp.x[0]);
      Block::differentiate(p_slope, dp, gradient, in.rows[at.stage], kept);
      this->block.store_bias_gradient(dp, head, q_first, kv_first);
      pack_operand<Element>(ds, dp);
      store_transposed(this->smem.ds[buffer], this->warp_row, ptx::lane_index(), ds);
      ptx::fence_proxy_async();
      ptx::wgmma_fence();
      issue_ab<Element>(this->sum, ds, in.q, at.stage);
      ptx::wgmma_commit();
      ptx::sync_named(kDsThere, Block::kConsumerThreads);
    }
  };

  CF_DEVICE static void run(const BwdParams& params) {
    Block::template run<SmemPlan>(params, [](const Block& block, SmemPlan& smem, int consumer) {
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
  SmemSizeCheck<sizeof(typename BackwardSm90Wide<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm90Wide<Config>::run(params);
}

}  // namespace cuflash
