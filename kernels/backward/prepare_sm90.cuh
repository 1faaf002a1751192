// First step of the Hopper backward: for each query tile, what the main kernel must know of its rows, and sums of dQ
// at 0.
#pragma once

#include "attention/schedule.cuh"
#include "attention/softmax.cuh"
#include "backward/delta.cuh"
#include "tile/query_tiles.cuh"

namespace cuflash {

template <class Config>
CF_DEVICE void backward_prepare_sm90(const BwdParams& p) {
  using Sums = QueryTiles<Config>;
  constexpr int kTileQ = Config::kTileQ, kFloats = Sums::kShares * Sums::kShareFloats;
  using Four = typename RowTile<kTileQ>::Four;

  const Attention& a = p.attention;
  const Work work = query_work(ptx::block_index(), num_tiles(a.len_q, kTileQ), a.heads_q);
  const typename Config::Sequence sequence(a, work.batch);
  if (work.tile * kTileQ >= sequence.len_q) return;
  const int64 index = Sums::index(a, sequence, work.head, work.tile);

  const float log2_unit = typename Config::Score(a, sequence, work.head).unit() * static_cast<float>(kLog2E);
  RowTile<kTileQ>& rows = static_cast<RowTile<kTileQ>*>(p.row_tiles)[index];
  if (ptx::thread_index() == 0) rows.far = 0;
  ptx::sync_threads();  // some thread may write 1
  for_each_delta<Config>(p, sequence, work, [&](int row, const RowShift<float>& shift, float delta) {
    rows.put(row, shift, delta, log2_unit);
    const int q = work.tile * kTileQ + row;
    if (q < sequence.len_q) keep_delta(p, sequence, work.head, q, shift, delta);
  });

  // Last, so that nothing stands in the way of what is read.
  Four* sums = reinterpret_cast<Four*>(static_cast<float*>(p.dq_accum) + index * kFloats);
  for (int i = ptx::thread_index(); i < kFloats / 4; i += Config::kThreads) sums[i] = {};
  if (p.dq_turn && ptx::thread_index() < Sums::kShares) p.dq_turn[index * Sums::kShares + ptx::thread_index()] = 0;
}

}  // namespace cuflash
