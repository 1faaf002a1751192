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
// keys of different consumers: dS passes through shared memory. Its product follows a tile later, so that consumers wait
// for each other hardly ever, and one has products while another has exponentials.
//
//   for each q tile:   S^T = K Q^T | dP^T = V dO^T | P under dP | dS | dQ = dS K of the tile before | dV += P^T dO,
//                      dK += dS^T Q | dQ to its sums under these
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

  using Share = typename Block::Sums::Share;
  using Adder = ShareAdder<Share, Config::kCopiedSums>;
  using Visit = typename Block::Visit;

  struct SmemPlan {
    typename Block::Inputs inputs;
    typename Block::DsTile ds[2];
    Ring<2> ds_ring;  // of these, from every warp to both consumers, in step with that of q
    Adder adders[Block::kConsumerThreads / 32];

    CF_DEVICE void init() {
      inputs.init();
      ds_ring.init(Block::kConsumers, Block::kConsumerThreads / 32 * kWarpArrivals);
    }
  };

  // Named barriers: K is no longer read, of all consumers' threads, and of a consumer's own, one for each.
  static constexpr int kKeysDone = 1, kMyWarps = 2;
  // The second consumer begins so much later, about half a visit, where there are so many that it pays. H200: 2 % at d 64,
  // 1 % at d 128.
  static constexpr int kApartNs = 8 * Config::kTileQ, kApartSteps = 16;

  template <class Smem>
  struct Consumer {
    const Block& block;
    Smem& smem;
    typename Block::Inputs& in;
    typename Block::Keys& keys;
    const int number, warp_row;
    const int kv_first;  // this warp's first key
    const bool leader;
    Fragment<16, Block::kDimQk> dk;
    Fragment<16, Block::kDimV> dv;

    CF_DEVICE Consumer(const Block& b, Smem& shared, typename Block::Keys& its_keys, int consumer)
        : block(b), smem(shared), in(shared.inputs), keys(its_keys), number(consumer),
          warp_row(ptx::thread_index() % ptx::kWarpgroupThreads / 32 * 16),
          kv_first(b.kv_first + consumer * Block::kRows + warp_row),
          leader(ptx::thread_index() % ptx::kWarpgroupThreads == 0) {
      dk.clear();
      dv.clear();
    }

    CF_DEVICE void run() {
      // Of a tile before the first there is a dS that nobody waits for, and a dQ that nobody adds.
      Cursor at;
      Visit now = block.first_visit(), before = now;
      if (!block.empty()) {
        const bool far = block.some_row_is_far();
        const auto wait_keys = [&] {
          in.wait_k();
          in.wait_v();
        };
        walk(now, before, at, wait_keys, [&] { return far; });
      }
      leave(before, at, [] {});
      adder().finish();
    }

    // Leaves the last tile in `before`, and goes on from its place in the rings. `is_far()` is whether some row of the next
    // tile, or of any, is far.
    template <class WaitKeys, class IsFar>
    CF_DEVICE void walk(Visit& now, Visit& before, Cursor& at, const WaitKeys& wait_keys, const IsFar& is_far) {
      typename Block::BiasCursor bias_at;
      typename Block::template Steps<true> steps;
      steps.start(block, now);
      Gradient gradient(block.p.attention, block.sequence, now.head);
      wait_keys();
      if (number > 0 && block.num_steps() >= kApartSteps) ptx::sleep_ns(kApartNs);
      const int visits = block.num_steps();
#pragma unroll 1
      for (int done = 0; done < visits; ++done) {
        steps.look_ahead(block, now);
        // A choice for all of a visit, before anything of it is under way: one within it costs 3 to 20 % of the whole.
        if (is_far() || !block.is_full(now.place, now.tile)) {
          visit<true>(gradient, now, before, done == 0, at, bias_at);
        } else {
          visit<false>(gradient, now, before, done == 0, at, bias_at);
        }
        at = at.next();
        bias_at = bias_at.next();
        before = now;
        if (steps.go_on(block, now)) {
          gradient = Gradient(block.p.attention, block.sequence, now.head);
        }
      }
    }

    // The gradients of the keys; the last dQ comes under that of the values, and `give_back` once its dS has been read.
    template <class GiveBack>
    CF_DEVICE void leave(const Visit& before, const Cursor& at, const GiveBack& give_back) {
      const Attention& a = block.p.attention;
      // V's rows are this consumer's alone. The gradient leaves under the last dQ.
      block.store(keys.v[number], number, dv, Config::Dropout::scale(a), block.p.dv_map, kMyWarps + number);
      if (!block.empty()) {
        Share dq;
        issue_dq(dq, at.before());
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(dq.x[0]);
        add_to_sums(dq, before, true);
        give_back();
      }
      ptx::sync_named(kKeysDone, Block::kConsumerThreads);
      block.store(keys.k[number], number, dk, a.softmax_scale, block.p.dk_map, kMyWarps + number);
      if (leader) ptx::tma_store_wait_read();
    }

    // One tile of queries; `kCareful` where some element may be hidden or some row is far.
    template <bool kCareful>
    CF_DEVICE void visit(const Gradient& gradient, const Visit& now, const Visit& before, bool first, const Cursor& at,
                         const typename Block::BiasCursor& bias_at) {
      const int q_first = now.tile * Config::kTileQ;
      const auto& rows = in.rows[at.stage];
      Scores s, dp;
      Weights weights, ds;
      in.q_ring.wait(at);
      ptx::wgmma_fence();
      issue_abt<Element>(s, keys.k[number], in.q, at.stage);
      ptx::wgmma_commit();
      in.dout_ring.wait(at);
      ptx::wgmma_fence();
      issue_abt<Element>(dp, keys.v[number], in.dout, at.stage);
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
      block.store_bias_gradient(dp, now.head, q_first, kv_first);
      pack_operand<Element>(ds, dp);
      smem.ds_ring.wait_empty(at);
      store_transposed(smem.ds[at.stage], number * Block::kRows + warp_row, ptx::lane_index(), ds);
      ptx::fence_proxy_async();
      smem.ds_ring.publish_by_warp(at);
      Config::CapturedGradient::add_all(gradient.score, dp, q_first, kv_first);

      // First, as all of dS before is there, and its registers are needed soonest.
      Share dq;
      issue_dq(dq, at.before());
      ptx::wgmma_fence();
      issue_ab<Element>(dv, weights, in.dout, at.stage);
      issue_ab<Element>(dk, ds, in.q, at.stage);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(dq.x[0]);
      if (leader && !first) smem.ds_ring.release(at.before());
      add_to_sums(dq, before, !first);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(dv.x[0]);
      ptx::wgmma_hold(dk.x[0]);
      if (leader) in.dout_ring.release(at);
      in.q_ring.release_by_warp(at);
    }

    CF_DEVICE void issue_dq(Share& dq, const Cursor& of) {
      smem.ds_ring.wait(of);
      ptx::wgmma_fence();
      Block::Sums::template issue<Element>(dq, smem.ds, of.stage, keys.k, number);
      ptx::wgmma_commit();
    }
    CF_DEVICE void add_to_sums(const Share& dq, const Visit& of, bool some) {
      block.add_to_sums(adder(), dq, of, number, kMyWarps + number, some);
    }
    CF_DEVICE Adder& adder() { return smem.adders[ptx::warp_index() - ptx::kWarpgroupThreads / 32]; }
  };

  CF_DEVICE static void run(const BwdParams& params) {
    Block::template run<SmemPlan>(params, [](const Block& block, SmemPlan& smem, int consumer) {
      Consumer<SmemPlan>(block, smem, smem.inputs, consumer).run();
    });
  }
};

template <class Config>
CF_DEVICE void backward_sm90(const BwdParams& params) {
  SmemSizeCheck<sizeof(typename BackwardSm90<Config>::SmemPlan), Config::kSmemBytes>();
  BackwardSm90<Config>::run(params);
}

}  // namespace cuflash
