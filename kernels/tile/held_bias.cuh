// HeldBias: a tile of an additive tensor that stays in shared memory while a block visits all that reads it. Threads
// copy it themselves; tile/bias.cuh has what the copy engine brings.
#pragma once

#include "params.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/sync.cuh"
#include "tile/bias_block.cuh"
#include "tile/shared.cuh"

namespace cuflash {

// The bias is a term of the score (attention/score.cuh), or there is none.
struct NoHeldBias {
  static constexpr bool kHeld = false;

  template <int kRows, int kCols>
  struct Tile {
    template <int kThreads>
    CF_DEVICE void load(const Attention&, int, int, int, int, int = 0) {}
    CF_DEVICE NoBiasBlock block(int, int, int) { return {}; }
    CF_DEVICE NoBiasBlock transposed(int, int, int) { return {}; }
    CF_DEVICE float element(int, int) { return 0.f; }
  };
};

template <class Element>
struct HeldBias {
  static constexpr bool kHeld = true;

  template <int kRows, int kCols>
  struct Tile {
    SharedTile<Element, kRows, kCols> tile;  // rows are queries

    // Starts to copy queries from `q_first` on and keys from `kv_first` on, zeros where there are none; complete as
    // load_tile_async is. Numbers along broadcast axes are 0.
    template <int kThreads>
    CF_DEVICE void load(const Attention& a, int batch, int head, int q_first, int kv_first,
                        int thread = ptx::thread_index()) {
      constexpr int kUnit = 16 / sizeof(Element), kAcross = kCols / kUnit;
      const Element* first = static_cast<const Element*>(a.bias) + batch * a.bias_batch + head * a.bias_head +
                             q_first * a.bias_row + kv_first * a.bias_column;
      const int rows = a.bias_row == 0 ? kRows : a.len_q - q_first;
      const int cols = a.bias_column == 0 ? kCols : a.len_kv - kv_first;
      const bool in_units =
          a.bias_column == 1 && a.bias_row % kUnit == 0 && reinterpret_cast<uint64>(first) % sizeof(uint4) == 0;
#pragma unroll 4
      for (int index = thread; index < kRows * kAcross; index += kThreads) {
        const int row = index / kAcross, col = index % kAcross * kUnit;
        const Element* source = first + row * a.bias_row + col * a.bias_column;
        if (in_units && row < rows && col + kUnit <= cols) {
          ptx::cp_async<16>(tile.address(row, col), source, true);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          *tile.at(row, col + i) = row < rows && col + i < cols ? source[i * a.bias_column] : Element(0.f);
        }
      }
    }

    // Of 16 rows and columns from these on.
    CF_DEVICE BiasBlock<Element> block(int row, int col, int lane) {
      return BiasBlock<Element>::of(tile, row, col, lane);
    }
    CF_DEVICE BiasBlock<Element> transposed(int row, int col, int lane) {
      return BiasBlock<Element>::of_transposed(tile, row, col, lane);
    }
    CF_DEVICE float element(int row, int col) { return to_accumulator(*tile.at(row, col)); }
  };
};

}  // namespace cuflash
