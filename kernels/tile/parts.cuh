// Parts of rows, each as if its keys were all there are: out divided by its own sum, and a RowState to merge by.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/cluster.cuh"

namespace cuflash {

template <class Real, int kCols>
struct alignas(kCols * sizeof(Real)) Columns {
  Real x[kCols];
};

// The parts of some columns of one row, `state_step` and `out_step` apart.
template <class Real, int kCols>
struct Parts {
  const RowState<Real>* states;
  const Real* outs;
  int64 state_step;
  int64 out_step;

  CF_DEVICE RowState<Real> state(int part) const { return states[part * state_step]; }
  CF_DEVICE Columns<Real, kCols> out(int part) const {
    return *reinterpret_cast<const Columns<Real, kCols>*>(outs + part * out_step);
  }
};

// The same where they lie in the shared memory of the blocks of a cluster, each where this block has its own.
template <int kCols>
struct ClusterParts {
  const RowState<float>* own_state;
  const float* own_out;

  CF_DEVICE RowState<float> state(int part) const { return *ptx::in_block(own_state, part); }
  CF_DEVICE Columns<float, kCols> out(int part) const {
    return *reinterpret_cast<const Columns<float, kCols>*>(ptx::in_block(own_out, part));
  }
};

// l = sum_i exp(m_i - m) l_i, and out = sum_i exp(m_i - m) l_i out_i, in the order of parts, yet to be divided by l. A
// part whose l is 0 saw no key, and its out, which may be anything, does not count. kAtOnce parts are read together, as
// each read takes long to come back.
template <int kAtOnce, class Real, int kCols, class Parts>
CF_DEVICE RowState<Real> merge_parts(Columns<Real, kCols>& out, const Parts& parts, int count, Real log2_unit) {
  RowState<Real> whole;
  whole.init();
#pragma unroll
  for (Real& x : out.x) x = Real(0);
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    RowState<Real> states[kAtOnce];
    Columns<Real, kCols> found[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      states[i].init();
      if (first + i < count) {
        states[i] = parts.state(first + i);
        found[i] = parts.out(first + i);
      }
    }
    Real largest = states[0].m;
#pragma unroll
    for (int i = 1; i < kAtOnce; ++i) largest = max_of(largest, states[i].m);
    const Real rescale = whole.update(largest, log2_unit);
#pragma unroll
    for (Real& x : out.x) x *= rescale;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Real l = states[i].l * whole.weight(states[i].m, log2_unit);
      whole.l += l;
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        out.x[c] = states[i].l == Real(0) ? out.x[c] : fma(l, found[i].x[c], out.x[c]);
      }
    }
  }
  return whole;
}

}  // namespace cuflash
