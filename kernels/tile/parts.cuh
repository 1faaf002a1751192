// Parts of rows, each as if its keys were all there are: out divided by its own sum, and a RowState to merge by.
#pragma once

#include "attention/softmax.cuh"

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

// l = sum_i exp(m_i - m) l_i, and out = sum_i exp(m_i - m) l_i out_i, in the order of parts, yet to be divided by l. A
// part whose l is 0 saw no key, and its out, which may be anything, does not count.
template <class Real, int kCols, class Parts>
CF_DEVICE RowState<Real> merge_parts(Columns<Real, kCols>& out, const Parts& parts, int count, Real log2_unit) {
  RowState<Real> whole;
  whole.init();
#pragma unroll 4
  for (int part = 0; part < count; ++part) whole.m = max_of(whole.m, parts.state(part).m);
#pragma unroll
  for (Real& x : out.x) x = Real(0);
#pragma unroll 4
  for (int part = 0; part < count; ++part) {
    const RowState<Real> state = parts.state(part);
    const Columns<Real, kCols> found = parts.out(part);
    const Real l = state.l * whole.weight(state.m, log2_unit);
    whole.l += l;
#pragma unroll
    for (int i = 0; i < kCols; ++i) out.x[i] = state.l == Real(0) ? out.x[i] : fma(l, found.x[i], out.x[i]);
  }
  return whole;
}

}  // namespace cuflash
