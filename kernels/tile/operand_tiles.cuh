// OperandTiles: the shared tiles that products of forwards and of gradients take, by what their elements are.
#pragma once

#include "tile/copy.cuh"
#include "tile/doubles.cuh"
#include "tile/halves.cuh"

namespace cuflash {

// Of elements that are multiplied as they lie, kHalves aside: 16 bits.
template <class Element, int kHalves>
struct OperandTiles {
  template <int kTileRows, int kDim>
  using Tile = SharedTile<Element, kTileRows, kDim>;

  template <int kDim, int kBytes, int kThreads, class Tile, class Rows>
  CF_DEVICE static void load(Tile& tile, const Rows& rows) {
    load_tile_async<kDim, kBytes, kThreads>(tile, rows);
  }
  // What a tile needs between its arrival and its use: by all threads, before the barrier.
  template <int kBytes, int kThreads, class Tile>
  CF_DEVICE static void prepare(Tile&) {}
  // The same of those that were loaded first of all, which waits for them if need be.
  template <int kBytes, int kThreads, class... Tiles>
  CF_DEVICE static void prepare_first(Tiles&...) {}
};

// Of floats, as halves.
template <int kHalves>
struct OperandTiles<float, kHalves> {
  template <int kTileRows, int kDim>
  using Tile = HalvesTile<kTileRows, kDim, kHalves>;

  template <int kDim, int kBytes, int kThreads, class Tile, class Rows>
  CF_DEVICE static void load(Tile& tile, const Rows& rows) {
    load_floats_async<kDim, kBytes, kThreads>(tile, rows);
  }
  template <int kBytes, int kThreads, class Tile>
  CF_DEVICE static void prepare(Tile& tile) {
    halve_rows<kBytes, kThreads>(tile);
  }
  template <int kBytes, int kThreads, class... Tiles>
  CF_DEVICE static void prepare_first(Tiles&... tiles) {
    ptx::cp_async_wait<0>();
    (halve_rows<kBytes, kThreads>(tiles), ...);
  }
};

// Of doubles, as tensor cores take them.
template <int kHalves>
struct OperandTiles<double, kHalves> : OperandTiles<fp16, kHalves> {
  template <int kTileRows, int kDim>
  using Tile = DoubleTile<kTileRows, kDim>;
};

}  // namespace cuflash
