// BiasGradient: where a kernel that makes dS leaves it as the gradient of the bias.
#pragma once

#include "params.cuh"
#include "ptx/keep.cuh"
#include "ptx/memory.cuh"

namespace cuflash {

// Nowhere: not wanted, or summed over what the bias is broadcast along by backward/bias.cuh.
struct NoBiasGradient {
  template <class Sequence>
  CF_DEVICE NoBiasGradient(const BwdParams&, const Sequence&, int /*head*/) {}
  template <class Real>
  CF_DEVICE void store(int /*q*/, int /*kv*/, Real /*ds*/) const {}

  struct Walk {
    CF_DEVICE void store(int /*keys*/, float /*ds*/) const {}
    CF_DEVICE void go_down(int /*rows*/) {}
  };
  CF_DEVICE Walk walk(int /*q*/, int /*kv*/) const { return {}; }
};

struct Stored {
  template <class Real>
  CF_DEVICE static void leave(Real* element, Real ds) {
    *element = ds;
  }
};
struct Added {
  template <class Real>
  CF_DEVICE static void leave(Real* element, Real ds) {
    ptx::add_to(element, ds);
  }
};

// In its element, stored where it belongs to this pair of this head alone, else added to the zero in it. Two pairs may
// share an element so: 0 + a + b is the same number whichever comes first, and of three it would not be.
template <class Way, class Real>
struct BiasGradientInPlace {
  int len_q, len_kv;
  Real* dbias;  // (len_q, len_kv), of this batch element and head
  int64 row;

  template <class Sequence>
  CF_DEVICE BiasGradientInPlace(const BwdParams& p, const Sequence& sequence, int head)
      : len_q(sequence.len_q), len_kv(sequence.len_kv),
        dbias(static_cast<Real*>(p.dbias) + sequence.batch * p.dbias_batch + head * p.dbias_head), row(p.dbias_row) {}

  CF_DEVICE void store(int q, int kv, Real ds) const {
    if (q < len_q && kv < len_kv) Way::leave(dbias + q * row + kv, ds);
  }

  // The same from row to row: one address that moves takes fewer registers than as many as there are elements.
  struct Walk {
    int rows, keys;  // that are left
    Real* at;
    int64 row;

    CF_DEVICE void store(int key, Real ds) const {
      if (rows > 0 && key < keys) Way::leave(at + key, ds);
    }
    CF_DEVICE void go_down(int by) {
      rows -= by;
      at = ptx::keep(at + by * row);
    }
  };
  CF_DEVICE Walk walk(int q, int kv) const { return {len_q - q, len_kv - kv, dbias + q * row + kv, row}; }
};
template <class Real>
using StoredBiasGradient = BiasGradientInPlace<Stored, Real>;
template <class Real>
using AddedBiasGradient = BiasGradientInPlace<Added, Real>;

// How a sum for the gradient of a broadcast bias is laid out: in dbias itself, or, where several blocks share an
// element, in one of several parts, of which each has as many rows and columns as there are queries and keys; dbias may
// have more.
struct BiasSums {
  int columns, rows, heads, batches;
  int64 batch, head, row;  // strides in elements
  int64 part;              // elements of one

  CF_DEVICE explicit BiasSums(const BwdParams& p)
      : columns(p.attention.bias_column ? p.attention.len_kv : 1), rows(p.attention.bias_row ? p.attention.len_q : 1),
        heads(p.attention.bias_head ? p.attention.heads_q : 1), batches(p.attention.bias_batch ? p.attention.batch : 1),
        batch(p.dbias_batch), head(p.dbias_head), row(p.dbias_row), part(int64(columns) * rows * heads * batches) {
    if (p.bias_parts == 1) return;
    row = columns;
    head = row * rows;
    batch = head * heads;
  }

  template <class Real>
  CF_DEVICE Real* of_part(const BwdParams& p, int number) const {
    return p.bias_parts == 1 ? static_cast<Real*>(p.dbias) : static_cast<Real*>(p.dbias_parts) + number * part;
  }
};

}  // namespace cuflash
