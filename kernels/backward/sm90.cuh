// Backward attention on Hopper: wgmma, TMA and warpgroups with roles, after FlashAttention-3 (Shah et al. 2024,
// arXiv 2407.08608). Up to 128 columns; backward/sm90_wide.cuh is for more.
//
//   P = exp(score(Q K^T) - lse),  dP = dO V^T,  dS = P * (dP - delta) * slope
//   dV = P^T dO,   dK = scale * dS^T Q,   dQ = scale * dS K
//
//   producer warpgroup, one thread   TMA: K, V and, tile by tile, Q, dO and what must be known of the rows
//   consumer warpgroups              64 keys of the key tile each, all products; adds dQ to sums in global memory
//
// One block owns one key tile of one key head and walks the query tiles that see it, of every head of the group. Scores
// are computed transposed, S^T = K Q^T, so that P^T and dS^T are the A operands of dV and dK in registers. Only dQ mixes
// keys of different consumers: dS passes through shared memory.
//
//   for each q tile:   S^T = K Q^T | dP^T = V dO^T | P under dP | dS | dV += P^T dO | dQ = dS K | dK += dS^T Q
#pragma once

#include "backward/block_sm90.cuh"

namespace cuflash {

template <class Config>
struct BackwardSm90 {
  using Block = BackwardBlock<Config>;
  using Element = typename Config::Element;
  using Gradient = typename Block::Gradient;
  using Cursor = typename Block::Cursor;
  using Scores = typename Block::Scores;
  using Weights = typename Block::Weights;
  static_assert(Block::kKeyTiles == Block::kConsumers && Block::Sums::kShares == Block::kConsumers);

  struct SmemPlan {
    typename Block::Inputs inputs;
    typename Block::DsTile ds[2];  // of a tile and the next: a consumer may still read the one before
  };

  // Named barriers of all consumers' threads: dS is whole; K is no longer read. Of a consumer's own, one for each.
  static constexpr int kDsWhole = 1, kKeysDone = 2, kMyWarps = 3;

  struct Consumer {
    const Block& block;
    SmemPlan& smem;
    typename Block::Inputs& in;
    const int number, warp_row;
    const int kv_first;  // this warp's first key
    const bool leader;
    Fragment<16, Block::kDimQk> dk;
    Fragment<16, Block::kDimV> dv;

    CF_DEVICE Consumer(const Block& b, SmemPlan& shared, int consumer)
        : block(b), smem(shared), in(shared.inputs), number(consumer),
          warp_row(ptx::thread_index() % ptx::kWarpgroupThreads / 32 * 16),
          kv_first(b.kv_first + consumer * Block::kRows + warp_row),
          leader(ptx::thread_index() % ptx::kWarpgroupThreads == 0) {
      dk.clear();
      dv.clear();
    }

    CF_DEVICE void run() {
      if (!block.empty()) walk();
      block.store(in.v[number], number, dv, Config::Dropout::scale(block.p.attention), block.p.dv_map,
                  kMyWarps + number);  // V's rows are this consumer's alone
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      block.store(in.k[number], number, dk, block.p.attention.softmax_scale, block.p.dk_map, kMyWarps + number);
      if (leader) ptx::tma_store_wait_read();
    }

    CF_DEVICE void walk() {
      const bool far = block.some_row_is_far();
      Cursor at;
      typename Block::BiasCursor bias_at;
      int head = block.head_first, tile = block.first_tile, buffer = 0;
      typename Block::ListStep list;
      if constexpr (Block::Walk::kListed) list.start(block, head, tile);
      Gradient gradient(block.p.attention, block.sequence, head);
      in.wait_k();
      in.wait_v();
#pragma unroll 1
      for (int left = block.num_steps(); left > 0; --left) {
        if constexpr (Block::Walk::kListed) list.look_ahead(block);
        // A choice for all of a visit, before anything of it is under way: one within it costs 3 to 20 % of the whole.
        const int place = Block::Walk::kListed ? list.place : tile;
        if (far || !block.is_full(place, tile)) {
          visit<true>(gradient, head, tile, place, at, bias_at, buffer);
        } else {
          visit<false>(gradient, head, tile, place, at, bias_at, buffer);
        }
        at = at.next();
        bias_at = bias_at.next();
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
    }

    // One tile of queries; `kCareful` where some element may be hidden or some row is far.
    template <bool kCareful>
    CF_DEVICE void visit(const Gradient& gradient, int head, int tile, int place, const Cursor& at,
                         const typename Block::BiasCursor& bias_at, int buffer) {
      const int q_first = tile * Config::kTileQ;
      const auto& rows = in.rows[at.stage];
      Scores s, dp;
      Weights weights, ds;
      in.q_ring.wait(at);
      ptx::wgmma_fence();
      issue_abt<Element>(s, in.k[number], in.q, at.stage);
      ptx::wgmma_commit();
      in.dout_ring.wait(at);
      ptx::wgmma_fence();
      issue_abt<Element>(dp, in.v[number], in.dout, at.stage);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(s.x[0]);

      const auto kept = kept_transposed<Scores>(gradient.dropout, q_first, kv_first);
      in.bias.wait(bias_at);
      const auto bias_of = [&](int k) {
        return in.bias.transposed(k * 16, number * Block::kRows + warp_row, ptx::lane_index(), bias_at);
      };
      Block::template weigh<kCareful>(s, weights, gradient, rows, q_first, kv_first, block.sequence.len_q, kept,
                                      bias_of);
      ptx::sync_warp();
      if (ptx::lane_index() == 0) in.bias.release(bias_at);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dp.x[0]);
      Block::differentiate(s, dp, gradient, rows, kept);
      block.store_bias_gradient(dp, head, q_first, kv_first);
      pack_operand<Element>(ds, dp);
      store_transposed(smem.ds[buffer], number * Block::kRows + warp_row, ptx::lane_index(), ds);

      ptx::wgmma_fence();
      issue_ab<Element>(dv, weights, in.dout, at.stage);
      ptx::wgmma_commit();
      ptx::fence_proxy_async();
      ptx::sync_named(kDsWhole, Block::kConsumerThreads);
      typename Block::Sums::Share dq;
      ptx::wgmma_fence();
      Block::Sums::template issue<Element>(dq, smem.ds, buffer, in.k, number);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(dv.x[0]);
      if (leader) in.dout_ring.release(at);
      ptx::wgmma_fence();
      issue_ab<Element>(dk, ds, in.q, at.stage);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(dq.x[0]);
      block.add_to_sums(dq, head, tile, place, number, kMyWarps + number);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dk.x[0]);
      if (leader) in.q_ring.release(at);
    }
  };

  CF_DEVICE static void run(const BwdParams& params) {
    Block::template run<SmemPlan>(
        params, [](const Block& block, SmemPlan& smem, int consumer) { Consumer(block, smem, consumer).run(); });
  }
};

template <class Config>
CF_DEVICE void backward_sm90(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm90<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm90<Config>::run(params);
}

}  // namespace cuflash
