// Written by cuflash.jit.render for bwd_sm80. Do not edit.
#pragma once

#include "std.cuh"

namespace cuflash {

struct Captured {
  void* captured0;
  void* dcaptured0;
  int captured0_size[2];
  void* captured1;
  int64 captured1_stride[1];
  int captured1_size[1];
  int64 padding[2];
};

}  // namespace cuflash
