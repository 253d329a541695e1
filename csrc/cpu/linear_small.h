// x @ weight^T for few rows, with bias and residual, in fp32.
#pragma once

#include "cpu/isa.h"

namespace rlhf_fast {

// out[n, m] = sum_k x[n, k] * weight[m, k] (+ bias[m]) (+ residual[n, m]). Elements of a row are
// adjacent in all four. out may be residual, not x.
struct LinearSmallArgs {
  int64_t rows = 0;     // N
  int64_t of_rows = 0;  // rows of the call that this one is a part of: they say how sums are ordered
  int64_t inner = 0;    // K
  int64_t columns = 0;  // M
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* weight = nullptr;
  int64_t weight_stride = 0;
  const float* bias = nullptr;      // null: none
  const float* residual = nullptr;  // null: none
  int64_t residual_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  int threads = 1;
};

RLHF_FAST_CPU_OP(linear_small, LinearSmallArgs)

}  // namespace rlhf_fast
