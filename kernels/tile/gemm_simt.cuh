// Products of a whole block on plain multiply-adds: operands in shared memory, results in registers.
//
//               kAcross threads share a row            Thread (r, c) of the grid owns rows r, r + kDown, ... and
//             +---+---+---+---+---+---+---+---+        columns c, c + kAcross, ...: its micro-tile. A number read
//  kDown rows |0,0|0,1|...|   |0,0|0,1|...|   |        from shared memory serves a whole row or column of it.
//             |1,0|1,1|   |   |1,0|1,1|   |   |        The threads of a row are neighbours in one warp, so what
//             +---+---+---+---+---+---+---+---+        one of them finds out of a row reaches the others by shuffles.
//             |0,0|0,1|   |   |0,0|0,1|   |   |
//
// Operands are converted to the accumulator type on their way into shared memory, a bounded piece at a time: the head
// size decides how many pieces, never how much memory. fp16, bf16 and fp32 thus differ in their loads and stores only.
#pragma once

#include "element.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/copy.cuh"

namespace cuflash {

// Numbers that move as one access.
template <class Real, int kCount>
struct alignas(kCount * sizeof(Real)) Pack {
  Real x[kCount];
};

template <class Real>
constexpr int kPackOf = 16 / sizeof(Real);

// kRows rows of kCols numbers; kPad more keep what neighbouring threads access at once in different banks.
template <class Real, int kRows_, int kCols_, int kPad>
struct StagedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPitch = kCols + kPad;

  alignas(16) Real data[kRows * kPitch];

  CF_DEVICE Real* at(int row, int col) { return data + row * kPitch + col; }
  template <int kCount>
  CF_DEVICE Pack<Real, kCount>& pack(int row, int col) {
    return *reinterpret_cast<Pack<Real, kCount>*>(at(row, col));
  }
};

// The threads of a block over a matrix of kRows rows.
template <int kThreads, int kRows>
struct ThreadGrid {
  // Four rows a thread, as far as one warp holds a row: few enough registers for a pack of each.
  static constexpr int kAcross = min_of(32, 4 * kThreads / kRows), kDown = kThreads / kAcross;

  CF_DEVICE static int row() { return ptx::thread_index() / kAcross; }
  CF_DEVICE static int col() { return ptx::thread_index() % kAcross; }

  // Over the threads that share a row.
  template <class Real>
  CF_DEVICE static Real row_max(Real x) {
#pragma unroll
    for (int mask = kAcross / 2; mask > 0; mask /= 2) x = max_of(x, ptx::shuffle_xor(x, mask));
    return x;
  }
  template <class Real>
  CF_DEVICE static Real row_sum(Real x) {
#pragma unroll
    for (int mask = kAcross / 2; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
  }
};

// One thread's share of a kRows x kCols matrix. Its columns come in groups of kWidth neighbours, so that a group is one
// access; columns past kCols exist where kCols is no multiple of the grid.
template <class Real, class Grid, int kRows, int kCols, int kWidth_ = 0>
struct MicroTile {
  static_assert(kRows % Grid::kDown == 0);
  static constexpr int kM = kRows / Grid::kDown, kN = cdiv(kCols, Grid::kAcross);
  static constexpr int kWidest = kN % kPackOf<Real> == 0 ? kPackOf<Real> : kN % 2 == 0 ? 2 : 1;
  static constexpr int kWidth = kWidth_ ? kWidth_ : kWidest;
  Real x[kM][kN];

  CF_DEVICE static int row_of(int m) { return Grid::row() + m * Grid::kDown; }
  CF_DEVICE static int col_of(int n) { return (Grid::col() + n / kWidth * Grid::kAcross) * kWidth + n % kWidth; }

  CF_DEVICE void clear() {
    for_each([](Real& value, int, int) { value = Real(0); });
  }

  // f(element, row, column) over this thread's elements.
  template <class F>
  CF_DEVICE void for_each(F&& f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) f(x[m][n], row_of(m), col_of(n));
    }
  }
};

// C += A B^T over kK columns of A and B.
template <int kK, class Real, class Grid, int kRows, int kCols, class TileA, class TileB>
CF_DEVICE void gemm_abt(MicroTile<Real, Grid, kRows, kCols, 1>& c, TileA& a, TileB& b) {
  using C = MicroTile<Real, Grid, kRows, kCols, 1>;
  constexpr int kPack = kPackOf<Real>;
#pragma unroll 1
  for (int k = 0; k < kK; k += kPack) {
    Pack<Real, kPack> a_packs[C::kM];
#pragma unroll
    for (int m = 0; m < C::kM; ++m) a_packs[m] = a.template pack<kPack>(C::row_of(m), k);
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      const Pack<Real, kPack> b_pack = b.template pack<kPack>(C::col_of(n), k);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
#pragma unroll
        for (int m = 0; m < C::kM; ++m) c.x[m][n] += a_packs[m].x[i] * b_pack.x[i];
      }
    }
  }
}

// C += A B over the rows of B, which meet columns [a_col, a_col + rows) of A.
template <class Real, class Grid, int kRows, int kCols, class TileA, class TileB>
CF_DEVICE void gemm_ab(MicroTile<Real, Grid, kRows, kCols>& c, TileA& a, int a_col, TileB& b) {
  using C = MicroTile<Real, Grid, kRows, kCols>;
  constexpr int kPack = kPackOf<Real>;
#pragma unroll 1
  for (int k = 0; k < TileB::kRows; k += kPack) {
    Pack<Real, kPack> a_packs[C::kM];
#pragma unroll
    for (int m = 0; m < C::kM; ++m) a_packs[m] = a.template pack<kPack>(C::row_of(m), a_col + k);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
#pragma unroll
      for (int n = 0; n < C::kN; n += C::kWidth) {
        const Pack<Real, C::kWidth> b_pack = b.template pack<C::kWidth>(k + i, C::col_of(n));
#pragma unroll
        for (int m = 0; m < C::kM; ++m) {
#pragma unroll
          for (int j = 0; j < C::kWidth; ++j) c.x[m][n + j] += a_packs[m].x[i] * b_pack.x[j];
        }
      }
    }
  }
}

// The same of doubles: what these rows add is a sum of its own, as one long sum would round worse than products of
// whole matrices do.
template <class Grid, int kRows, int kCols, class TileA, class TileB>
CF_DEVICE void gemm_ab(MicroTile<double, Grid, kRows, kCols>& c, TileA& a, int a_col, TileB& b) {
  using C = MicroTile<double, Grid, kRows, kCols>;
  constexpr int kPack = kPackOf<double>;
#pragma unroll
  for (int n = 0; n < C::kN; n += C::kWidth) {
    double sum[C::kM][C::kWidth] = {};
#pragma unroll 1
    for (int k = 0; k < TileB::kRows; k += kPack) {
      Pack<double, kPack> a_packs[C::kM];
#pragma unroll
      for (int m = 0; m < C::kM; ++m) a_packs[m] = a.template pack<kPack>(C::row_of(m), a_col + k);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const Pack<double, C::kWidth> b_pack = b.template pack<C::kWidth>(k + i, C::col_of(n));
#pragma unroll
        for (int m = 0; m < C::kM; ++m) {
#pragma unroll
          for (int j = 0; j < C::kWidth; ++j) sum[m][j] += a_packs[m].x[i] * b_pack.x[j];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int j = 0; j < C::kWidth; ++j) c.x[m][n + j] += sum[m][j];
    }
  }
}

// Columns that are staged at once: at most 256 bytes of a row, in pieces of equal size.
template <class Real>
CF_DEVICE constexpr int staged_cols(int dim) {
  const int pieces = cdiv(dim * static_cast<int>(sizeof(Real)), 256);
  return round_up(cdiv(dim, pieces), 8);
}

// Rows that are staged at once: `most` halved until they take 16 KB or are the `least`.
CF_DEVICE constexpr int staged_rows(int row_bytes, int least, int most) {
  return most <= least || most * row_bytes <= 16384 ? most : staged_rows(row_bytes, least, most / 2);
}

// A block that owns a tile of kRows rows and walks tiles of kCols others: its shared memory and its products.
template <class Config, int kRows, int kCols>
struct SimtBlock {
  using Element = typename Config::Element;
  using Real = Accumulator<Element>;
  using Rows = GlobalRows<const Element>;
  using Grid = ThreadGrid<Config::kThreads, kRows>;
  static constexpr int kPack = kPackOf<Real>;
  static constexpr int kStagedCols = max_of(staged_cols<Real>(Config::kDimQk), staged_cols<Real>(Config::kDimV));
  static constexpr int kWidestRow = round_up(max_of(Config::kDimQk, Config::kDimV), Grid::kAcross);
  static constexpr int kStagedRows = staged_rows(kWidestRow * sizeof(Real), kPack, kCols);

  using Scores = MicroTile<Real, Grid, kRows, kCols, 1>;
  template <int kDim>
  using Output = MicroTile<Real, Grid, kRows, kDim>;

  struct Operands {  // of C += A B^T
    StagedTile<Real, kRows, kStagedCols, kPack> a;
    StagedTile<Real, kCols, kStagedCols, kPack> b;
  };
  struct Weighted {  // of C += weights * values
    StagedTile<Real, kRows, kCols, Grid::kAcross> weights;
    StagedTile<Real, kStagedRows, kWidestRow, 0> values;
  };
  union SmemPlan {  // a product begins and ends with its memory free for the next
    Operands operands;
    Weighted weighted;
  };

  // Fills the tile's rows with columns [first_col, first_col + kStaged) of kDim; zeros where there are none, so that
  // padding of any content (NaN included) never enters a product.
  template <int kStaged, int kDim, class Tile, class AnyRows>
  CF_DEVICE static void load(Tile& tile, const AnyRows& rows, int first_col) {
    using Vector = typename VectorOf<Config::kCopyBytes>::Type;
    constexpr int kWidth = Config::kCopyBytes / sizeof(Element), kMove = min_of(kWidth, kPack);
    constexpr int kInFlight = min_of(4, 16 / kWidth);  // accesses under way: at most 16 registers after conversion
    constexpr int kAcross = kStaged / kWidth, kThreadsAcross = min_of(Config::kThreads, power_of_two_above(kAcross));
    constexpr int kRowsAtOnce = Config::kThreads / kThreadsAcross;
    static_assert(kDim % kWidth == 0 && kStaged % kWidth == 0);
    const int first_row = ptx::thread_index() / kThreadsAcross;
#pragma unroll 1
    for (int across = ptx::thread_index() % kThreadsAcross; across < kAcross; across += kThreadsAcross) {
      const int col = across * kWidth;
      const bool valid_col = kDim % kStaged == 0 || first_col + col < kDim;
      // A running pointer: independent addresses would be kept in registers over the whole kernel.
      const Element* source = rows.at(first_row, first_col, col);
#pragma unroll kInFlight
      for (int down = 0; down < Tile::kRows;
           source = rows.below(source, down + first_row, first_col + col, kRowsAtOnce), down += kRowsAtOnce) {
        const int row = down + first_row;
        if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) break;
        const bool valid = valid_col && row < rows.count;
        const Vector vector = valid ? *reinterpret_cast<const Vector*>(source) : Vector{};
        const Element* elements = reinterpret_cast<const Element*>(&vector);
#pragma unroll
        for (int i = 0; i < kWidth; i += kMove) {
          Pack<Real, kMove> pack;
#pragma unroll
          for (int j = 0; j < kMove; ++j) pack.x[j] = to_accumulator(elements[i + j]);
          tile.template pack<kMove>(row, col + i) = pack;
        }
      }
    }
  }

  // c += a b^T over all kDim columns.
  template <int kDim, class RowsA, class RowsB>
  CF_DEVICE static void multiply(Scores& c, Operands& smem, const RowsA& a, const RowsB& b) {
    constexpr int kStaged = staged_cols<Real>(kDim);
#pragma unroll 1
    for (int col = 0; col < kDim; col += kStaged) {
      load<kStaged, kDim>(smem.a, a, col);
      load<kStaged, kDim>(smem.b, b, col);
      ptx::sync_threads();
      gemm_abt<kStaged>(c, smem.a, smem.b);
      ptx::sync_threads();
    }
  }

  // c += weights * values, a kRows x kCols matrix from registers times kCols rows of kDim columns.
  template <int kDim, class AnyRows>
  CF_DEVICE static void accumulate(Output<kDim>& c, Weighted& smem, Scores& weights, const AnyRows& values) {
    weights.for_each([&](Real x, int row, int col) { *smem.weights.at(row, col) = x; });
#pragma unroll 1
    for (int row = 0; row < kCols; row += kStagedRows) {
      load<round_up(kDim, Grid::kAcross), kDim>(smem.values, values.from(row), 0);
      ptx::sync_threads();
      gemm_ab(c, smem.weights, row, smem.values);
      ptx::sync_threads();
    }
  }

  // Writes c * scale_of(m) for every row number m of this thread.
  template <int kDim, class Value, template <class> class AnyRows, class F>
  CF_DEVICE static void store(const AnyRows<Value>& rows, Output<kDim>& c, F&& scale_of) {
#pragma unroll
    for (int m = 0; m < Output<kDim>::kM; ++m) {
      const int row = c.row_of(m);
      if (row >= rows.count) return;
      const Real scale = scale_of(m);
#pragma unroll
      for (int n = 0; n < Output<kDim>::kN; ++n) {
        const int col = c.col_of(n);
        if (col < kDim) rows.data[rows.offset(row) + col] = from_accumulator<Value>(c.x[m][n] * scale);
      }
    }
  }
};

}  // namespace cuflash
